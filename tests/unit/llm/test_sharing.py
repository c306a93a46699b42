"""Serving and training on one base: neither changes a bit of the other, and the base is held once."""

from __future__ import annotations

import os
import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from corun.clock import NS_PER_S, now_ns
from corun.errors import InputError, RunFault
from corun.llm import adapters
from corun.llm.base import base_bytes, glm, share, tree
from corun.llm.engine import StaticEngine
from corun.llm.generate import Prompt, generate
from corun.llm.learn import LearnOptions, new_learner
from corun.llm.sharing import MODES, THREAD_LABEL, Job, start_learner
from corun.serve.batcher import Batcher

EXAMPLES = [([3 + i, 40, 50 + i], [10 + i, 11, 120 + i]) for i in range(8)]
JOB = Job(EXAMPLES, LearnOptions(batch_size=2, lr=1e-2))
PROMPTS = [Prompt([3 + (7 * i + 3 * j) % 250 for j in range(4 + i)], 24) for i in range(12)]
STEPS = 12


@pytest.fixture(scope="module")
def stored(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return share(base, tmp_path_factory.mktemp("base"))


class Alone:
    """Tokens without training, losses and adapter without serving."""

    def __init__(self, base: Any) -> None:
        model = adapters.attach(tree(base), "serve", base)
        self.tokens = [generate(model.eval(), [prompt])[0].ids for prompt in PROMPTS]
        self.trained = lru_cache(lambda steps: self._trained(base, steps))

    def _trained(self, base: Any, steps: int) -> tuple[list[float], dict[str, Any]]:
        learner = new_learner(base, EXAMPLES, JOB.options)
        return [learner.step().loss for _ in range(steps)], learner.adapter()


@pytest.fixture(scope="module")
def alone(base: Any) -> Alone:
    return Alone(base)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_tokens_and_losses_are_bit_equal_to_each_side_alone(mode: str, stored: Any, alone: Alone) -> None:
    """While the learner trains, greedy tokens equal those without it, its losses and adapter those without serving;
    the adapter it then publishes gives the server the learner's own tokens."""
    tokens = alone.tokens
    base = stored.open()
    engine = StaticEngine(adapters.attach(tree(base), "serve", base), Batcher(3, 1_000_000))
    engine.start()
    learner = start_learner(stored, base, JOB, mode)
    try:
        give_up_ns = now_ns() + 60 * NS_PER_S
        overlap = False
        while not overlap:  # rounds of training and serving until a token was made within a step
            assert now_ns() < give_up_ns
            learner.train(STEPS)
            tickets = [engine.submit(prompt) for prompt in PROMPTS]
            assert [ticket.result(60).ids for ticket in tickets] == tokens
            steps = learner.wait(60)
            overlap = any(
                step.t_start_ns <= stamp <= step.t_end_ns
                for step in steps
                for ticket in tickets
                for stamp in ticket.result().stamps_ns
            )
        losses, trained = alone.trained(len(steps))
        assert [step.loss for step in steps] == losses
        state = learner.adapter()
        assert all(torch.equal(trained[key], value) for key, value in state.items())
        assert engine.publish(state) == 1
        own = adapters.attach(tree(base), "learner", base)
        adapters.replace(own, "learner", trained)
        after = engine.submit(PROMPTS[0])
        assert after.result(60).ids == generate(own.eval(), [PROMPTS[0]])[0].ids != tokens[0]
        assert (learner.pid == os.getpid()) == (mode == "thread")
        assert learner.label == (THREAD_LABEL if mode == "thread" else "")
    finally:
        learner.stop()
        engine.close()


@pytest.mark.parametrize("mode", ["process", "thread"])
def test_a_job_that_cannot_be_trained_is_an_input_error_here(mode: str, stored: Any, base: Any) -> None:
    """What the learner refuses, in its process or thread, is raised in the caller with its problems."""
    with pytest.raises(InputError, match="example 0 has no label"):
        start_learner(stored, base, Job([([3], []), ([3], [4])]), mode)


def test_unknown_modes_are_refused(stored: Any, base: Any) -> None:
    """A near miss is suggested."""
    with pytest.raises(InputError, match='did you mean "process"'):
        start_learner(stored, base, JOB, "proces")


def test_an_input_error_survives_the_way_between_processes() -> None:
    """Exceptions are sent pickled: what and problems must come back."""
    error = pickle.loads(pickle.dumps(InputError("what", ["a", "b"])))
    assert "what" in str(error)
    assert "b" in str(error)


def test_the_file_may_vanish_once_it_is_open(base: Any, tmp_path: Path) -> None:
    """A mapped base stays readable after its file is removed."""
    stored = share(base, tmp_path)
    opened = stored.open()
    stored.path.unlink()
    assert torch.equal(opened.state["lm_head.weight"], base.state["lm_head.weight"])


def shares_of(pid: int, path: Path) -> int:
    """Proportional bytes (PSS) a process holds of one mapped file (/proc/pid/smaps)."""
    total, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and first == "Pss:":
            total += int(line.split()[1]) * 1024
    return total


def test_the_base_is_held_once_by_both_processes(tmp_path: Path) -> None:
    """After both sides used the base, their proportional shares of its file add up to one base, about half each.

    When the child is then killed the next question is a RunFault, and stopping returns.
    """
    plugin = glm()
    shape = plugin.Shape(layers=3, hidden=256, ffn=4096, heads=8, head_dim=32, vocab=4096, max_length=512)
    whole = plugin.Base(shape, plugin.random_state(shape, 0, torch.float32), "test", plugin.load_tokenizer(None))
    size, stored = base_bytes(whole), share(whole, tmp_path)
    base = stored.open()
    learner = start_learner(stored, base, JOB)
    learner.train(1)
    learner.wait(60)
    generate(tree(base), [Prompt(range(3, 200), 2)])
    assert all(value.sum().isfinite() for value in base.state.values())
    mine, theirs = shares_of(os.getpid(), stored.path), shares_of(learner.pid, stored.path)
    assert 0.8 * size < mine + theirs < 1.1 * size
    assert 0.3 * size < theirs < 0.7 * size
    psutil.Process(learner.pid).kill()
    with pytest.raises(RunFault, match="died"):
        learner.wait(60)
    learner.stop()
