"""The dynamic batching rule, driven in virtual time."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError
from corun.serve.batcher import NEVER, Batcher

ARRIVALS = st.lists(st.integers(0, 2_000), min_size=1, max_size=60).map(sorted)


def simulate(batcher: Batcher, arrivals: list[int], service_ns: int) -> list[tuple[int, list[int]]]:
    """One worker in virtual time: (closed at, indices of the batch) for every batch."""
    coming = deque(enumerate(arrivals))
    waiting: deque[int] = deque()
    held: list[int] = []
    batches: list[tuple[int, list[int]]] = []
    now = 0
    while coming or waiting or held:
        while coming and coming[0][1] <= now:
            waiting.append(coming.popleft()[0])
        oldest = min((arrivals[index] for index in held), default=0)
        take, close, wait_until = batcher.decide(len(held), len(waiting), oldest, now)
        assert 0 <= take <= len(waiting)
        held += [waiting.popleft() for _ in range(take)]
        if close:
            batches.append((now, held))
            now, held = now + service_ns, []
        elif not take:
            upcoming = [coming[0][1]] if coming else []
            now = min(upcoming + [wait_until] * (wait_until != NEVER))
    return batches


@given(ARRIVALS, st.integers(1, 8), st.integers(0, 500), st.integers(0, 400))
@settings(max_examples=200)
def test_every_request_is_batched_once_in_order_within_the_limits(
    arrivals: list[int], max_batch: int, max_delay_ns: int, service_ns: int
) -> None:
    """No batch over max_batch, arrival order kept, every request exactly once."""
    batches = simulate(Batcher(max_batch, max_delay_ns), arrivals, service_ns)
    assert [index for _, batch in batches for index in batch] == list(range(len(arrivals)))
    assert all(1 <= len(batch) <= max_batch for _, batch in batches)


@given(ARRIVALS, st.integers(2, 8), st.integers(0, 500), st.integers(0, 400))
@settings(max_examples=200)
def test_a_free_worker_never_holds_a_request_longer_than_the_delay(
    arrivals: list[int], max_batch: int, max_delay_ns: int, service_ns: int
) -> None:
    """A batch closes at the latest max_delay after its oldest arrival, or as soon as the worker is free."""
    free_at = 0
    for closed_at, batch in simulate(Batcher(max_batch, max_delay_ns), arrivals, service_ns):
        oldest = min(arrivals[index] for index in batch)
        assert closed_at <= max(oldest + max_delay_ns, free_at, oldest)
        free_at = closed_at + service_ns


@given(ARRIVALS, st.integers(0, 400))
@settings(max_examples=60)
def test_off_by_default(arrivals: list[int], service_ns: int) -> None:
    """With max_batch 1 each request goes alone, the moment the worker is free."""
    free_at = 0
    for closed_at, batch in simulate(Batcher(), arrivals, service_ns):
        assert len(batch) == 1
        assert closed_at == max(arrivals[batch[0]], free_at)
        free_at = closed_at + service_ns


def test_a_full_batch_does_not_wait() -> None:
    """max_batch waiting requests go at once, whatever the delay."""
    assert Batcher(4, 10**9).decide(0, 9, 0, 5) == (4, True, NEVER)
    assert Batcher(4, 10**9).decide(3, 1, 0, 5) == (1, True, NEVER)


def test_without_delay_a_batch_is_what_waits() -> None:
    """max_delay 0 groups what queued up while the worker was busy, and waits for nobody."""
    assert Batcher(8, 0).decide(0, 3, 0, 5) == (3, True, NEVER)
    assert Batcher(8, 0).decide(0, 0, 0, 5) == (0, False, NEVER)


def test_limits_that_make_no_sense_are_bad_input() -> None:
    """Both problems are named."""
    with pytest.raises(InputError, match=r"(?s)max_batch is 0.*max_delay_ns is -1"):
        Batcher(0, -1)
