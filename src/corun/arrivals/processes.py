"""Arrival processes: small frozen values that say when requests are due.

A process knows nothing of clocks, sockets or streams. It answers one question, given a random generator and the
length of a segment: at which instants, in seconds from the segment's start, is a request due?

    poisson   |  |||   |  | ||      |     gaps exponential, CV 1
    constant  |    |    |    |    |       gaps equal, CV 0
    gamma     |||      |  ||||        |   gaps gamma(k), CV 1/sqrt(k)
    mmpp      |||||||        ||||||||     bursts: Poisson while on, a share of it (or nothing) while off
    sine/ramp                             Poisson with a moving rate, made by thinning
    closed                                no due instants at all: the next request waits for the last reply
    offline   ‖                           everything due at 0

`rate` is always the long-run mean in requests a second, so that two processes of equal rate offer equal load and
differ in shape only. Poisson, gamma, MMPP and sine are *prefix stable*: the same seed over a longer segment begins
with the same arrivals. Gamma and MMPP start in their stationary state, not with an arrival, so that short segments
are not biased.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from corun.errors import InputError

__all__ = [
    "MAX_ARRIVALS",
    "ClosedLoop",
    "Constant",
    "ExactCount",
    "Gamma",
    "Mmpp",
    "Modulated",
    "Offline",
    "Poisson",
    "Process",
    "Ramp",
    "Seconds",
    "Sine",
]

Seconds = NDArray[np.float64]

MAX_ARRIVALS: Final = 50_000_000
"""More arrivals than this in one stream's segment is a typing error, not a load (1.2 GB of rows)."""


class Process(Protocol):
    """What a schedule needs of an arrival process."""

    @property
    def name(self) -> str:
        """The process's name, as `parse` takes it and the validator judges it."""

    @property
    def rate(self) -> float | None:
        """Long-run mean in requests a second; None where the process has none (closed loop, offline, replay)."""

    def draw(self, rng: np.random.Generator, duration_s: float) -> Seconds:
        """Due instants in [0, duration_s), ascending; NaN marks a request without a due instant (closed loop)."""


@runtime_checkable
class Modulated(Process, Protocol):
    """A Poisson process whose rate is a known function of time; `Poisson` itself is the flat case."""

    @property
    def rate(self) -> float: ...

    @property
    def peak(self) -> float:
        """An upper bound of the intensity, requests a second."""

    def intensity(self, at_s: Seconds, duration_s: float) -> Seconds:
        """The rate at each instant, requests a second."""

    def cumulative(self, at_s: Seconds, duration_s: float) -> Seconds:
        """The expected number of arrivals in [0, at_s): the integral of the intensity."""


def require(what: str, *conditions: tuple[bool, str]) -> None:
    """Raise one InputError that lists every condition that does not hold."""
    problems = [text for holds, text in conditions if not holds]
    if problems:
        raise InputError(f"{what}: the parameters do not make an arrival process", problems)


def counted(value: int, field: str, least: int) -> tuple[bool, str]:
    """A condition for `require`: a number of requests that a schedule can hold."""
    return least <= value <= MAX_ARRIVALS, f"{field} must be in {least}..{MAX_ARRIVALS:,}, not {value!r}"


def positive(value: float, field: str, unit: str) -> tuple[bool, str]:
    """A condition for `require`: finite and above 0."""
    return math.isfinite(value) and value > 0, f"{field} must be above 0 {unit}, not {value!r}"


@dataclass(frozen=True)
class Constant:
    """Equal gaps of 1/rate; the first request is due `phase` gaps after the start (0 <= phase < 1).

    A segment of T s holds exactly rate * T arrivals when that is a whole number.
    """

    name: ClassVar[str] = "constant"
    rate: float
    phase: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.name,
            positive(self.rate, "rate", "requests/s"),
            (0 <= self.phase < 1, f"phase must be in 0..1 (a share of a gap), not {self.phase!r}"),
        )

    def draw(self, rng: np.random.Generator, duration_s: float) -> Seconds:
        count = math.ceil(self.rate * duration_s) + 1
        stamps = (np.arange(count, dtype=np.float64) + self.phase) / self.rate
        return stamps[stamps < duration_s]


