"""Were the promises kept: each bound of each service in each arm is met, missed, or cannot be told.

A request that was rejected, failed or lost took longer than any bound: it is ranked as infinite, so a service cannot
keep its promise by refusing work. Latency is the sojourn, from the intended send time, all repeats of an arm together.

    n at or above the percentile's floor     met when the exact percentile <= bound, else missed
    n below the floor                        missed when so many requests over the bound would be improbable
                                             (<= 1 %) under the promise, else "cannot tell"

The floor (corun.stats.percentiles) is where one request more or less over the true percentile stops deciding.
"Cannot tell" is not "met": a program that asks gets exit code 3 for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from corun.run.directory import read_manifest, write_json
from corun.run.read import read_table, windows
from corun.run.records import INFER_CLIENT
from corun.stats.percentiles import fraction, percentile_of, sample_floor

Word = Literal["met", "missed", "cannot tell"]
Promises = Mapping[str, Mapping[str, float]]

FILE = "slo.json"
IMPROBABLE = 0.01
_COLUMNS = tuple(column for column in INFER_CLIENT if column.name in ("segment", "status", "sojourn_ms"))


@dataclass(frozen=True)
class Verdict:
    """One promise in one arm. measured_ms is None where there are too few requests or the percentile is infinite."""

    service: str
    arm: str
    figure: str
    bound_ms: float
    measured_ms: float | None
    requests: int
    over: int
    word: Word

    @property
    def sentence(self) -> str:
        """What a person needs to know about it."""
        where = f"{self.service} in {self.arm}: {self.figure} <= {self.bound_ms:g} ms"
        counts = f"{self.over} of {self.requests} requests took longer or were not answered"
        if self.word == "cannot tell":
            return f"{where} cannot be told from {self.requests} requests; it needs {_needed(self.figure)}, lengthen the run"
        measured = "" if self.measured_ms is None else f", measured {self.measured_ms:.4g} ms"
        return f"{where} {self.word}{measured}; {counts}"


def judge(path: Path, promises: Promises) -> list[Verdict]:
    """Every promise of a run directory, by service, arm and figure (`p99_ms` is figure p99).

    Arms in which a service was not asked for anything are left out.
    """
    if not promises:
        return []
    measured = [window for window in windows(read_manifest(path)) if window.arm != "train"]
    found = []
    for service, bounds in promises.items():
        table = read_table(path / "infer_client" / f"{service}.csv", _COLUMNS)
        sojourn = np.where(table["status"] == "OK", table["sojourn_ms"], np.inf)
        for arm in dict.fromkeys(window.arm for window in measured):
            mine = np.isin(table["segment"], [window.segment for window in measured if window.arm == arm])
            found += [verdict(service, arm, name, bound, sojourn[mine]) for name, bound in bounds.items()]
    return found


def verdict(service: str, arm: str, name: str, bound_ms: float, sojourn_ms: ArrayLike) -> Verdict:
    """Judge one bound on shape-(n,) latencies in ms, infinite where no OK came back."""
    values: NDArray[np.float64] = np.asarray(sojourn_ms, dtype=np.float64)
    figure, over = name.removesuffix("_ms"), int((values > bound_ms).sum())
    measured = _measure(figure, values)
    if measured is not None:
        word: Word = "met" if measured <= bound_ms else "missed"
    else:
        word = "missed" if len(values) and _improbable(figure, over, len(values)) else "cannot tell"
    finite = measured if measured is not None and np.isfinite(measured) else None
    return Verdict(service, arm, figure, bound_ms, finite, len(values), over, word)


def _measure(figure: str, values: NDArray[np.float64]) -> float | None:
    if figure == "max":
        return float(values.max()) if len(values) else None
    return percentile_of(values, float(figure[1:]))


def _improbable(figure: str, over: int, requests: int) -> bool:
    """P[at least `over` of `requests` over the bound] when no more than 1 - p are, by the binomial distribution."""
    if figure == "max" or not over:
        return False
    tail = 1 - fraction(float(figure[1:]))
    return float(special.bdtrc(over - 1, requests, tail)) <= IMPROBABLE


def _needed(figure: str) -> int:
    return 1 if figure == "max" else sample_floor(float(figure[1:]))


def overall(verdicts: Iterable[Verdict]) -> Word | None:
    """The worst of them: missed, cannot tell, met; None without a promise."""
    words = {verdict.word for verdict in verdicts}
    ranked: tuple[Word, ...] = ("missed", "cannot tell", "met")
    return next((word for word in ranked if word in words), None)


def kept(path: Path, promises: Promises) -> bool:
    """Whether every promise to a run directory was shown to be met; without a promise there is none to break."""
    return overall(judge(path, promises)) in (None, "met")


def as_json(verdicts: list[Verdict]) -> dict[str, Any]:
    """The overall word and every promise."""
    return {"slo": overall(verdicts), "promises": [asdict(verdict) for verdict in verdicts]}


def write(path: Path, promises: Promises) -> list[Verdict]:
    """Judge a run directory and, when something was promised, write its slo.json."""
    verdicts = judge(path, promises)
    if verdicts:
        write_json(path / FILE, as_json(verdicts))
    return verdicts


__all__ = ["FILE", "Promises", "Verdict", "as_json", "judge", "kept", "overall", "verdict", "write"]
