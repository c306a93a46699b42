"""Which batch bound a service gets: always one that keeps the promise where any does, and the one that carries most."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError
from corun.plan.batching import TIE, capacity, choose, limit, percentile_ms, sizes_to
from corun.plan.measured import Curve, Memory, Point
from corun.plan.question import Candidate, Kind, Slo, make_candidates, parse_batch

SIZES = (1, 2, 4, 8)


def _curve(times: list[float], private_mib: float = 10.0) -> Curve:
    """Batches of 1, 2, 4, ... that take `times`, with a slight spread; each size needs `private_mib` more."""
    points = tuple(
        Point(size, tuple(ms * factor for factor in (0.95, 1.0, 1.0, 1.1)), Memory(place * private_mib))
        for place, (size, ms) in enumerate(zip(SIZES, times, strict=False), 1)
    )
    return Curve(SIZES, points, 0.5)


curves = st.lists(st.floats(1, 60), min_size=1, max_size=3).map(_curve)


@given(curves, st.floats(1, 400), st.sampled_from([50.0, 90.0]), st.floats(2, 400))
@settings(max_examples=12, deadline=None)
def test_the_choice_keeps_the_promise_whenever_any_batch_does(
    curve: Curve, rate: float, percentile: float, bound_ms: float
) -> None:
    """Times may grow or fall with the size. Of those that keep it, none carries more than TIE above the choice."""
    slo = Slo(percentile, bound_ms)
    found = choose(curve, rate, slo)
    keeping = [one for one in found.options if one.predicted_ms <= bound_ms]
    assert found.keeps == bool(keeping) == (found.option in keeping)
    assert found.options[0].max_batch == 1
    for one in keeping:
        assert one.capacity >= rate * (1 - 1e-9)
        assert one.capacity <= found.option.capacity / (1 - TIE) * (1 + 1e-9)
        assert percentile_ms(curve, one.capacity, percentile, one.max_batch, one.max_delay_ms) <= bound_ms
    if not keeping and any(math.isfinite(one.predicted_ms) for one in found.options):
        assert found.option.predicted_ms == min(one.predicted_ms for one in found.options)
    assert found.why


def test_batches_that_cost_nothing_are_taken_and_such_that_gain_nothing_are_not() -> None:
    """Eight in the time of one carry eight times as much; eight in eight times the time leave it at one by one."""
    slo = Slo(99, 100.0)
    flat = choose(_curve([10, 10, 10, 10]), 50, slo)
    assert (flat.option.max_batch, flat.option.max_delay_ms) == (8, 0.0)
    assert flat.option.capacity > 5 * flat.options[0].capacity
    assert "one by one" in flat.why
    linear = choose(_curve([10, 21, 43, 90]), 50, slo)
    assert linear.option.max_batch == 1
    assert linear.why.startswith("batches gain nothing")


def test_a_rate_that_only_batches_carry_says_so() -> None:
    """300/s of 10 ms each: one by one is overloaded, and the reason names what it carries instead."""
    found = choose(_curve([10, 12, 14, 18]), 300, Slo(99, 100.0))
    assert found.keeps
    assert found.option.max_batch == 8
    assert "less than the 300/s asked" in found.why


def test_a_short_bound_takes_a_smaller_batch() -> None:
    """The largest batch carries most of all, but one of them takes longer than may be waited."""
    curve = _curve([10, 14, 22, 60])
    loose, tight = (choose(curve, 20, Slo(90, bound)) for bound in (500.0, 40.0))
    assert tight.option.max_batch < 8
    assert tight.keeps
    assert loose.option.capacity > tight.option.capacity


def test_nothing_that_keeps_it_is_said_with_what_comes_nearest() -> None:
    """No option under a bound shorter than the service itself; with no rate to carry at all the most requests/s."""
    curve = _curve([10, 12, 14, 18])
    near = choose(curve, 10, Slo(90, 5.0))
    assert not near.keeps
    assert "nearest" in near.why
    lost = choose(curve, 1e6, Slo(90, 500.0))
    assert "overloaded" in lost.why
    assert lost.option.max_batch == 8


def test_a_batch_without_its_memory_is_no_option() -> None:
    """The fourth size needs 40 MiB; where there are 35 it is not looked at. A bound on the size is one too."""
    curve = _curve([10, 10, 10, 10])
    short = choose(curve, 50, Slo(99, 100.0), fits=lambda memory: memory.private_mib <= 35)
    assert short.option.max_batch == 4
    assert {one.max_batch for one in short.options} == {1, 2, 4}
    assert choose(curve, 50, Slo(99, 100.0), largest=2).option.max_batch == 2


def test_the_highest_rate_is_below_that_of_full_batches() -> None:
    """Capacity within a promise never reaches what full batches one after the other would answer."""
    curve = _curve([10, 12, 14, 18])
    for size in SIZES:
        assert 0 < capacity(curve, Slo(99, 200.0), size) < limit(curve, size)
    assert capacity(curve, Slo(99, 1.0), 4) == 0


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0.1, 100)), min_size=1, max_size=6, unique_by=lambda p: p[0]))
@settings(max_examples=50)
def test_a_curve_goes_through_what_was_measured(given_: list[tuple[int, float]]) -> None:
    """Every size measured has its median; sizes between lie between their neighbours; none beyond is shorter."""
    points = tuple(Point(size, (ms,)) for size, ms in sorted(given_))
    curve = Curve(tuple(one.size for one in points), points)
    found = curve.times_ms(70)
    assert len(found) == 70
    for one in points:
        assert found[one.size - 1] == pytest.approx(one.ms)
    for left, right in itertools.pairwise(points):
        between = found[left.size - 1 : right.size]
        assert min(left.ms, right.ms) * (1 - 1e-9) <= min(between)
        assert max(between) <= max(left.ms, right.ms) * (1 + 1e-9)
    assert (np.diff(found[points[-1].size - 1 :]) >= 0).all()


def test_a_point_has_a_median_a_rate_and_an_interval_where_it_may() -> None:
    """Eleven batches are the floor of an interval; below it there is none, never a wrong one."""
    point = Point(4, tuple(float(ms) for ms in range(10, 21)))
    assert point.ms == 15
    assert point.per_s == pytest.approx(1000 * 4 / 15)
    assert point.interval_ms is not None
    assert point.interval_ms[0] <= 15 <= point.interval_ms[1]
    assert Point(4, (10.0, 11.0)).interval_ms is None


@given(st.integers(1, 1000))
def test_sizes_double_up_to_the_largest(largest: int) -> None:
    """1, 2, 4, ... without a gap, the largest last and once."""
    sizes = sizes_to(largest)
    assert sizes[0] == 1
    assert sizes[-1] == largest
    assert all(one < other <= 2 * one for one, other in itertools.pairwise(sizes))


@given(
    st.sampled_from(["resnet18", "vit_b_16"]),
    st.integers(1, 64),
    st.floats(0, 1000).map(lambda ms: float(f"{ms:.3g}")),
)
@settings(max_examples=50)
def test_a_kind_is_read_back_as_it_was_written(model: str, max_batch: int, delay_ms: float) -> None:
    """Model, bound and delay survive; served one by one a kind is the model's plain name."""
    text = Candidate("x", model, 1.0, max_batch, delay_ms).kind
    if max_batch == 1:
        assert text == model
    else:
        assert Kind.parse(text) == Kind(model, max_batch, delay_ms)
    assert make_candidates([model], 1.0)[0].kind == model


@pytest.mark.parametrize(("text", "bound"), [("1", 1), (" 16 ", 16), ("auto", None), ("Auto", None)])
def test_a_batch_bound_is_a_number_or_auto(text: str, bound: int | None) -> None:
    """auto is None: chosen for each service."""
    assert parse_batch(text) == bound


@pytest.mark.parametrize("text", ["", "0", "-1", "2.5", "automatic"])
def test_what_is_no_batch_bound_is_refused(text: str) -> None:
    """The error names the flag."""
    with pytest.raises(InputError, match="--max-batch"):
        parse_batch(text)
