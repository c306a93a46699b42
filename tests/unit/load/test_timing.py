"""Waiting: never early, the rung and the reasons against the others on record."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun.clock import now_ns
from corun.errors import InputError
from corun.load import timing
from corun.load.timing import (
    SelectWaiter,
    TimerfdWaiter,
    Timing,
    make_waiter,
    parse_cpu_list,
    sleep_until_ns,
    spin_budget_ns,
    why_not_exclusive,
)

MS = 1_000_000


@pytest.fixture(params=[TimerfdWaiter, SelectWaiter], ids=["timerfd", "select"])
def waiter(request: pytest.FixtureRequest) -> timing.Waiter:
    made = request.param()
    yield made
    made.close()


def test_a_deadline_ends_the_wait_and_not_before(waiter: timing.Waiter) -> None:
    """The wait returns without events once the armed instant has come, again and again."""
    for _ in range(5):
        deadline = now_ns() + 3 * MS
        waiter.arm(deadline)
        while now_ns() < deadline - MS // 10:
            assert waiter.wait() == []
        assert now_ns() >= deadline - MS // 10


def test_a_past_deadline_wakes_at_once(waiter: timing.Waiter) -> None:
    """An instant already gone is no reason to sleep for ever."""
    waiter.arm(now_ns() - MS)
    assert waiter.wait() == []


def test_a_descriptor_wakes_a_disarmed_waiter(waiter: timing.Waiter) -> None:
    """Deadline 0 means none: only a descriptor ends the wait then."""
    read, write = os.pipe()
    waiter.register(read, select.EPOLLIN)
    waiter.arm(now_ns() + MS)
    waiter.arm(0)
    os.write(write, b"x")
    assert waiter.wait() == [(read, select.EPOLLIN)]
    waiter.unregister(read)
    os.close(read)
    os.close(write)


def test_the_timer_fires_early_by_what_was_asked() -> None:
    """With a lead or a spin the timer fires early by it, and every wait until the deadline returns at once."""
    early_ns = 100_000 * MS
    waiter = TimerfdWaiter(early_ns)
    deadline = now_ns() + early_ns + 5 * MS
    waiter.arm(deadline)
    for _ in range(6):
        assert waiter.wait() == []
        assert deadline - early_ns <= now_ns() < deadline
    waiter.close()


def test_the_lead_is_what_a_wake_up_takes_and_bounded() -> None:
    """It comes from probes, is never negative, and a slow machine cannot make it a long spin."""
    assert 0 <= timing.wake_lead_ns() <= timing.LEAD_MAX_NS
    assert Timing("timerfd", "other", lead_ns=9).early_ns == 9
    assert Timing("spin-fifo", "fifo", spin_ns=200).early_ns == 200


def test_sleep_until_is_never_early() -> None:
    """clock_nanosleep on an absolute instant returns after it; a past one returns at once."""
    for ahead in (0, -MS, MS, 3 * MS):
        deadline = now_ns() + ahead
        sleep_until_ns(deadline)
        assert now_ns() >= deadline


@given(rate=st.floats(0.001, 1e7))
def test_spinning_stays_below_its_share_of_a_core(rate: float) -> None:
    """Spin per request times requests per second is at most a fifth of a second."""
    assert 0 <= spin_budget_ns(rate) <= timing.SPIN_NS
    assert spin_budget_ns(rate) * rate <= timing.SPIN_SHARE * 1e9 + 1
    assert spin_budget_ns(0) == timing.SPIN_NS


@pytest.mark.parametrize(
    ("text", "cores"), [("", set()), ("\n", set()), ("3", {3}), ("0,2-4\n", {0, 2, 3, 4}), ("7-7", {7})]
)
def test_cpu_lists_are_read_as_the_kernel_writes_them(text: str, cores: set[int]) -> None:
    """Single cores and ranges, separated by commas; an empty list is none."""
    assert parse_cpu_list(text) == cores


def test_an_exclusive_core_must_be_pinned_and_isolated(tmp_path: Path) -> None:
    """Without isolcpus, or with several cores to run on, no core is taken for ours alone."""
    assert why_not_exclusive(tmp_path)
    allowed = os.sched_getaffinity(0)
    core = min(allowed)
    os.sched_setaffinity(0, {core})
    try:
        assert f"core {core} is not isolated" in why_not_exclusive(tmp_path)
        online = tmp_path / "devices/system/cpu"
        online.mkdir(parents=True)
        (online / "isolated").write_text(f"{core}\n")
        assert "isolated from" not in why_not_exclusive(tmp_path)
    finally:
        os.sched_setaffinity(0, allowed)


def test_without_timerfd_the_ladder_falls_to_select(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that refuses timerfd_create leaves select(2), and the record says why."""
    monkeypatch.setattr(timing, "_timerfd_works", lambda: False)
    refused: dict[str, str] = {}
    assert timing._choose_rung(True, refused, Path("/nowhere")) == "select"
    assert "timerfd" in refused
    made = make_waiter(Timing("select", "other"))
    assert isinstance(made, SelectWaiter)
    made.close()


def test_unknown_priorities_and_cores_are_input_errors() -> None:
    """Both are refused with what is possible."""
    with pytest.raises(InputError, match="none, auto, fifo"):
        timing.prepare("high")
    with pytest.raises(InputError, match="may use"):
        timing.prepare("none", [100_000])


def test_the_choice_and_every_refusal_are_recorded() -> None:
    """In a process of its own: policy untouched by default, slack 1 ns, each other rung with its reason."""
    program = (
        "from corun.load.timing import prepare; import json, os\n"
        "t = prepare('none')\n"
        "print(json.dumps([t.as_dict(), os.sched_getscheduler(0) == os.SCHED_OTHER]))"
    )
    import json

    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root / "src", capture_output=True, text=True, check=True
    )
    chosen, untouched = json.loads(done.stdout)
    assert untouched
    assert chosen["slack_ns"] == 1
    assert chosen["policy"] == "other"
    assert chosen["refused"]["spin-fifo"].startswith("not asked for")
    assert chosen["rung"] == "spin-exclusive" or "spin-exclusive" in chosen["refused"]