@dataclass(frozen=True)
class Poisson:
    """Independent exponential gaps of mean 1/rate: many unrelated users (CV 1, dispersion 1 at every scale)."""

    name: ClassVar[str] = "poisson"
    rate: float

    def __post_init__(self) -> None:
        require(self.name, positive(self.rate, "rate", "requests/s"))

    @property
    def peak(self) -> float:
        return self.rate

    def intensity(self, at_s: Seconds, duration_s: float) -> Seconds:
        return np.full_like(at_s, self.rate)

    def cumulative(self, at_s: Seconds, duration_s: float) -> Seconds:
        return self.rate * at_s

    def draw(self, rng: np.random.Generator, duration_s: float) -> Seconds:
        return poisson_stamps(rng, self.rate, duration_s)


@dataclass(frozen=True)
class Gamma:
    """Independent gamma(shape) gaps of mean 1/rate; CV 1/sqrt(shape), so below shape 1 burstier than Poisson.

    Starts in equilibrium: the first arrival comes after a uniform share of a length-biased gap, and a gamma(k) gap
    seen that way is gamma(k + 1) (Cox, Renewal Theory, 1962, chapter 5).
    """

    name: ClassVar[str] = "gamma"
    rate: float
    shape: float

    def __post_init__(self) -> None:
        require(
            self.name,
            positive(self.rate, "rate", "requests/s"),
            (0.01 <= self.shape <= 1000, f"shape must be in 0.01..1000 (1 is Poisson), not {self.shape!r}"),
        )

    def draw(self, rng: np.random.Generator, duration_s: float) -> Seconds:
        scale_s = 1 / (self.rate * self.shape)
        first_s = rng.random() * rng.standard_gamma(self.shape + 1) * scale_s
        return _renew(
            lambda count: rng.standard_gamma(self.shape, count) * scale_s, first_s, 1 / self.rate, duration_s
        )


@dataclass(frozen=True)
class Mmpp:
    """Two-state Markov-modulated Poisson process: on for exponential(on_s), off for exponential(off_s).

    While on, requests come at `on_rate`; while off, at `floor` times that (0: an on/off source). `rate` is the mean
    over both. Fischer and Meier-Hellstern, The Markov-modulated Poisson process cookbook, 1993.
    """

    name: ClassVar[str] = "mmpp"
    rate: float
    on_s: float = 1.0
    off_s: float = 4.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.name,
            positive(self.rate, "rate", "requests/s"),
            positive(self.on_s, "on_s", "s"),
            positive(self.off_s, "off_s", "s"),
            (0 <= self.floor <= 1, f"floor must be in 0..1 (a share of the rate while on), not {self.floor!r}"),
        )

    @property
    def on_rate(self) -> float:
        """Requests a second while on."""
        return self.rate * (self.on_s + self.off_s) / (self.on_s + self.floor * self.off_s)

    def dispersion(self, window_s: float) -> float:
        """Variance over mean of the counts in windows of `window_s`, from the stationary covariance of the rate."""
        leave = 1 / self.on_s + 1 / self.off_s
        on = self.on_s / (self.on_s + self.off_s)
        variance = on * (1 - on) * (self.on_rate * (1 - self.floor)) ** 2
        x = leave * window_s
        return 1 + 2 * variance / (self.rate * leave) * (1 + math.expm1(-x) / x)

    @property
    def interval_cv(self) -> float:
        """Coefficient of variation of the gaps (squared: 1 plus a term in the difference of the two rates)."""
        high, low = self.on_rate, self.on_rate * self.floor
        end_on, end_off = 1 / self.on_s, 1 / self.off_s
        spread = 2 * end_on * end_off * (high - low) ** 2
        return math.sqrt(1 + spread / ((end_on + end_off) ** 2 * (high * low + high * end_off + low * end_on)))

    def draw(self, rng: np.random.Generator, duration_s: float) -> Seconds:
        [switches] = rng.spawn(1)
        on_first = bool(switches.random() < self.on_s / (self.on_s + self.off_s))
        knots_s, done = self._timeline(switches, on_first, duration_s)
        unit = poisson_stamps(rng, 1.0, float(np.interp(duration_s, knots_s, done)))
        stamps = np.interp(unit, done, knots_s)
        return stamps[stamps < duration_s]

    def _timeline(self, rng: np.random.Generator, on_first: bool, duration_s: float) -> tuple[Seconds, Seconds]:
        """Instants at which the state switches, and the expected arrivals up to each of them."""
        means = np.array([self.on_s, self.off_s] if on_first else [self.off_s, self.on_s])
        rates = np.array([1.0, self.floor] if on_first else [self.floor, 1.0]) * self.on_rate
        pairs = math.ceil(duration_s / (self.on_s + self.off_s)) + 8
        dwells = np.empty((0, 2))
        while dwells.sum() <= duration_s:
            dwells = np.concatenate([dwells, rng.standard_exponential((pairs, 2)) * means])
        knots_s = np.concatenate([[0.0], np.cumsum(dwells)])
        return knots_s, np.concatenate([[0.0], np.cumsum(dwells * rates)])


