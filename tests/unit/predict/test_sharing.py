"""The duty rule and the virtual-time model: by hand where it can be, by laws where it cannot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError
from corun.predict.sharing import HEADROOMS, LEAD, Device, DutyRule, calibrate, shares, simulate
from corun.stats import sojourn_times

DEVICE = Device(service_speed=0.5, train_speed=0.5, step_s=0.1, batch=1)


def test_the_share_is_what_the_load_leaves() -> None:
    """clip((1 - headroom - u) / train_cost, floor, 1)."""
    rule = DutyRule(headroom=0.1, train_cost=0.5, floor=0.05)
    assert [rule.share(u) for u in (0.0, 0.5, 0.7, 2.0)] == pytest.approx([1.0, 0.8, 0.4, 0.05])


def test_down_at_once_up_after_the_dwell() -> None:
    """A gap of one window inside a burst does not start the trainer."""
    rule = DutyRule(headroom=0.0, dwell=2)
    assert rule.follow([0.2, 0.8, 0.1, 0.8, 0.1, 0.1]).tolist() == pytest.approx([0.8, 0.2, 0.2, 0.2, 0.2, 0.9])


@given(st.lists(st.floats(0, 3), min_size=1, max_size=40), st.integers(1, 5))
def test_shares_stay_within_floor_and_one_and_never_above_what_is_allowed(loads: list[float], dwell: int) -> None:
    """Whatever the loads: between floor and 1, at most the share of the window's own load."""
    rule = DutyRule(dwell=dwell)
    followed = rule.follow(loads)
    assert (followed >= rule.floor).all()
    assert (followed <= [rule.share(load) for load in loads]).all()


@pytest.mark.parametrize("wrong", [{"headroom": 1.0}, {"train_cost": 0.0}, {"floor": 0.0}, {"dwell": 0}])
def test_an_impossible_rule_is_refused(wrong: dict[str, float]) -> None:
    """At construction."""
    with pytest.raises(InputError):
        DutyRule(**wrong)  # type: ignore[arg-type]


def test_a_policy_asks_for_each_window_at_its_start() -> None:
    """The forecast is asked at the start of every window, times the service time."""
    asked: list[float] = []

    def forecast(now_s: float) -> float:
        asked.append(now_s)
        return 10.0

    assert shares(forecast, 0.05, DutyRule(headroom=0.1), 100.0, 3, 2.0).tolist() == pytest.approx([0.4] * 3)
    assert asked == [100.0, 102.0, 104.0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.001, 0.2), min_size=1, max_size=60), st.floats(0.001, 0.2))
def test_without_training_it_is_a_plain_queue(gaps: list[float], service_s: float) -> None:
    """With a share of 0 the sojourn times are those of Lindley's recursion."""
    arrivals = np.cumsum(gaps)
    run = simulate(arrivals, service_s, [0.0, 0.0], 1.0, DEVICE)
    assert run.sojourn_s == pytest.approx(sojourn_times(arrivals, service_s), abs=1e-6)
    assert run.train_samples_per_s == 0.0


def test_without_requests_training_has_its_share() -> None:
    """Steps of 0.1 s at share d leave d of the time: 10 d steps a second."""
    for share in (1.0, 0.5, 0.25):
        run = simulate([], 0.1, [share] * 40, 1.0, DEVICE)
        assert run.train_samples_per_s == pytest.approx(10 * share, rel=0.02)


def test_both_run_at_their_shared_speed() -> None:
    """A request of 0.1 s that meets full training takes 0.2 s, and costs it one step's half: by hand."""
    run = simulate([0.5], 0.1, [1.0], 1.0, DEVICE)
    assert run.sojourn_s == pytest.approx([0.2])
    assert run.train_samples_per_s == pytest.approx(9.0)


def test_a_request_in_a_pause_is_not_slowed() -> None:
    """At share 1/2 steps run 0-0.1, 0.2-0.3, ...; a request at 0.1 that needs 0.1 s meets none."""
    run = simulate([0.1], 0.1, [0.5], 1.0, DEVICE)
    assert run.sojourn_s == pytest.approx([0.1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.0, 0.3), min_size=1, max_size=60), st.floats(0.01, 0.1), st.floats(0.05, 1.0))
def test_training_only_ever_delays_and_work_is_conserved(gaps: list[float], service_s: float, share: float) -> None:
    """No sojourn is shorter than alone nor longer than at half speed throughout; training is at most its own speed."""
    arrivals = np.cumsum(gaps)
    run = simulate(arrivals, service_s, [share] * 5, 1.0, DEVICE)
    alone = sojourn_times(arrivals, service_s)
    slowest = sojourn_times(arrivals, service_s / DEVICE.service_speed)
    assert (run.sojourn_s >= alone - 1e-6).all()
    assert (run.sojourn_s <= slowest + 1e-6).all()
    assert 0 <= run.train_samples_per_s <= 1 / DEVICE.step_s + 1e-9


def test_less_training_violates_less() -> None:
    """Violations fall with the share, and so does training."""
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(0.1, 2000))
    runs = [simulate(arrivals, 0.05, [share] * 200, 1.0, DEVICE) for share in (0.1, 0.5, 1.0)]
    violations = [run.violation_pct(0.3) for run in runs]
    training = [run.train_samples_per_s for run in runs]
    assert violations == sorted(violations)
    assert training == sorted(training)


@pytest.mark.parametrize(
    ("arrivals", "duty"), [([2.0, 1.0], [1.0]), ([-1.0, 1.0], [1.0]), ([1.0], []), ([1.0], [1.5]), ([1.0], [-0.1])]
)
def test_impossible_inputs_are_refused(arrivals: list[float], duty: list[float]) -> None:
    """Arrivals that run backwards, no window, shares outside 0..1."""
    with pytest.raises(ValueError, match=r"arrivals|share"):
        simulate(arrivals, 0.1, duty, 1.0, DEVICE)


def _late_pct(past: np.ndarray, headroom: float, bound_s: float) -> float:
    start, windows = past[0] + LEAD, int(past[-1] - past[0]) - LEAD
    duty = shares(lambda now: 40.0, 0.01, DutyRule(headroom=headroom), start, windows, 1.0)
    inside = past[(past >= start) & (past < start + windows)]
    return simulate(inside - start, 0.01, duty, 1.0, DEVICE).violation_pct(bound_s)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_calibration_takes_the_smallest_headroom_that_would_have_kept_the_promise(seed: int) -> None:
    """The past keeps the promise with the headroom found and breaks it with the next smaller one."""
    past = np.cumsum(np.random.default_rng(seed).exponential(1 / 40, 3000))
    found = calibrate(lambda now: 40.0, past, 0.01, 0.06, 1.0, DEVICE)
    place = HEADROOMS.index(found)
    assert _late_pct(past, found, 0.06) <= 1.0
    assert place == 0 or _late_pct(past, HEADROOMS[place - 1], 0.06) > 1.0


def test_a_load_that_breaks_the_promise_alone_leaves_the_fallback() -> None:
    """Service times above the bound are late whatever the trainer does: no headroom helps, none is invented."""
    past = np.arange(0.0, 60.0, 0.1)
    assert calibrate(lambda now: 10.0, past, 0.05, 0.04, 1.0, DEVICE, fallback=0.25) == 0.25


def test_too_short_a_past_leaves_the_fallback() -> None:
    """Fewer windows than the forecaster's history teach nothing."""
    assert calibrate(lambda now: 10.0, np.arange(0.0, 5.0, 0.1), 0.01, 0.1, 1.0, DEVICE, fallback=0.1) == 0.1
