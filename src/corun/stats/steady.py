"""Did a run reach a steady state, from which request on, and did the service keep up at all?

Three questions, three independent answers, none of which throws data away:

- Where does the warm-up end? MSER-5 (White 1997, "An effective truncation heuristic for bias reduction in
  simulation output"; White, Cobb & Spratt 2000): average the samples in batches of 5 and drop the first d
  batches, d minimising the squared standard error of what is left,
      MSER(d) = sum over i >= d of (Y[i] - mean(Y[d..]))^2 / (n - d)^2,   0 <= d <= n/2.
  A minimum in the second half of the run means that the warm-up never ended.
- Is it level? Triton perf_analyzer's rule: over the last three windows, max / min <= 1.10 for both
  throughput and p50 latency. Taken alone it condemns sound runs: of perfectly stationary M/D/1 runs of 4,000
  requests it passes 96 % at utilisation 0.1, 73 % at 0.5, 23 % at 0.8. A failure is therefore a *note*; it
  becomes a *problem* where p50 also has a trend: a two-sided t-test, at 1 %, on its slope over ten windows.
- Is it keeping up? In an over-saturated open loop the number of requests in flight grows for as long as the load
  lasts. A one-sided t-test on the least-squares slope of its averages over ten windows (guidellm tests the
  slope of its samples; averages over long windows are nearly independent, samples are not), and the growth
  must exceed both the mean level and one request, so that an immaterial slope does not condemn a run.
  Judged over the whole load, warm-up included: growth that began before the window is still growth.

Simulated M/D/1, 300 runs of 1,000 / 4,000 requests, share called over-saturated: utilisation 0.8 2 % / 0 %,
0.9 4 % / 1 %, 0.95 12 % / 4 %, 1.05 74 % / 96 %, 1.1 95 % / 100 %. Share without any problem: 0.5 98 % / 100 %,
0.8 96 % / 100 %, 0.9 95 % / 98 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from corun.stats.percentiles import METHOD, as_samples
from corun.stats.queues import mean_in_flight

BATCH: Final = 5
WINDOWS: Final = 3
STABILITY: Final = 0.10
SLOPE_WINDOWS: Final = 10
SLOPE_ALPHA: Final = 0.01
LOSSES: Final = 0.01
NEVER: Final = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, slots=True)
class Truncation:
    """How many leading samples are warm-up; `ended` False means the run was too short to see it end."""

    dropped: int
    samples: int
    ended: bool


@dataclass(frozen=True, slots=True)
class Stability:
    """max / min over the last windows for throughput and p50; `windows` values of each, oldest first.

    A window without a reply makes both ratios infinite.
    """

    throughput_ratio: float
    p50_ratio: float
    throughput_per_s: tuple[float, ...]
    p50_ns: tuple[float, ...]
    stable: bool


@dataclass(frozen=True, slots=True)
class Saturation:
    """The trend of requests in flight: growth over the load (requests), its mean level, one-sided p."""

    slope_per_s: float
    growth: float
    mean_in_flight: float
    p: float
    saturated: bool


@dataclass(frozen=True, slots=True)
class Steady:
    """The report on one run of one service: what the checks found, what is wrong, and what is merely worth a look.

    `drift_p` is the two-sided p of the hypothesis that p50 has no trend over the kept part of the run.
    """

    warm_up: Truncation | None
    stability: Stability | None
    drift_p: float | None
    saturation: Saturation | None
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def steady(self) -> bool:
        """Whether nothing speaks against quoting percentiles of the kept samples."""
        return not self.problems


def mser5(samples: ArrayLike, *, batch: int = BATCH) -> Truncation | None:
    """Return White's truncation point of shape-(n,) samples in time order; None below 10 batches.

    `ended` is False when the minimum lies at the very end of the allowed half, i.e. the series still changes.
    Source: White 1997; batches of 5 and the half limit: White, Cobb & Spratt 2000.
    """
    values = as_samples(samples)
    batches = values.size // batch
    if batches < 10:
        return None
    means = values[: batches * batch].reshape(batches, batch).mean(axis=1)
    means = means - means.mean()
    left = np.arange(batches, 0, -1)
    sums, squares = (np.cumsum(series[::-1])[::-1] for series in (means, means**2))
    allowed = batches // 2 + 1
    errors = (np.maximum(squares - sums**2 / left, 0) / left.astype(np.float64) ** 2)[:allowed]
    best = int(np.argmin(errors))
    return Truncation(best * batch, values.size, best < allowed - 1)


def three_windows(
    end_ns: ArrayLike, sojourn_ns: ArrayLike, start_at_ns: int, stop_at_ns: int, *, windows: int = WINDOWS
) -> Stability:
    """Apply perf_analyzer's rule to [start_at_ns, stop_at_ns) cut into `windows` equal windows.

    end_ns, sojourn_ns: (n,) reply instants and latencies in ns, one per answered request, in any order.
    Throughput counts the replies inside a window; p50 is exact. Raises ValueError for an empty time range.
    """
    if stop_at_ns <= start_at_ns:
        raise ValueError(f"the window must end after it starts, got [{start_at_ns}, {stop_at_ns})")
    ends, sojourns = np.asarray(end_ns, dtype=np.int64), as_samples(sojourn_ns)
    if ends.shape != sojourns.shape:
        raise ValueError(f"{ends.size} reply instants but {sojourns.size} latencies")
    inside = (ends >= start_at_ns) & (ends < stop_at_ns)
    which = (ends[inside] - start_at_ns) * windows // (stop_at_ns - start_at_ns)
    parts = [sojourns[inside][which == index] for index in range(windows)]
    length_s = (stop_at_ns - start_at_ns) / windows / 1e9
    rates = tuple(part.size / length_s for part in parts)
    medians = tuple(float(np.quantile(part, 0.5, method=METHOD)) if part.size else math.nan for part in parts)
    ratios = [max(series) / min(series) if all(rates) else math.inf for series in (rates, medians)]
    return Stability(ratios[0], ratios[1], rates, medians, max(ratios) <= 1 + STABILITY)


def slope_test(values: ArrayLike) -> tuple[float, float]:
    """Return (least-squares slope per step, one-sided p that it is not above zero) of shape-(n,) values, n >= 3."""
    data = as_samples(values)
    if data.size < 3:
        raise ValueError(f"a slope needs at least 3 values, got {data.size}")
    steps = np.arange(data.size) - (data.size - 1) / 2
    slope = float(steps @ data / (steps @ steps))
    rest = data - data.mean() - slope * steps
    error = math.sqrt(float(rest @ rest) / (data.size - 2) / float(steps @ steps))
    if error <= 1e-12 * abs(slope) or error == 0:
        return slope, 0.0 if slope > 0 else 1.0
    return slope, float(special.stdtr(data.size - 2, -slope / error))


def over_saturation(start_ns: ArrayLike, end_ns: ArrayLike, *, alpha: float = SLOPE_ALPHA) -> Saturation | None:
    """Test whether requests in flight grew for as long as load was offered; None below 100 requests.

    start_ns, end_ns: (n,) intended send and reply instants in ns, whole load; NEVER as the end of a request
    that was not answered. Up to 1 % of such requests are losses and left out; more are a backlog in flight.
    """
    starts, ends = np.asarray(start_ns, dtype=np.int64), np.asarray(end_ns, dtype=np.int64)
    if starts.shape != ends.shape:
        raise ValueError(f"{starts.size} starts but {ends.size} ends")
    lost = ends == NEVER
    if lost.sum() <= LOSSES * lost.size:
        starts, ends = starts[~lost], ends[~lost]
    if starts.size < 100 or starts.min() == starts.max():
        return None
    first, last = int(starts.min()), int(starts.max())
    edges = np.linspace(0, last - first, SLOPE_WINDOWS + 1)
    levels = mean_in_flight(starts - first, np.minimum(ends, last) - first, edges)
    slope, p = slope_test(levels)
    growth, mean = slope * SLOPE_WINDOWS, float(levels.mean())
    seconds = (last - first) / SLOPE_WINDOWS / 1e9
    return Saturation(slope / seconds, growth, mean, p, p < alpha and growth > max(mean, 1.0))


def steady_state(start_ns: ArrayLike, end_ns: ArrayLike) -> Steady:
    """Judge one run of one service from its intended send and reply instants, (n,) int64 ns, in any order.

    NEVER marks a request without a reply: it has no latency (in flight: see over_saturation). The warm-up is found on
    latencies in send order; the stability rule then looks at what MSER-5 keeps. A check without enough
    requests is None and `problems` says so.
    """
    starts, ends = np.asarray(start_ns, dtype=np.int64), np.asarray(end_ns, dtype=np.int64)
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    saturation = over_saturation(starts, ends)
    answered = ends != NEVER
    starts, ends = starts[answered], ends[answered]
    warm_up = mser5((ends - starts).astype(np.float64))
    stability, drift_p = _kept_stability(starts, ends, warm_up)
    problems = _problems(warm_up, stability, drift_p, saturation)
    return Steady(warm_up, stability, drift_p, saturation, problems, _notes(stability, drift_p))


def _kept_stability(
    starts: NDArray[np.int64], ends: NDArray[np.int64], warm_up: Truncation | None
) -> tuple[Stability | None, float | None]:
    """Return the stability rule and the drift test on what follows the warm-up."""
    if warm_up is None:
        return None, None
    ends, sojourns = ends[warm_up.dropped :], (ends - starts)[warm_up.dropped :]
    first, last = int(starts[warm_up.dropped]), int(starts[-1])
    if last <= first:
        return None, None
    fine = three_windows(ends, sojourns, first, last, windows=SLOPE_WINDOWS).p50_ns
    drift_p = None if any(map(math.isnan, fine)) else _either_slope(fine)
    return three_windows(ends, sojourns, first, last), drift_p


def _either_slope(values: Sequence[float]) -> float:
    """Return the two-sided p of a zero slope."""
    slope, p = slope_test(values)
    return 1.0 if slope == 0 else 2 * min(p, 1 - p)


def _problems(
    warm_up: Truncation | None,
    stability: Stability | None,
    drift_p: float | None,
    saturation: Saturation | None,
) -> tuple[str, ...]:
    problems = []
    if warm_up is None or stability is None or saturation is None:
        problems.append("too few requests to judge whether the run is steady; lengthen the run")
    if saturation is not None and saturation.saturated:
        problems.append(
            f"over-saturated: requests in flight grew by {saturation.growth:.0f} around a mean of"
            f" {saturation.mean_in_flight:.0f}; lower the rate, no percentile of this run is quoted"
        )
    if warm_up is not None and not warm_up.ended:
        problems.append("the warm-up did not end in the first half of the run; lengthen the warm-up")
    if stability is not None and not stability.stable and _drifts(drift_p):
        cause = "p50 has a trend" if drift_p is not None else f"a {SLOPE_WINDOWS}th of the run has no reply"
        problems.append(f"drifting: {cause} and {_unlevel(stability)}; look for throttling or a cold start")
    return tuple(problems)


def _notes(stability: Stability | None, drift_p: float | None) -> tuple[str, ...]:
    if stability is None or stability.stable or _drifts(drift_p):
        return ()
    return (f"without a trend, {_unlevel(stability)}; usual for a queue in a short run, a longer run is more level",)


def _drifts(drift_p: float | None) -> bool:
    return drift_p is None or drift_p < SLOPE_ALPHA


def _unlevel(stability: Stability) -> str:
    return (
        f"the last {WINDOWS} windows differ by x{stability.throughput_ratio:.2f} in throughput and"
        f" x{stability.p50_ratio:.2f} in p50 (perf_analyzer's limit is x{1 + STABILITY:.2f})"
    )
