"""Rules of the tick grid."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun.profile.grid import Grid, Tick
from corun.profile.sampler import run

SECOND = 1_000_000_000


class FakeTime:
    """A clock that only moves when told: by waiting, and by the work of a tick."""

    def __init__(self, overshoot_ns: int = 0) -> None:
        self.now = 5 * SECOND
        self.overshoot_ns = overshoot_ns

    def now_ns(self) -> int:
        return self.now

    def wait_until(self, deadline_ns: int) -> bool:
        self.now = max(self.now, deadline_ns + self.overshoot_ns)
        return True


def sampled(time: FakeTime, work_ns: list[int], period_ns: int = SECOND) -> list[Tick]:
    """The ticks of a run whose k-th reading takes work_ns[k]."""
    taken: list[Tick] = []

    def sample(tick: Tick) -> None:
        time.now += work_ns[len(taken)]
        taken.append(tick)

    run(Grid(time.now_ns(), period_ns), time.wait_until, time.now_ns, sample, len(work_ns))
    return taken


def test_the_first_tick_is_taken_at_once() -> None:
    """Tick 0 is due at the start, even when the clock moved on a little before the first wait."""
    grid = Grid(1000, SECOND)
    assert grid.next_deadline_ns(1007) == 1000
    assert grid.take(1007) == Tick(0, 1000, 7, 0)


def test_overshooting_sleeps_do_not_add_up() -> None:
    """Each deadline is start + k * period, however late the ticks before it were."""
    ticks = sampled(FakeTime(overshoot_ns=1_000_000), [3_000_000] * 120)
    assert [tick.number for tick in ticks] == list(range(120))
    assert {tick.late_ns for tick in ticks} == {1_000_000}
    assert ticks[-1].deadline_ns == 5 * SECOND + 119 * SECOND


def test_a_stall_skips_ticks_stays_on_the_grid_and_is_counted() -> None:
    """After a reading of 1.5 periods the next tick is on the grid and says that one was missed."""
    work = [1_500_000_000 if number % 10 == 9 else 1_000_000 for number in range(41)]
    ticks = sampled(FakeTime(), work)
    assert all(tick.deadline_ns % SECOND == 0 and tick.late_ns == 0 for tick in ticks)
    assert sum(tick.missed for tick in ticks) == 4
    assert [tick.number for tick in ticks if tick.missed] == [11, 22, 33, 44]


def test_a_sleeper_that_was_not_woken_reads_at_once() -> None:
    """Woken 2.4 periods late, the tick is read now and the two periods slept through are missed."""
    grid = Grid(0, SECOND)
    grid.take(0)
    assert grid.next_deadline_ns(1) == SECOND
    assert grid.take(3_400_000_000) == Tick(3, 3 * SECOND, 400_000_000, 2)
    assert grid.next_deadline_ns(3_400_000_001) == 4 * SECOND


@given(st.lists(st.integers(0, 3 * SECOND), min_size=1, max_size=40), st.integers(1, SECOND // 2))
def test_every_tick_of_the_grid_is_taken_or_missed(work_ns: list[int], overshoot_ns: int) -> None:
    """Taken and missed ticks together are all ticks up to the last one, and no tick is taken twice."""
    ticks = sampled(FakeTime(overshoot_ns), work_ns)
    numbers = [tick.number for tick in ticks]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] + 1 == len(ticks) + sum(tick.missed for tick in ticks)
    assert all(0 <= tick.late_ns < SECOND for tick in ticks)


def test_the_loop_ends_when_waiting_says_so() -> None:
    """`wait_until` returning False ends the loop without one more reading."""
    taken: list[Tick] = []
    answers = iter([True, True, False])
    run(Grid(0, SECOND), lambda deadline_ns: next(answers), lambda: 0, taken.append)
    assert len(taken) == 2


def test_a_period_of_nothing_is_refused() -> None:
    """The period must be positive; the message names it."""
    with pytest.raises(ValueError, match="must be positive"):
        Grid(0, 0)
