"""Judges whether arrivals are what they are called: each process is held to its own name.

No single figure tells a good generator from a bad one. A per-second count spaced evenly has a dispersion near 1 at
1 s and fails only below it; two processes with one seed keep a CV of 1 and fail only in correlation and dispersion.
So a Poisson schedule must pass all of

    count           within 4.24 standard deviations of the expected number
    cv              standard deviation over mean of the gaps: 1 +- 0.03 at 20,000 arrivals
    lag1            correlation of neighbouring gaps: 0 +- 0.03 at 20,000
    dispersion@c    variance over mean of counts in windows that hold c = 5, 20, 100, 500 arrivals on average:
                    1 +- 3 sqrt(2/m) over m windows (Cox and Lewis 1966), skipped below 30 windows
    ks              Kolmogorov-Smirnov distance of the gaps from an exponential of their own mean

Processes with a moving rate are judged the same way after their time is stretched by the expected count (the
time-rescaling theorem: Brown et al. 2002). The bands of cv and lag1 scale with 1/sqrt(n). A true process fails one
check in about one report of fifty, nearly always a dispersion by a hair; the faults this is for miss their bands by
factors. Works on intended and on achieved stamps; for the latter say by `jitter_ns` how far an achieved stamp may lie
from its intended one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corun.arrivals.legacy import Legacy
from corun.arrivals.processes import (
    ClosedLoop,
    Constant,
    ExactCount,
    Gamma,
    Mmpp,
    Modulated,
    Offline,
    Poisson,
    Process,
    Seconds,
)
from corun.arrivals.recorded import MinuteCounts, Replay, Trace

__all__ = ["Check", "Report", "cv", "dispersion", "lag1", "validate"]

SIGMAS: Final = 0.03 * math.sqrt(20_000)
"""Band of cv, lag1 and count in standard deviations: the 0.03 at 20,000 arrivals of the reference (4.24)."""

FEWEST_ARRIVALS: Final = 50
FEWEST_WINDOWS: Final = 30
WINDOW_MEANS: Final = (5, 20, 100, 500)

KS_EXPONENTIAL: Final = 1.55
"""0.1% point of Stephens' modified distance with the mean estimated (1974; simulated for n = 50..5,000)."""

KS_KNOWN: Final = 1.95
"""0.1% point of sqrt(n) times the Kolmogorov distance; conservative when the mean is estimated."""


@dataclass(frozen=True)
class Check:
    """One figure and the band it must lie in; `passed` is None where there is too little data to tell."""

    name: str
    value: float
    low: float
    high: float
    passed: bool | None
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What a set of stamps claims to be and how each check went."""

    process: str
    arrivals: int
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> str:
        """`pass`, `fail`, or `cannot tell` when there was too little data to judge more than the count."""
        if any(check.passed is False for check in self.checks):
            return "fail"
        return "pass" if any(check.passed and check.name != "count" for check in self.checks) else "cannot tell"

    @property
    def passed(self) -> bool:
        """Whether the verdict is `pass`."""
        return self.verdict == "pass"

    @property
    def reasons(self) -> tuple[str, ...]:
        """A sentence for each check that failed, or that could not be made when nothing failed."""
        failed = tuple(check.reason for check in self.checks if check.passed is False)
        return failed or tuple(check.reason for check in self.checks if check.passed is None)


def validate(stamps_ns: NDArray[np.int64], process: Process, duration_s: float, jitter_ns: int = 1) -> Report:
    """Hold the stamps of one stream's segment to the process they are said to come from.

    Args:
        stamps_ns: (n,) intended or achieved instants, ns from the segment's start, in any order.
        process: what they are called; `Legacy` calls itself Poisson and is judged as such.
        duration_s: the segment's length.
        jitter_ns: how far a stamp may lie from its intended instant; 1 allows for rounding only.
    """
    stamps_s = np.sort(np.asarray(stamps_ns, dtype=np.int64)) / 1e9
    checks = _checks(stamps_s, process, duration_s, jitter_ns / 1e9)
    return Report(process.name, stamps_s.size, tuple(checks))


def cv(gaps: Seconds) -> float:
    """Coefficient of variation: standard deviation over mean (0 constant, 1 exponential)."""
    mean = float(np.mean(gaps))
    return float(np.std(gaps)) / mean if mean > 0 else math.inf


def lag1(gaps: Seconds) -> float:
    """Correlation of each gap with the next; 0 when the gaps do not vary."""
    centred = gaps - np.mean(gaps)
    power = float(np.dot(centred, centred))
    return float(np.dot(centred[:-1], centred[1:])) / power if power > 0 else 0.0


def dispersion(stamps: Seconds, window: float, end: float) -> float:
    """Variance over mean of the counts in the whole windows of [0, end) (Fano factor): 1 for Poisson at any scale."""
    windows = int(end / window)
    counts = np.bincount((stamps[stamps < windows * window] / window).astype(np.int64), minlength=windows)[:windows]
    mean = float(np.mean(counts))
    return float(np.var(counts, ddof=1)) / mean if mean > 0 else math.nan


def _checks(stamps_s: Seconds, process: Process, duration_s: float, jitter_s: float) -> list[Check]:
    match process:
        case Constant():
            return _constant(stamps_s, process, duration_s, jitter_s)
        case Gamma():
            return _gamma(stamps_s, process, duration_s, jitter_s)
        case Mmpp():
            return _mmpp(stamps_s, process, duration_s)
        case Legacy():
            return _rescaled(stamps_s, Poisson(process.rate), duration_s, jitter_s)
        case ExactCount():
            exact = process.count_in(duration_s)
            return _rescaled(stamps_s, process.process, duration_s, jitter_s, exact)
        case Offline():
            late_s = float(np.abs(stamps_s).max(initial=0.0))
            count = _band("count", stamps_s.size, process.count, process.count)
            return [count, _band("latest_s", late_s, 0.0, jitter_s, "offline requests are all due at 0")]
        case ClosedLoop():
            return [_undecided("count", "a closed loop has no due instants to validate")]
        case MinuteCounts():
            return [_uniform_in_bins(stamps_s, process)]
        case Replay() | Trace():
            return _recorded(stamps_s, process, duration_s, jitter_s)
        case Modulated():
            return _rescaled(stamps_s, process, duration_s, jitter_s)
        case _:
            return [_undecided("count", f"there is no test for the process {process.name}")]


def _rescaled(
    stamps_s: Seconds, process: Modulated, duration_s: float, jitter_s: float, exact: int | None = None
) -> list[Check]:
    """The Poisson checks in the process's own time, in which one arrival is expected per unit."""
    expected = float(process.cumulative(np.array(duration_s), duration_s))
    clipped = np.clip(stamps_s, 0.0, duration_s)
    slack = 2 * jitter_s * process.peak
    count = _count(stamps_s.size, expected, 1.0) if exact is None else _band("count", stamps_s.size, exact, exact)
    return [count, *_poisson(process.cumulative(clipped, duration_s), expected, slack)]


