"""The scaler in virtual time: bounds, patience, hysteresis, and what a load that rises and falls does to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError
from corun.tasks.demand import LEARN_FROM, Demand
from corun.tasks.scaling import Decision, Observation, ScalingRule, decide

RULE = ScalingRule(1, 5, up_after_s=2, down_after_s=20)


def simulate(
    rule: ScalingRule, rate: Callable[[float], float], seconds: int, service_s: float = 0.1, start_s: int = 3
) -> list[int]:
    """Replicas after each second under a fluid load: what the ready ones do not serve waits; starting takes start_s."""
    looks: list[Observation] = []
    ready_at = [0.0] * rule.least
    waiting = 0.0
    course = []
    for second in range(seconds):
        arrived = rate(second)
        served = sum(at <= second for at in ready_at) / service_s
        waiting = max(0.0, waiting + arrived - served)
        looks.append(Observation(second, arrived, len(ready_at), service_s, waiting=round(waiting)))
        wanted = decide(rule, looks[-60:]).replicas
        ready_at = ready_at[:wanted] + [float(second + start_s)] * (wanted - len(ready_at))
        course.append(wanted)
    return course


def changes(course: list[int]) -> int:
    return sum(a != b for a, b in pairwise(course))


def look(now_s: float, rate: float, replicas: int = 1, **more: float) -> Observation:
    return Observation(now_s, rate, replicas, **({"service_s": 0.1} | more))  # type: ignore[arg-type]


looks = st.lists(
    st.builds(
        Observation,
        now_s=st.just(0.0),
        rate=st.floats(0, 200),
        replicas=st.integers(0, 9),
        service_s=st.one_of(st.none(), st.floats(1e-4, 2)),
        forecast=st.one_of(st.none(), st.floats(0, 300)),
        waiting=st.integers(0, 500),
        late_share=st.floats(0, 1),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(looks, st.integers(0, 4), st.integers(1, 5))
def test_a_decision_is_within_the_bounds_and_says_why(seen: list[Observation], least: int, more: int) -> None:
    """Whatever was seen, the answer lies between least and most, and a change comes with its reason."""
    rule = ScalingRule(least, least + more)
    seen = [
        Observation(float(i), *[getattr(one, f) for f in list(one.__dataclass_fields__)[1:]])
        for i, one in enumerate(seen)
    ]
    decision = decide(rule, seen)
    assert rule.least <= decision.replicas <= rule.most
    assert bool(decision.why) == (decision.replicas != seen[-1].replicas)


@settings(max_examples=100, deadline=None)
@given(looks, st.floats(1, 4))
def test_more_load_never_means_fewer_replicas(seen: list[Observation], factor: float) -> None:
    """The same history with every rate and queue larger never ends in a smaller number."""
    rule = ScalingRule(1, 8, up_after_s=3, down_after_s=10)
    times = [float(i) for i in range(len(seen))]
    fields = [(one.replicas, one.service_s, one.forecast, one.late_share) for one in seen]
    less = [
        Observation(t, one.rate, *f[:3], one.waiting, f[3]) for t, one, f in zip(times, seen, fields, strict=True)
    ]
    greater = [
        Observation(t, one.rate * factor, *f[:3], math.ceil(one.waiting * factor), f[3])
        for t, one, f in zip(times, seen, fields, strict=True)
    ]
    assert decide(rule, greater).replicas >= decide(rule, less).replicas


@settings(max_examples=40, deadline=None)
@given(st.floats(0.5, 45))
def test_a_constant_load_settles(rate: float) -> None:
    """With one rate there is no change in the last two thirds of ten minutes, and the replicas carry the load."""
    course = simulate(RULE, lambda _: rate, 600)
    assert changes(course[200:]) == 0
    assert course[-1] >= min(RULE.most, math.ceil(rate * 0.1))


@pytest.mark.parametrize(("seed", "rate"), [(seed, 4.0 + 1.8 * seed) for seed in range(21)])
def test_poisson_noise_does_not_make_it_flap(seed: int, rate: float) -> None:
    """Counts per second that scatter around one mean change the number of replicas a few times in ten minutes at most."""
    counts = np.random.default_rng(seed).poisson(rate, 600)
    smoothed = np.convolve(counts, np.ones(5) / 5, mode="same")
    course = simulate(RULE, lambda second: float(smoothed[int(second)]), 600)
    assert changes(course) <= 16


def test_up_and_down_again() -> None:
    """One replica becomes three when the load needs three, and one again when it has been low for down_after_s."""
    rule = ScalingRule(1, 3, up_after_s=2, down_after_s=20)
    course = simulate(rule, lambda second: 20.0 if 30 <= second < 90 else 2.0, 180)
    assert course[25] == 1
    assert course[80] == 3
    assert course[100] == 3
    assert course[-1] == 1


def test_it_waits_before_it_starts_one() -> None:
    """A burst shorter than up_after_s starts nothing; before there is that much history nothing is decided."""
    assert decide(RULE, [look(0, 50)]) == Decision(1)
    assert decide(RULE, [look(0, 1), look(1, 50), look(2, 1)]).replicas == 1
    assert decide(RULE, [look(0, 12), look(1, 50), look(2, 12)]).replicas == 2


def test_hysteresis_between_low_and_target() -> None:
    """A load that two replicas carry at 60 % keeps both: it is too much for one at 50 %, too little for a third."""
    seen = [look(second, 12, 2) for second in range(60)]
    assert decide(RULE, seen).replicas == 2
    assert decide(RULE, [look(second, 4, 2) for second in range(60)]).replicas == 1


def test_the_cool_down_begins_with_every_change() -> None:
    """Nothing is stopped within down_after_s of a change, whatever the load was before."""
    seen = [look(second, 1, 3 if second < 50 else 2) for second in range(60)]
    assert decide(RULE, seen).replicas == 2
    seen += [look(second, 1, 2) for second in range(60, 75)]
    assert decide(RULE, seen).replicas == 1


def test_a_forecast_starts_replicas_before_the_load_comes() -> None:
    """The larger of what is and what is expected counts."""
    seen = [look(second, 2, forecast=20) for second in range(5)]
    assert decide(RULE, seen).replicas == 3


def test_a_backlog_needs_replicas_too() -> None:
    """Waiting requests are to be worked off within drain_s."""
    seen = [look(second, 5, waiting=40) for second in range(5)]
    assert decide(RULE, seen).replicas == 3


def test_broken_bounds_need_another_replica_while_it_is_load_that_breaks_them() -> None:
    """Late answers of busy replicas add one; of idle replicas they do not, for more replicas would not help."""
    busy = [look(second, 6, late_share=0.2) for second in range(5)]
    idle = [look(second, 1, late_share=0.2) for second in range(5)]
    assert decide(RULE, busy).replicas == 2
    assert decide(RULE, idle).replicas == 1


def test_a_task_without_load_may_have_no_replica_and_gets_one_with_the_first_request() -> None:
    """With least = 0 an idle task scales to zero, and a waiting request is enough to come back."""
    rule = ScalingRule(0, 2, up_after_s=0, down_after_s=10)
    assert decide(rule, [look(second, 0, 1) for second in range(20)]).replicas == 0
    assert decide(rule, [Observation(second, 0, 1) for second in range(20)]).replicas == 0
    assert decide(rule, [Observation(0, 0, 0, waiting=1)]).replicas == 1


@pytest.mark.parametrize(
    "wrong", [{"least": 2, "most": 1}, {"most": 0, "least": 0}, {"low": 0.8}, {"target": 1.5}, {"down_after_s": 0.5}]
)
def test_a_rule_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    """Bounds in the wrong order, thresholds that overlap, a cool-down shorter than the warm-up."""
    with pytest.raises(InputError):
        ScalingRule(**wrong)  # type: ignore[arg-type]


def test_nothing_seen_is_nothing_to_decide_from() -> None:
    """Without one look there is no answer."""
    with pytest.raises(ValueError, match="nothing"):
        decide(RULE, [])


# The forecast


def test_a_young_task_is_forecast_by_its_mean() -> None:
    """Before there is enough to learn from the forecast is the exponentially weighted mean; before anything, none."""
    demand = Demand(2.0)
    assert demand.forecast() is None
    demand.observe(10)
    demand.observe(20)
    forecast = demand.forecast()
    assert forecast is not None
    assert (forecast.method, forecast.rate) == ("ewma", pytest.approx(5 + 0.3 * 5))


def test_an_old_task_is_forecast_by_what_it_learned() -> None:
    """After LEARN_FROM windows an upper quantile is forecast: above most of what then comes, and not far above."""
    demand = Demand(1.0, ahead=2)
    counts = np.random.default_rng(4).poisson(20, LEARN_FROM + 60)
    covered = 0
    for place, count in enumerate(counts):
        forecast = demand.forecast()
        if place > LEARN_FROM:
            assert forecast is not None
            assert forecast.method == "learned"
            assert forecast.rate < 60
            covered += forecast.rate >= count
        demand.observe(int(count))
    assert covered > 40


def test_an_earlier_life_teaches_but_does_not_say_what_is_now() -> None:
    """Remembered windows fit the forecaster; the first forecast waits for a window of this life."""
    demand = Demand(1.0)
    demand.remember(np.random.default_rng(4).poisson(20, 100).tolist())
    assert demand.forecast() is None
    demand.observe(3)
    forecast = demand.forecast()
    assert forecast is not None
    assert forecast.method == "learned"


def test_a_task_that_nobody_asks_anything_learns_nothing() -> None:
    """Windows without arrivals leave the mean, at zero."""
    demand = Demand(1.0)
    for _ in range(LEARN_FROM + 5):
        demand.observe(0)
    forecast = demand.forecast()
    assert forecast is not None
    assert (forecast.method, forecast.rate) == ("ewma", 0.0)
