"""Rules of the process rows, read from a fake /proc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from corun.profile.host import TICK_NS
from corun.profile.processes import ProcessTable
from corun.profile.source import Faults, Row
from corun.profile.tables import PROCESS
from corun.profile.watch import Watched
from corun.run.records import names
from corun.testing.sysfs import PAGE_MIB, FakeMachine


class Followed:
    """A process table on a fake machine, with what it told."""

    def __init__(self, machine: FakeMachine, *watched: Watched, drm: bool = False) -> None:
        self.faults = Faults()
        self.told: list[tuple[str, str, str, str]] = []
        self.table = ProcessTable(machine.root, self.faults, lambda *event: self.told.append(event), drm)
        self.table.watch(watched)

    def row(self, pid: int) -> Row:
        """The row of one process at this tick."""
        return next(row for row in self.table.read() if row["pid"] == pid)

    def kinds(self) -> list[str]:
        """What was told, in order."""
        return [kind for kind, *_ in self.told]


SERVER = Watched(4711, "server", "resnet50")


def test_a_row_has_raw_counters(tmp_path: Path) -> None:
    """CPU is ns, memory MiB, and a name with spaces and brackets does not shift the fields."""
    row = Followed(FakeMachine(tmp_path).process(4711), SERVER).row(4711)
    assert set(row) <= set(names(PROCESS))
    assert (row["role"], row["name"], row["ppid"], row["threads"]) == ("server", "resnet50", 1, 1)
    assert (row["cpu_ns"], row["runq_wait_ns"]) == (1_000_000, 2_000)
    assert (row["cpu_user_ns"], row["cpu_system_ns"]) == (10 * TICK_NS, 5 * TICK_NS)
    assert (row["ctx_voluntary"], row["ctx_involuntary"], row["major_faults"]) == (3, 4, 2)
    assert row["rss_mib"] == 256 * PAGE_MIB


def test_threads_are_summed(tmp_path: Path) -> None:
    """schedstat of the process file is the main thread's only; all threads count here."""
    threads = {4711: (10, 1, 1, 1, 0), 4712: (200, 20, 2, 5, 6), 4713: (3000, 300, 3, 7, 8)}
    row = Followed(FakeMachine(tmp_path).process(4711, threads=threads), SERVER).row(4711)
    assert (row["cpu_ns"], row["runq_wait_ns"]) == (3210, 321)
    assert (row["ctx_voluntary"], row["ctx_involuntary"]) == (13, 14)


def test_counters_never_go_down_when_a_thread_ends(tmp_path: Path) -> None:
    """What a thread had counted when it ended is kept, and a new thread is found."""
    machine = FakeMachine(tmp_path).process(4711, threads={4711: (10, 1, 1, 1, 1), 4712: (200, 20, 2, 2, 2)})
    followed = Followed(machine, SERVER)
    assert followed.row(4711)["cpu_ns"] == 210
    machine.end_thread(4711, 4712)
    assert followed.row(4711)["cpu_ns"] == 210
    machine.thread(4711, 4713, 5, 5, 1, 0, 0)
    assert followed.row(4711)["cpu_ns"] == 215


def test_switches_are_read_again_only_after_a_time_slice(tmp_path: Path) -> None:
    """A thread that did not run cannot have switched, so its status is left alone."""
    machine = FakeMachine(tmp_path).process(4711, threads={4711: (10, 1, 7, 3, 4)})
    followed = Followed(machine, SERVER)
    followed.row(4711)
    machine.thread(4711, 4711, 10, 1, 7, 99, 99)
    assert followed.row(4711)["ctx_voluntary"] == 3
    machine.thread(4711, 4711, 11, 1, 8, 99, 98)
    row = followed.row(4711)
    assert (row["ctx_voluntary"], row["ctx_involuntary"]) == (99, 98)


def test_without_schedstat_the_cells_stay_empty(tmp_path: Path) -> None:
    """A kernel without schedstat gives CPU time in ticks and no run-queue wait, and no fault per tick."""
    machine = FakeMachine(tmp_path).process(4711)
    (tmp_path / "proc/4711/task/4711/schedstat").unlink()
    followed = Followed(machine, SERVER)
    row = followed.row(4711)
    assert row["cpu_ns"] == 15 * TICK_NS
    assert "runq_wait_ns" not in row
    assert followed.faults.total == 0


@pytest.mark.parametrize("end", ["gone", "zombie"])
def test_a_process_that_ends_stops_its_rows(tmp_path: Path, end: str) -> None:
    """Gone or waiting to be reaped: no more rows, one event, no fault."""
    machine = FakeMachine(tmp_path).process(4711).process(4712)
    followed = Followed(machine, SERVER, Watched(4712, "client", "c0"))
    assert len(followed.table.read()) == 2
    _ = machine.end_process(4711) if end == "gone" else machine.process(4711, state="Z")
    assert [row["pid"] for row in followed.table.read()] == [4712]
    assert followed.told[-1] == ("process_exit", "server", "resnet50", "pid 4711")
    assert followed.faults.total == 0


def test_a_process_that_never_was_is_told(tmp_path: Path) -> None:
    """A number without a process is an event, not an error."""
    followed = Followed(FakeMachine(tmp_path), SERVER)
    assert followed.table.read() == []
    assert followed.told == [("process_exit", "server", "resnet50", "pid 4711 was gone before it was read")]