@dataclass(frozen=True)
class Sine:
    """Poisson whose rate swings as rate * (1 + amplitude * sin(2 pi (t / period_s + phase)))."""

    name: ClassVar[str] = "sine"
    rate: float
    amplitude: float = 0.5
    period_s: float = 60.0
    phase: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.name,
            positive(self.rate, "rate", "requests/s"),
            positive(self.period_s, "period_s", "s"),
            (0 <= self.amplitude <= 1, f"amplitude must be in 0..1 (a share of the rate), not {self.amplitude!r}"),
            (math.isfinite(self.phase), f"phase must be a number of periods, not {self.phase!r}"),
        )

    @property
    def peak(self) -> float:
        return self.rate * (1 + self.amplitude)

    def intensity(self, at_s: Seconds, duration_s: float) -> Seconds:
        turn = 2 * np.pi * (at_s / self.period_s + self.phase)
        return np.asarray(self.rate * (1 + self.amplitude * np.sin(turn)))

    def cumulative(self, at_s: Seconds, duration_s: float) -> Seconds:
        turn = 2 * np.pi * (at_s / self.period_s + self.phase)
        swing = np.cos(2 * np.pi * self.phase) - np.cos(turn)
        return np.asarray(self.rate * (at_s + self.amplitude * self.period_s / (2 * np.pi) * swing))

    def draw(self, rng: np.random.Generator, duration_s: float) -> Seconds:
        return _thin(rng, self, duration_s)


@dataclass(frozen=True)
class Ramp:
    """Poisson whose rate goes in a straight line from `first` to `last` requests a second over the segment."""

    name: ClassVar[str] = "ramp"
    first: float
    last: float

    def __post_init__(self) -> None:
        fits = all(math.isfinite(rate) and rate >= 0 for rate in (self.first, self.last))
        require(
            self.name,
            (fits, f"first and last must be at least 0 requests/s, not {self.first!r} and {self.last!r}"),
            (not fits or self.peak > 0, "first and last are both 0: nothing would ever arrive"),
        )

    @property
    def rate(self) -> float:
        return (self.first + self.last) / 2

    @property
    def peak(self) -> float:
        return max(self.first, self.last)

    def intensity(self, at_s: Seconds, duration_s: float) -> Seconds:
        return self.first + (self.last - self.first) * at_s / duration_s

    def cumulative(self, at_s: Seconds, duration_s: float) -> Seconds:
        return self.first * at_s + (self.last - self.first) * at_s**2 / (2 * duration_s)

    def draw(self, rng: np.random.Generator, duration_s: float) -> Seconds:
        return _thin(rng, self, duration_s)


@dataclass(frozen=True)
class Step:
    """Poisson whose rate jumps from `rate` to `high` requests a second at `from_s` and back at `until_s`.

    `rate` is the rate outside the step: the mean over a segment depends on how much of it the step fills.
    """

    name: ClassVar[str] = "step"
    rate: float
    high: float
    from_s: float
    until_s: float

    def __post_init__(self) -> None:
        ordered = 0 <= self.from_s < self.until_s < math.inf
        require(
            self.name,
            positive(self.rate, "rate", "requests/s"),
            positive(self.high, "high", "requests/s"),
            (ordered, f"from_s and until_s must ascend from 0 s on, not {self.from_s!r} and {self.until_s!r}"),
        )

    @property
    def peak(self) -> float:
        return max(self.rate, self.high)

    def intensity(self, at_s: Seconds, duration_s: float) -> Seconds:
        return np.where((at_s >= self.from_s) & (at_s < self.until_s), self.high, self.rate)

    def cumulative(self, at_s: Seconds, duration_s: float) -> Seconds:
        return self.rate * at_s + (self.high - self.rate) * (np.clip(at_s, self.from_s, self.until_s) - self.from_s)

    def draw(self, rng: np.random.Generator, duration_s: float) -> Seconds:
        return _thin(rng, self, duration_s)


