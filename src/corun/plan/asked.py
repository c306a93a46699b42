"""From what was typed to a question and a machine, with everything that is wrong said at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from corun.errors import suggest
from corun.plan.measured import Profile, fingerprint
from corun.plan.memory import Limits
from corun.plan.planner import Machine
from corun.plan.question import (
    GOALS,
    Goal,
    Problems,
    Question,
    make_candidates,
    parse_batch,
    parse_job,
    parse_slo,
    split_words,
)
from corun.process import available_cores
from corun.profile.footprint import available_mib, gpu_memory
from corun.registry import Model, resolve_data
from corun.run.directory import hardware, versions
from corun.share.host import Host
from corun.share.policy import Cast, Member
from corun.share.spec import parse as parse_policy

DEVICES: Final = ("auto", "cpu", "cuda")
USUAL: Final = ("idle", "none")
USUAL_GPU: Final = ("preempt", "mps", "none")
LADDER: Final = (2.0, 4.0, 8.0)
DRIVER: Final = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class Asked:
    """The flags as typed."""

    services: Sequence[str]
    train: str
    rate: float
    slo: str
    policies: Sequence[str]
    maximize: str
    copies: int = 1
    memory_margin: float = 0.1
    data: Sequence[str] = ()
    max_batch: str = "1"


def resolve_device(name: str) -> str:
    """`auto` as cuda where the driver answers, else cpu."""
    return name if name != "auto" else "cuda" if DRIVER.exists() else "cpu"


def trainer_threads(asked: int | None, threads: int) -> int:
    """As asked, else the cores that one service leaves: the same for every set, so that windows compare."""
    return asked or max(1, available_cores() - threads)


def make_question(asked: Asked, models: Mapping[str, Model], cast: Cast, host: Host) -> Question:
    """The question; InputError lists every problem of the flags, policies this machine refuses included."""
    problems = Problems()
    trainable = [name for name, model in models.items() if model.train]
    job = problems.attempt(parse_job, asked.train, trainable)
    slo = problems.attempt(parse_slo, asked.slo)
    problems.attempt(parse_batch, asked.max_batch)
    names = split_words(asked.services)
    for name in dict.fromkeys(names):
        if name not in models:
            problems.add(f'--services: there is no model "{name}"{suggest(name, models)}')
    if not names:
        problems.add("--services: name at least one model")
    if asked.rate <= 0:
        problems.add(f"--rate must be above 0, got {asked.rate:g}")
    if asked.maximize not in GOALS:
        problems.add(f'--maximize "{asked.maximize}" is none of {", ".join(GOALS)}{suggest(asked.maximize, GOALS)}')
    for data in dict.fromkeys(asked.data):
        problems.attempt(resolve_data, data)
    policies = _policies(split_words(asked.policies), cast, host, problems)
    problems.raise_any("the plan cannot be made")
    assert slo is not None
    goal: Goal = next(one for one in GOALS if one == asked.maximize)
    usual = policies if job else ("none",)
    return Question(job, make_candidates(names, asked.rate, asked.copies), slo, usual, goal, asked.memory_margin)


def make_cast(services: int, threads: int, trainer_threads: int, device: str) -> Cast:
    """Who will share the machine, for asking policies whether they can be had."""
    members = tuple(Member("server", f"service {index}", threads, index) for index in range(services))
    return Cast(members, Member("trainer", "trainer", trainer_threads), frozenset({device}))


def _policies(names: Sequence[str], cast: Cast, host: Host, problems: Problems) -> tuple[str, ...]:
    """The policies asked for, or the usual ones of those that can be had here."""
    if not names:
        usual = USUAL_GPU if cast.on_gpu else USUAL
        return tuple(name for name in usual if not _refusals(name, cast, host))
    for name in names:
        for reason in problems.attempt(_refusals, name, cast, host) or ():
            problems.add(f"--policies {name}: {reason}")
    return tuple(dict.fromkeys(names))


def _refusals(name: str, cast: Cast, host: Host) -> list[str]:
    return [reason for policy in parse_policy(name) for reason in policy.refusals(host, cast)]


def describe_machine() -> dict[str, Any]:
    """What figures of this machine depend on: processor, cores, memory, GPUs, library versions."""
    facts = hardware()
    kept = {name: facts[name] for name in ("cpu", "cores", "cores_available", "memory_kib")}
    return {**kept, "gpus": list(gpu_memory().names), "versions": versions()}


def open_profile(root: Path, setup: Mapping[str, Any], fresh: bool = False) -> Profile:
    """result/profiles/<machine>-<setup>.json: windows of another machine or another set-up are never mixed in."""
    facts = describe_machine()
    name = f"{fingerprint(facts)}-{fingerprint(setup)[:6]}.json"
    return Profile.open(root / "profiles" / name, {**facts, "setup": dict(setup)}, fresh)


def measure_machine(threads: int, device: str) -> Machine:
    """Cores and memory that are there now. threads: the trainer's."""
    free = gpu_memory().free_mib if device.startswith("cuda") else None
    return Machine(available_cores(), threads, Limits(available_mib(), free), LADDER)