def _poisson(stamps: Seconds, end: float, slack: float) -> list[Check]:
    """CV, lag-1, dispersion and KS of stamps in [0, end); `slack` is the allowed shift of a gap in mean gaps."""
    if stamps.size < FEWEST_ARRIVALS:
        return [_too_few(stamps.size)]
    gaps = np.diff(stamps)
    band = SIGMAS / math.sqrt(gaps.size) + slack
    checks = [
        _band("cv", cv(gaps), 1 - band, 1 + band, "1 is Poisson, less is evener, more is burstier"),
        _band("lag1", lag1(gaps), -band, band, "neighbouring gaps of a Poisson process are unrelated"),
    ]
    for mean in WINDOW_MEANS:
        checks.append(_dispersion(stamps, mean * end / stamps.size, end, f"dispersion@{mean}"))
    distance = _ks(gaps / gaps.mean(), lambda gap: -np.expm1(-gap)) - slack
    n = gaps.size
    modified = (distance - 0.2 / n) * (math.sqrt(n) + 0.26 + 0.5 / math.sqrt(n))
    return [*checks, _band("ks", modified, -math.inf, KS_EXPONENTIAL, "the gaps are not exponential")]


def _dispersion(stamps: Seconds, window: float, end: float, name: str) -> Check:
    windows = int(end / window)
    if windows < FEWEST_WINDOWS:
        return _undecided(name, f"{name}: {windows} windows, {FEWEST_WINDOWS} needed")
    band = 3 * math.sqrt(2 / windows)
    about = f"1 is Poisson; {windows} windows"
    return _band(name, dispersion(stamps, window, end), 1 - band, 1 + band, about)


def _constant(stamps_s: Seconds, process: Constant, duration_s: float, jitter_s: float) -> list[Check]:
    expected = process.draw(np.random.default_rng(0), duration_s).size
    count = _band("count", stamps_s.size, expected, expected)
    if stamps_s.size < 2:
        return [count, _undecided("gaps", f"{stamps_s.size} arrivals have no gap")]
    gaps = np.diff(stamps_s)
    off_s = float(np.abs(gaps - 1 / process.rate).max())
    return [
        count,
        _band("cv", cv(gaps), 0.0, 2 * jitter_s * process.rate, "equal gaps have CV 0"),
        _band("gap_error_s", off_s, 0.0, 2 * jitter_s, f"every gap should be {1 / process.rate:.6g} s"),
    ]


