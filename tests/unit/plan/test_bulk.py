"""The queue served in batches: the server's own batcher in virtual time, Lindley's queue, and what holds of any."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.plan.bulk import serve
from corun.plan.tail import REQUESTS, busy_ms, sojourn_percentile
from corun.serve.batcher import NEVER, Batcher
from corun.serve.policies import Fifo
from corun.stats.queues import sojourn_times

gaps = st.lists(st.integers(0, 60), min_size=1, max_size=60)
times = st.lists(st.integers(0, 80), min_size=1, max_size=6)
delays = st.sampled_from([0, 0, 1, 7, 25, 90])


def _by_the_batcher(arrivals: list[int], times: list[int], max_delay: int) -> tuple[list[int], list[int]]:
    """(sojourns, sizes) with the server's own Batcher and Fifo, event after event."""
    batcher, queue = Batcher(len(times), max_delay), Fifo[int]()
    coming = deque(enumerate(arrivals))
    ends, sizes, now = dict[int, int](), list[int](), 0
    while coming or queue:
        held: list[int] = []
        while True:
            while coming and coming[0][1] <= now:
                queue.push(coming.popleft()[0])
            oldest = min((arrivals[one] for one in held), default=0)
            take, close, wait_until = batcher.decide(len(held), len(queue), oldest, now)
            held += [queue.pop(now) for _ in range(take)]
            if close:
                break
            if take:
                continue
            instants = ([wait_until] if wait_until != NEVER else []) + [at for _, at in list(coming)[:1]]
            now = max(now, min(instants))
        now += times[len(held) - 1]
        ends.update(dict.fromkeys(held, now))
        sizes.append(len(held))
    return [ends[one] - at for one, at in enumerate(arrivals)], sizes


@given(gaps, times, delays)
@settings(max_examples=150)
def test_it_is_the_servers_own_batching_rule(gaps: list[int], times: list[int], max_delay: int) -> None:
    """The same batches and the same sojourns as corun.serve's Batcher and Fifo driven through virtual time."""
    arrivals = np.cumsum(gaps).tolist()
    expected, sizes = _by_the_batcher(arrivals, times, max_delay)
    found = serve(arrivals, times, 1.0, max_delay)
    assert found.sizes == tuple(sizes)
    assert found.sojourns.tolist() == expected
    assert found.busy == sum(times[size - 1] for size in sizes)


@given(gaps, st.floats(0.1, 50), st.lists(st.floats(0.2, 3), min_size=60, max_size=60))
@settings(max_examples=40)
def test_batches_of_one_are_lindleys_queue(gaps: list[int], ms: float, factors: list[float]) -> None:
    """B = 1 is the FIFO queue of corun.stats.queues, whatever the delay."""
    arrivals, factors = np.cumsum(gaps), factors[: len(gaps)]
    expected = sojourn_times(arrivals, ms * np.array(factors))
    assert serve(arrivals, [ms], factors, 17.0).sojourns == pytest.approx(expected)


@given(gaps, times, delays)
@settings(max_examples=60)
def test_nobody_is_lost_or_overtaken_and_nobody_is_held_too_long(
    gaps: list[int], times: list[int], max_delay: int
) -> None:
    """Every request is in one batch of at most B, in order; with a server that was free it waits at most the delay."""
    arrivals = np.cumsum(gaps)
    found = serve(arrivals, times, 1.0, max_delay)
    assert sum(found.sizes) == arrivals.size
    assert max(found.sizes) <= len(times)
    assert (np.diff(arrivals + found.sojourns) >= 0).all()
    longest = max_delay + 2 * max(times) * (1 + arrivals.size / len(times))
    assert found.sojourns.max() <= longest


def test_what_is_no_queue_is_refused() -> None:
    """Arrivals that run backwards, a size without a time, negative times and delays."""
    for arrivals, times, delay in (([2, 1], [1], 0), ([1], [], 0), ([1], [-1], 0), ([1], [1], -1)):
        with pytest.raises(ValueError):
            serve(arrivals, times, 1.0, delay)


shapes = st.lists(st.floats(0.5, 2), min_size=1, max_size=8)
growths = st.lists(st.floats(0.3, 3), max_size=7).map(lambda steps: tuple(np.cumprod([1.0, *steps]).tolist()))


@given(st.floats(0.1, 2), st.floats(1, 20), shapes, growths, st.floats(0, 10))
@settings(max_examples=25)
def test_a_batched_service_is_full_at_the_rate_of_full_batches(
    load: float, ms: float, shape: list[float], growth: tuple[float, ...], delay_ms: float
) -> None:
    """No tail at B requests per time of a batch of B and above, one below; what is added to each request is added."""
    shape = (np.array(shape) / np.mean(shape)).tolist()
    full = 1000 * len(growth) / (ms * growth[-1])
    found = sojourn_percentile(load * full, shape, ms, 0.0, 90, growth, delay_ms)
    assert np.isfinite(found) == (load * full * ms * growth[-1] < 1000 * len(growth))
    if np.isfinite(found):
        later = sojourn_percentile(load * full, shape, ms, 2.5, 90, growth, delay_ms)
        assert later == pytest.approx(found + 2.5)


@given(st.floats(0.1, 0.95), st.floats(1, 20), growths)
@settings(max_examples=25)
def test_a_request_keeps_the_server_busy_for_its_part_of_a_batch(
    load: float, ms: float, growth: tuple[float, ...]
) -> None:
    """Between the smallest and the largest time a request in a batch of any size; one by one it is the mean."""
    parts = [ms * factor / size for size, factor in enumerate(growth, 1)]
    rate = 1000 * load / parts[-1]
    found = busy_ms(rate, (1.0,), ms, growth)
    assert min(parts) * (1 - 1e-9) <= found <= max(parts) * (1 + 1e-9)
    assert busy_ms(rate, (0.5, 1.5), ms) == ms
    assert REQUESTS > 1000


def test_batching_raises_what_a_service_can_carry() -> None:
    """A batch that takes as long as one request carries ten times what one by one carries; held batches wait longer."""
    flat = (1.0,) * 16
    assert sojourn_percentile(800, (1.0,), 10.0, 0.0, 99) == float("inf")
    quick = sojourn_percentile(800, (1.0,), 10.0, 0.0, 99, flat)
    assert 10 <= quick <= 20 * (1 + 1e-9)
    assert sojourn_percentile(20, (1.0,), 10.0, 0.0, 50, flat, 30.0) > sojourn_percentile(
        20, (1.0,), 10.0, 0.0, 50, flat
    )
