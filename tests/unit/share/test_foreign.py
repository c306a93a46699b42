"""Foreign load, from recorded /proc files and on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from corun.clock import NS_PER_S, now_ns
from corun.share.foreign import foreign_cores, machine_busy_s, own_cores, process_cpu_s, read_cpu
from corun.share.host import Host
from corun.testing.host import FakeHost

TICK = os.sysconf("SC_CLK_TCK")


def _stat(host: FakeHost, pid: int, name: str, ticks: tuple[int, int, int, int]) -> None:
    before, after = "S 1 1 1 0 -1 0 0 0 0 0", "20 0 1 0 100 0 0"
    host.put(f"proc/{pid}/stat", f"{pid} ({name}) {before} {' '.join(map(str, ticks))} {after}")


def _machine(host: FakeHost, user: int, idle: int, steal: int) -> None:
    host.put("proc/stat", f"cpu  {user} 0 0 {idle} 50 0 0 {steal} 7 0\ncpu0 1 2 3\n")


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    machine = FakeHost(tmp_path, {10: [10], 20: [20]})
    machine.add_process(10, [10], children=[30])
    machine.add_process(30, [30])
    return machine


def test_what_is_not_ours_is_foreign(host: FakeHost) -> None:
    """Busy time less that of our processes and their children; idle and disk wait are not busy, stolen time is."""
    for pid in (10, 20, 30):
        _stat(host, pid, "python (x) y", (0, 0, 0, 0))
    _machine(host, 0, 0, 0)
    before = read_cpu([10, 20], host, 0)
    _stat(host, 10, "python (x) y", (TICK, 0, 0, 0))
    _stat(host, 20, "train", (TICK, TICK, 0, 0))
    _stat(host, 30, "worker", (0, 0, TICK, TICK))
    _machine(host, 7 * TICK, 900, TICK)
    after = read_cpu([10, 20], host, 2 * NS_PER_S)
    assert set(after.own_s) == {10, 20, 30}
    assert own_cores(before, after) == pytest.approx(5 / 2)
    assert own_cores(before, after, [20]) == pytest.approx(1.0)
    assert foreign_cores(before, after) == pytest.approx((8 - 5) / 2)


def test_a_process_that_is_gone_counts_nothing(host: FakeHost) -> None:
    """A pid without files has used nothing, and never makes foreign time negative."""
    _machine(host, 0, 0, 0)
    assert process_cpu_s(77, host) == 0.0
    reading = read_cpu([77], host, 0)
    assert foreign_cores(reading, read_cpu([77], host, NS_PER_S)) == 0.0


def test_this_machine_can_be_read() -> None:
    """The real /proc has a busy time, and this process a part of it."""
    host = Host()
    assert machine_busy_s(host) > 0
    reading = read_cpu([os.getpid()], host, now_ns())
    assert reading.own_s[os.getpid()] > 0
