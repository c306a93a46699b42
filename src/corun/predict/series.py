"""Turns requests into causal rows: features a forecaster may see, targets it must meet, and parts split by time.

Row i is request i + 1 (the first request has no gap before it). A forecast of row i is made when row i - 1 arrives:

    arrivals      ──●────●──────────●───●───────▶        features of rows i-L .. i-1  ─▶  targets of row i
    responses        └──────────┘ done: visible from the first row that arrives after it

Prompt sizes and gaps are known at arrival. A response's length is known only when it is complete: `visible` holds,
for every value, the first row at whose arrival it may be used. As a feature, row j carries the mean of the responses
that completed since row j - 1 (or the last known such mean), so a window of rows never shows what was still running.

Windows are dense: an empty window counts 0. A window's tokens are the prompt tokens that arrive in it and the response
tokens that complete in it; both are known when it closes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corun.errors import InputError
from corun.predict.data import NS, Requests

__all__ = ["REQUEST_FIELDS", "WINDOW_FIELDS", "Field", "Parts", "Series", "request_series", "split", "window_series"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESPONSE_LAG_S: Final = 10.0
"""Without a recorded duration a response counts as complete so long after its arrival (about 200 tokens at 50 ms)."""

DAY_S: Final = 86_400.0
SHARES: Final = (0.6, 0.7, 0.8)
EARLY_SHARE: Final = 0.9


@dataclass(frozen=True)
class Field:
    """One target; forecasts work on log1p(scale * value)."""

    name: str
    scale: float = 1.0

    def to_log(self, values: Floats) -> Floats:
        return np.asarray(np.log1p(values * self.scale))

    def from_log(self, values: Floats) -> Floats:
        return np.asarray(np.maximum(np.expm1(values), 0.0) / self.scale)


REQUEST_FIELDS: Final = (Field("inter_arrival_s", 1000.0), Field("request_tokens"), Field("response_tokens"))
WINDOW_FIELDS: Final = (Field("requests"), Field("tokens"))


@dataclass(frozen=True)
class Series:
    """n rows: features (n, C), of which the first T are the targets' own logs as far as visible; targets (n, T) raw;
    visible (n, T): first row at which a value may be used; t_ns (n,): when the row's values are complete."""

    fields: tuple[Field, ...]
    features: Floats
    targets: Floats
    visible: Ints
    t_ns: Ints

    def __len__(self) -> int:
        return int(self.t_ns.size)

    @property
    def log_targets(self) -> Floats:
        """(n, T)"""
        return np.stack([field.to_log(self.targets[:, place]) for place, field in enumerate(self.fields)], axis=1)

    def from_log(self, values: Floats) -> Floats:
        """(..., T, k) logs as raw values, field by field."""
        columns = [field.from_log(values[..., place, :]) for place, field in enumerate(self.fields)]
        return np.stack(columns, axis=-2)


@dataclass(frozen=True)
class Parts:
    """Row ranges in time order with a gap between them: train, its last tenth for early stopping, and the rest."""

    train: slice
    early: slice
    validation: slice
    calibration: slice
    test: slice

    @property
    def learning(self) -> slice:
        """Train and early stopping: all that baselines and scalers may see."""
        return slice(self.train.start, self.early.stop)


def request_series(requests: Requests, response_lag_s: float = RESPONSE_LAG_S) -> Series:
    """Rows of single requests with the targets inter_arrival_s, request_tokens, response_tokens.

    response_lag_s: used only where the trace does not record how long a response took.
    """
    t_ns = requests.t_ns[1:]
    rows = np.arange(t_ns.size)
    response = requests.response_tokens[1:]
    targets = np.stack([requests.gaps_s, requests.request_tokens[1:], response], axis=1)
    done_ns = _done_ns(requests, response_lag_s)[1:]
    visible = np.maximum(rows, np.searchsorted(t_ns, done_ns, side="left"))
    gap, prompt, answer = REQUEST_FIELDS
    seen = _as_of(answer.to_log(response), visible)
    features = np.stack([gap.to_log(targets[:, 0]), prompt.to_log(targets[:, 1]), seen], axis=1)
    return Series(REQUEST_FIELDS, features, targets, np.stack([rows, rows, visible], axis=1), t_ns)


