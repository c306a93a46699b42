"""How long a package will take: `a + b * padded tokens`, learned while serving, or known.

    a, b = argmin  sum_i  forget^(n - i) * (seconds_i - a - b * tokens_i)^2

Exponentially weighted least squares over two unknowns needs five running sums and no history. With packages of one
size only the line through the origin is determined; a noisy slope may come out negative: then the same line is used.
"""

from __future__ import annotations

from typing import Protocol

FLOOR_S = 1e-6
FORGET = 0.95


class Estimate(Protocol):
    """What a package, or the rest of a request, is expected to take."""

    def seconds(self, packages: int, padded_tokens: int) -> float:
        """Expected seconds, always positive, of so many packages with so many padded tokens in all."""

    def observe(self, padded_tokens: int, seconds: float) -> None:
        """Learn from one finished package."""


class KnownCost:
    """A cost that is given and never learns, for simulators."""

    def __init__(self, start_s: float, token_s: float) -> None:
        self.start_s, self.token_s = start_s, token_s

    def seconds(self, packages: int, padded_tokens: int) -> float:
        return max(FLOOR_S, self.start_s * packages + self.token_s * padded_tokens)

    def observe(self, padded_tokens: int, seconds: float) -> None:
        """Nothing to learn."""


class LearnedCost:
    """Exponentially weighted least squares over finished packages; before the first, `token_s` a token.

    forget: weight of a package relative to the one after it, in (0, 1].
    """

    def __init__(self, start_s: float = 0.0, token_s: float = 1e-4, forget: float = FORGET) -> None:
        if not 0 < forget <= 1:
            raise ValueError(f"forget is {forget}: give a number in (0, 1]")
        self.start_s, self.token_s = start_s, token_s
        self._forget = forget
        self._weight = self._x = self._xx = self._y = self._xy = 0.0

    def seconds(self, packages: int, padded_tokens: int) -> float:
        return max(FLOOR_S, self.start_s * packages + self.token_s * padded_tokens)

    def observe(self, padded_tokens: int, seconds: float) -> None:
        """Learn from one package; one without tokens says nothing."""
        if padded_tokens <= 0 or seconds < 0:
            return
        forget, x, y = self._forget, float(padded_tokens), seconds
        self._weight = forget * self._weight + 1.0
        self._x = forget * self._x + x
        self._xx = forget * self._xx + x * x
        self._y = forget * self._y + y
        self._xy = forget * self._xy + x * y
        self._solve()

    def _solve(self) -> None:
        spread = self._weight * self._xx - self._x * self._x
        if spread > 1e-9 * self._weight * self._xx:
            slope = (self._weight * self._xy - self._x * self._y) / spread
            start = (self._y - slope * self._x) / self._weight
            if slope > 0 and start >= 0:
                self.start_s, self.token_s = start, slope
                return
        self.start_s, self.token_s = 0.0, max(FLOOR_S / self._x, self._xy / self._xx)
