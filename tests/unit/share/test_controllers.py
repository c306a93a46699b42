"""Controllers, ladder, forecast and brakes as pure functions, and a load step in an ideal plant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import special

from corun.clock import NS_PER_MS
from corun.errors import InputError
from corun.share.brakes import GO_ON, LEAST_REST_NS, LOOK_AGAIN_NS, Brakes
from corun.share.controllers import (
    BELOW_KNEE,
    CREEP_PER_S,
    LUCK,
    Aimd,
    Controller,
    Pi,
    State,
    Window,
    breaks,
    ladder,
    make_controller,
    percentile_ms,
)
from corun.share.forecast import Ewma, Headroom, make_forecaster
from corun.share.page import Knobs

SLO_MS = 50.0
CONTROLLERS: list[Controller] = [Aimd(SLO_MS), Pi(SLO_MS)]
states = st.builds(
    State, st.floats(0.05, 1), st.floats(0.05, 1), st.integers(0, 16), st.floats(0, 1e3), st.floats(0.05, 1)
)
windows = st.builds(
    Window, st.floats(0.1, 60), st.integers(0, 1000), st.none() | st.floats(0.001, 1e6), st.integers(0, 1000)
)
both = pytest.mark.parametrize("controller", CONTROLLERS, ids=lambda c: type(c).__name__)


@both
@settings(max_examples=100)
@given(state=states, seen=st.lists(windows, max_size=20))
def test_the_effort_stays_between_floor_and_one(controller: Controller, state: State, seen: list[Window]) -> None:
    """Whatever is seen, training is never starved below the floor nor asked for more than everything."""
    for window in seen:
        state = controller.next(state, window)
        assert 0.05 <= state.effort <= 1
        assert 0.05 <= state.integral <= 1


@both
@given(state=states, p99=st.floats(SLO_MS * 1.001, 1e6))
def test_a_broken_bound_never_raises_the_effort(controller: Controller, state: State, p99: float) -> None:
    """Above the bound the next effort is no higher than the one the same state gives at the bound."""
    state = replace(state, integral=min(state.integral, state.effort))
    after = controller.next(state, Window(5, 100, p99))
    assert after.effort <= max(0.05, state.effort)


@both
def test_quiet_windows_bring_everything_back(controller: Controller) -> None:
    """From the floor, windows without replies or far below the bound lead to full effort and stay there."""
    for p99 in (None, 1.0):
        state = State(0.05, 0.05)
        efforts = []
        for _ in range(20):
            state = controller.next(state, Window(5, 100, p99))
            efforts.append(state.effort)
        assert efforts == sorted(efforts)
        assert efforts[11:] == [1.0] * 9


@both
def test_a_long_overload_winds_nothing_up(controller: Controller) -> None:
    """After an hour above the bound the effort recovers as fast as after a minute."""

    def windows_to_half(bad: int) -> int:
        state = State()
        for _ in range(bad):
            state = controller.next(state, Window(5, 100, 10 * SLO_MS))
        count = 0
        while state.effort < 0.5:
            state = controller.next(state, Window(5, 100, 1.0))
            count += 1
        return count

    assert windows_to_half(720) == windows_to_half(12)


def test_aimd_cuts_by_the_overshoot() -> None:
    """Twice the bound halves the effort; between the margin and the bound it falls by what is above the margin."""
    aimd = Aimd(SLO_MS)
    assert aimd.next(State(0.8), Window(5, 9, 2 * SLO_MS)).effort == pytest.approx(0.4)
    assert aimd.next(State(0.8), Window(5, 9, 100 * SLO_MS)).effort == pytest.approx(0.24)
    near = aimd.next(State(0.8, streak=3), Window(5, 9, 0.9 * SLO_MS))
    assert near == State(pytest.approx(0.8 * aimd.margin / 0.9), peak_ms=0.9 * SLO_MS)
    assert aimd.next(near, Window(0.5, 9, 0.5 * SLO_MS)).effort == near.effort


def test_aimd_grows_faster_while_nothing_is_harmed() -> None:
    """The increase doubles with each good window and starts anew after a bad one."""
    aimd, state, efforts = Aimd(SLO_MS), State(0.1), []
    for _ in range(4):
        state = aimd.next(state, Window(5, 9, 1.0))
        efforts.append(round(state.effort, 6))
    assert efforts == [0.15, 0.25, 0.45, 0.85]
    assert aimd.next(state, Window(5, 9, 2 * SLO_MS)).streak == 0


@given(state=states, slow=st.floats(SLO_MS * 1.001, 1e6))
def test_one_good_window_after_a_bad_one_gives_no_room(state: State, slow: float) -> None:
    """The slowest of a few requests may be a fast one: the second after a broken bound never gets more effort."""
    aimd = Aimd(SLO_MS)
    broken = aimd.next(state, Window(1, 10, slow))
    assert aimd.next(broken, Window(1, 10, 1.0)).effort <= broken.effort


def test_one_slow_reply_proves_nothing() -> None:
    """One of 68 over the bound is what a kept p99 looks like: a little less effort, no knee, and soon forgotten."""
    assert not breaks(Window(5, 68, 3 * SLO_MS, over=1), SLO_MS)
    assert breaks(Window(5, 68, 3 * SLO_MS, over=3), SLO_MS)
    assert breaks(Window(5, 68, 3 * SLO_MS), SLO_MS)
    assert not breaks(Window(5, 68, 0.9 * SLO_MS, over=0), SLO_MS)
    for controller in CONTROLLERS:
        state = controller.next(State(1.0, 1.0), Window(5, 68, 3 * SLO_MS, over=1))
        assert 0.7 < state.effort < 1
        assert math.isinf(state.knee)
        for _ in range(4):
            state = controller.next(state, Window(5, 68, 0.3 * SLO_MS, over=0))
        assert state.effort == 1


@given(st.integers(1, 5000), st.floats(1.01, 50))
def test_a_kept_p99_seldom_passes_for_a_broken_one(replies: int, factor: float) -> None:
    """Of windows whose replies are over the bound in 1 of 100, fewer than LUCK count as broken (binomial, exactly)."""
    worst = next(over for over in range(replies + 2) if breaks(Window(5, replies, factor, over=over), 1.0))
    assert special.bdtrc(worst - 1, replies, 0.01) < LUCK


def test_aimd_stays_below_the_effort_that_broke_the_bound_until_the_load_is_gone() -> None:
    """Up to a plateau below the knee while as many requests come as when it broke, and everything once they do not."""
    aimd = Aimd(SLO_MS)
    state = aimd.next(State(0.8), Window(1, 10, 2 * SLO_MS, arrivals=20))
    assert (state.knee, state.knee_rate) == (0.8, 20)
    still, gone = state, state
    for _ in range(14):
        still = aimd.next(still, Window(1, 10, 0.2 * SLO_MS, arrivals=18))
        gone = aimd.next(gone, Window(1, 10, 0.2 * SLO_MS, arrivals=5))
    assert BELOW_KNEE * 0.8 < still.effort <= BELOW_KNEE * (0.8 + 14 * CREEP_PER_S) + 1e-9
    assert gone.effort == 1


def test_what_follows_a_broken_bound_is_no_new_knee() -> None:
    """The queue of an overload outlives its cause: windows over the bound right after one do not lower the knee."""
    aimd = Aimd(SLO_MS)
    state = aimd.next(State(0.9), Window(1, 10, 3 * SLO_MS))
    for _ in range(4):
        state = aimd.next(state, Window(1, 10, 3 * SLO_MS))
    assert state.knee >= 0.9


@pytest.mark.parametrize(
    "change", [{"slo_ms": 0}, {"slo_ms": math.nan}, {"margin": 0}, {"margin": 1.1}, {"floor": 0}]
)
@pytest.mark.parametrize("name", ["aimd", "pi"])
def test_impossible_controllers_are_refused(name: str, change: dict[str, float]) -> None:
    """A bound, margin or floor that means nothing is named."""
    options = {"slo_ms": SLO_MS, "margin": 0.8, "floor": 0.05, **change}
    with pytest.raises(InputError, match=next(iter(change))):
        make_controller(name, options["slo_ms"], options["margin"], options["floor"])


def test_an_unknown_controller_is_refused() -> None:
    """Only what exists can be chosen."""
    with pytest.raises(InputError, match="aimd or pi"):
        make_controller("pid", 1, 0.8, 0.1)


efforts = st.floats(0.01, 1)


@given(
    efforts, efforts, st.integers(1, 8), st.integers(1, 64), st.floats(0.1, 1), st.integers(0, 8), st.integers(0, 9)
)
def test_less_effort_never_means_coarser_steps_or_more_work(
    one: float, other: float, micro: int, finest: int, duty: float, threads: int, least: int
) -> None:
    """The ladder is monotone in the effort, keeps to its ends, and never exceeds the base."""
    base = Knobs(micro, duty, threads)
    low, high = (ladder(effort, base, finest, least) for effort in sorted((one, other)))
    assert low.micro >= high.micro
    assert low.duty <= high.duty
    assert low.threads <= high.threads
    for knobs in (low, high):
        assert micro <= knobs.micro <= max(micro, finest)
        assert 0 < knobs.duty <= duty
        assert (min(threads, least) if least else threads) <= knobs.threads <= threads


def test_granularity_first_duty_last() -> None:
    """Full effort is the base; half effort is the finest split at full duty; below it only the duty falls."""
    base = Knobs()
    assert ladder(1.0, base, 16) == base
    assert ladder(0.75, base, 16) == Knobs(4)
    assert ladder(0.5, base, 16) == Knobs(16)
    assert ladder(0.25, base, 16) == Knobs(16, 0.5)


def test_cores_first_duty_last() -> None:
    """Where threads can be given up a share of the effort is whole cores, and rest begins with the last one."""
    base = Knobs(threads=4)
    assert ladder(1.0, base, 1, 1) == base
    assert ladder(0.9, base, 1, 1) == Knobs(threads=3)
    assert ladder(0.5, base, 1, 1) == Knobs(threads=2)
    assert ladder(0.25, base, 1, 1) == Knobs(1, 0.5, 1)
    assert ladder(0.375, base, 1, 2) == Knobs(1, 0.5, 2)


def test_on_two_cores_no_effort_is_without_effect() -> None:
    """The first cut takes a thread, and every further one time: a controller's answer is never lost in a gap."""
    base = Knobs(threads=2)
    assert [ladder(effort, base, 1, 1) for effort in (1.0, 0.9, 0.5, 0.1)] == [
        base,
        *(Knobs(1, duty, 1) for duty in (0.9, 0.5, 0.1)),
    ]


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=400), st.sampled_from([5.0, 50.0, 99.0]))
def test_percentiles_are_samples(latencies: list[int], percent: float) -> None:
    """The percentile is the one that numpy calls "higher"; nothing has none."""
    expected = float(np.quantile(np.array(latencies), percent / 100, method="higher"))
    assert percentile_ms(latencies, percent) == pytest.approx(expected / 1e6)
    assert percentile_ms([]) is None