def window_series(
    requests: Requests, window_s: float, response_lag_s: float = RESPONSE_LAG_S, end_ns: int | None = None
) -> Series:
    """Dense windows with the targets requests and tokens.

    Windows start at the first request and the last, partial one is dropped; with `end_ns` the last window ends there
    (exclusive) and the first, partial one is dropped. Two days of data or more add the time of day as two features.
    """
    width = round(window_s * NS)
    if width < 1:
        raise InputError(f"a window of {window_s} s; it must be positive")
    first, last = int(requests.t_ns[0]), int(requests.t_ns[-1])
    count = (last - first) // width if end_ns is None else (end_ns - first) // width
    start = first if end_ns is None else end_ns - count * width
    arriving = _window_of(requests.t_ns, start, width, count)
    finishing = _window_of(_done_ns(requests, response_lag_s), start, width, count)
    counts = np.bincount(arriving, minlength=count + 1)[:count].astype(np.float64)
    tokens = np.bincount(arriving, weights=requests.request_tokens, minlength=count + 1)[:count]
    tokens += np.bincount(finishing, weights=requests.response_tokens, minlength=count + 1)[:count]
    targets = np.stack([counts, tokens], axis=1)
    closes_ns = start + width * np.arange(1, count + 1, dtype=np.int64)
    logs = [field.to_log(targets[:, place]) for place, field in enumerate(WINDOW_FIELDS)]
    if count * window_s >= 2 * DAY_S:
        angle = 2 * np.pi * (closes_ns / NS % DAY_S) / DAY_S
        logs += [np.sin(angle), np.cos(angle)]
    rows = np.arange(count)
    return Series(WINDOW_FIELDS, np.stack(logs, axis=1), targets, np.stack([rows, rows], axis=1), closes_ns)


def split(rows: int, gap: int, minimum: int) -> Parts:
    """60/10/10/20 by time with `gap` rows left out between the parts; the last tenth of train stops the training.

    Raises InputError when a part would be shorter than `minimum` rows.
    """
    ends = [int(share * rows) for share in SHARES]
    cut = int(EARLY_SHARE * ends[0])
    parts = Parts(
        train=slice(0, cut),
        early=slice(min(cut + gap, ends[0] - (ends[0] - cut) // 2), ends[0]),
        validation=slice(ends[0] + gap, ends[1]),
        calibration=slice(ends[1] + gap, ends[2]),
        test=slice(ends[2] + gap, rows),
    )
    shortest = min(part.stop - part.start for part in (parts.validation, parts.calibration, parts.test))
    if shortest < minimum or cut < 2 * gap:
        needed = max(10 * (gap + minimum + 1), 4 * gap)
        raise InputError(
            f"{rows} rows are too few for an input of {gap} rows; give at least {needed} or a shorter one"
        )
    return parts


def visible_order(series: Series, target: int) -> tuple[Floats, Ints]:
    """One target's values in the order they become known, and how many are known when each row is forecast.

    Returns (n,) values and (n + 1,) counts: entry i is for the forecast of row i, entry n for the next row.
    """
    visible = series.visible[:, target]
    order = np.argsort(visible, kind="stable")
    known = np.searchsorted(visible[order], np.arange(len(series) + 1) - 1, side="right")
    return series.targets[order, target], known


def _done_ns(requests: Requests, response_lag_s: float) -> Ints:
    if requests.elapsed_s is not None:
        return np.asarray(requests.t_ns + np.rint(requests.elapsed_s * NS).astype(np.int64))
    return requests.t_ns + round(response_lag_s * NS)


def _as_of(values: Floats, visible: Ints) -> Floats:
    """At each row the mean of the values that became visible there, else the last such mean (0 before the first)."""
    n = values.size
    inside = visible < n
    sums = np.bincount(visible[inside], weights=values[inside], minlength=n)
    counts = np.bincount(visible[inside], minlength=n)
    means = sums / np.maximum(counts, 1)
    latest = np.maximum.accumulate(np.where(counts > 0, np.arange(n), -1))
    return np.where(latest >= 0, means[np.maximum(latest, 0)], 0.0)


def _window_of(t_ns: Ints, start: int, width: int, count: int) -> Ints:
    """Window index of each instant; those outside fall into an extra last bin."""
    index = (t_ns - start) // width
    return np.where((index < 0) | (index >= count), count, index)
