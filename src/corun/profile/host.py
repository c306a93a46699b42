"""The host: CPU times, memory, pressure and network, read from /proc."""

from __future__ import annotations

import os
from pathlib import Path

from corun.profile.kept import KeptFile, under
from corun.profile.source import READ_ERRORS, Row, Status, Unavailable, describe
from corun.profile.tables import CPU
from corun.run.records import Column, names

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_CPU_CELLS = names(CPU)[:8]
_STAT_KEYS = {b"ctxt": "ctx_switches", b"processes": "forks"} | {
    key.encode(): key for key in ("procs_running", "procs_blocked")
}
_MEMORY_KEYS = {
    b"MemTotal": "mem_total_mib",
    b"MemFree": "mem_free_mib",
    b"MemAvailable": "mem_available_mib",
    b"Cached": "mem_cached_mib",
    b"Dirty": "mem_dirty_mib",
    b"SwapTotal": "swap_total_mib",
    b"SwapFree": "swap_free_mib",
}


class CpuTimes:
    """/proc/stat: time of all cores by state, context switches, threads ready to run."""

    name = "cpu"
    columns: tuple[Column, ...] = ()

    def __init__(self, root: Path) -> None:
        self._file = KeptFile(under(root, "/proc/stat"))

    def read(self, row: Row) -> None:
        head, _, rest = self._file.read_all().partition(b"\n")
        fields = head.split()
        if len(fields) < 9:
            raise ValueError(f"/proc/stat: {len(fields) - 1} CPU times instead of 8 or more")
        for cell, ticks in zip(_CPU_CELLS, fields[1:9], strict=True):
            row[cell] = int(ticks) * TICK_NS
        for line in rest[rest.find(b"ctxt ") :].splitlines():
            key, _, value = line.partition(b" ")
            if key in _STAT_KEYS:
                row[_STAT_KEYS[key]] = int(value)

    def status(self) -> Status:
        return Status(self.name, details={"cores": os.cpu_count(), "step_ns": TICK_NS})

    def close(self) -> None:
        self._file.close()


class Memory:
    """/proc/meminfo, kB turned into MiB."""

    name = "memory"
    columns: tuple[Column, ...] = ()

    def __init__(self, root: Path) -> None:
        self._file = KeptFile(under(root, "/proc/meminfo"))

    def read(self, row: Row) -> None:
        for line in self._file.read_all().splitlines():
            key, _, value = line.partition(b":")
            cell = _MEMORY_KEYS.get(key)
            if cell:
                row[cell] = round(int(value.split()[0]) / 1024, 3)

    def status(self) -> Status:
        return Status(self.name)

    def close(self) -> None:
        self._file.close()


class Pressure:
    """/proc/pressure/{cpu,memory,io}: how long threads stood still for want of something (PSI, raw totals)."""

    name = "pressure"
    columns: tuple[Column, ...] = ()

    def __init__(self, root: Path) -> None:
        self._files: dict[str, KeptFile] = {}
        self._absent: dict[str, str] = {}
        for resource in ("cpu", "memory", "io"):
            self._open(resource, under(root, f"/proc/pressure/{resource}"))
        if not self._files:
            raise Unavailable(next(iter(self._absent.values())) + "; the kernel needs CONFIG_PSI and psi=1")

    def _open(self, resource: str, path: Path) -> None:
        try:
            file = KeptFile(path)
            _pressure_totals(file.read())
        except READ_ERRORS as error:
            self._absent[resource] = describe(error)
        else:
            self._files[resource] = file

    def read(self, row: Row) -> None:
        for resource, file in self._files.items():
            for kind, total in _pressure_totals(file.read()).items():
                row[f"psi_{resource}_{kind}_us"] = total

    def status(self) -> Status:
        return Status(self.name, absent=self._absent)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _pressure_totals(text: bytes) -> dict[str, int]:
    """`{"some": us, "full": us}` from lines such as `some avg10=0.00 avg60=0.00 avg300=0.00 total=4477199`."""
    totals = {}
    for line in text.splitlines():
        kind, _, averages = line.partition(b" ")
        totals[kind.decode()] = int(averages.rpartition(b"total=")[2])
    return totals


class Network:
    """/proc/net/dev: the loopback apart, all other interfaces together."""

    name = "network"
    columns: tuple[Column, ...] = ()

    def __init__(self, root: Path) -> None:
        self._file = KeptFile(under(root, "/proc/net/dev"))

    def read(self, row: Row) -> None:
        rx_bytes = tx_bytes = rx_packets = tx_packets = errors = drops = lo_bytes = 0
        for line in self._file.read_all().splitlines()[2:]:
            name, _, counters = line.rpartition(b":")
            value = [int(field) for field in counters.split()]
            if name.strip() == b"lo":
                lo_bytes = value[8]
                continue
            rx_bytes, rx_packets = rx_bytes + value[0], rx_packets + value[1]
            tx_bytes, tx_packets = tx_bytes + value[8], tx_packets + value[9]
            errors, drops = errors + value[2] + value[10], drops + value[3] + value[11]
        row |= {
            "net_rx_bytes": rx_bytes,
            "net_tx_bytes": tx_bytes,
            "net_rx_packets": rx_packets,
            "net_tx_packets": tx_packets,
            "net_errors": errors,
            "net_drops": drops,
            "lo_bytes": lo_bytes,
        }

    def status(self) -> Status:
        return Status(self.name)

    def close(self) -> None:
        self._file.close()
