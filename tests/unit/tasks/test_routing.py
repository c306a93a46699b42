"""The routing table against random histories: nothing is lost, answered twice, or sent where it may not go."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.tasks.routing import MAX_ATTEMPTS, TURNED_AWAY, Limits, Pending, Replica, Routing, State
from corun.wire import Kind, RequestHeader, Status

OK = int(Status.OK)
LIMITS = Limits(requests=12, payload_bytes=4000, window=3, answer_ns=50, hold_ns=20)


class World:
    """A table with replicas made of nothing: `ends` counts how often each request came to an end."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.now = 1000
        self.ends: Counter[int] = Counter()
        self.status: dict[int, int] = {}
        self.sends: Counter[int] = Counter()
        self.where: dict[int, list[str]] = {}
        self.table: Routing[str, None] = Routing(limits, self._send, self._refuse)
        self.submitted = 0

    def _send(self, replica: Replica[str, None], id: int, request: Pending[str]) -> None:
        assert replica.state is State.READY
        assert replica.outstanding[id] is request
        assert len(replica.outstanding) <= self.table.limits.window
        least = (
            min(
                len(one.outstanding)
                for one in self.table.replicas.values()
                if one.state is State.READY and one != replica
            )
            if sum(one.state is State.READY for one in self.table.replicas.values()) > 1
            else 99
        )
        assert len(replica.outstanding) - 1 <= least
        self.sends[request.header.id] += 1
        self.where.setdefault(request.header.id, []).append(replica.name)

    def _refuse(self, request: Pending[str], status: Status, reason: str) -> None:
        assert reason
        self.ends[request.header.id] += 1
        self.status[request.header.id] = int(status)

    def submit(self, size: int = 10) -> int:
        number, self.submitted = self.submitted, self.submitted + 1
        header = RequestHeader(Kind.INFER, 0, 0, number, size, 0, 0, 0)
        self.table.submit(Pending("client", header, bytes(size), self.now), self.now)
        return number

    def up(self, name: str) -> None:
        if name not in self.table.replicas:
            self.table.add(name, None)
        self.table.ready(self.table.replicas[name], self.now)

    def answer(self, name: str, status: int = OK, place: int = 0) -> None:
        replica = self.table.replicas[name]
        ids = list(replica.outstanding)
        if ids:
            request = self.table.complete(replica, ids[place % len(ids)], status, self.now)
            if request is not None:
                self.ends[request.header.id] += 1
                self.status[request.header.id] = status

    def check(self) -> None:
        table = self.table
        held = [*table.waiting, *(one for replica in table.replicas.values() for one in replica.outstanding.values())]
        assert table.received == self.submitted == sum(table.answered.values()) + table.open
        assert table.open == len(held) <= table.limits.requests
        assert table.payload_bytes == sum(len(request.payload) for request in held)
        assert not self.ends or max(self.ends.values()) == 1
        assert not self.sends or max(self.sends.values()) <= MAX_ATTEMPTS
        assert not set(self.ends) & {request.header.id for request in held}


names = st.sampled_from("abc")
steps = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from((0, 10, 900))),
    st.tuples(st.just("up"), names),
    st.tuples(
        st.just("answer"), names, st.sampled_from((OK, OK, int(Status.REJECTED), *TURNED_AWAY)), st.integers(0, 5)
    ),
    st.tuples(st.just("fail"), names),
    st.tuples(st.just("drain"), names),
    st.tuples(st.just("remove"), names),
    st.tuples(st.just("wait"), st.integers(1, 30)),
)


def play(world: World, step: tuple[object, ...]) -> None:
    """One step of a history; what names a replica that is not there is left out."""
    table = world.table
    match step:
        case ("submit", int(size)):
            world.submit(size)
        case ("wait", int(ns)):
            world.now += ns
            table.expire(world.now)
        case ("up", str(name)):
            world.up(name)
        case (_, str(name), *_) if name not in table.replicas:
            pass
        case ("answer", str(name), int(status), int(place)):
            world.answer(name, status, place)
        case ("fail", str(name)):
            table.fail(table.replicas[name], world.now)
        case ("drain", str(name)):
            table.drain(name)
        case ("remove", str(name)):
            table.remove(name, world.now)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=60))
def test_every_request_ends_exactly_once(history: list[tuple[object, ...]]) -> None:
    """Whatever replicas do, each request is answered or refused once, sent twice at most, and always accounted for."""
    world = World()
    for step in history:
        play(world, step)
        world.check()
    world.table.cancel(world.now)
    world.check()
    assert world.table.open == 0
    assert world.ends == Counter(range(world.submitted))


