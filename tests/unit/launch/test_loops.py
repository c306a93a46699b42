"""The pure parts of a run of inference loops: names, arms, threads, command lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from corun.launch.loops import Loop, LoopPlan, loop_command, named
from corun.process import available_cores
from corun.run.config import Train
from corun.wire.sockets import Address

MODELS = st.lists(st.sampled_from(["resnet18", "null", "vgg11"]), min_size=1, max_size=8)
CONTROL = Address("unix", "/tmp/control.sock")


@given(MODELS)
def test_loops_have_names_of_their_own(models: list[str]) -> None:
    """Every loop keeps its model and gets a name no other has; a model's first loop is called like it."""
    found = named(models)
    assert [model for model, _ in found] == models
    assert len({name for _, name in found}) == len(models)
    assert {name for _, name in found} >= set(models)


def test_the_arm_says_what_runs() -> None:
    """Loops alone are arm alone, loops beside a trainer corun."""
    loops = (Loop("null", "null"),)
    assert LoopPlan(loops, 1.0).arm == "alone"
    assert LoopPlan(loops, 1.0, Train(arch="resnet18")).arm == "corun"
    assert LoopPlan(loops, 1.0).train_label == "none"
    assert LoopPlan(loops, 1.0, Train(arch="resnet18", batch_size=4)).train_label == "resnet18_4"


def test_the_trainer_gets_the_cores_the_loops_leave() -> None:
    """As configured, else the cores left over, at least one."""
    loops = tuple(Loop("null", f"n{i}") for i in range(available_cores()))
    assert LoopPlan(loops, 1.0, Train(arch="resnet18")).train_threads == 1
    assert LoopPlan((), 1.0, Train(arch="resnet18")).train_threads == available_cores()
    assert LoopPlan(loops, 1.0, Train(arch="resnet18", threads=3)).train_threads == 3


def test_the_command_line_says_everything_and_nothing_that_is_not_set() -> None:
    """Every set option is a flag of `python -m corun.serve.loop`; None leaves it out."""
    loop = Loop("resnet18", "r", batch_size=4, threads=2)
    argv, environment = loop_command(loop, LoopPlan((loop,), 1.0, seed=7), Path("/run"), CONTROL)
    assert argv[1:3] == ["-m", "corun.serve.loop"]
    assert "--weights" not in argv
    pairs = dict(zip(argv[3::2], argv[4::2], strict=True))
    assert pairs["--batch-size"] == "4"
    assert pairs["--seed"] == "7"
    assert pairs["--control"] == "unix:/tmp/control.sock"
    assert environment["OMP_NUM_THREADS"] == "2"


def test_the_digest_follows_what_is_measured() -> None:
    """The same plan has the same digest; another batch size, model or duration another one."""
    loop = Loop("resnet18", "r")
    plan = LoopPlan((loop,), 1.0)
    assert plan.digest() == LoopPlan((Loop("resnet18", "r"),), 1.0).digest()
    others = [LoopPlan((replace(loop, batch_size=2),), 1.0), LoopPlan((loop,), 2.0), LoopPlan((loop, loop), 1.0)]
    assert len({plan.digest(), *(other.digest() for other in others)}) == 4
