"""What a translation server writes: a row a request, a row a package, memory every second, a summary at the end.

All instants are ns of CLOCK_MONOTONIC of the server's host; t_send is the client's, on the same clock on one host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.ectrans.engines import Answers
from corun.ectrans.memory import Memory, total
from corun.ectrans.scheduler import Job, Package
from corun.run.directory import hardware, versions, write_json
from corun.run.table import TableWriter
from corun.stats import percentile_of
from corun.wire import Status

REQUESTS = (
    "req",
    "class",
    "n",
    "src_tok",
    "out_tok",
    "t_send",
    "t_arrive",
    "t_first_dispatch",
    "t_enc0",
    "t_enc1",
    "t_dec0",
    "t_done",
    "slowdown",
    "status",
)
PACKAGES = ("n", "Lmax", "real", "padded", "waste", "members", "wait")
PROFILE = ("t", "pid", "role", "pss_mib", "uss_mib", "rss_mib", "cpu_pct", "gpu_mem_mib", "gpu_util_pct")


@dataclass
class Busy:
    """Time that a half of the model worked, as intervals; overlap is what both worked at once."""

    encoder_ns: int = 0
    decoder_ns: int = 0
    overlap_ns: int = 0
    _encoder: list[tuple[int, int]] = field(default_factory=list)
    _decoder: list[tuple[int, int]] = field(default_factory=list)

    def add(self, answers: Answers) -> None:
        """One package."""
        self._encoder.append((answers.enc0_ns, answers.enc1_ns))
        self._decoder.append((answers.dec0_ns, answers.dec1_ns))

    def body(self, span_ns: int) -> dict[str, float | None]:
        """Shares of `span_ns`; overlap as a share of the encoder's time, None when it never worked."""
        encoder, decoder = _union(self._encoder), _union(self._decoder)
        busy = _length(encoder)
        both = _length(encoder) + _length(decoder) - _length(_union([*encoder, *decoder]))
        return {
            "encoder_busy": _share(busy, span_ns),
            "decoder_busy": _share(_length(decoder), span_ns),
            "overlap_pct": round(100 * both / busy, 2) if busy else None,
        }


def _union(intervals: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _length(intervals: Sequence[tuple[int, int]]) -> int:
    return sum(end - begin for begin, end in intervals)


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole > 0 else 0.0


class Tally:
    """Counts and figures of one server since it was made or reset."""

    def __init__(self) -> None:
        self.began_ns = now_ns()
        self.ended: dict[Status, int] = {}
        self.sentences = self.tokens = 0
        self.turnaround_ms: dict[str, list[float]] = {}
        self.slowdown: list[float] = []
        self.padded = self.real = self.items = self.packages = 0
        self.busy = Busy()
        self.last_ns = self.began_ns
        self.peak: dict[str, float] = {}

    def request(self, job: Job, out_tokens: int, slowdown: float | None) -> None:
        """A request ended."""
        assert job.status is not None
        self.ended[job.status] = self.ended.get(job.status, 0) + 1
        self.last_ns = job.done_ns or self.last_ns
        if job.status == Status.OK:
            self.sentences += job.size
            self.tokens += out_tokens
            taken_ms = ((job.done_ns or 0) - job.arrival_ns) / NS_PER_MS
            self.turnaround_ms.setdefault(job.kind, []).append(taken_ms)
            if slowdown is not None:
                self.slowdown.append(slowdown)

    def refused(self, status: Status) -> None:
        """A request was answered without having been admitted."""
        self.ended[status] = self.ended.get(status, 0) + 1

    def package(self, package: Package, answers: Answers) -> None:
        """A package came back whole."""
        self.packages += 1
        self.items += len(package.items)
        self.padded += package.padded
        self.real += package.real
        self.busy.add(answers)

    def memory(self, rows: Sequence[Memory]) -> None:
        """Remember the largest sums."""
        for name, value in total(rows).items():
            self.peak[name] = max(value, self.peak.get(name, 0.0))

    def body(self, max_items: int) -> dict[str, Any]:
        """Everything as one JSON object."""
        span_ns = max(1, self.last_ns - self.began_ns)
        return {
            "requests": {status.name: count for status, count in self.ended.items()},
            "sentences": self.sentences,
            "tokens": self.tokens,
            "span_s": round(span_ns / NS_PER_S, 3),
            "sentences_per_s": round(self.sentences * NS_PER_S / span_ns, 3),
            "tokens_per_s": round(self.tokens * NS_PER_S / span_ns, 3),
            "turnaround_ms": {kind: spread(values) for kind, values in self.turnaround_ms.items()},
            "slowdown": spread(self.slowdown),
            "packages": self.packages,
            "occupancy": _share(self.items, self.packages * max_items),
            "padding_waste": round(1 - self.real / self.padded, 4) if self.padded else None,
            **self.busy.body(span_ns),
            "peak": self.peak,
        }


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, percentiles where there are enough values, and the largest."""
    if not values:
        return {}
    figures: dict[str, float | None] = {"mean": sum(values) / len(values)}
    figures |= {f"p{percent}": percentile_of(values, percent) for percent in (50, 95, 99)}
    figures["max"] = max(values)
    return {name: None if value is None else round(value, 3) for name, value in figures.items()}


class Files:
    """The files of one server's directory; does nothing without a directory."""

    def __init__(self, out: Path | None, settings: Mapping[str, Any]) -> None:
        self.out, self._settings = out, settings
        self._cpu: dict[int, tuple[int, float]] = {}
        self._tables: dict[str, TableWriter] = {}
        if out is not None:
            for name, columns in (("requests", REQUESTS), ("packages", PACKAGES), ("profile", PROFILE)):
                self._tables[name] = TableWriter(out / f"{name}.csv", columns)

    def request(self, values: Sequence[Any]) -> None:
        self._row("requests", values)

    def package(self, package: Package) -> None:
        wait = package.wait_ns
        shares = (package.real, package.padded, round(package.waste, 4), package.members, wait)
        self._row("packages", (len(package.items), package.longest, *shares))

    def memory(self, rows: Sequence[Memory], own_pid: int) -> None:
        """One row a process, with its processor use since the row before."""
        now = now_ns()
        for row in rows:
            before = self._cpu.get(row.pid)
            percent = None if before is None else 100 * (row.cpu_s - before[1]) * NS_PER_S / max(1, now - before[0])
            self._cpu[row.pid] = (now, row.cpu_s)
            sizes = (round(row.pss_mib, 2), round(row.uss_mib, 2), round(row.rss_mib, 2))
            role = "server" if row.pid == own_pid else "worker"
            self._row(
                "profile", (now, row.pid, role, *sizes, None if percent is None else round(percent, 1), None, None)
            )

    def _row(self, name: str, values: Sequence[Any]) -> None:
        if self._tables:
            self._tables[name].row(values)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json and close the tables."""
        if self.out is None:
            return
        for table in self._tables.values():
            table.close()
        write_json(
            self.out / "summary.json",
            {"config": dict(self._settings), "versions": versions(), "host": hardware(), **summary},
        )
