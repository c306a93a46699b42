"""Requests of a load: mixes such as `3x256,2x16` in their order, or Poisson arrivals with drawn sizes.

3x256,2x16      three requests of 256 sentences, then two of 16, `gap_ms` apart
8:.6,32:.25     sizes with their shares, drawn for each of the arrivals of a Poisson process
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from corun.clock import NS_PER_MS, NS_PER_S
from corun.errors import InputError

PUBLISHED: Final = {
    "H": "3x256,2x16,2x256,3x128,3x16,1x128",
    "T": "3x256,16,256,128,2x256,16,128",
    "U": "4x128,8x32",
    "V": "4x128,20,100,8,200,50",
}
SIZES: Final = "8:.6,32:.25,128:.1,256:.05"
MAX_SENTENCES = 100_000


@dataclass(frozen=True)
class Arrival:
    """One request: when it is sent, from the start of the load, and how many sentences it holds."""

    at_ns: int
    size: int


def parse_mix(text: str) -> list[int]:
    """Sizes of the requests of a mix, or of a published one by its letter (H, T, U, V)."""
    sizes: list[int] = []
    problems = []
    for part in PUBLISHED.get(text, text).split(","):
        times, _, size = part.strip().rpartition("x")
        try:
            repeat, sentences = int(times or 1), int(size)
        except ValueError:
            repeat = sentences = 0
        if not (repeat > 0 and sentences > 0 and repeat * sentences <= MAX_SENTENCES):
            problems.append(f'"{part}": give how many requests x how many sentences, e.g. 3x256 or 16')
            continue
        sizes += [sentences] * repeat
    if problems:
        raise InputError(f'the mix "{text}" is wrong', problems)
    return sizes


def parse_sizes(text: str) -> dict[int, float]:
    """Sizes and their shares, which must sum to 1."""
    shares: dict[int, float] = {}
    for part in text.split(","):
        size, _, share = part.partition(":")
        try:
            shares[int(size)] = float(share or 1)
        except ValueError:
            raise InputError(f'the sizes "{text}" are wrong', [f'"{part}": give size:share, e.g. 8:.6']) from None
    if min(shares) < 1 or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise InputError(f'the sizes "{text}" are wrong', ["sizes are 1 or more, shares sum to 1"])
    return shares


def mix(sizes: Sequence[int], gap_ms: float = 100.0) -> list[Arrival]:
    """Requests of these sizes, `gap_ms` apart."""
    return [Arrival(round(index * gap_ms * NS_PER_MS), size) for index, size in enumerate(sizes)]


def poisson(rate: float, sizes: dict[int, float], count: int, seed: int) -> list[Arrival]:
    """`count` requests at `rate` a second on average, with drawn sizes."""
    if rate <= 0 or count < 1:
        raise InputError(f"a load of {count} requests at {rate} a second cannot be made: give positive numbers")
    random = np.random.default_rng(seed)
    instants = np.cumsum(random.exponential(1 / rate, count))
    drawn = random.choice(list(sizes), count, p=list(sizes.values()))
    return [Arrival(round(at * NS_PER_S), int(size)) for at, size in zip(instants, drawn, strict=True)]
