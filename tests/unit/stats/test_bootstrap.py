"""The block bootstrap inside one run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.stats import bootstrap
from corun.stats.bootstrap import block_bootstrap


@given(st.integers(11, 120), st.integers(1, 11), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_the_interval_holds_the_point_and_is_made_of_samples(n: int, block: int, circular: bool, seed: int) -> None:
    """Bounds are samples of the run around its percentile, and the label says that they speak of one run only."""
    rng = np.random.default_rng(seed)
    samples = rng.exponential(1, n)
    interval = block_bootstrap(samples, 50, rng, block=block, circular=circular, replicates=50).interval
    assert interval is not None
    assert {interval.low, interval.point, interval.high} <= set(samples.tolist())
    assert interval.label.startswith("within one run")


def test_the_same_generator_state_gives_the_same_interval() -> None:
    """Randomness is a parameter: equal seeds, equal results."""
    samples = np.random.default_rng(1).exponential(1, 500)
    first, second = (block_bootstrap(samples, 90, np.random.default_rng(9)) for _ in range(2))
    assert first == second


def test_one_block_as_long_as_the_run_has_nothing_to_resample() -> None:
    """A circular block of n samples is the run itself, rotated: its percentile cannot change."""
    samples = np.random.default_rng(1).exponential(1, 100)
    interval = block_bootstrap(samples, 50, np.random.default_rng(2), block=100).interval
    assert interval is not None
    assert interval.width == 0


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by working in chunks of replicates; the draws stay the same."""
    samples = np.random.default_rng(1).exponential(1, 300)
    whole = block_bootstrap(samples, 90, np.random.default_rng(5), replicates=60)
    monkeypatch.setattr(bootstrap, "_CELLS_AT_ONCE", 1000)
    assert block_bootstrap(samples, 90, np.random.default_rng(5), replicates=60) == whole


def test_too_few_samples_are_refused_with_the_number_needed() -> None:
    """Below the floor there is no percentile to bracket."""
    estimate = block_bootstrap(np.ones(100), 99, np.random.default_rng(0))
    assert estimate.interval is None
    assert "662" in estimate.reason


@pytest.mark.parametrize("block", [0, 101])
def test_a_block_fits_the_run(block: int) -> None:
    """A block holds at least one sample and at most the whole run."""
    with pytest.raises(ValueError, match="block"):
        block_bootstrap(np.ones(100), 50, np.random.default_rng(0), block=block)
