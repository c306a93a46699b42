"""Replicas of one task in virtual time: a runtime made of nothing, jobs that are done when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import RunFault
from corun.tasks.commands import ReplicaFigures, RouterFigures
from corun.tasks.front import Step, steps
from corun.tasks.replicas import Patience, ReplicaSet
from corun.tasks.runtime import ReplicaSpec, Usage
from corun.wire import Address

STEP_S = 0.5
PATIENCE = Patience(start_s=20, probe_s=STEP_S, misses=3)


class Inline(Executor):
    """Does a job when it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - as a pool does
            future.set_exception(error)
        return future


class FakeHandle:
    """A replica whose health the test decides."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec = spec
        self.living = True
        self.well = True
        self.stopped = self.killed = False
        self.limits_in_force: dict[str, str] = {}

    @property
    def address(self) -> Address:
        return self.spec.address

    @property
    def id(self) -> str:
        return f"fake-{self.spec.port}"

    pid = None

    def alive(self) -> bool:
        return self.living

    def healthy(self, timeout_s: float = 2.0) -> bool:
        return self.living and self.well

    def logs(self, tail: int = 50) -> str:
        return ""

    def how_it_ended(self) -> str:
        return "is running" if self.living else "was killed by SIGKILL"

    def stop(self, grace_s: float = 10.0) -> None:
        self.living, self.stopped = False, True

    def kill(self) -> None:
        self.living, self.killed = False, True

    def usage(self) -> Usage:
        return Usage(1.0, 50.0)


class World:
    """A replica set and its time; `routed` are the names a router would have."""

    def __init__(self, well: bool = True) -> None:
        self.now = 0.0
        self.well = well
        self.refuses = False
        self.handles: list[FakeHandle] = []
        self.events: list[tuple[str, str]] = []
        self.routed: set[str] = set()
        self.set = ReplicaSet(
            "t", self, self._specify, Inline(), lambda kind, text: self.events.append((kind, text)), PATIENCE
        )

    name = "fake"

    def start(self, spec: ReplicaSpec) -> FakeHandle:
        if self.refuses:
            raise RunFault("the engine refused")
        handle = FakeHandle(spec)
        handle.well = self.well
        self.handles.append(handle)
        return handle

    def _specify(self, index: int, port: int) -> ReplicaSpec:
        return ReplicaSpec("t", index, self.set.model, None, len(self.handles) + 1, Path("unused"))

    def run(self, seconds: float) -> None:
        """Ticks; the router follows what it is told, and lets drained replicas go."""
        for _ in range(round(seconds / STEP_S)):
            self.now += STEP_S
            self.set.tick(self.now, frozenset(self.routed))
            self.routed = set(self.set.serving())

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    @property
    def living(self) -> list[FakeHandle]:
        return [handle for handle in self.handles if handle.living]


def test_as_many_as_wanted_become_ready() -> None:
    """Each is started once, probed, and served to the router under a name of its own."""
    world = World()
    world.set.resize(3, "m")
    world.run(3)
    assert len(world.set.serving()) == world.set.count == len(world.handles) == 3
    assert [row.state for row in world.set.rows()] == ["ready"] * 3
    assert {handle.spec.index for handle in world.handles} == {0, 1, 2}


def test_a_killed_replica_is_started_again_after_its_back_off() -> None:
    """It leaves the router at once, comes back under another name, and later each time it dies quickly."""
    world = World()
    world.set.resize(1, "m")
    world.run(2)
    (first,) = world.set.serving()
    waits = []
    for _ in range(4):
        world.living[0].living = False
        died = world.now
        world.run(2 * STEP_S)
        assert world.set.serving() == {}
        while not world.set.serving():
            world.run(STEP_S)
        waits.append(world.now - died)
    assert list(world.set.serving()) != [first]
    assert waits == sorted(waits)
    assert waits[-1] > 2 * waits[0]
    assert world.set.restarts == 4
    assert ("end", "replica 0 was killed by SIGKILL; it is started again in 0.5 s") in world.events


def test_a_replica_that_does_not_answer_is_killed_after_three_misses() -> None:
    """One or two missed looks are forgiven; the third ends it, and a new one takes its place."""
    world = World()
    world.set.resize(1, "m")
    world.run(2)
    world.handles[0].well = False
    world.run(2 * STEP_S)
    assert len(world.set.serving()) == 1
    world.handles[0].well = True
    world.run(STEP_S)
    world.handles[0].well = False
    world.run(4 * STEP_S)
    assert world.handles[0].killed
    world.run(5)
    assert len(world.set.serving()) == 1
    assert len(world.living) == 1


def test_one_that_never_becomes_ready_is_given_up_and_tried_again() -> None:
    """After start_s it is killed; a runtime that refuses to start one is asked again too."""
    world = World(well=False)
    world.set.resize(1, "m")
    world.run(PATIENCE.start_s + 2)
    assert world.handles[0].killed
    assert "was not ready within 20 s" in dict(world.events)["end"]
    world.refuses = True
    world.run(40)
    assert "the engine refused" in dict(world.events)["end"]
    world.refuses, world.well = False, True
    world.run(40)
    assert len(world.set.serving()) == 1


def test_scaling_down_drains_before_it_stops() -> None:
    """The surplus replica runs until the router has let it go, and is not counted meanwhile."""
    world = World()
    world.set.resize(2, "m")
    world.run(2)
    keys = dict(world.set.serving())
    world.set.resize(1, "m")
    (leaving,) = world.set.draining()
    assert world.set.count == 1
    for _ in range(5):
        world.now += STEP_S
        world.set.tick(world.now, frozenset(keys))
    assert len(world.living) == 2
    world.set.tick(world.now + STEP_S, frozenset(world.set.serving()))
    world.set.tick(world.now + 2 * STEP_S, frozenset(world.set.serving()))
    assert [handle.stopped for handle in world.handles] == [False, True]
    assert leaving not in world.set.serving()
    assert len(world.set.places) == 1


def test_another_model_replaces_the_old_one_without_a_gap() -> None:
    """Replicas of the new model are ready before those of the old one are drained."""
    world = World()
    world.set.resize(2, "old")
    world.run(2)
    world.set.resize(2, "new")
    least = 9
    for _ in range(20):
        world.run(STEP_S)
        world.set.resize(2, "new")
        least = min(least, len(world.set.serving()))
    assert least >= 2
    assert [row.model for row in world.set.rows()] == ["new", "new"]
    assert len(world.living) == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 6)), max_size=12))
def test_it_always_ends_with_what_is_wanted(history: list[tuple[int, int, int]]) -> None:
    """Whatever is wanted and whoever dies in between, in the end exactly so many live as are wanted, all of them ready."""
    world = World()
    for wanted, deaths, ticks in history:
        world.set.resize(wanted, "m")
        for handle in world.living[:deaths]:
            handle.living = False
        world.run(ticks * STEP_S)
    world.set.resize(2, "m")
    world.run(120)
    assert len(world.set.serving()) == len(world.living) == len(world.set.places) == 2


@pytest.mark.parametrize("kill", [False, True])
def test_stopping_ends_them_all(kill: bool) -> None:
    """Each replica is stopped, or killed when there is no time, those that wait for a start too."""
    world = World()
    world.set.resize(3, "m")
    world.run(2)
    world.handles[0].living = False
    world.run(STEP_S)
    assert all(job.done() for job in world.set.stop(kill))
    assert world.living == []
    assert all((handle.killed if kill else handle.stopped) for handle in world.handles[1:])


def test_cpu_time_of_the_dead_is_not_forgotten() -> None:
    """The task's CPU time is that of everything that ever served it."""
    world = World()
    world.set.resize(2, "m")
    world.run(2)
    before = world.set.cpu_s
    world.handles[0].living = False
    world.run(3)
    world.set.resize(1, "m")
    world.run(3)
    assert world.set.cpu_s >= before + 1


