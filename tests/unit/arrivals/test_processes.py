"""Arrival processes: bounds, mean rates, shapes, prefix stability, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corun.arrivals.legacy import Legacy
from corun.arrivals.processes import (
    MAX_ARRIVALS,
    ClosedLoop,
    Constant,
    ExactCount,
    Gamma,
    Mmpp,
    Offline,
    Poisson,
    Process,
    Ramp,
    Sine,
    Step,
)
from corun.arrivals.validator import cv, dispersion, lag1
from corun.errors import InputError

RATES = st.floats(0.1, 300)
DURATIONS = st.floats(0.01, 30)
SEEDS = st.integers(0, 2**32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


OPEN = st.one_of(
    st.builds(Constant, RATES, st.floats(0, 0.99)),
    st.builds(Poisson, RATES),
    st.builds(Gamma, RATES, st.floats(0.05, 50)),
    st.builds(Mmpp, RATES, st.floats(0.01, 5), st.floats(0.01, 5), st.floats(0, 1)),
    st.builds(Sine, RATES, st.floats(0, 1), st.floats(0.1, 100), st.floats(-2, 2)),
    st.builds(Ramp, RATES, RATES),
    st.builds(Step, RATES, RATES, st.floats(0, 10), st.floats(11, 40)),
    st.builds(ExactCount, st.builds(Poisson, RATES)),
    st.builds(Legacy, RATES),
)


@settings(max_examples=120, deadline=None)
@given(OPEN, DURATIONS, SEEDS)
def test_every_open_process_stays_in_its_segment(process: Process, duration_s: float, seed: int) -> None:
    """Due instants are finite, ascending and inside [0, duration)."""
    stamps = process.draw(rng(seed), duration_s)
    assert stamps.dtype == np.float64
    assert np.isfinite(stamps).all()
    assert (np.diff(stamps) >= 0).all()
    assert ((stamps >= 0) & (stamps < duration_s)).all()


@settings(max_examples=60, deadline=None)
@given(OPEN, DURATIONS, SEEDS)
def test_the_same_seed_draws_the_same_arrivals(process: Process, duration_s: float, seed: int) -> None:
    """A process holds no state: two fresh generators of one seed give identical instants."""
    assert np.array_equal(process.draw(rng(seed), duration_s), process.draw(rng(seed), duration_s))


STABLE = [
    Constant(37.0, 0.25),
    Poisson(40.0),
    Gamma(40.0, 0.3),
    Mmpp(40.0, 0.5, 1.5, 0.1),
    Sine(40.0, 0.9, 7.0),
    Legacy(40.0),
]


@pytest.mark.parametrize("process", STABLE, ids=lambda process: process.name)
@given(shorter=st.floats(0.01, 20), longer=st.floats(20, 60), seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_a_longer_segment_begins_with_the_same_arrivals(
    process: Process, shorter: float, longer: float, seed: int
) -> None:
    """Prefix stability: the arrivals before T do not depend on how long the segment goes on after T."""
    short = process.draw(rng(seed), shorter)
    long = process.draw(rng(seed), longer)
    assert np.array_equal(short, long[: short.size])
    assert long[short.size :].min(initial=longer) >= shorter


@pytest.mark.parametrize("rate", [100, 1000, 5000])
def test_constant_delivers_its_rate_exactly(rate: int) -> None:
    """B5: 100, 1,000 and 5,000 a second for 2 s are exactly that many requests, every gap 1/rate."""
    stamps = Constant(rate).draw(rng(), 2.0)
    assert stamps.size == 2 * rate
    assert np.diff(stamps) == pytest.approx(1 / rate, rel=1e-9)


@given(st.integers(1, 500), st.integers(1, 100), st.floats(0, 0.999))
@settings(deadline=None)
def test_constant_holds_rate_times_duration(rate: int, duration_s: int, phase: float) -> None:
    """A whole number of gaps gives that whole number of requests, whatever the phase."""
    assert Constant(rate, phase).draw(rng(), duration_s).size == rate * duration_s


MEANS = [
    (Poisson(50.0), 1.0),
    (Gamma(50.0, 0.25), 4.0),
    (Gamma(50.0, 4.0), 0.25),
    (Mmpp(50.0, 0.2, 0.8, 0.1), Mmpp(50.0, 0.2, 0.8, 0.1).dispersion(200.0)),
    (Sine(50.0, 0.8, 10.0), 1.0),
    (Ramp(0.0, 100.0), 1.0),
]


@pytest.mark.parametrize(("process", "index"), MEANS, ids=lambda value: getattr(value, "name", ""))
def test_the_long_run_rate_is_the_stated_one(process: Process, index: float) -> None:
    """Whatever the shape, 20 segments of 200 s hold rate * duration arrivals within 4 standard deviations."""
    counts = [process.draw(rng(seed), 200.0).size for seed in range(20)]
    expected = 20 * 200 * 50.0
    assert sum(counts) == pytest.approx(expected, abs=4 * np.sqrt(index * expected))


@pytest.mark.parametrize("process", [Gamma(1.0, 0.1), Mmpp(1.0, 2.0, 8.0)], ids=lambda process: process.name)
def test_bursty_processes_start_in_their_stationary_state(process: Process) -> None:
    """Even the first gap-length of a segment holds its share: no arrival is planted at the start."""
    counts = np.array([process.draw(rng(seed), 1.0).size for seed in range(3000)])
    assert counts.mean() == pytest.approx(1.0, abs=4 * counts.std() / np.sqrt(3000))


@pytest.mark.parametrize(
    ("process", "expected_cv", "expected_dispersion"),
    [
        (Poisson(100.0), 1.00, 1.03),
        (Gamma(100.0, 0.25), 2.02, 4.06),
        (Gamma(100.0, 0.5), 1.42, 2.03),
        (Gamma(100.0, 2.0), 0.71, 0.52),
    ],
    ids=["poisson", "gamma 0.25", "gamma 0.5", "gamma 2"],
)
def test_shapes_match_the_reference_table(process: Process, expected_cv: float, expected_dispersion: float) -> None:
    """60,000 arrivals at 100/s: CV and dispersion at 1 s are the published ones within sampling error."""
    stamps = process.draw(rng(6), 600.0)
    assert cv(np.diff(stamps)) == pytest.approx(expected_cv, rel=0.03)
    assert lag1(np.diff(stamps)) == pytest.approx(0.0, abs=0.02)
    assert dispersion(stamps, 1.0, 600.0) == pytest.approx(expected_dispersion, rel=0.25)


def test_legacy_matches_the_reference_table() -> None:
    """The evenly spaced generator at 100/s: CV 0.10, lag-1 0.99, dispersion 0.08 at 50 ms and near 1 at 1 s."""
    stamps = Legacy(100.0).draw(rng(), 600.0)
    assert cv(np.diff(stamps)) == pytest.approx(0.10, abs=0.015)
    assert lag1(np.diff(stamps)) == pytest.approx(0.99, abs=0.01)
    assert dispersion(stamps, 0.05, 600.0) == pytest.approx(0.08, abs=0.03)
    assert dispersion(stamps, 1.0, 600.0) == pytest.approx(1.0, abs=0.2)


def test_legacy_clients_fire_in_step() -> None:
    """The original's fault is reproduced: whatever generator it is handed, every client gets the same arrivals."""
    assert np.array_equal(Legacy(20.0).draw(rng(1), 30.0), Legacy(20.0).draw(rng(2), 30.0))
    assert not np.array_equal(Legacy(20.0, seed=7).draw(rng(1), 30.0), Legacy(20.0).draw(rng(1), 30.0))


