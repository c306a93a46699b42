"""Errors, clock and process helpers."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun import clock, errors, process

NS = st.integers(-(10**12), 10**12)
DELAY = st.integers(0, 10**9)


def test_input_error_lists_every_problem() -> None:
    """Each problem stands on its own line below what is wrong."""
    error = errors.InputError("config.json has 2 problems", ["a: bad", "b: worse"])
    assert str(error).splitlines() == ["config.json has 2 problems", "  - a: bad", "  - b: worse"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(errors.InputError("x"), 2), (errors.RunFault("x"), 1), (errors.PeerClosed("x"), 1), (KeyboardInterrupt(), 130)],
)
def test_guard_turns_our_errors_into_exit_codes(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A front door ends with the error's exit code and a sentence on stderr, never a traceback."""
    with pytest.raises(SystemExit) as caught, errors.guard():
        raise error
    assert caught.value.code == code
    assert "Traceback" not in capsys.readouterr().err


def test_guard_lets_defects_through() -> None:
    """An error nobody meant to raise keeps its traceback."""
    with pytest.raises(ZeroDivisionError), errors.guard():
        _ = 1 // 0


def test_suggest_names_the_near_miss_only() -> None:
    """A near miss gets a suggestion, nonsense gets none."""
    assert errors.suggest("resnet81", ["resnet18", "vgg16"]) == '; did you mean "resnet18"?'
    assert errors.suggest("zzz", ["resnet18"]) == ""


@given(offset=NS, there=DELAY, back=DELAY, work=DELAY, start=NS)
def test_clock_offset_is_within_its_bound(offset: int, there: int, back: int, work: int, start: int) -> None:
    """Whatever the delays of the two ways, the offset found is wrong by at most half the round trip."""
    t1 = start + there + offset
    probe = clock.Probe(start, t1, t1 + work, start + there + work + back)
    found = clock.estimate_offset([probe])
    assert abs(found.offset_ns - offset) <= found.bound_ns + 1
    assert found.rtt_ns == there + back


@given(st.lists(st.tuples(DELAY, DELAY), min_size=1, max_size=16))
def test_the_fastest_probe_decides(delays: list[tuple[int, int]]) -> None:
    """Of many probes the one with the smallest round trip gives offset and bound."""
    probes = [clock.Probe(0, there, there, there + back) for there, back in delays]
    assert clock.estimate_offset(probes).rtt_ns == min(there + back for there, back in delays)


def _clocks(monotonic_ns: Callable[[], int], time_ns: Callable[[], int]) -> SimpleNamespace:
    return SimpleNamespace(monotonic_ns=monotonic_ns, time_ns=time_ns)


def test_anchor_maps_monotonic_to_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stamp maps to what the wall clock said then, whatever the machine did between two readings."""
    wall_at_0, mono_ns = 1_700_000_000 * 10**9, iter(range(5, 10**6, 7))
    monkeypatch.setattr(clock, "time", _clocks(lambda: next(mono_ns), lambda: wall_at_0 + next(mono_ns)))
    anchor = clock.anchor()
    assert abs(anchor.wall_at(10**6) - (wall_at_0 + 10**6)) <= 7


def test_the_tightest_of_the_readings_is_the_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading that a stall tore apart is not used: the error is at most half the shortest distance of two readings."""
    instants = iter([0, 900, 1000, 1000, 1001, 1002, 2000, 2000, 2900, 3000, 3400, 3500, 4000, 4001, 4999])
    monkeypatch.setattr(clock, "time", _clocks(lambda: next(instants), lambda: next(instants)))
    assert clock.anchor() == clock.Anchor(1001, 1001)


def test_the_real_clocks_run_together() -> None:
    """The anchor of this machine lies between two readings of its wall clock, unless that was set meanwhile."""
    before = time.time_ns()
    anchor = clock.anchor()
    after = time.time_ns()
    assert before <= anchor.wall_ns <= after or after < before
    assert anchor.wall_at(anchor.mono_ns) == anchor.wall_ns


def test_thread_environment_names_every_library() -> None:
    """Every numerical library is given the same number of threads."""
    assert set(process.thread_environment(3).values()) == {"3"}
    assert "OMP_NUM_THREADS" in process.thread_environment(1)


def test_stop_signal_is_a_flag_and_a_readable_descriptor() -> None:
    """SIGTERM sets the flag once and wakes a select; the old handler comes back afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    with process.StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert select.select([stop.fileno()], [], [], 60)[0]
        assert stop.requested
        assert os.read(stop.fileno(), 10) == b"x"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_child_dies_with_its_parent() -> None:
    """kill -9 of a parent kills the child that asked for it."""
    child = "from corun.process import die_with_parent; die_with_parent(); print('up', flush=True); import time; time.sleep(600)"
    parent = (
        "import subprocess, sys, time; "
        f"c = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE); "
        "c.stdout.readline(); print(c.pid, flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(clock.__file__).resolve().parents[1])}
    started = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, env=environment)
    assert started.stdout is not None
    pid = int(started.stdout.readline())
    started.kill()
    started.wait()
    started.stdout.close()
    deadline = time.monotonic() + 60
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
