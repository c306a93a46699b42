"""How much a trainer may run beside a service of known load, and a model of the two in virtual time.

The share follows from the load forecast for the next window (rate x mean service time = utilisation u):

    share = clip((1 - headroom - u) / train_cost, floor, 1)

A negative headroom overbooks: for a forecast of an upper quantile, whose margin is already in it. A lower share applies
at once, a higher one only after `dwell` windows in a row allow it, so that the gap inside a burst does not start the
trainer. After a step of duration dt the trainer sleeps dt (1 / share - 1). `calibrate` takes the headroom from the past:
the smallest with which the past's own requests would have kept the promise.

The model has one device, one FIFO service and one trainer. While both have work the service runs at `service_speed`
and the trainer at `train_speed` of their speed alone; arrivals are given and depend on nothing (open loop).

    arrivals ──▶ queue ──▶ service ─┐ device      share of each window ──▶ pauses between steps
                           steps  ──┘
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corun.errors import InputError

__all__ = ["Device", "DutyRule", "Shared", "calibrate", "shares", "simulate"]

Floats = NDArray[np.float64]

NEVER: Final = float("inf")
ROUNDING_S: Final = 1e-9
LEAD: Final = 12
HEADROOMS: Final = tuple(round(-0.6 + 0.05 * step, 2) for step in range(27))


@dataclass(frozen=True)
class DutyRule:
    """Training share from load; the same rule serves every policy, only the forecast differs."""

    headroom: float = 0.1
    train_cost: float = 1.0
    floor: float = 0.05
    dwell: int = 2

    def __post_init__(self) -> None:
        if not (-1 < self.headroom < 1 and self.train_cost > 0 and 0 < self.floor <= 1 and self.dwell >= 1):
            raise InputError(
                f"{self}: headroom lies between -1 and 1, train_cost is positive, floor lies in (0, 1], dwell is 1 or more"
            )

    def share(self, utilisation: float) -> float:
        """The share of a window in which the service needs `utilisation` of the device."""
        return float(min(max((1 - self.headroom - utilisation) / self.train_cost, self.floor), 1.0))

    def follow(self, utilisations: Sequence[float]) -> Floats:
        """Shares (n,) of consecutive windows: down at once, up to what the last `dwell` windows all allow."""
        allowed = np.array([self.share(value) for value in utilisations])
        return np.array([allowed[max(k - self.dwell + 1, 0) : k + 1].min() for k in range(allowed.size)])


@dataclass(frozen=True)
class Device:
    """Speeds while service and trainer both work, and the trainer's step when it is alone."""

    service_speed: float = 0.5
    train_speed: float = 0.5
    step_s: float = 0.03
    batch: int = 16


@dataclass(frozen=True)
class Shared:
    """What came of a simulation: sojourn times (n,) in s and training samples a second."""

    sojourn_s: Floats
    train_samples_per_s: float

    def violation_pct(self, bound_s: float) -> float:
        """Share of requests slower than the bound, in percent."""
        return float(100 * (self.sojourn_s > bound_s).mean())


def shares(
    forecast: Callable[[float], float],
    service_s: float,
    rule: DutyRule,
    start_s: float,
    windows: int,
    window_s: float,
) -> Floats:
    """Shares (windows,) by a policy; forecast: instant in s -> requests/s of the window that begins there."""
    starts = start_s + window_s * np.arange(windows)
    return rule.follow([forecast(float(start)) * service_s for start in starts])