def test_requests_go_to_the_replica_with_the_fewest_outstanding() -> None:
    """Of three idle replicas each gets every third request; one that answers faster gets more."""
    world = World(Limits(requests=100, window=50))
    for name in "abc":
        world.up(name)
    for _ in range(9):
        world.submit()
    assert [len(replica.outstanding) for replica in world.table.replicas.values()] == [3, 3, 3]
    for _ in range(3):
        world.answer("b")
    for _ in range(3):
        world.submit()
    assert [len(replica.outstanding) for replica in world.table.replicas.values()] == [3, 3, 3]
    assert world.where[9] == world.where[10] == world.where[11] == ["b"]


def test_a_new_replica_is_not_flooded() -> None:
    """With one request at a time, a replica that joins late gets every second one and not all until it caught up."""
    world = World()
    world.up("a")
    for _ in range(10):
        world.submit()
        world.answer("a")
    world.up("b")
    for _ in range(6):
        number = world.submit()
        world.answer(world.where[number][0])
    assert Counter(world.where[number][0] for number in range(10, 16)) == {"a": 3, "b": 3}


def test_what_a_dead_replica_had_goes_to_another_one_in_order() -> None:
    """Its requests are sent again, oldest first, and end there."""
    world = World()
    world.up("a")
    first = [world.submit() for _ in range(3)]
    world.up("b")
    world.table.fail(world.table.replicas["a"], world.now)
    assert [request.header.id for request in world.table.replicas["b"].outstanding.values()] == first
    assert world.table.retried == 3
    for _ in first:
        world.answer("b")
    assert world.ends == Counter(first)
    assert set(world.status.values()) == {OK}


def test_a_request_that_kills_two_replicas_is_refused() -> None:
    """The second death ends it with FAILED, so that it does not go round."""
    world = World()
    world.up("a")
    number = world.submit()
    world.up("b")
    world.table.fail(world.table.replicas["a"], world.now)
    world.up("a")
    world.table.fail(world.table.replicas["b"], world.now)
    assert world.status == {number: int(Status.FAILED)}


@pytest.mark.parametrize("status", sorted(TURNED_AWAY))
def test_a_request_that_was_turned_away_goes_elsewhere(status: int) -> None:
    """NOT_LOADED, DRAINING and CANCELLED mean that the replica did not do it and is not to be asked again."""
    world = World()
    world.up("a")
    number = world.submit()
    world.up("b")
    world.answer("a", status)
    assert world.where[number] == ["a", "b"]
    assert world.table.replicas["a"].state is State.DOWN
    world.answer("b")
    assert world.status == {number: OK}


def test_a_drained_replica_finishes_what_it_has_and_gets_nothing_new() -> None:
    """Draining keeps the outstanding request there and sends the next one to the other."""
    world = World()
    world.up("a")
    first = world.submit()
    world.up("b")
    world.table.drain("a")
    second = world.submit()
    assert (world.where[first], world.where[second]) == (["a"], ["b"])
    world.answer("a")
    assert world.status == {first: OK}


def test_what_does_not_fit_is_rejected() -> None:
    """Over the limit of requests or of payload bytes the answer is REJECTED, at once."""
    world = World()
    for _ in range(LIMITS.requests):
        world.submit()
    assert world.status == {}
    over = world.submit()
    assert world.status == {over: int(Status.REJECTED)}
    world = World()
    assert [world.submit(1500) for _ in range(3)] == [0, 1, 2]
    assert world.status == {2: int(Status.REJECTED)}


def test_without_a_replica_requests_are_held_for_a_while() -> None:
    """A replica that comes within hold_ns gets them; else they end NOT_LOADED. A silent replica's end EXPIRED."""
    world = World()
    held = world.submit()
    world.now += LIMITS.hold_ns - 1
    world.table.expire(world.now)
    world.up("a")
    assert world.where[held] == ["a"]
    world.now += LIMITS.answer_ns
    world.table.expire(world.now)
    assert world.status == {held: int(Status.EXPIRED)}
    world.table.remove("a", world.now)
    late = world.submit()
    world.now += LIMITS.hold_ns
    world.table.expire(world.now)
    assert world.status[late] == Status.NOT_LOADED


def test_busy_time_is_the_time_with_something_outstanding() -> None:
    """Overlapping requests count once; gaps do not count."""
    world = World()
    world.up("a")
    replica = world.table.replicas["a"]
    world.submit()
    world.now += 5
    world.submit()
    world.now += 5
    world.answer("a")
    world.now += 5
    world.answer("a")
    world.now += 100
    assert replica.busy_until(world.now) == 15
    world.submit()
    world.now += 4
    assert replica.busy_until(world.now) == 19
