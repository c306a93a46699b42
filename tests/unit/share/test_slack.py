"""The micro-step that a bound leaves room for: recursion, choice, and what a running trainer does with it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError
from corun.share.controllers import Window
from corun.share.simulation import TrainingCost
from corun.share.slack import choose_micro, gated_sojourns, micro_for_step, predict_p99_ms, step_for_slack
from corun.share.steering import SlackSteering
from corun.stats import sojourn_times

gaps = st.lists(st.integers(0, 10**8), min_size=1, max_size=80)


def _load(seed: int, count: int, rate: float, service_ms: float) -> tuple[list[int], list[int]]:
    draw = random.Random(seed)
    now, arrivals = 0.0, []
    for _ in range(count):
        now += draw.expovariate(rate)
        arrivals.append(round(now * 1e9))
    return arrivals, [round(service_ms * 1e6 * draw.lognormvariate(0, 0.1)) for _ in arrivals]


@given(gaps, st.integers(1, 10**8))
def test_without_training_it_is_lindleys_recursion(distances: list[int], service: int) -> None:
    """Micro-steps of no length give the sojourns of the plain queue."""
    arrivals = np.cumsum(distances).tolist()
    expected = sojourn_times(arrivals, [service] * len(arrivals))
    assert gated_sojourns(arrivals, [service] * len(arrivals), 0) == pytest.approx(expected.tolist())


@given(gaps, st.integers(1, 10**8), st.integers(1, 10**8))
def test_a_micro_step_delays_by_at_most_one_per_busy_period(distances: list[int], service: int, step: int) -> None:
    """Each request waits no longer than without training plus one micro-step for every busy period before it."""
    arrivals = np.cumsum(distances).tolist()
    plain = gated_sojourns(arrivals, [service] * len(arrivals), 0)
    gated = gated_sojourns(arrivals, [service] * len(arrivals), step)
    periods = 0
    for index, (alone, beside) in enumerate(zip(plain, gated, strict=True)):
        periods += index == 0 or alone == service
        assert alone <= beside < alone + periods * step


@given(gaps, st.integers(1, 10**7), st.integers(1, 10**8))
def test_requests_start_at_boundaries_or_one_after_the_other(distances: list[int], service: int, step: int) -> None:
    """A request that finds the service idle starts a whole number of micro-steps after the last one ended."""
    arrivals = np.cumsum(distances).tolist()
    ends = [a + s for a, s in zip(arrivals, gated_sojourns(arrivals, [service] * len(arrivals), step), strict=True)]
    previous = arrivals[0]
    for arrival, end in zip(arrivals, ends, strict=True):
        start = end - service
        assert start >= arrival
        assert (start - previous) % step == 0 if arrival > previous else start == previous
        previous = end


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 100), st.floats(1.0, 3.0))
def test_the_choice_meets_the_bound_or_is_the_finest_there_is(seed: int, factor: float) -> None:
    """The predicted p99 of the choice keeps the bound, and no split that keeps it is faster."""
    cost = TrainingCost()
    arrivals, services = _load(seed, 800, 27.0, 11.0)
    bound = factor * predict_p99_ms(arrivals, services, 0.0)
    choice = choose_micro(arrivals, services, cost.micro_ms, 64, bound)
    predicted = {k: predict_p99_ms(arrivals, services, cost.micro_ms(-(-64 // k))) for k in range(1, 65)}
    assert choice.meets == (min(predicted.values()) <= bound)
    if choice.meets:
        assert choice.p99_ms <= bound

        def speed(k: int) -> float:
            size, larger = divmod(64, k)
            return 64 / ((larger and larger * cost.micro_ms(size + 1)) + (k - larger) * cost.micro_ms(size))

        fastest = max(speed(k) for k, p99 in predicted.items() if p99 <= bound)
        assert speed(choice.micro) >= 0.97 * fastest
    else:
        assert choice.p99_ms == min(predicted.values())


def test_more_slack_never_means_finer_steps() -> None:
    """The chosen micro-step grows with the bound."""
    arrivals, services = _load(1, 2000, 27.0, 11.0)
    alone = predict_p99_ms(arrivals, services, 0.0)
    choices = [
        choose_micro(arrivals, services, TrainingCost().micro_ms, 64, alone * x) for x in (1.05, 1.2, 1.6, 3, 9)
    ]
    sizes = [choice.samples for choice in choices]
    assert sizes == sorted(sizes)
    assert choices[-1].efficiency == 1.0


def test_a_batch_is_never_cut_below_its_least() -> None:
    """BatchNorm needs two samples: an impossible bound gives parts of two, not of one."""
    arrivals, services = _load(1, 800, 27.0, 11.0)
    assert choose_micro(arrivals, services, TrainingCost().micro_ms, 64, 0.0, least=2).samples == 2


def test_nothing_can_be_predicted_from_nothing() -> None:
    """A prediction without requests is bad input."""
    with pytest.raises(InputError, match="without any request"):
        predict_p99_ms([], [], 1.0)


@settings(max_examples=10, deadline=None)
@given(st.floats(5, 40), st.floats(2, 12), st.floats(1.2, 6))
def test_the_step_for_slack_just_meets_the_bound(rate: float, service_ms: float, factor: float) -> None:
    """Fresh arrivals of that rate keep about the bound; no load at all leaves the longest step."""
    bound = factor * service_ms
    step = step_for_slack(rate, service_ms, bound, 200.0)
    assert 0 <= step <= 200
    assert step_for_slack(0.0, service_ms, bound, 200.0) == 200.0
    assert step_for_slack(rate, service_ms, 1e9, 50.0) == 50.0
    arrivals, _ = _load(99, 3000, rate, service_ms)
    services = [round(service_ms * 1e6)] * len(arrivals)
    if 0 < step < 200:
        assert 0.6 * bound <= predict_p99_ms(arrivals, services, step) <= 1.7 * bound


@given(st.integers(1, 64), st.floats(0.1, 200), st.floats(0, 200), st.integers(1, 64))
def test_parts_follow_the_wanted_step(micro: int, step_ms: float, wanted_ms: float, finest: int) -> None:
    """Finer at once, coarser by at most half of the parts a window, within 1 and the finest."""
    after = micro_for_step(micro, step_ms, wanted_ms, finest)
    assert after >= 1
    assert after <= max(finest, -(-micro // 2))
    assert after >= min(finest, -(-micro // 2))
    if wanted_ms >= step_ms and micro <= finest:
        assert after <= micro


def test_slack_coarsens_at_low_load_and_refines_at_high_load() -> None:
    """Windows of little load lead to few parts, windows of much load to many; it starts with the finest."""
    steering = SlackSteering(slo_ms=60.0, micro_max=16, window_s=5.0)
    cost = TrainingCost()
    assert steering.first.micro == 16

    def settle(rate: float) -> int:
        micro = 16
        for _ in range(12):
            window = Window(5.0, int(5 * rate), 30.0, int(5 * rate), 11.0)
            wish = steering.steer(window, micro, cost.micro_ms(-(-64 // micro)))
            assert wish.micro is not None
            micro = wish.micro
        return micro

    quiet, busy = settle(5.0), settle(36.0)
    assert 1 <= quiet < busy <= 16


def test_the_interpolated_cost_is_the_measured_one() -> None:
    """The cost passes through its points: 4, 8 and 16 parts run at 1.10, 1.00 and 0.83 of the full batch's speed."""
    cost = TrainingCost()
    assert cost.micro_ms(64) == 120.0
    for parts, speed in ((4, 1.10), (8, 1.00), (16, 0.83)):
        assert 120.0 / (parts * cost.micro_ms(64 // parts)) == pytest.approx(speed, abs=0.005)
    lengths = [cost.micro_ms(samples) for samples in range(1, 65)]
    assert lengths == sorted(lengths)