def calibrate(
    forecast: Callable[[float], float],
    past_s: ArrayLike,
    service_s: float,
    bound_s: float,
    window_s: float,
    device: Device,
    late_pct: float = 1.0,
    fallback: float = 0.0,
) -> float:
    """The smallest of HEADROOMS with which at most late_pct of the past's requests take longer than bound_s.

    A p99 promise is late_pct 1. past_s: (n,) ascending instants in s; forecast: as in `shares`, the first LEAD windows
    only fill its history. `fallback` when no headroom keeps the promise: a load that breaks it without any training
    says nothing about headroom. Violations fall as headroom grows (to the grain of a step), so it is found by bisection.
    """
    past = np.asarray(past_s, dtype=np.float64)
    windows = int((past[-1] - past[0]) // window_s) - LEAD if past.size else 0
    if windows < 1:
        return fallback
    start = float(past[0]) + LEAD * window_s
    inside = past[(past >= start) & (past < start + windows * window_s)]
    utilisations = [forecast(start + window_s * window) * service_s for window in range(windows)]

    def keeps(place: int) -> bool:
        duty = DutyRule(headroom=HEADROOMS[place]).follow(utilisations)
        return simulate(inside - start, service_s, duty, window_s, device).violation_pct(bound_s) <= late_pct

    place = bisect_left(range(len(HEADROOMS)), True, key=keeps)
    return HEADROOMS[place] if place < len(HEADROOMS) else fallback


def simulate(arrivals_s: ArrayLike, service_s: ArrayLike, duty: ArrayLike, window_s: float, device: Device) -> Shared:
    """Run the device from instant 0 until the last window ends and the queue is empty.

    arrivals_s: (n,) ascending, 0 or later; service_s: (n,) or one number, alone on the device; duty: (windows,) share
    of each window, 0 = no training, the last one holds on. Training after the last window's end is not counted.
    Raises ValueError when arrivals run backwards or a share is outside [0, 1].
    """
    arrivals = np.asarray(arrivals_s, dtype=np.float64)
    service = np.broadcast_to(np.asarray(service_s, dtype=np.float64), arrivals.shape)
    allowed = np.asarray(duty, dtype=np.float64)
    if arrivals.size and ((np.diff(arrivals) < 0).any() or arrivals[0] < 0):
        raise ValueError("arrivals must ascend from 0 or later")
    if allowed.size == 0 or (allowed < 0).any() or (allowed > 1).any():
        raise ValueError("there must be a share for one window at least, each between 0 and 1")
    return _Run(arrivals.tolist(), service.tolist(), allowed.tolist(), window_s, device).run()


class _Run:
    """State of one simulation: the next arrival, the request in service, the step in progress or the pause."""

    def __init__(
        self, arrivals: list[float], service: list[float], duty: list[float], window_s: float, device: Device
    ) -> None:
        self.arrivals, self.service, self.duty = arrivals, service, duty
        self.window_s, self.device = window_s, device
        self.end_s = window_s * len(duty)
        self.now = 0.0
        self.arrived = self.served = 0
        self.left_service = 0.0
        self.left_step = 0.0
        self.step_began = 0.0
        self.wake = 0.0
        self.steps = 0.0
        self.sojourn = [0.0] * len(arrivals)

    def run(self) -> Shared:
        while self.now < self.end_s or self.served < len(self.arrivals):
            serving, training = self.arrived > self.served, self.left_step > 0
            both = serving and training
            fast = self.device.service_speed if both else 1.0
            slow = self.device.train_speed if both else 1.0
            due = min(self._next_arrival(), NEVER if training else self.wake)
            due = min(due, self.now + self.left_service / fast if serving else NEVER)
            due = min(due, self.now + self.left_step / slow if training else NEVER)
            if self.now < self.end_s:
                due = min(due, self.end_s)
            self._pass(due, fast if serving else 0.0, slow if training else 0.0)
            self._arrive()
            self._serve(serving)
            self._train(training)
        return Shared(np.array(self.sojourn), self.steps * self.device.batch / self.end_s)

    def _next_arrival(self) -> float:
        return self.arrivals[self.arrived] if self.arrived < len(self.arrivals) else NEVER

    def _pass(self, until: float, service_speed: float, train_speed: float) -> None:
        elapsed = until - self.now
        self.left_service -= elapsed * service_speed
        self.left_step -= elapsed * train_speed
        if until <= self.end_s:
            self.steps += elapsed * train_speed / self.device.step_s
        self.now = until

    def _arrive(self) -> None:
        while self.arrived < len(self.arrivals) and self.arrivals[self.arrived] <= self.now:
            if self.arrived == self.served:
                self.left_service = self.service[self.arrived]
            self.arrived += 1

    def _serve(self, serving: bool) -> None:
        if serving and self.left_service <= ROUNDING_S:
            self.sojourn[self.served] = self.now - self.arrivals[self.served]
            self.served += 1
            self.left_service = self.service[self.served] if self.served < self.arrived else 0.0

    def _train(self, training: bool) -> None:
        """A step that ends begins its pause; a pause that ends begins a step; no share, no step in this window."""
        window = min(int((self.now + ROUNDING_S) / self.window_s), len(self.duty) - 1)
        share = self.duty[window]
        if training and self.left_step <= ROUNDING_S:
            self.left_step = 0.0
            took = self.now - self.step_began
            self.wake = self.now + took * (1 / share - 1) if share > 0 else self.now
        if self.left_step <= 0 and self.now >= self.wake - ROUNDING_S:
            if share > 0:
                self.left_step, self.step_began = self.device.step_s, self.now
            else:
                after = window + 1
                self.wake = after * self.window_s if after < len(self.duty) else NEVER