def _plant(utilisation: float, knobs: Knobs) -> float:
    """p99 (ms) of an ideal queue of 10-ms services beside 120-ms steps: backlog, and the step a request meets."""
    wait = 10 * (1 + 3 * utilisation / (1 - utilisation))
    meets = knobs.duty * 120 / knobs.micro * (1 + 0.3 / knobs.micro)
    return wait + meets


def _preempting_plant(utilisation: float, knobs: Knobs) -> float:
    """p99 (ms) of an ideal queue on two cores whose kernel preempts: two threads double a service time, one adds a quarter."""
    slower = 1 + (1.0 if knobs.threads == 2 else 0.25) * knobs.duty
    busy = utilisation * slower
    return 10 * slower * (1 + 3 * busy / (1 - busy))


def _through_a_step(
    controller: Controller, knobs_of: Callable[[float], Knobs], plant: Callable[[float, Knobs], tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """p99 (ms) and training speed of 72 windows of 5 s; utilisation is 40 % in windows 24 to 47, else 10 %."""
    state, p99s, speeds = State(), [], []
    for window in range(72):
        utilisation = 0.4 if 24 <= window < 48 else 0.1
        p99_ms, speed = plant(utilisation, knobs_of(state.effort))
        p99s.append(p99_ms)
        speeds.append(speed)
        state = controller.next(state, Window(5, 100, p99_ms, arrivals=round(500 * utilisation)))
    return p99s, speeds


def _kept_and_recovered(p99s: list[float], speeds: list[float], slo_ms: float) -> None:
    assert all(p99 <= slo_ms for p99 in p99s[26:28])
    assert np.mean([p99 <= slo_ms for p99 in p99s[26:48]]) >= 0.85
    assert np.mean(speeds[60:]) >= 0.9 * np.mean(speeds[12:24])


@both
@pytest.mark.parametrize("slo_ms", [45.0, 60.0, 120.0])
def test_a_load_step_is_absorbed_and_forgotten(controller: Controller, slo_ms: float) -> None:
    """Utilisation 10 -> 40 -> 10 %: p99 below the bound within three windows, training back to 90 % after it."""
    controller = type(controller)(slo_ms)  # type: ignore[call-arg]

    def plant(utilisation: float, knobs: Knobs) -> tuple[float, float]:
        return _plant(utilisation, knobs), knobs.duty * (1 - utilisation) / (1 + 0.02 * knobs.micro)

    _kept_and_recovered(*_through_a_step(controller, lambda effort: ladder(effort, Knobs(), 16), plant), slo_ms)


@both
@pytest.mark.parametrize("slo_ms", [40.0, 60.0, 120.0])
def test_a_load_step_on_two_cores_is_absorbed_and_forgotten(controller: Controller, slo_ms: float) -> None:
    """The same where the ladder is threads and time: full effort breaks every bound here, a thread less keeps two of them."""
    controller = type(controller)(slo_ms)  # type: ignore[call-arg]

    def plant(utilisation: float, knobs: Knobs) -> tuple[float, float]:
        speed = knobs.duty * (1.0 if knobs.threads == 2 else 0.6) * (1 - utilisation / 2)
        return _preempting_plant(utilisation, knobs), speed

    _kept_and_recovered(
        *_through_a_step(controller, lambda effort: ladder(effort, Knobs(threads=2), 1, 1), plant), slo_ms
    )


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=50), st.floats(0.05, 1), st.floats(0, 1))
def test_a_forecast_is_never_negative(rates: list[float], weight: float, trend: float) -> None:
    """However the rates fall, the forecast is a rate."""
    forecaster = Ewma(weight, trend)
    assert forecaster.forecast() is None
    for rate in rates:
        forecaster.observe(rate)
        assert (forecaster.forecast(3) or 0) >= 0


