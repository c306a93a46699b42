"""Bursts of growing size against servers that are formulas: what counts as a batch, and what ends a curve."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from corun.errors import PeerClosed, RunFault
from corun.launch.batches import LEAST, REPEATS, WARM, Burst, all_sizes


class _Server:
    """Answers a burst as `batches(size, number of the burst)` says; asked: every size in order."""

    def __init__(self, batches: Callable[[int, int], tuple[int, ...]]) -> None:
        self._batches = batches
        self.asked: list[int] = []

    def burst(self, size: int) -> Burst:
        self.asked.append(size)
        return Burst(self._batches(size, len(self.asked)), 2.0 * size, 0.25)


def _whole(size: int, number: int) -> tuple[int, ...]:
    return (size,) * size


def test_every_size_is_served_upwards_and_what_warms_up_does_not_count() -> None:
    """Sizes in any order are taken from the smallest; each has REPEATS times after WARM bursts."""
    server = _Server(_whole)
    found = all_sizes(server, os.getpid(), (4, 1, 2), 60.0)
    assert [(one.size, one.times_ms) for one in found.sizes] == [(n, (2.0 * n,) * REPEATS) for n in (1, 2, 4)]
    assert server.asked == [size for size in (1, 2, 4) for _ in range(WARM + REPEATS)]
    assert found.overhead_ms == 0.25
    assert found.fault == ""


def test_a_burst_that_fell_apart_is_sent_again() -> None:
    """Every second burst of two arrives as one and one: only whole batches are times."""
    found = all_sizes(_Server(lambda size, number: (size,) * size if number % 2 else (1,) * size), 1, (1, 2), 60.0)
    assert [one.size for one in found.sizes] == [1, 2]
    assert set(found.sizes[1].times_ms) == {4.0}
    assert len(found.sizes[1].times_ms) >= LEAST


def test_a_server_that_answers_each_request_by_itself_has_a_curve_of_one() -> None:
    """Batches of two never come: a few tries, then no larger size is asked."""
    server = _Server(lambda size, number: (1,) * size)
    found = all_sizes(server, 1, (1, 2, 4, 8), 60.0)
    assert [one.size for one in found.sizes] == [1]
    assert 4 not in server.asked
    assert server.asked.count(2) == WARM + LEAST


@pytest.mark.parametrize("error", [RunFault("a request was answered FAILED: out of memory"), PeerClosed("killed")])
def test_a_size_that_fails_ends_the_curve_and_the_smaller_ones_stand(error: Exception) -> None:
    """The reason is kept; without any size there is nothing to keep and the error is raised."""

    def upto(size: int, number: int) -> tuple[int, ...]:
        if size >= limit:
            raise error
        return (size,) * size

    limit = 4
    found = all_sizes(_Server(upto), 1, (1, 2, 4, 8), 60.0)
    assert [one.size for one in found.sizes] == [1, 2]
    assert found.fault == f"batches of 4: {error}"
    limit = 1
    with pytest.raises(type(error)):
        all_sizes(_Server(upto), 1, (1, 2), 60.0)


def test_without_time_the_smallest_size_is_still_measured() -> None:
    """LEAST batches of the first size whatever the budget; larger ones are left out."""
    found = all_sizes(_Server(_whole), 1, (1, 2, 4), 0.0)
    assert [(one.size, len(one.times_ms)) for one in found.sizes] == [(1, LEAST)]