def test_children_carry_their_parents_role(tmp_path: Path) -> None:
    """A loader process of the trainer counts as trainer; its ppid tells it apart."""
    machine = FakeMachine(tmp_path).process(10).process(11, ppid=10).children(10, 11)
    followed = Followed(machine, Watched(10, "trainer", "resnet18"))
    followed.table.read()
    row = followed.row(11)
    assert (row["role"], row["name"], row["ppid"]) == ("trainer", "resnet18", 10)


def test_a_dead_child_is_never_adopted(tmp_path: Path) -> None:
    """A child that waits to be reaped stays in its parent's list; it makes no row and no event."""
    machine = FakeMachine(tmp_path).process(10).process(11, state="Z").children(10, 11, 12)
    followed = Followed(machine, Watched(10, "trainer", "t"))
    for _ in range(3):
        assert [row["pid"] for row in followed.table.read()] == [10]
    assert followed.kinds() == ["process_start"]


def test_children_of_several_roles_in_one_process_may_have_any_thread_as_parent(tmp_path: Path) -> None:
    """A trainer that is a thread starts its loader processes from that thread: they are followed all the same."""
    machine = FakeMachine(tmp_path).process(10).process(11, ppid=10).children(10)
    machine.write("/proc/10/task/17/children", "11 ")
    followed = Followed(machine, Watched(10, "server+trainer", "a+b"))
    followed.table.read()
    assert (followed.row(11)["role"], followed.row(11)["name"]) == ("server+trainer", "a+b")
    alone = Followed(machine, Watched(10, "server", "a"))
    assert [row["pid"] for _ in range(2) for row in alone.table.read()] == [10, 10]


def test_the_launchers_children_are_not_launchers(tmp_path: Path) -> None:
    """The launcher's children are named by the watch file, each with its own role."""
    machine = FakeMachine(tmp_path).process(10).process(11).children(10, 11)
    followed = Followed(machine, Watched(10, "launcher", "launcher"))
    followed.table.read()
    assert [row["pid"] for row in followed.table.read()] == [10]


def test_a_later_role_replaces_the_earlier_one(tmp_path: Path) -> None:
    """A child adopted under its parent's role takes the role the watch file gives it, counters kept."""
    machine = FakeMachine(tmp_path).process(4711, threads={4711: (10, 0, 1, 0, 0), 4712: (5, 0, 1, 0, 0)})
    followed = Followed(machine, Watched(4711, "trainer", "t"))
    followed.row(4711)
    machine.end_thread(4711, 4712)
    followed.row(4711)
    followed.table.watch([SERVER])
    row = followed.row(4711)
    assert (row["role"], row["cpu_ns"]) == ("server", 15)


def test_a_bad_text_is_a_fault_and_an_empty_cell(tmp_path: Path) -> None:
    """A status that cannot be understood costs its cells, not the row."""
    machine = FakeMachine(tmp_path).process(4711)
    machine.write("/proc/4711/task/4711/status", "Name:\tx\n")
    followed = Followed(machine, SERVER)
    row = followed.row(4711)
    assert row["rss_mib"] == 256 * PAGE_MIB
    assert "ctx_voluntary" not in row
    assert followed.faults.by_source["process threads"] == 1


def test_drm_time_is_summed_over_clients_once(tmp_path: Path) -> None:
    """Duplicated descriptors of one client count once, other clients are added."""
    machine = FakeMachine(tmp_path).process(4711).drm(4711, 5, client=1, busy_ns=100, memory_kib=2048)
    machine.drm(4711, 6, client=1, busy_ns=100, memory_kib=2048).drm(4711, 7, client=2, busy_ns=11, memory_kib=1024)
    row = Followed(machine, SERVER, drm=True).row(4711)
    assert (row["gpu_busy_ns"], row["gpu_mem_mib"], row["gpu_attr"]) == (111, 3.0, "fdinfo")


def test_drm_time_of_a_closed_client_is_kept(tmp_path: Path) -> None:
    """A client that is closed takes its memory away, not the time it has used."""
    machine = FakeMachine(tmp_path).process(4711).drm(4711, 5, 1, 100, 1024).drm(4711, 7, 2, 11, 1024)
    followed = Followed(machine, SERVER, drm=True)
    followed.row(4711)
    machine.write("/proc/4711/fdinfo/7", "pos:\t0\n")
    row = followed.row(4711)
    assert (row["gpu_busy_ns"], row["gpu_mem_mib"]) == (111, 1.0)


def test_a_process_without_drm_has_no_gpu_cells(tmp_path: Path) -> None:
    """No DRM device open means empty, not zero."""
    row = Followed(FakeMachine(tmp_path).process(4711), SERVER, drm=True).row(4711)
    assert not {"gpu_busy_ns", "gpu_mem_mib", "gpu_attr"} & set(row)


def test_a_real_process_of_this_machine_can_be_followed() -> None:
    """On a real /proc the own process has all cells, and a child that was killed stops its rows."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    followed = Followed(
        FakeMachine(Path("/")), Watched(os.getpid(), "profiler", "p"), Watched(child.pid, "server", "s")
    )
    try:
        rows = {row["pid"]: row for row in followed.table.read()}
        assert {"cpu_ns", "runq_wait_ns", "ctx_voluntary", "rss_mib"} <= set(rows[child.pid])
        again = followed.row(os.getpid())
        assert again["cpu_ns"] >= rows[os.getpid()]["cpu_ns"]  # type: ignore[operator]
    finally:
        child.kill()
        child.wait()
    assert child.pid not in {row["pid"] for row in followed.table.read()}
    assert followed.told[-1][0] == "process_exit"
    followed.table.close()