# What a router is told


def figures(**states: str) -> RouterFigures:
    replicas = [ReplicaFigures(name, "127.0.0.1:1", state, True, 0, 0, 0, 0) for name, state in states.items()]
    return RouterFigures(0, 1, "127.0.0.1:1", 0, {}, 0, 0, 0, 0, 0, 0, [], 0, replicas)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["ready", "down", "draining"])),
    st.sets(st.sampled_from("abcdef")),
    st.sets(st.sampled_from("abcdef")),
)
def test_telling_a_router_makes_it_agree(there: dict[str, str], ready: set[str], leaving: set[str]) -> None:
    """After the steps the router has those that serve, those that drain are draining, and nobody else."""
    serving = {name: Address("tcp", "127.0.0.1", 1) for name in ready - leaving}
    table = dict(there)
    for step in steps(serving, frozenset(leaving), figures(**there)):
        match step.do:
            case "add":
                table[step.name] = "ready"
            case "drain":
                table[step.name] = "draining"
            case "remove":
                del table[step.name]
    assert set(table) - leaving == set(serving)
    assert all(table[name] == "draining" for name in leaving if name in table)


def test_a_router_that_agrees_is_told_nothing() -> None:
    """No step without a difference; a new router is told everything."""
    serving = {"a": Address("tcp", "127.0.0.1", 1)}
    assert steps(serving, frozenset("b"), figures(a="ready", b="draining")) == []
    assert steps(serving, frozenset(), figures()) == [Step("add", "a")]
