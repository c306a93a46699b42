"""How much slower services get beside each other and beside training: a small model fitted on few runs.

A request of service i finds other threads that want a core. Service j is busy a share rho_j of the time, the trainer
always, so with n = 1 + sum Bernoulli(rho_j) threads on C cores it runs max(1, n / C) times longer: processor sharing.
What remains is pressure on caches and memory bandwidth, taken as linear in the others' load:

    slowdown_i(S) = 1 + a c0_i(S) + b [c1_i(S) - c0_i(S)] + p sum_{j != i} rho_j + t_i      a, b, p, t_i >= 0

    c0_i   E[max(1, n / C)] - 1 of the services alone (exact: the sum of Bernoullis is Poisson-binomial)
    c1_i   the same with the trainer's threads; b near 0 where the policy keeps the trainer out of the way
    t_i    what the trainer costs this service beyond that
    rho_j  rate_j * service time_j * slowdown_j: a slower service is busy longer; least fixed point from 1 upwards

    training speed / alone = exp(-sum_j k_j rate_j service_j)                                k_j >= 0

Sensitivity x pressure instead of a coefficient per pair is the form of Quasar (ASPLOS'14) and of gpulets (ATC'22); n / C is
the fluid limit of processor sharing. Non-negative least squares (Lawson and Hanson 1974) with a slight ridge, which
gives to a and b what t_i does not need. All terms grow with every load, hence so does every prediction.

The tail comes from corun.plan.tail with the service times measured beside the trainer as shape; its excess over the
service alone is scaled by one factor kappa fitted on the same runs. Alone, the prediction is what was measured alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

RIDGE: Final = 0.03
ROUNDS: Final = 60
MAX_SLOWDOWN: Final = 1e3


@dataclass(frozen=True)
class Running:
    """One service that runs: its model, its requests/s and its mean service time alone in ms."""

    model: str
    rate: float
    service_ms: float

    @property
    def load(self) -> float:
        """Share of the time it is busy when nobody slows it down; 1 is all of it."""
        return self.rate * self.service_ms / 1000


@dataclass(frozen=True)
class Observed:
    """Slowdown of service `index` among those running: mean service time there over alone. weight: requests."""

    running: tuple[Running, ...]
    index: int
    slowdown: float
    busy: tuple[float, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Slowed:
    """Training speed over alone beside the services running."""

    running: tuple[Running, ...]
    ratio: float


@dataclass(frozen=True)
class Interference:
    """Fitted coefficients. threads: the trainer's, 0 = nobody trains."""

    cores: int
    threads: int
    sharing: float = 1.0
    training: float = 1.0
    pressure: float = 0.0
    trainer: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)

    def slowdowns(self, running: Sequence[Running]) -> list[float]:
        """Predicted slowdown of every service in a set; `MAX_SLOWDOWN` where the queue never ends."""
        slow = [1.0] * len(running)
        for _ in range(ROUNDS):
            busy = [min(1.0, one.load * factor) for one, factor in zip(running, slow, strict=True)]
            after = [min(MAX_SLOWDOWN, self._one(running, busy, index)) for index in range(len(running))]
            if np.allclose(after, slow, rtol=1e-6):
                return after
            slow = after
        return slow

    def _one(self, running: Sequence[Running], busy: Sequence[float], index: int) -> float:
        features = self.features(busy, index)
        return (
            1 + float(np.dot((self.sharing, self.training, self.pressure), features)) + self._trainer(running[index])
        )

    def _trainer(self, one: Running) -> float:
        if not self.threads:
            return 0.0
        known = list(self.trainer.values())
        return self.trainer.get(one.model, float(np.mean(known)) if known else 0.0)

    def features(self, busy: Sequence[float], index: int) -> tuple[float, float, float]:
        """(c0, c1 - c0, sum of the others' busy shares) for service `index`."""
        others = [share for place, share in enumerate(busy) if place != index]
        without = contention(others, 0, self.cores)
        return without, contention(others, self.threads, self.cores) - without, float(sum(others))

    def training_ratio(self, running: Sequence[Running]) -> float:
        """Predicted training speed over alone, in (0, 1]."""
        known = list(self.cost.values())
        usual = float(np.mean(known)) if known else 0.0
        return float(np.exp(-sum(self.cost.get(one.model, usual) * one.load for one in running)))


def contention(busy: Sequence[float], always: int, cores: int) -> float:
    """E[max(1, n / cores)] - 1, n = 1 + `always` + a thread for each service that is busy with its share of the time."""
    count = np.ones(1)
    for share in busy:
        count = np.convolve(count, (1 - min(1.0, share), min(1.0, share)))
    threads = 1 + always + np.arange(count.size)
    return float(np.dot(count, np.maximum(1.0, threads / cores))) - 1


def fit(cores: int, threads: int, observed: Sequence[Observed], slowed: Sequence[Slowed] = ()) -> Interference:
    """Coefficients from what was observed; without an observation the processor-sharing prior (a = b = 1, p = t = 0)."""
    prior = Interference(cores, threads)
    if not observed:
        return replace(prior, cost=_cost(slowed))
    models = sorted({one.running[one.index].model for one in observed}) if threads else []
    rows = np.array([_row(prior, one, models) for one in observed])
    targets = np.array([one.slowdown - 1 for one in observed])
    weights = np.sqrt([one.weight for one in observed]) / np.maximum(1.0, targets + 1)
    weights /= weights.max()
    found = _nnls(rows * weights[:, None], targets * weights, _ridge(rows.shape[1]))
    trainer = dict(zip(models, found[3:].tolist(), strict=True))
    return Interference(cores, threads, float(found[0]), float(found[1]), float(found[2]), trainer, _cost(slowed))


def _row(prior: Interference, one: Observed, models: Sequence[str]) -> list[float]:
    own = one.running[one.index].model
    return [*prior.features(one.busy, one.index), *(float(model == own) for model in models)]


def _ridge(columns: int) -> NDArray[np.float64]:
    """Shared terms are free where single ones are not, so what all services have in common goes to them."""
    return np.array([RIDGE / 10] * 3 + [RIDGE] * (columns - 3))


def _cost(slowed: Sequence[Slowed]) -> dict[str, float]:
    models = sorted({one.model for run in slowed for one in run.running})
    if not models:
        return {}
    rows = np.array(
        [[sum(one.load for one in run.running if one.model == model) for model in models] for run in slowed]
    )
    targets = np.array([-np.log(min(1.0, max(1e-3, run.ratio))) for run in slowed])
    found = _nnls(rows, targets, np.full(len(models), RIDGE / 100))
    return dict(zip(models, found.tolist(), strict=True))


def _nnls(rows: NDArray[np.float64], targets: NDArray[np.float64], ridge: NDArray[np.float64]) -> NDArray[np.float64]:
    stacked = np.vstack([rows, np.diag(ridge)])
    solution, _ = nnls(stacked, np.concatenate([targets, np.zeros(ridge.size)]))
    return np.asarray(solution, dtype=np.float64)