def _gamma(stamps_s: Seconds, process: Gamma, duration_s: float, jitter_s: float) -> list[Check]:
    from scipy.special import gammainc  # 0.1 s to import: only where a gamma process is judged

    shape = process.shape
    count = _count(stamps_s.size, process.rate * duration_s, max(1 / shape, 1.0))
    if stamps_s.size < FEWEST_ARRIVALS:
        return [count, _too_few(stamps_s.size)]
    gaps = np.diff(stamps_s)
    n, due, slack = gaps.size, 1 / math.sqrt(shape), 2 * jitter_s * process.rate
    band = SIGMAS * due * math.sqrt((1 + 1 / shape) / (2 * n)) + slack
    near = SIGMAS / math.sqrt(n) + slack

    def share_below(gap: Seconds) -> Seconds:
        return np.asarray(gammainc(shape, shape * gap), dtype=np.float64)

    distance = _ks(gaps / gaps.mean(), share_below) - float(share_below(np.array(slack)))
    return [
        count,
        _band("cv", cv(gaps), due - band, due + band, f"gamma gaps of shape {shape:g} have CV {due:.3g}"),
        _band("lag1", lag1(gaps), -near, near, "neighbouring gaps of a renewal process are unrelated"),
        _band("ks", distance * math.sqrt(n), -math.inf, KS_KNOWN, f"the gaps are not gamma of shape {shape:g}"),
    ]


def _mmpp(stamps_s: Seconds, process: Mmpp, duration_s: float) -> list[Check]:
    """Bursts: count, CV, and dispersion at the scales of one burst and of five cycles, against their formulas."""
    count = _count(stamps_s.size, process.rate * duration_s, process.dispersion(duration_s))
    long_s = 5 * (process.on_s + process.off_s)
    needed_s = FEWEST_WINDOWS * long_s
    if duration_s < needed_s or stamps_s.size < FEWEST_ARRIVALS:
        few = f"{stamps_s.size} arrivals in {duration_s:g} s; {FEWEST_ARRIVALS} in {needed_s:g} s needed"
        return [count, _undecided("bursts", few)]
    due = process.interval_cv
    checks = [count, _band("cv", cv(np.diff(stamps_s)), due * 0.8, due * 1.25, f"these bursts have CV {due:.3g}")]
    for name, window_s in (("dispersion@on", process.on_s), ("dispersion@long", long_s)):
        index = process.dispersion(window_s)
        found = dispersion(stamps_s, window_s, duration_s)
        checks.append(_band(name, found, index / 2, index * 2, f"these bursts have {index:.3g}, Poisson 1"))
    return checks


def _uniform_in_bins(stamps_s: Seconds, process: MinuteCounts) -> Check:
    if stamps_s.size < FEWEST_ARRIVALS:
        return _too_few(stamps_s.size)
    places = (stamps_s / process.bin_s) % 1.0
    distance = _ks(places, lambda place: place) * math.sqrt(stamps_s.size)
    return _band("ks", distance, -math.inf, KS_KNOWN, "the arrivals are not uniform inside their minute")


def _recorded(stamps_s: Seconds, process: Replay | Trace, duration_s: float, jitter_s: float) -> list[Check]:
    """A replay, or a trace with nothing random about it, must be met stamp by stamp."""
    if isinstance(process, Trace) and (process.keep < 1 or process.spread_s > 0):
        return [_undecided("stamp_error_s", f"{process.label} is thinned or spread at random: no stamp is known")]
    due_s = process.draw(np.random.default_rng(0), duration_s)
    count = _band("count", stamps_s.size, due_s.size, due_s.size)
    if stamps_s.size != due_s.size:
        return [count]
    worst_s = float(np.abs(stamps_s - due_s).max(initial=0.0))
    return [count, _band("stamp_error_s", worst_s, 0.0, jitter_s, f"the stamps are not those of {process.label}")]


def _ks(values: Seconds, share_below: Callable[[Seconds], Seconds]) -> float:
    """Kolmogorov-Smirnov distance of a sample from a distribution function."""
    below = share_below(np.sort(values))
    n = values.size
    ranks = np.arange(n + 1) / n
    return float(max((ranks[1:] - below).max(), (below - ranks[:-1]).max()))


def _count(count: int, expected: float, index: float) -> Check:
    """The number of arrivals, whose variance is `index` times its mean."""
    band = SIGMAS * math.sqrt(index * expected) + 1
    return _band("count", count, expected - band, expected + band, f"{expected:.6g} expected")


def _band(name: str, value: float, low: float, high: float, about: str = "") -> Check:
    passed = low <= value <= high
    if passed:
        return Check(name, value, low, high, True)
    reason = f"{name} {value:.4g} lies outside {low:.4g}..{high:.4g}" + (f" ({about})" if about else "")
    return Check(name, value, low, high, False, reason)


def _undecided(name: str, reason: str) -> Check:
    return Check(name, math.nan, math.nan, math.nan, None, reason)


def _too_few(arrivals: int) -> Check:
    return _undecided("gaps", f"{arrivals} arrivals, {FEWEST_ARRIVALS} needed to judge their gaps")