@dataclass(frozen=True)
class ExactCount:
    """A Poisson, sine or ramp process *conditioned on its count*: exactly N arrivals, placed as the process would.

    Given their number, the arrivals of a Poisson process are independent draws from its normalised intensity
    (uniform for a constant rate). The count no longer varies, so windows the size of the segment show dispersion 0:
    the name says so ("poisson-exact"). `count` None takes the process's expected count, rounded.
    """

    process: Modulated
    count: int | None = None

    def __post_init__(self) -> None:
        name = getattr(self.process, "name", type(self.process).__name__)
        require(
            f"{name}-exact",
            (
                isinstance(self.process, Modulated),
                f"an exact count exists for poisson, sine, ramp and step, not for {name}",
            ),
            counted(0 if self.count is None else self.count, "count", least=0),
        )

    @property
    def name(self) -> str:
        return f"{self.process.name}-exact"

    @property
    def rate(self) -> float:
        return self.process.rate

    def count_in(self, duration_s: float) -> int:
        """How many arrivals a segment of that length holds."""
        if self.count is not None:
            return self.count
        return round(float(self.process.cumulative(np.array(duration_s), duration_s)))

    def draw(self, rng: np.random.Generator, duration_s: float) -> Seconds:
        wanted = self.count_in(duration_s)
        kept = np.empty(0)
        while kept.size < wanted:
            at_s = rng.random(2 * wanted + 16) * duration_s
            marks = rng.random(at_s.size) * self.process.peak
            kept = np.concatenate([kept, at_s[marks < self.process.intensity(at_s, duration_s)]])
        return np.sort(kept[:wanted])


@dataclass(frozen=True)
class ClosedLoop:
    """`streams` requests in flight; each reply is followed by `think_s` of rest and the next request.

    There are no due instants, so latency cannot be counted from them and coordinated omission cannot be seen. The
    schedule holds one row per loop, marked `UNPLANNED_NS`. One stream without rest is MLPerf's single stream.
    """

    name: ClassVar[str] = "closed"
    rate: ClassVar[None] = None
    streams: int = 1
    think_s: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.name,
            counted(self.streams, "streams", least=1),
            (0 <= self.think_s < math.inf, f"think_s must be at least 0 s, not {self.think_s!r}"),
        )

    def draw(self, rng: np.random.Generator, duration_s: float) -> Seconds:
        return np.full(self.streams, np.nan)


@dataclass(frozen=True)
class Offline:
    """`count` requests all due at 0: the service's own maximum throughput, no tail latency (MLPerf's Offline)."""

    name: ClassVar[str] = "offline"
    rate: ClassVar[None] = None
    count: int

    def __post_init__(self) -> None:
        require(self.name, counted(self.count, "count", least=1))

    def draw(self, rng: np.random.Generator, duration_s: float) -> Seconds:
        return np.zeros(self.count)


def poisson_stamps(rng: np.random.Generator, rate: float, duration_s: float) -> Seconds:
    """Arrivals of a Poisson process of that rate in [0, duration_s)."""
    return _renew(lambda count: rng.standard_exponential(count) / rate, None, 1 / rate, duration_s)


def _renew(gaps: Callable[[int], Seconds], first_s: float | None, mean_s: float, duration_s: float) -> Seconds:
    """Arrivals of a renewal process; gaps are summed in one pass, so that blocks leave no trace in the sum."""
    expected = duration_s / mean_s
    block = int(expected + 5 * math.sqrt(expected)) + 16
    drawn = np.empty(0) if first_s is None else np.array([first_s])
    while True:
        drawn = np.concatenate([drawn, gaps(block)])
        stamps = np.cumsum(drawn)
        if stamps[-1] >= duration_s:
            return stamps[stamps < duration_s]


def _thin(rng: np.random.Generator, process: Modulated, duration_s: float) -> Seconds:
    """Arrivals at the peak rate, each kept with probability intensity/peak (Lewis and Shedler, 1979)."""
    [marks] = rng.spawn(1)
    stamps = poisson_stamps(rng, process.peak, duration_s)
    return stamps[marks.random(stamps.size) * process.peak < process.intensity(stamps, duration_s)]
