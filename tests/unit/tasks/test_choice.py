"""The model of one task: best quality that keeps its promises and fits, with a reason for every other one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.run.config import Slo
from corun.tasks.choice import Candidate, Capacity, Choice, Demand, choose
from corun.tasks.profile import Point, Profile
from corun.tasks.task import Task

BIG = Capacity(cores=8, memory_mib=10_000)


def candidate(
    model: str,
    quality: float | None = 70.0,
    ms: float = 10.0,
    top: float = 100.0,
    memory_mib: float = 500.0,
    cpu_ms: float = 5.0,
    **values: object,
) -> Candidate:
    """A model with one latency up to the rate `top`, alone and three times that beside training."""
    points = tuple(
        Point(rate, 1000, ms * times, ms * times, p99_ms=ms * times, training=training)
        for training, times in ((False, 1), (True, 3))
        for rate in (top / 10, top)
    )
    profile = Profile(
        **{  # type: ignore[arg-type]
            "model": model,
            "machine": "m",
            "device": "cpu",
            "threads": 1,
            "points": points,
            "cpu_ms": cpu_ms,
            "rss_mib": memory_mib,
            **values,
        }
    )
    return Candidate(model, quality, "top-1 %", profile)


def task(**values: object) -> Task:
    """A task of 20 requests/s with a p99 of 50 ms."""
    return Task(**{"id": "t", "rate": 20.0, "slo": Slo(p99_ms=50), **values})  # type: ignore[arg-type]


def test_the_best_quality_that_keeps_the_promise_wins_and_the_others_learn_why() -> None:
    """A better model that is too slow and a worse one that would do lose, each with its own sentence."""
    choice = choose(task(), [candidate("fast", 60), candidate("good", 75, 40), candidate("best", 85, 80)], BIG)
    assert choice.model == "good"
    assert choice.expected_ms == {"p99_ms": 40}
    assert choice.reasons["best"] == "p99 80 ms at 20 requests/s, 50 ms are promised"
    assert choice.reasons["fast"].startswith("would do, with less quality: 60")
    assert choice.why == "75 top-1 %; p99 40 ms expected; 1 replica"


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (candidate("x", 99, ms=60), "p99 60 ms"),
        (candidate("x", 99, top=10), "keeps up with 10 requests/s"),
        (candidate("x", 99, memory_mib=20_000), "takes 20000 MiB of memory, 1e+04 are free"),
        (candidate("x", 99, cpu_ms=1000), "20 cores busy, 8 are free"),
        (candidate("x", 99, device="cuda"), "measured on cuda, the task asks for cpu"),
        (Candidate("x", 99.0, "top-1 %"), "not measured on this machine"),
    ],
)
def test_each_way_to_lose_has_its_sentence(other: Candidate, reason: str) -> None:
    """Latency, rate, memory, cores, device and a missing profile are told apart."""
    choice = choose(task(), [candidate("plain"), other], BIG)
    assert choice.model == "plain"
    assert reason in choice.reasons["x"]


def test_quality_below_the_least_or_unknown_is_refused_only_where_a_least_was_asked() -> None:
    """min_quality is a bar; without one a model of unknown quality may serve, behind every known one."""
    models = [candidate("low", 50), candidate("unknown", None)]
    strict = choose(task(min_quality=60), models, BIG)
    assert strict.model is None
    assert strict.reasons == {
        "low": "quality 50 top-1 % is below 60",
        "unknown": "its quality is unknown and at least 60 is asked for",
    }
    assert choose(task(), models, BIG).model == "low"
    assert choose(task(), [candidate("unknown", None)], BIG).model == "unknown"


def test_replicas_are_as_few_as_keep_the_promise() -> None:
    """One replica that cannot keep up becomes several, up to the most the task allows."""
    models = [candidate("m", 70, top=15)]
    assert choose(task(rate=40.0, max_replicas=4), models, BIG).replicas == 3
    assert choose(task(rate=40.0, max_replicas=4, min_replicas=4), models, BIG).replicas == 4
    refused = choose(task(rate=40.0, max_replicas=2), models, BIG)
    assert refused.model is None
    assert refused.replicas == 0
    assert "with 2 replicas" in refused.reasons["m"]


def test_beside_training_the_slower_curve_counts() -> None:
    """With a training job on the machine the latencies measured beside one decide."""
    models = [candidate("heavy", 80, 30), candidate("light", 60, 10)]
    assert choose(task(), models, BIG).model == "heavy"
    beside = choose(task(), models, Capacity(8, 10_000, training=True))
    assert beside.model == "light"
    assert "90 ms at 20 requests/s beside training" in beside.reasons["heavy"]


def test_training_may_be_protected_by_a_bound() -> None:
    """A model that slows the training job more than allowed loses; without a bound the cost is told."""
    points = (Point(20, 1000, 9, 9, p99_ms=9, training=True, slowdown=1.8),)
    models = [candidate("greedy", 80, points=points), candidate("modest", 60)]
    told = choose(task(), models, Capacity(8, 10_000, training=True))
    assert told.model == "greedy"
    assert "training x1.8 slower" in told.why
    bound = choose(task(), models, Capacity(8, 10_000, training=True, max_slowdown=1.5))
    assert bound.model == "modest"
    assert bound.reasons["greedy"] == "makes training x1.8 slower, x1.5 is allowed"


def test_a_larger_batch_limit_is_used_when_only_it_keeps_up() -> None:
    """Batching is chosen where a single request at a time cannot."""
    points = (Point(10, 1000, 5, 5, p99_ms=5), Point(40, 1000, 20, 20, p99_ms=20, max_batch=8))
    one = candidate("m", 70, points=points)
    assert choose(task(rate=8.0), [one], BIG).max_batch == 1
    assert choose(task(rate=30.0), [one], BIG).max_batch == 8


def test_a_model_that_could_not_take_the_lowest_rate_is_not_called_unmeasured() -> None:
    """A profile of losses says the machine is too slow, not that nobody looked."""
    lossy = candidate("m", 70, points=(Point(10, 5, 900, 900, lost=50),))
    assert "did not keep up with 10 requests/s" in choose(task(), [lossy], BIG).reasons["m"]


def test_without_any_candidate_the_choice_says_so() -> None:
    """No allowed model is a sentence, not an error."""
    assert choose(task(), [], BIG) == Choice(None, {}, "no model of kind classification is allowed", replicas=0)


CANDIDATES = st.lists(
    st.builds(
        candidate,
        st.sampled_from("abcdefgh"),
        st.none() | st.floats(0, 100),
        st.floats(1, 100),
        st.floats(1, 100),
        st.floats(10, 5000),
        st.floats(0.1, 100),
    ),
    max_size=6,
    unique_by=lambda one: one.model,
)
TASKS = st.builds(
    task,
    rate=st.floats(0.1, 200),
    min_quality=st.sampled_from([0.0, 50.0]),
    max_replicas=st.integers(1, 4),
)
MACHINES = st.builds(Capacity, st.floats(0, 8), st.floats(0, 8000), training=st.booleans())


@settings(max_examples=150, deadline=None)
@given(TASKS, CANDIDATES, MACHINES)
def test_a_choice_keeps_every_promise_and_explains_every_other_model(
    asked: Task, candidates: list[Candidate], machine: Capacity
) -> None:
    """Whatever is chosen fits and keeps the SLO; nobody else is left without a reason; no better model would do."""
    choice = choose(asked, candidates, machine)
    assert set(choice.reasons) == {one.model for one in candidates} - {choice.model}
    assert all(choice.reasons.values())
    assert choice.why
    if choice.model is None:
        return
    assert not Demand(choice.cores, choice.memory_mib, choice.gpu_mib).problems(machine)
    assert max(asked.min_replicas, 1) <= choice.replicas <= asked.max_replicas
    assert all(choice.expected_ms[name] <= bound for name, bound in asked.slo.bounds.items())
    for one in candidates:
        if (one.quality or 0) > (choice.quality or 0):
            alone = choose(asked, [one], machine)
            assert alone.model is None
            assert choice.reasons[one.model] == alone.reasons[one.model]


@settings(max_examples=60, deadline=None)
@given(TASKS, CANDIDATES, MACHINES)
def test_more_machine_never_means_less_quality(asked: Task, candidates: list[Candidate], machine: Capacity) -> None:
    """Adding cores and memory never turns a choice into a worse one."""
    small = choose(asked, candidates, machine)
    large = choose(asked, candidates, Capacity(machine.cores * 2, machine.memory_mib * 2, training=machine.training))
    if small.model is not None:
        assert large.model is not None
        assert (large.quality or 0) >= (small.quality or 0)