def test_legacy_drops_empty_seconds() -> None:
    """A second whose count is 0 vanishes, so no gap is ever longer than 1 s and slow rates come out too fast."""
    stamps = Legacy(0.5).draw(rng(), 400.0)
    assert np.diff(stamps).max() <= 1.0 + 1e-9
    assert stamps.size / 400.0 > 1.0


def test_mmpp_dispersion_follows_its_formula() -> None:
    """Gaps and counts of a bursty source vary as the formulas say, from the short to the long scale."""
    process = Mmpp(100.0, 0.3, 0.7, 0.2)
    stamps = process.draw(rng(3), 3000.0)
    assert cv(np.diff(stamps)) == pytest.approx(process.interval_cv, rel=0.03)
    for window_s in (0.05, 0.3, 2.0):
        assert dispersion(stamps, window_s, 3000.0) == pytest.approx(process.dispersion(window_s), rel=0.1)


def test_mmpp_without_a_difference_is_poisson() -> None:
    """With floor 1 on and off are alike: dispersion 1 at every scale, CV 1."""
    assert Mmpp(10.0, floor=1.0).interval_cv == 1.0
    assert Mmpp(10.0, floor=1.0).dispersion(5.0) == 1.0
    assert Mmpp(10.0, floor=1.0).on_rate == 10.0


