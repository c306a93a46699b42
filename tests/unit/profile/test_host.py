"""Rules of the host sources, read from a fake /proc."""

from __future__ import annotations

from pathlib import Path

import pytest

from corun.profile.host import TICK_NS, CpuTimes, Memory, Network, Pressure
from corun.profile.kept import KeptFile
from corun.profile.source import Faults, HostSource, Row, Unavailable, describe, open_sources, summarise
from corun.profile.tables import CPU, MEMORY, NETWORK, PRESSURE
from corun.run.records import names
from corun.testing.sysfs import FakeMachine


def read(source: HostSource) -> Row:
    """The cells of one reading."""
    row: Row = {}
    source.read(row)
    return row


def test_cpu_times_are_nanoseconds(tmp_path: Path) -> None:
    """The kernel's ticks become ns, each state under its own column; switches and forks stay counts."""
    row = read(CpuTimes(FakeMachine(tmp_path).host().root))
    assert set(row) == set(names(CPU))
    assert (row["cpu_user_ns"], row["cpu_steal_ns"]) == (100 * TICK_NS, 8 * TICK_NS)
    assert (row["ctx_switches"], row["forks"], row["procs_running"], row["procs_blocked"]) == (261195, 5265, 3, 1)


def test_a_kept_descriptor_sees_the_present(tmp_path: Path) -> None:
    """Reading again shows what the file holds now, without opening it again."""
    machine = FakeMachine(tmp_path).host(user=100)
    source = CpuTimes(machine.root)
    read(source)
    machine.host(user=150)
    assert read(source)["cpu_user_ns"] == 150 * TICK_NS


def test_memory_is_mib(tmp_path: Path) -> None:
    """kB become MiB; what a kernel does not name stays out of the row."""
    machine = FakeMachine(tmp_path).host(free=1536)
    row = read(Memory(machine.root))
    assert set(row) == set(names(MEMORY))
    assert (row["mem_total_mib"], row["mem_free_mib"], row["swap_total_mib"]) == (16384.0, 1.5, 0.0)
    machine.write("/proc/meminfo", "MemTotal: 2048 kB\n")
    assert read(Memory(machine.root)) == {"mem_total_mib": 2.0}


def test_pressure_keeps_the_raw_totals(tmp_path: Path) -> None:
    """PSI totals are counters in µs; the averages the kernel makes are not stored."""
    row = read(Pressure(FakeMachine(tmp_path).host(psi_us=4477199).root))
    assert set(row) == set(names(PRESSURE))
    assert (row["psi_memory_some_us"], row["psi_io_full_us"]) == (4477199, 0)


def test_pressure_without_one_of_its_files_names_it(tmp_path: Path) -> None:
    """A kernel without pressure/io still gives the other two, and says what is missing."""
    machine = FakeMachine(tmp_path).host()
    (tmp_path / "proc/pressure/io").unlink()
    source = Pressure(machine.root)
    assert "psi_io_some_us" not in read(source)
    assert "No such file" in source.status().absent["io"]


def test_pressure_is_unavailable_without_its_files(tmp_path: Path) -> None:
    """Without /proc/pressure the reason says which kernel option is needed."""
    with pytest.raises(Unavailable, match="CONFIG_PSI"):
        Pressure(tmp_path)


def test_the_loopback_is_counted_apart(tmp_path: Path) -> None:
    """Interfaces are summed without lo, whose bytes have a column of their own."""
    row = read(Network(FakeMachine(tmp_path).host().root))
    assert set(row) == set(names(NETWORK))
    assert (row["net_rx_bytes"], row["net_tx_packets"], row["lo_bytes"]) == (1010, 22, 700)
    assert (row["net_errors"], row["net_drops"]) == (4, 6)


def test_long_tables_are_read_whole(tmp_path: Path) -> None:
    """A file of many pages is read to its end."""
    path = tmp_path / "long"
    path.write_bytes(b"x" * 100_000)
    kept = KeptFile(path)
    assert len(kept.read_all()) == 100_000
    assert len(kept.read()) == 4096


def test_an_absent_source_is_a_status_with_its_reason(tmp_path: Path) -> None:
    """Probing never raises: what is not there, or cannot be understood, has a name and a reason."""
    machine = FakeMachine(tmp_path).host().write("/proc/stat", "no numbers\n")
    sources, statuses = open_sources(
        [
            ("cpu", lambda: CpuTimes(machine.root)),
            ("memory", lambda: Memory(machine.root)),
            ("network", lambda: Network(tmp_path / "nowhere")),
        ],
        iter(range(0, 100_000, 7000)).__next__,
    )
    assert [source.name for source in sources] == ["memory"]
    cpu, memory, network = statuses
    assert "CPU times" in cpu.reason
    assert (memory.available, memory.probe_us) == (True, 7)
    assert "No such file or directory" in network.reason
    assert network.line().startswith("network: unavailable (")


def test_every_fault_counts_and_the_first_is_told() -> None:
    """A thousand failed readings are a count of a thousand and one event."""
    told: list[tuple[str, str]] = []
    faults = Faults(lambda source, text: told.append((source, text)))
    for _ in range(1000):
        faults.record("cpu", OSError(5, "Input/output error"))
    faults.record("cpu", ValueError("bad text"))
    assert (faults.total, faults.by_source["cpu"]) == (1001, 1001)
    assert told == [("cpu", "Input/output error"), ("cpu", "bad text")]


def test_reasons_are_short() -> None:
    """An error is told by its text and its file; a long list by its first names and a count."""
    assert describe(FileNotFoundError(2, "No such file or directory", "/x")) == "No such file or directory: /x"
    assert describe(KeyError()) == "KeyError"
    assert summarise(dict.fromkeys("abcde", "")) == "a, b, c and 2 more"
