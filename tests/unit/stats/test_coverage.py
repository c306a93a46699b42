"""Do the intervals cover the truth as often as they claim? Simulated queues with an exactly known p99."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from scipy import optimize

from corun.stats.bootstrap import block_bootstrap
from corun.stats.intervals import (
    minimum_length,
    order_statistic_interval,
    replication_interval,
    t_interval,
)
from corun.stats.percentiles import METHOD
from corun.stats.queues import poisson_arrivals, sojourn_times

SERVICE_MS = 8.0
WARM_UP = 2000
TRIALS = 300


@cache
def true_sojourn(utilisation: float, fraction: float) -> float:
    """Return a quantile of the M/D/1 sojourn in ms from Erlang's (1909) exact distribution of the wait.

    P[W <= x] = (1 - rho) * sum over j = 0..floor(x / D) of (-1)^j y^j / j! * e^y,  y = lambda (x - j D)
    """
    rate = utilisation / SERVICE_MS

    def shortfall(wait: float) -> float:
        lags = [rate * (wait - j * SERVICE_MS) for j in range(int(wait // SERVICE_MS) + 1)]
        terms = [(-1) ** j * y**j / math.factorial(j) * math.exp(y) for j, y in enumerate(lags)]
        return (1 - utilisation) * math.fsum(terms) - fraction

    return SERVICE_MS + float(optimize.brentq(shortfall, 0.0, 30 * SERVICE_MS))


def simulated_runs(rng: np.random.Generator, utilisation: float, runs: int, length: int) -> np.ndarray:
    """Return sojourns in ms, shape (runs, length), of independent M/D/1 queues after their warm-up."""
    arrivals = poisson_arrivals(rng, utilisation / SERVICE_MS, (runs, WARM_UP + length))
    return sojourn_times(arrivals, SERVICE_MS)[:, WARM_UP:]


def p99_table(seed: int, utilisation: float, k: int, length: int) -> np.ndarray:
    """Return the p99 of every run, shape (TRIALS, k)."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [np.quantile(simulated_runs(rng, utilisation, k, length), 0.99, axis=1, method=METHOD) for _ in range(TRIALS)]
    )


def test_the_simulator_has_the_exact_p99() -> None:
    """Erlang's formula and the simulated queue agree: 91 ms at 8 ms service and utilisation 0.8."""
    truth = true_sojourn(0.8, 0.99)
    assert truth == pytest.approx(91.0, abs=0.5)
    sojourns = simulated_runs(np.random.default_rng(11), 0.8, 8, 250_000)
    assert np.quantile(sojourns, 0.99) == pytest.approx(truth, rel=0.03)


@pytest.mark.parametrize(("utilisation", "length"), [(0.5, 1000), (0.8, 6000)])
def test_the_headline_covers_the_true_p99(utilisation: float, length: int) -> None:
    """Five runs of sufficient length: the nominal 95 % t-interval really covers at least 89 %."""
    assert length >= minimum_length(99, utilisation)
    covered = 0
    for values in p99_table(20, utilisation, 5, length).tolist():
        estimate = replication_interval(values, [length] * 5, utilisation=utilisation)
        assert estimate.interval is not None
        covered += estimate.interval.contains(true_sojourn(utilisation, 0.99))
    assert covered / TRIALS >= 0.89


def test_many_short_runs_cover_worse_than_few_long_ones() -> None:
    """Why short runs are refused: ten of 1,000 requests cover far less than five of 6,000 would."""
    covered = 0
    for values in p99_table(21, 0.8, 10, 1000).tolist():
        assert replication_interval(values, [1000] * 10).interval is None
        interval = t_interval(values).interval
        assert interval is not None
        covered += interval.contains(true_sojourn(0.8, 0.99))
    assert covered / TRIALS < 0.75


def test_the_independent_interval_covers_almost_never() -> None:
    """Order statistics of one run's 6,000 requests, nominal 95 %, cover below 40 % at utilisation 0.8."""
    rng = np.random.default_rng(22)
    truth, covered = true_sojourn(0.8, 0.99), 0
    for sojourns in simulated_runs(rng, 0.8, TRIALS, 6000):
        interval = order_statistic_interval(sojourns, 99).interval
        assert interval is not None
        assert interval.effective is not None
        assert interval.effective < 0.2 * interval.k
        covered += interval.contains(truth)
    assert covered / TRIALS < 0.4


def test_the_block_bootstrap_lies_between() -> None:
    """Twenty blocks of one run keep some of the correlation: better than independence, short of its claim."""
    rng = np.random.default_rng(23)
    truth, covered, trials = true_sojourn(0.8, 0.99), 0, 80
    for sojourns in simulated_runs(rng, 0.8, trials, 5000):
        interval = block_bootstrap(sojourns, 99, rng, replicates=200).interval
        assert interval is not None
        covered += interval.contains(truth)
    assert 0.4 < covered / trials < 0.89
