"""The one line a client prints when it was run by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from corun.clock import NS_PER_MS
from corun.load.ring import Records
from corun.load.work import Counts
from corun.stats import percentile_of
from corun.wire import Status


@dataclass(frozen=True)
class Latencies:
    """p50 and p99 in ms, over requests answered with OK (slip: over all sent); None = too few of them."""

    sojourn: tuple[float | None, float | None]
    response: tuple[float | None, float | None]
    slip: tuple[float | None, float | None]


def latencies(records: Records) -> Latencies:
    """Sojourn, response and slip of a segment's records."""
    ok = records[records["status"] == Status.OK]
    sent = records[records["t_tx_start"] != 0]
    return Latencies(
        sojourn=_pair(ok["t_rx"] - ok["t_intended"]),
        response=_pair(ok["t_rx"] - ok["t_tx_start"]),
        slip=_pair(sent["t_tx_start"] - sent["t_intended"]),
    )


def _pair(duration_ns: NDArray[np.int64]) -> tuple[float | None, float | None]:
    duration_ms = duration_ns / NS_PER_MS
    return percentile_of(duration_ms, 50), percentile_of(duration_ms, 99)


def line(counts: Counts, records: Records, asked: str, duration_s: float) -> str:
    """`100 of 100 sent, 10/s (asked 10/s); sojourn p50 8.1 ms, p99 n/a; ...`"""
    found = latencies(records)
    figures = "; ".join(
        f"{name} p50 {_ms(pair[0])}, p99 {_ms(pair[1])}"
        for name, pair in (("sojourn", found.sojourn), ("response", found.response), ("slip", found.slip))
    )
    sent = f"{counts.sent} of {counts.scheduled} sent, {sent_rate(records, duration_s):.4g}/s ({asked})"
    return f"{sent}; {figures}; {counts.errors} errors, {counts.lost} lost"


def sent_rate(records: Records, duration_s: float) -> float:
    """Requests handed to the kernel per second of the segment."""
    return float((records["t_tx_done"] != 0).sum()) / duration_s


def _ms(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g} ms"
