"""Trains one net on one series: scalers from train only, early stopping on train's last tenth, the best epoch restored.

Validation is never looked at while training: it is kept for choosing the best naive forecast and for the proof that a
model beats it. The best epoch's weights are copied deeply; a shallow copy would go on training.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corun.errors import InputError, RunFault
from corun.predict.nets import Shape, build, pinball
from corun.predict.series import Field, Parts, Series

__all__ = ["DEFAULTS", "Curve", "Epoch", "Settings", "Trained", "part_rows", "settings_for", "train"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BATCH_WHEN_FORECASTING: Final = 1024
LEAST_STD: Final = 1e-6
OnEpoch = Callable[["Epoch"], None]


@dataclass(frozen=True)
class Settings:
    """How nets are trained; `interval` is the nominal coverage of what they forecast."""

    seq_len: int = 80
    epochs: int = 50
    batch_size: int = 32
    lr: float = 1e-3
    patience: int = 10
    seed: int = 0
    device: str = "cpu"
    interval: float = 0.9

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}; it must be {wanted}"
            for name, wanted, holds in (
                ("seq_len", "2 or more", self.seq_len >= 2),
                ("epochs", "1 or more", self.epochs >= 1),
                ("batch_size", "1 or more", self.batch_size >= 1),
                ("lr", "positive and at most 10", 0 < self.lr <= 10),
                ("interval", "between 0 and 1", 0 < self.interval < 1),
            )
            if not holds
        ]
        if problems:
            raise InputError("the training settings cannot be used", problems)

    @property
    def levels(self) -> tuple[float, float, float, float, float]:
        """Lower end, q10, median, q90, upper end."""
        return ((1 - self.interval) / 2, 0.1, 0.5, 0.9, (1 + self.interval) / 2)


DEFAULTS: Final = {
    "cuda": Settings(seq_len=100, epochs=100, batch_size=64, patience=15, device="cuda"),
    "cpu": Settings(seq_len=80, epochs=50, batch_size=32, patience=10, device="cpu"),
}


def settings_for(device: str) -> Settings:
    """The defaults of a device name such as cpu or cuda:0."""
    return replace(DEFAULTS["cuda" if device.startswith("cuda") else "cpu"], device=device)


@dataclass(frozen=True)
class Epoch:
    """What is told after every epoch."""

    model: str
    epoch: int
    epochs: int
    train_loss: float
    early_loss: float


@dataclass
class Curve:
    """Losses by epoch (pinball, standardised logs) and which epoch was kept."""

    train: list[float] = field(default_factory=list)
    early: list[float] = field(default_factory=list)
    best_epoch: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Trained:
    """A net with all it needs to forecast: input and output scales, quantile levels, target fields."""

    name: str
    shape: Shape
    net: Any
    input_mean: Floats
    input_std: Floats
    output_mean: Floats
    output_std: Floats
    levels: tuple[float, ...]
    fields: tuple[Field, ...]
    device: str = "cpu"

    def forecast(self, windows: Floats) -> Floats:
        """(m, L, C) features -> (m, H, T, 5) logs: lower end, q10, median, q90, upper end, not yet conformal."""
        return np.concatenate([self._batch(piece) for piece in _pieces(windows)])

    def at(self, series: Series, rows: Ints) -> Floats:
        """Forecasts (m, H, T, 5) in logs for the rows given, each from the rows before it (row n is the next one)."""
        length = self.shape.length
        if rows.size and int(rows.min()) < length:
            raise InputError(f"{int(rows.min())} rows before the forecast; the model needs {length}")
        windows = np.lib.stride_tricks.sliding_window_view(series.features, length, axis=0).transpose(0, 2, 1)
        pieces = [self._batch(windows[piece - length]) for piece in _pieces(rows)]
        return np.concatenate(pieces) if pieces else np.empty((0, self.shape.horizon, self.shape.targets, 5))

    def _batch(self, windows: Floats) -> Floats:
        scaled = ((windows - self.input_mean) / self.input_std).astype(np.float32)
        self.net.eval()
        with torch.inference_mode():
            out = self.net(torch.from_numpy(scaled).to(self.device)).cpu().numpy().astype(np.float64)
        rank = np.argsort(np.argsort(self.levels, kind="stable"), kind="stable")
        ascending = np.sort(out, axis=-1)[..., rank]
        return np.asarray(ascending * self.output_std[:, None] + self.output_mean[:, None])


def part_rows(part: slice, horizon: int, first: int = 0) -> Ints:
    """Rows of a part from which all `horizon` values lie inside it, at `first` or later."""
    return np.arange(max(part.start, first), part.stop - horizon + 1, dtype=np.int64)


def train(
    name: str,
    series: Series,
    parts: Parts,
    settings: Settings,
    horizon: int = 1,
    length: int | None = None,
    on_epoch: OnEpoch | None = None,
) -> tuple[Trained, Curve]:
    """Train a new net on `parts.train`, stopped by `parts.early`; returns it with its best epoch's weights.

    Raises RunFault when the loss is no number.
    """
    trained = _fresh(name, series, parts, settings, horizon, length or settings.seq_len)
    batches = _Batches(trained, series, horizon, settings.device)
    rows = torch.from_numpy(part_rows(parts.train, horizon, trained.shape.length)).to(settings.device)
    early = torch.from_numpy(part_rows(parts.early, horizon, trained.shape.length)).to(settings.device)
    optimiser = torch.optim.Adam(trained.net.parameters(), settings.lr)
    shuffle = torch.Generator().manual_seed(settings.seed)
    curve, best, started = Curve(), trained.net.state_dict(), time.monotonic()
    for epoch in range(settings.epochs):
        order = rows[torch.randperm(rows.numel(), generator=shuffle).to(settings.device)]
        curve.train.append(batches.learn(order, optimiser, settings.batch_size))
        curve.early.append(batches.loss(early))
        if not math.isfinite(curve.train[-1] + curve.early[-1]):
            raise RunFault(
                f"{name}: the loss is {curve.train[-1]} in epoch {epoch + 1}; lower --lr ({settings.lr:g})"
            )
        if on_epoch:
            on_epoch(Epoch(name, epoch + 1, settings.epochs, curve.train[-1], curve.early[-1]))
        if curve.early[-1] <= min(curve.early):
            curve.best_epoch, best = epoch, copy.deepcopy(trained.net.state_dict())
        elif epoch - curve.best_epoch >= settings.patience:
            break
    trained.net.load_state_dict(best)
    curve.seconds = time.monotonic() - started
    return trained, curve


def _fresh(name: str, series: Series, parts: Parts, settings: Settings, horizon: int, length: int) -> Trained:
    """An untrained net with the scales of the train part."""
    seen, targets = series.features[parts.train], series.log_targets[parts.train]
    shape = Shape(length, seen.shape[1], len(series.fields), horizon, len(settings.levels))
    return Trained(
        name=name,
        shape=shape,
        net=build(name, shape, settings.levels, settings.seed).to(settings.device),
        input_mean=seen.mean(axis=0),
        input_std=np.maximum(seen.std(axis=0), LEAST_STD),
        output_mean=targets.mean(axis=0),
        output_std=np.maximum(targets.std(axis=0), LEAST_STD),
        levels=settings.levels,
        fields=series.fields,
        device=settings.device,
    )


class _Batches:
    """A series as scaled tensors, from which windows are gathered by row number."""

    def __init__(self, trained: Trained, series: Series, horizon: int, device: str) -> None:
        inputs = (series.features - trained.input_mean) / trained.input_std
        outputs = (series.log_targets - trained.output_mean) / trained.output_std
        self.net, self.levels, self.length = trained.net, trained.levels, trained.shape.length
        self.inputs = torch.from_numpy(inputs.astype(np.float32)).to(device).unfold(0, self.length, 1)
        self.outputs = torch.from_numpy(outputs.astype(np.float32)).to(device).unfold(0, horizon, 1)

    def learn(self, rows: Tensor, optimiser: Any, size: int) -> float:
        """One pass over `rows`; returns the mean loss."""
        self.net.train()
        total = torch.zeros((), device=rows.device)
        for piece in rows.split(size):
            optimiser.zero_grad(set_to_none=True)
            loss = self._loss(piece)
            loss.backward()
            optimiser.step()
            total += loss.detach() * piece.numel()
        return float(total) / max(rows.numel(), 1)

    def loss(self, rows: Tensor) -> float:
        """Mean loss without learning."""
        self.net.eval()
        with torch.inference_mode():
            pieces = [(float(self._loss(piece)), piece.numel()) for piece in rows.split(BATCH_WHEN_FORECASTING)]
        return sum(loss * count for loss, count in pieces) / max(rows.numel(), 1)

    def _loss(self, rows: Tensor) -> Tensor:
        forecast = self.net(self.inputs[rows - self.length].transpose(1, 2))
        return pinball(forecast, self.outputs[rows].transpose(1, 2), self.levels)


def _pieces(rows: NDArray[Any]) -> Sequence[NDArray[Any]]:
    return [rows[start : start + BATCH_WHEN_FORECASTING] for start in range(0, len(rows), BATCH_WHEN_FORECASTING)]