def test_on_off_source_is_silent_while_off() -> None:
    """With floor 0 all arrivals fall into bursts: gaps either follow the rate while on or span an off time."""
    gaps = np.diff(Mmpp(10.0, on_s=1.0, off_s=50.0).draw(rng(1), 5000.0))
    assert (gaps < 0.2).mean() > 0.9
    assert gaps.max() > 20


def test_sine_and_ramp_follow_their_intensity() -> None:
    """The counts of a swing's upper half, and of a ramp's second half, match the integrated intensity."""
    sine = Sine(100.0, 0.8, 20.0).draw(rng(2), 200.0)
    upper = ((sine % 20.0) < 10.0).sum()
    assert upper == pytest.approx(100 * 100 * (1 + 0.8 * 2 / np.pi), rel=0.03)
    ramp = Ramp(10.0, 90.0).draw(rng(2), 200.0)
    assert (ramp >= 100.0).sum() == pytest.approx(100 * 70, rel=0.04)


def test_a_step_is_poisson_at_one_rate_inside_and_at_another_outside() -> None:
    """The counts before, in and after the step are those of their rates, within 4 standard deviations."""
    stamps = Step(20.0, 80.0, 50.0, 150.0).draw(rng(3), 200.0)
    inside = ((stamps >= 50.0) & (stamps < 150.0)).sum()
    assert inside == pytest.approx(8000, abs=4 * np.sqrt(8000))
    assert stamps.size - inside == pytest.approx(2000, abs=4 * np.sqrt(2000))


@given(
    st.one_of(
        st.builds(Poisson, RATES),
        st.builds(Sine, RATES, st.floats(0, 1), st.floats(1, 100), st.floats(-1, 1)),
        st.builds(Ramp, RATES, RATES),
        st.builds(Step, RATES, RATES, st.floats(0, 10), st.floats(11, 40)),
    ),
    st.floats(1, 100),
)
@example(Step(6.0, 0.125, 0.00390625, 11.0), 3.0)
@settings(max_examples=60, deadline=None)
def test_cumulative_is_the_integral_of_the_intensity(
    process: Poisson | Sine | Ramp | Step, duration_s: float
) -> None:
    """The closed form agrees with a numerical integral, never falls, and the intensity never exceeds the peak."""
    jumps = [process.from_s, process.until_s] if isinstance(process, Step) else []
    both_sides = np.clip([*jumps, *np.nextafter(jumps, -1.0)], 0.0, duration_s)
    at_s = np.union1d(np.linspace(0.0, duration_s, 20_001), both_sides)
    intensity = process.intensity(at_s, duration_s)
    steps = np.diff(at_s) * (intensity[1:] + intensity[:-1]) / 2
    assert (intensity <= process.peak * (1 + 1e-12)).all()
    assert (intensity >= -1e-9).all()
    total = process.cumulative(at_s, duration_s)
    assert total[0] == pytest.approx(0.0, abs=1e-9)
    assert total[-1] == pytest.approx(steps.sum(), rel=1e-3)
    assert (np.diff(total) >= -1e-9).all()


