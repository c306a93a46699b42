"""The interference model, the tail and memory: identities, monotony, recovery of what is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.plan.interference import Interference, Observed, Running, Slowed, contention, fit
from corun.plan.measured import Memory
from corun.plan.memory import Limits, need
from corun.plan.tail import REQUESTS, sojourn_percentile

loads = st.lists(st.floats(0.0, 0.9), max_size=6)
cores = st.integers(1, 8)
running = st.lists(
    st.builds(Running, st.sampled_from("abcd"), st.floats(0.5, 30.0), st.floats(1.0, 25.0)), min_size=1, max_size=5
)
models = st.builds(
    Interference,
    cores,
    st.integers(0, 4),
    st.floats(0, 2),
    st.floats(0, 1.5),
    st.floats(0, 1),
    st.fixed_dictionaries({name: st.floats(0, 1) for name in "abcd"}),
    st.fixed_dictionaries({name: st.floats(0, 2) for name in "abcd"}),
)


@given(loads, st.integers(0, 4), cores)
@settings(max_examples=60)
def test_contention_is_the_mean_over_every_combination_of_busy_services(
    busy: list[float], always: int, cores: int
) -> None:
    """Poisson-binomial by convolution = the sum over all 2^n combinations of who is busy."""
    total = 0.0
    for on in itertools.product((0, 1), repeat=len(busy)):
        probability = math.prod(share if flag else 1 - share for share, flag in zip(busy, on, strict=True))
        total += probability * max(1.0, (1 + always + sum(on)) / cores)
    assert contention(busy, always, cores) == pytest.approx(total - 1, abs=1e-9)


@given(models, st.sampled_from("abcd"), st.floats(0.5, 30), st.floats(1, 25))
@settings(max_examples=50)
def test_a_service_alone_is_not_slowed_down(model: Interference, name: str, rate: float, ms: float) -> None:
    """Nobody beside it and nobody training: the slowdown is exactly 1."""
    assert replace(model, threads=0).slowdowns([Running(name, rate, ms)]) == [1.0]


@given(models, running, st.integers(0, 4), st.floats(1.0, 3.0))
@settings(max_examples=40)
def test_more_load_never_makes_anybody_faster(
    model: Interference, services: list[Running], place: int, factor: float
) -> None:
    """Raising one rate or adding one service raises every slowdown and lowers the training speed, or leaves them."""
    before = model.slowdowns(services)
    place %= len(services)
    raised = [replace(one, rate=one.rate * factor) if at == place else one for at, one in enumerate(services)]
    joined = [*services, services[place]]
    for after, set_ in ((model.slowdowns(raised), raised), (model.slowdowns(joined), joined)):
        assert all(late >= early * (1 - 1e-4) for early, late in zip(before, after, strict=False))
        assert model.training_ratio(set_) <= model.training_ratio(services) + 1e-12
    assert 0 < model.training_ratio(services) <= 1


@given(st.floats(0, 1.5), st.floats(0, 1.5), st.floats(0, 0.8), st.lists(st.floats(0, 0.6), min_size=3, max_size=3))
@settings(max_examples=30)
def test_the_fit_recovers_what_made_the_observations(
    sharing: float, training: float, pressure: float, trainer: list[float]
) -> None:
    """Slowdowns of every set up to three, made by known coefficients, are predicted again for sets never shown."""
    names = ["a", "b", "c"]
    truth = Interference(2, 1, sharing, training, pressure, dict(zip(names, trainer, strict=True)), {"a": 0.5})
    every = [Running("a", 10, 8), Running("b", 20, 9), Running("c", 5, 30)]
    observed, slowed = [], []
    for size in (1, 2):
        for chosen in itertools.combinations(every, size):
            factors = truth.slowdowns(chosen)
            busy = tuple(min(1.0, one.load * factor) for one, factor in zip(chosen, factors, strict=True))
            observed += [Observed(chosen, at, factor, busy) for at, factor in enumerate(factors)]
            slowed.append(Slowed(chosen, truth.training_ratio(chosen)))
    found = fit(2, 1, observed, slowed)
    assert found.slowdowns(every) == pytest.approx(truth.slowdowns(every), rel=0.08)
    assert found.training_ratio(every) == pytest.approx(truth.training_ratio(every), rel=0.01)


def test_without_an_observation_cores_are_shared_evenly() -> None:
    """The prior is processor sharing: two always busy services on one core take twice as long."""
    model = fit(1, 0, [])
    assert model.slowdowns([Running("a", 100, 10), Running("b", 100, 10)]) == pytest.approx([2.0, 2.0])


@given(st.floats(0.05, 0.8), st.floats(1, 40))
@settings(max_examples=20)
def test_the_median_and_tail_are_those_of_an_exponential_queue(load: float, mean_ms: float) -> None:
    """M/M/1: the sojourn is exponential with mean S / (1 - rho), whatever the percentile (within sampling error)."""
    shape = -np.log(1 - (np.arange(2000) + 0.5) / 2000)
    for percentile in (50, 90):
        found = sojourn_percentile(1000 * load / mean_ms, shape, mean_ms, 0.0, percentile)
        expected = -math.log(1 - percentile / 100) * mean_ms / (1 - load)
        assert found == pytest.approx(expected, rel=0.1 + 0.5 * load**3)


@given(
    st.floats(0.5, 50),
    st.floats(1, 20),
    st.floats(1, 2),
    st.sampled_from([50.0, 90.0, 99.0]),
    st.lists(st.floats(0.2, 4), min_size=1, max_size=30),
)
@settings(max_examples=25)
def test_the_tail_grows_with_rate_and_service_time(
    rate: float, ms: float, factor: float, percentile: float, shape: list[float]
) -> None:
    """Common random numbers make the prediction monotone, not only on average; a full server has no tail at all."""
    plain = sojourn_percentile(rate, shape, ms, 0.0, percentile)
    span_ms = 2 * REQUESTS * (1000 / rate + ms * max(shape) * factor)
    rounding = 2 * REQUESTS * np.finfo(float).eps * span_ms if math.isfinite(plain) else 0.0
    assert sojourn_percentile(rate, shape, ms * factor, 0.0, percentile) >= plain - rounding
    assert sojourn_percentile(rate * factor, shape, ms, 0.0, percentile) >= plain - rounding
    assert sojourn_percentile(rate, shape, ms, 1.5, percentile) == pytest.approx(plain + 1.5)
    assert sojourn_percentile(1001 / ms, shape, ms, 0.0, percentile) == float("inf")


sizes = [st.floats(0, most, allow_subnormal=False) for most in (4000, 500, 9000)]
parts = st.lists(st.builds(Memory, *sizes), max_size=6)


@given(parts, parts, st.floats(0, 0.5))
@settings(max_examples=50)
def test_memory_adds_up_and_libraries_count_once(one: list[Memory], other: list[Memory], margin: float) -> None:
    """Private and GPU memory of two sets add up; shared memory is the larger of both; the margin is on everything.

    A set fits into exactly what it needs and not into the least bit less.
    """
    limits = Limits(1e9, 1e9)
    first, second, both = (need(group, limits, margin) for group in (one, other, [*one, *other]))
    shared = [max((part.shared_mib for part in group), default=0.0) for group in (one, other)]
    assert both.gpu_mib == pytest.approx(first.gpu_mib + second.gpu_mib)
    expected = first.host_mib + second.host_mib - (1 + margin) * min(shared)
    assert both.host_mib == pytest.approx(expected)
    assert need([*one, *other], Limits(both.host_mib), margin).fits
    assert not need([*one, *other], Limits(math.nextafter(both.host_mib, -1)), margin).fits


def test_memory_of_the_gpu_is_asked_only_where_there_is_one() -> None:
    """Without a GPU its limit says nothing; with one, either memory may be the one that is short."""
    parts = [Memory(100, 50, 800)]
    assert need(parts, Limits(1000), 0.1).fits
    assert not need(parts, Limits(1000, 500), 0.1).fits
    assert not need(parts, Limits(100, 5000), 0.1).fits
