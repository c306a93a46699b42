"""What is counted of a task: requests, their response time and what they cost; two of them merge into one.

Mean and standard deviation are merged by the pairwise formula of Chan, Golub & LeVeque (1979):

    n = na + nb     d = mb - ma     m = ma + d nb / n     M2 = M2a + M2b + d^2 na nb / n     sd = sqrt(M2 / (n - 1))

so what several processes record in any order is what one would have recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Statistics:
    """Requests answered in some span and what they cost; None where nothing was measured."""

    requests: int = 0
    """answered OK; response times are theirs"""
    errors: int = 0
    """refused, failed or lost"""
    mean_ms: float = 0.0
    """mean response time"""
    sd_ms: float = 0.0
    """sample standard deviation of the response time; 0 below two requests"""
    max_ms: float = 0.0
    span_s: float = 0.0
    """seconds in which they came"""
    cpu_s: float = 0.0
    """CPU time of the task's replicas"""
    rss_mib: float | None = None
    """largest resident memory of the task's replicas together"""
    gpu_mib: float | None = None
    """largest GPU memory"""
    gpu_s: float | None = None
    """seconds the GPU was busy for the task"""

    @classmethod
    def of(cls, response_ms: Iterable[float], **costs: float | int | None) -> Statistics:
        """Of response times in ms; costs: the other fields."""
        values = list(response_ms)
        if not values:
            return cls(**costs)  # type: ignore[arg-type]
        mean = math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        sd = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0
        return cls(requests=len(values), mean_ms=mean, sd_ms=sd, max_ms=max(values), **costs)  # type: ignore[arg-type]

    def __add__(self, other: Statistics) -> Statistics:
        """Both spans together."""
        n = self.requests + other.requests
        mean, sd = self.mean_ms or other.mean_ms, self.sd_ms or other.sd_ms
        if self.requests and other.requests:
            apart = other.mean_ms - self.mean_ms
            mean = self.mean_ms + apart * other.requests / n
            squares = self._squares + other._squares + apart**2 * self.requests * other.requests / n
            sd = math.sqrt(squares / (n - 1))
        return Statistics(
            requests=n,
            errors=self.errors + other.errors,
            mean_ms=mean,
            sd_ms=sd,
            max_ms=max(self.max_ms, other.max_ms),
            span_s=self.span_s + other.span_s,
            cpu_s=self.cpu_s + other.cpu_s,
            rss_mib=_largest(self.rss_mib, other.rss_mib),
            gpu_mib=_largest(self.gpu_mib, other.gpu_mib),
            gpu_s=_total(self.gpu_s, other.gpu_s),
        )

    @property
    def _squares(self) -> float:
        return self.sd_ms**2 * max(self.requests - 1, 0)

    @property
    def rate(self) -> float | None:
        """Requests/s of the span, errors included."""
        return (self.requests + self.errors) / self.span_s if self.span_s else None


def _largest(a: float | None, b: float | None) -> float | None:
    return max((value for value in (a, b) if value is not None), default=None)


def _total(a: float | None, b: float | None) -> float | None:
    return None if a is None and b is None else (a or 0.0) + (b or 0.0)