@given(st.integers(0, 500), st.floats(0.1, 50), SEEDS)
@settings(max_examples=40, deadline=None)
def test_an_exact_count_is_exact(count: int, duration_s: float, seed: int) -> None:
    """Conditioned processes deliver the count they name, to the request, and say so in their name."""
    for process in (Poisson(7.0), Ramp(0.0, 5.0), Sine(7.0)):
        exact = ExactCount(process, count)
        assert exact.draw(rng(seed), duration_s).size == count
        assert exact.name == f"{process.name}-exact"


def test_an_exact_count_defaults_to_the_expected_one() -> None:
    """Without a number the count is the rate times the duration; a ramp's is the area under it."""
    assert ExactCount(Poisson(10.0)).draw(rng(), 30.0).size == 300
    assert ExactCount(Ramp(0.0, 10.0)).draw(rng(), 30.0).size == 150


def test_a_closed_loop_has_no_due_instants() -> None:
    """One NaN per loop marks that the request waits for a reply; there is no rate."""
    process = ClosedLoop(streams=3, think_s=0.1)
    assert np.isnan(process.draw(rng(), 10.0)).tolist() == [True] * 3
    assert process.rate is None


def test_offline_is_due_at_once() -> None:
    """All requests are due at 0."""
    assert Offline(5).draw(rng(), 1.0).tolist() == [0.0] * 5


REFUSED = [
    (Constant, {"rate": 0.0}, "rate must be above 0"),
    (Constant, {"rate": 1.0, "phase": 1.0}, "phase must be in 0..1"),
    (Poisson, {"rate": -1.0}, "not -1.0"),
    (Poisson, {"rate": float("nan")}, "rate must be above 0"),
    (Poisson, {"rate": float("inf")}, "rate must be above 0"),
    (Gamma, {"rate": 1.0, "shape": 0.0}, "shape must be in 0.01..1000"),
    (Mmpp, {"rate": 1.0, "off_s": 0.0}, "off_s must be above 0"),
    (Mmpp, {"rate": 1.0, "floor": 1.5}, "floor must be in 0..1"),
    (Sine, {"rate": 1.0, "amplitude": 2.0}, "amplitude must be in 0..1"),
    (Sine, {"rate": 1.0, "phase": float("nan")}, "phase must be a number"),
    (Ramp, {"first": 0.0, "last": 0.0}, "nothing would ever arrive"),
    (Ramp, {"first": -1.0, "last": 5.0}, "at least 0"),
    (Step, {"rate": 1.0, "high": 2.0, "from_s": 5.0, "until_s": 5.0}, "must ascend"),
    (Step, {"rate": 1.0, "high": 0.0, "from_s": 1.0, "until_s": 5.0}, "high must be above 0"),
    (ClosedLoop, {"streams": 0}, "streams must be in 1"),
    (ClosedLoop, {"think_s": float("nan")}, "think_s"),
    (Offline, {"count": MAX_ARRIVALS + 1}, "count must be in 1"),
    (Legacy, {"rate": 0.01}, "at least 0.1"),
    (Legacy, {"rate": 1.0, "seed": -1}, "seed must be in"),
    (ExactCount, {"process": Constant(1.0)}, "exact count exists for poisson"),
    (ExactCount, {"process": Poisson(1.0), "count": -1}, "count must be in 0"),
]


@pytest.mark.parametrize(("kind", "parameters", "message"), REFUSED)
def test_impossible_parameters_are_refused(kind: type, parameters: dict[str, object], message: str) -> None:
    """A process that could not produce arrivals cannot be made; the error names the bound and the value."""
    with pytest.raises(InputError, match=message):
        kind(**parameters)


def test_all_problems_are_listed_at_once() -> None:
    """Three bad parameters are three problems of one error."""
    with pytest.raises(InputError) as caught:
        Mmpp(rate=-1.0, on_s=0.0, floor=2.0)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("process", [*STABLE, ClosedLoop(), Offline(1), Ramp(1.0, 2.0)])
def test_processes_are_frozen(process: Process) -> None:
    """Processes are values: none can be changed after it was made."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        process.anything = 1  # type: ignore[attr-defined]
