"""The two learned forecasters: an LSTM and a DLinear, both with one output per quantile, target and horizon.

DLinear (Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023) splits the input into a
moving average and the rest and maps each with one linear layer over time, shared by the channels; here a small matrix
then mixes channels into targets, so that prompt sizes may tell something about gaps.

    input (B, L, C) ── moving average, ends replicated ──▶ trend ── Linear(L, H*Q) ─┐
          └─────────── input - trend ────────────────────▶ rest  ── Linear(L, H*Q) ─┴─▶ (B, C, H*Q) ── mix ──▶ (B, H, T, Q)

Both are trained with the pinball loss on standardised logs. Its 0.5 part is the absolute error, the score they are
judged by; a squared loss costs up to half of that score on these heavy tails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from corun.errors import InputError, suggest

__all__ = ["NETS", "DLinear", "Lstm", "Shape", "build", "pinball"]

KERNEL: Final = 25


@dataclass(frozen=True)
class Shape:
    """What goes in and out: (B, length, channels) to (B, horizon, targets, quantiles)."""

    length: int
    channels: int
    targets: int
    horizon: int
    quantiles: int
    hidden: int = 32


class Lstm(nn.Module):
    """One LSTM layer; its last state, through one linear layer, corrects the mean of the input's target channels.

    The mean carries the level: a bounded state cannot follow a load that leaves the range seen in training.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.lstm = nn.LSTM(shape.channels, shape.hidden, batch_first=True)
        self.head = nn.Linear(shape.hidden, shape.horizon * shape.targets * shape.quantiles, bias=False)
        self.level = nn.Parameter(torch.ones(shape.targets))
        self.bias = nn.Parameter(torch.zeros(shape.horizon, shape.targets, shape.quantiles))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, H, T, Q); quantiles may still cross."""
        out = self.head(self.lstm(x)[0][:, -1])
        level = self.level * x[:, :, : self.shape.targets].mean(dim=1)
        out = out.view(-1, self.shape.horizon, self.shape.targets, self.shape.quantiles)
        return out + level[:, None, :, None] + self.bias


class DLinear(nn.Module):
    """Trend and rest, one linear map over time each, then a mix of channels.

    It starts as the plain mean of its input (the paper's 1/L), so that on noise it has nothing to unlearn.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.kernel = min(KERNEL, shape.length - 1 + shape.length % 2)
        outputs = shape.horizon * shape.quantiles
        self.trend = nn.Linear(shape.length, outputs)
        self.rest = nn.Linear(shape.length, outputs)
        self.mix = nn.Parameter(torch.eye(shape.targets, shape.channels))
        self.bias = nn.Parameter(torch.zeros(shape.horizon, shape.targets, shape.quantiles))
        for layer, weight in ((self.trend, 1 / shape.length), (self.rest, 0.0)):
            nn.init.constant_(layer.weight, weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, H, T, Q); quantiles may still cross."""
        by_channel = x.transpose(1, 2)
        side = self.kernel // 2
        padded = nn.functional.pad(by_channel, (side, side), mode="replicate") if side else by_channel
        trend = nn.functional.avg_pool1d(padded, self.kernel, stride=1)
        out = self.trend(trend) + self.rest(by_channel - trend)
        out = out.view(-1, self.shape.channels, self.shape.horizon, self.shape.quantiles)
        return torch.einsum("bchq,tc->bhtq", out, self.mix) + self.bias


NETS: Final[dict[str, Callable[[Shape], Any]]] = {"lstm": Lstm, "dlinear": DLinear}


def build(name: str, shape: Shape, levels: Sequence[float], seed: int) -> Any:
    """A freshly initialised net whose quantiles start at the normal's; the process's random state is not disturbed."""
    if name not in NETS:
        raise InputError(f'model "{name}" is not known{suggest(name, NETS)} (known: {", ".join(NETS)})')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = NETS[name](shape)
    with torch.no_grad():
        net.bias += torch.special.ndtri(torch.tensor(levels, dtype=torch.float32))
    return net


def pinball(forecast: Tensor, actual: Tensor, levels: Sequence[float]) -> Tensor:
    """Mean pinball loss of (B, H, T, Q) quantile forecasts against (B, H, T) values (Koenker & Bassett 1978)."""
    error = actual.unsqueeze(-1) - forecast
    q = torch.tensor(levels, dtype=forecast.dtype, device=forecast.device)
    return torch.maximum(q * error, (q - 1) * error).mean()
