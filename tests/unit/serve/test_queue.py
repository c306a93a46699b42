"""The bounded queue between the two threads."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.serve.tools import request, until

from corun.clock import now_ns
from corun.errors import InputError
from corun.serve import policies
from corun.serve.batcher import Batcher
from corun.serve.policies import Fifo, make_policy, policy_names, register
from corun.serve.queue import BATCHED, PICKED, Request, RequestQueue


def queue(limit: int = 100, max_batch: int = 1, max_delay_ns: int = 0) -> RequestQueue:
    return RequestQueue(Fifo(), Batcher(max_batch, max_delay_ns), limit)


def taken(source: RequestQueue) -> list[Request]:
    batch = source.take()
    assert isinstance(batch, list)
    return batch


@given(st.integers(1, 20), st.lists(st.integers(1, 8), max_size=10))
@settings(max_examples=60)
def test_what_does_not_fit_is_handed_back(limit: int, groups: list[int]) -> None:
    """The queue never holds more than its limit; accepted and rejected together are what was offered."""
    source = queue(limit)
    accepted: list[Request] = []
    for size in groups:
        offered = [request() for _ in range(size)]
        rejected = list(source.offer(offered))
        assert len(source) <= limit
        assert offered[len(offered) - len(rejected) :] == rejected
        assert all(item.queue_len == limit for item in rejected)
        accepted += offered[: len(offered) - len(rejected)]
    assert [item.queue_len for item in accepted] == list(range(len(accepted)))
    assert [taken(source)[0] for _ in accepted] == accepted
    source.dispose()


def test_taking_stamps_and_counts() -> None:
    """picked <= batched are stamped; what was taken is in flight until done."""
    source = queue()
    source.offer([request(), request()])
    first = taken(source)[0]
    assert 0 < first.stamps[PICKED] <= first.stamps[BATCHED]
    assert source.in_flight == 1
    assert not source.idle
    source.done()
    taken(source)
    source.done()
    assert source.idle
    source.dispose()


def test_a_sleeping_worker_is_woken_by_an_offer_a_task_and_the_end() -> None:
    """Whatever it sleeps through, nothing is lost and nothing wakes it twice."""
    source, got = queue(), []

    def work() -> None:
        while (item := source.take()) is not None:
            got.append(item)
            source.done()

    thread = threading.Thread(target=work)
    thread.start()
    items = [request(id=index) for index in range(20)]
    for item in items:
        until(lambda: source.idle)
        source.offer([item])
    until(lambda: len(got) == 20)

    def task() -> None:
        pass

    source.post(task)
    until(lambda: len(got) == 21)
    source.close()
    thread.join(60)
    assert not thread.is_alive()
    assert got == [*([item] for item in items), task]
    source.dispose()


def test_tasks_go_before_requests() -> None:
    """A task posted behind waiting requests is taken next."""
    source = queue()
    source.offer([request()])

    def task() -> None:
        pass

    source.post(task)
    assert source.take() is task
    taken(source)
    source.dispose()


def test_a_batch_waits_for_its_delay_and_is_filled_meanwhile() -> None:
    """Requests that arrive while a batch is held join it; the batch closes when it is full."""
    source = queue(max_batch=3, max_delay_ns=60 * 10**9)
    got: list[list[Request]] = []
    thread = threading.Thread(target=lambda: got.append(taken(source)))
    thread.start()
    items = [request(id=index) for index in range(3)]
    for item in items:
        source.offer([item])
        time.sleep(0.01)
    thread.join(60)
    assert got == [items]
    source.dispose()


def test_a_batch_that_stays_small_goes_when_its_delay_is_over() -> None:
    """The last request of a burst is not held for ever, and not before its time."""
    source = queue(max_batch=8, max_delay_ns=20 * 10**6)
    item = request()
    source.offer([item])
    assert taken(source) == [item]
    assert item.stamps[BATCHED] - item.t_done >= 20 * 10**6
    source.dispose()


def test_wake_ups_while_a_delay_runs_out_are_not_lost() -> None:
    """Offers that race with the end of the delay: every request is taken exactly once."""
    source = queue(max_batch=4, max_delay_ns=200_000)
    got: list[Request] = []

    def work() -> None:
        while (batch := source.take()) is not None:
            assert isinstance(batch, list)
            got.extend(batch)
            source.done()

    thread = threading.Thread(target=work)
    thread.start()
    items = [request(id=index) for index in range(300)]
    for index, item in enumerate(items):
        source.offer([item])
        if index % 3 == 0:
            time.sleep(0.0002)
    until(lambda: len(got) == len(items))
    source.close()
    thread.join(60)
    assert got == items
    source.dispose()


def test_clear_empties_the_queue() -> None:
    """What is cleared comes back in order and is not taken any more."""
    source = queue()
    items = [request(id=index) for index in range(5)]
    source.offer(items)
    assert source.clear() == items
    assert source.idle
    source.close()
    assert source.take() is None
    source.dispose()


def test_policies_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """fifo is there, a policy can be registered, an unknown name is bad input with a suggestion."""
    monkeypatch.setattr(policies, "_POLICIES", dict(policies._POLICIES))
    assert "fifo" in policy_names()
    register("another", Fifo)
    assert "another" in policy_names()
    assert isinstance(make_policy("another"), Fifo)
    with pytest.raises(InputError, match=r'did you mean "fifo"'):
        make_policy("fifi")


@given(st.lists(st.integers(), max_size=30))
@settings(max_examples=40)
def test_fifo_gives_back_what_it_got_in_order(items: list[int]) -> None:
    """First come, first served, each item once, and an empty policy has nothing to give."""
    policy: Fifo[int] = Fifo()
    for item in items:
        policy.push(item)
    assert len(policy) == len(items)
    assert [policy.pop(0) for _ in items] == items
    with pytest.raises(IndexError):
        policy.pop(0)


@settings(max_examples=40, deadline=None)
@given(
    policy=st.sampled_from(["fifo", "sjf", "edf", "hrrn"]),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    place=st.integers(0, 11),
)
def test_a_request_taken_back_leaves_the_others_in_their_order(policy: str, sizes: list[int], place: int) -> None:
    """Only the named request is removed; what remains comes out as it would have without it."""
    now = now_ns()
    requests = [request(b"x" * size, id, t_done=now - 1000 + id) for id, size in enumerate(sizes)]
    connection = requests[0].connection
    for one in requests:
        one.connection = connection
    place %= len(requests)
    changed, plain = (RequestQueue(make_policy(policy), Batcher(), 100) for _ in range(2))
    changed.offer(requests)
    plain.offer([one for one in requests if one.header.id != place])
    assert changed.cancel(connection, 0, place) == [requests[place]]
    assert changed.cancel(connection, 0, place) == []
    orders = [[one.header.id for one in queue.clear()] for queue in (changed, plain)]
    assert orders[0] == orders[1]
    changed.dispose()
    plain.dispose()


def test_what_is_being_answered_is_marked_and_not_removed() -> None:
    """A taken request stays with who answers it; kept ones are in flight until they are released."""
    source = RequestQueue(make_policy("fifo"), Batcher(), 10)
    one = request()
    source.offer([one])
    assert source.take() == [one]
    source.keep([one])
    source.done()
    assert (source.in_flight, source.idle) == (1, False)
    assert source.cancel(one.connection, 0, one.header.id) == []
    assert one.given_up
    source.release(one)
    assert (source.in_flight, source.idle) == (0, True)
    source.dispose()


def test_without_room_only_tasks_are_taken() -> None:
    """A request keeps waiting while the engine is full; a task does not."""
    source, one = RequestQueue(make_policy("fifo"), Batcher(), 10), request()
    source.offer([one])
    source.post(print)
    assert source.take(requests=False) is print
    assert len(source) == 1
    assert source.take() == [one]
    source.dispose()


def test_edf_ranks_by_the_deadlines_requests_bring() -> None:
    """The later arrival with the nearer deadline is served first."""
    far, near = request(t_done=1), request(t_done=2)
    far.deadline_ns, near.deadline_ns = 900, 300
    source = RequestQueue(make_policy("edf"), Batcher(), 10)
    source.offer([far, near])
    assert source.take() == [near]
    source.dispose()