@given(st.floats(0, 1e4), st.integers(2, 30))
def test_a_constant_load_is_forecast_exactly(rate: float, count: int) -> None:
    """Equal rates are their own forecast."""
    forecaster = Ewma()
    for _ in range(count):
        forecaster.observe(rate)
    assert forecaster.forecast(4) == pytest.approx(rate)


def test_a_ramp_is_forecast_ahead_of_its_last_value() -> None:
    """With a trend the forecast of a rising load lies above what was seen; without one it lags behind."""
    trending, lagging = Ewma(0.5, 0.5), Ewma(0.5, 0.0)
    for rate in range(0, 100, 5):
        trending.observe(rate)
        lagging.observe(rate)
    assert (trending.forecast(2) or 0) > 95 > (lagging.forecast(2) or 0)


@given(st.floats(0, 5), st.floats(0, 5))
def test_headroom_falls_with_the_load(one: float, other: float) -> None:
    """More forecast load never means more effort; the ends are 1 and the floor."""
    headroom = Headroom(0.2, 0.7, 0.1)
    low, high = sorted((one, other))
    assert headroom.effort(low) >= headroom.effort(high) >= 0.1
    assert headroom.effort(0.2) == 1
    assert headroom.effort(0.7) == pytest.approx(0.1)


def test_impossible_forecasts_are_refused() -> None:
    """Weights, headroom and forecasters outside their range are named."""
    for make in (lambda: Ewma(0), lambda: Ewma(0.5, 2), lambda: Headroom(0.7, 0.2), lambda: make_forecaster("lstm2")):
        with pytest.raises(InputError):
            make()


