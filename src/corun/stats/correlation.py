"""How much independent information a correlated series of samples holds.

Requests that share a queue share its backlog: neighbours are nearly copies of each other, so n of them carry
the information of far fewer. With autocorrelation r[k] the variance of an average is inflated by

    tau = 1 + 2 (r[1] + r[2] + ...),   effective samples = n / tau

(Law, "Simulation Modeling and Analysis", section 4.4; Geyer 1992, "Practical Markov chain Monte Carlo",
for where to stop the sum). A percentile is an average too: of the indicator "this sample lies above it".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corun.stats.percentiles import METHOD, as_samples, fraction


def autocorrelation(samples: ArrayLike) -> NDArray[np.float64]:
    """Return r[0..n-1] of shape-(n,) samples (biased estimator, by FFT); r[0] = 1, a constant series gives r[k>0] = 0."""
    values = as_samples(samples)
    n = values.size
    if n == 0:
        raise ValueError("no samples to correlate")
    if values.max() == values.min():
        return np.asarray(np.eye(1, n)[0], dtype=np.float64)
    centred = values - values.mean()
    size = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(centred, size)
    covariance = np.fft.irfft(spectrum * spectrum.conj(), size)[:n]
    return np.asarray(covariance / covariance[0], dtype=np.float64)


def inflation(samples: ArrayLike) -> float:
    """Return tau >= 1, the factor by which correlation divides the sample count.

    The sum stops at the first non-positive pair r[2m] + r[2m+1] (Geyer's initial positive sequence), because
    beyond it the estimates are noise; the result lies in [1, n].
    """
    correlations = autocorrelation(samples)
    paired = correlations[: correlations.size // 2 * 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(paired <= 0)
    kept = paired[: negative[0]] if negative.size else paired
    return float(np.clip(2 * kept.sum() - 1, 1.0, correlations.size))


def effective_size(samples: ArrayLike, percentile: float | None = None) -> float:
    """Return how many independent samples would tell the mean (or the percentile) as well as these do.

    samples: (n,) in the order they happened. With a percentile (0-100) the series is the indicator of lying
    at or above it. The result lies in [1, n].
    """
    values = as_samples(samples)
    if percentile is not None:
        values = (values >= np.quantile(values, fraction(percentile), method=METHOD)).astype(np.float64)
    return values.size / inflation(values)