@settings(max_examples=60)
@given(st.floats(0.05, 1), st.lists(st.integers(1, 200), min_size=5, max_size=60))
def test_the_duty_is_kept_over_time(duty: float, works_ms: list[int]) -> None:
    """Work is at most duty x time plus one piece and one rest too short to be taken, however work is cut."""
    brakes, now, worked = Brakes(), 1, 0
    brakes.arrive(now, duty)
    brakes.leave(now)
    for work_ms in works_ms:
        now += work_ms * NS_PER_MS
        worked += work_ms * NS_PER_MS
        brakes.arrive(now, duty)
        while until := brakes.held_until(now, False):
            now = until
        brakes.leave(now)
    slack = LEAST_REST_NS * duty / (1 - duty) if duty < 1 else 0
    assume(brakes.owed_ns < LEAST_REST_NS)
    assert worked <= duty * (now - 1) + slack + 10


@given(st.integers(0, 1000), st.integers(0, 300), st.floats(0.1, 1))
def test_being_held_counts_as_rest(work_ms: int, held_ms: int, duty: float) -> None:
    """Rest that is owed shrinks by the time a request held the trainer."""
    brakes, now = Brakes(), 1
    brakes.arrive(now, duty)
    brakes.leave(now)
    now += work_ms * NS_PER_MS
    brakes.arrive(now, duty)
    owed = brakes.owed_ns
    now += held_ms * NS_PER_MS
    assert brakes.leave(now) == held_ms * NS_PER_MS
    assert brakes.owed_ns == pytest.approx(max(0.0, owed - held_ms * NS_PER_MS))


def test_pending_holds_for_ever_or_for_max_wait() -> None:
    """A pending request holds the trainer and is asked about again soon; max_wait is a bound for one stop."""
    brakes = Brakes()
    brakes.arrive(1000, 1.0)
    late = 1000 + 10**12
    assert brakes.held_until(late, True) == late + LOOK_AGAIN_NS
    assert brakes.held_until(late, False) == GO_ON
    bounded = Brakes(max_wait_ns=5 * NS_PER_MS)
    bounded.arrive(1000, 1.0)
    assert bounded.held_until(1000, True) == 1000 + 5 * NS_PER_MS
    assert bounded.held_until(1000 + 5 * NS_PER_MS, True) == GO_ON


def test_full_duty_forgives_what_is_owed() -> None:
    """A trainer that is no longer throttled goes on at once."""
    brakes = Brakes()
    brakes.arrive(1, 1.0)
    brakes.leave(1)
    brakes.arrive(10**9, 0.1)
    assert brakes.held_until(10**9, False) > 10**9
    brakes.arrive(10**9, 1.0)
    assert brakes.held_until(10**9, False) == GO_ON
