"""The planner on a synthetic machine: against brute force, with memory that runs out, with what is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError
from corun.plan.interference import Interference
from corun.plan.measured import Condition, Curve, Memory, Point, Profile, Sample, Window, fingerprint
from corun.plan.memory import Limits
from corun.plan.planner import Answer, Machine, Planner, best
from corun.plan.question import Job, Question, Slo, make_candidates
from corun.testing.zoo import Zoo

NAMES = ("a", "b", "c", "d", "e")
JOB = Job("resnet18", 16)
SERVICE_MS = {"a": 4.0, "b": 6.0, "c": 9.0, "d": 12.0, "e": 15.0}


def _zoo(**changes: object) -> Zoo:
    trainer = dict.fromkeys(NAMES, 0.15)
    truth = {
        "none": Interference(2, 1, 1.0, 0.9, 0.3, trainer, dict.fromkeys(NAMES, 0.8)),
        "idle": Interference(2, 1, 1.0, 0.05, 0.3, dict.fromkeys(NAMES, 0.03), dict.fromkeys(NAMES, 1.2)),
    }
    return replace(Zoo(SERVICE_MS, truth), **changes)  # type: ignore[arg-type]


def _planner(
    zoo: Zoo, bound_ms: float, rate: float = 20.0, profile: Profile | None = None, **more: object
) -> Planner:
    question = Question(
        JOB,
        make_candidates(NAMES, rate),
        Slo(90, bound_ms),
        tuple(zoo.truth),
        **more,  # type: ignore[arg-type]
    )
    machine = Machine(2, 1, Limits(zoo.limit_mib * 1.0001 if np.isfinite(zoo.limit_mib) else 1e9))
    return Planner(question, profile if profile is not None else Profile(), machine, zoo.measure)


def _answers(planner: Planner) -> dict[str, Answer]:
    return {answer.policy: answer for answer in planner.answers()}


def test_the_planner_agrees_with_brute_force_with_few_runs() -> None:
    """On 20 synthetic questions: within one service always, the same count in 85 %, with under half of all windows."""
    exact = within = asked = 0
    cases = [(seed, bound) for seed in range(2) for bound in (14.0, 20.0, 28.0, 42.0, 70.0)]
    for seed, bound in cases:
        zoo = _zoo(seed=seed)
        planner = _planner(zoo, bound)
        planner.looks = 2
        for policy, answer in _answers(planner).items():
            truth = zoo.largest(NAMES, 20.0, policy, 90, bound)
            exact += truth == len(answer.places)
            within += abs(truth - len(answer.places)) <= 1
        asked += len(zoo.asked)
    assert within == 2 * len(cases)
    assert exact >= 0.85 * 2 * len(cases)
    assert asked / len(cases) < 0.5 * (5 + 2 * 2 * 32)


def test_a_kept_profile_makes_the_next_question_cheap() -> None:
    """Asked again, nothing is measured; asked with another bound, only what decides is."""
    zoo, profile = _zoo(), Profile()
    first = _answers(_planner(zoo, 24.0, profile=profile))
    count = len(zoo.asked)
    again = _planner(zoo, 24.0, profile=profile)
    assert _answers(again) == first
    assert len(zoo.asked) == count
    assert again.measured == 0
    assert again.reused == len(set(zoo.asked))


def test_the_better_policy_carries_more() -> None:
    """A policy that keeps the trainer away carries at least as many services, and is the best one."""
    planner = _planner(_zoo(), 20.0)
    answers = _answers(planner)
    assert len(answers["idle"].places) > len(answers["none"].places)
    chosen = best(list(answers.values()), planner.question)
    assert chosen is not None
    assert chosen.policy == "idle"


def test_looser_promises_never_carry_fewer_services() -> None:
    """The count grows with the bound, from none to all."""
    counts = [len(_answers(_planner(_zoo(), bound))["none"].places) for bound in (5.0, 15.0, 25.0, 40.0, 400.0)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, len(NAMES))


def test_a_plan_never_needs_more_memory_than_there_is() -> None:
    """Windows that died are no crash, and the set that is planned fits with its margin."""
    private = dict.fromkeys((*NAMES, "trainer"), 1000.0)
    zoo = _zoo(private_mib=private, limit_mib=4500.0)
    for answer in _answers(_planner(zoo, 400.0)).values():
        assert 0 < len(answer.places) <= 2
        assert answer.need.fits
        assert "memory" in answer.blocked or "needs" in answer.blocked


def test_a_model_that_cannot_run_alone_is_left_out() -> None:
    """Its fault is named, the others are planned."""
    zoo = _zoo(private_mib={"c": 1e6}, limit_mib=1e5)
    planner = _planner(zoo, 400.0)
    answers = _answers(planner)
    assert set(planner.unfit) == {"c"}
    assert {place.candidate.name for place in answers["idle"].places} == set(NAMES) - {"c"}


def test_nothing_that_can_run_is_an_answer_too() -> None:
    """Too few requests to say anything, or no model that starts: nothing fits, with the reason, and no traceback."""
    silent = _zoo(seconds=1e-6)
    for answer in _answers(_planner(silent, 400.0)).values():
        assert answer.places == ()
        assert "no request was answered" in answer.blocked
    assert best(list(_answers(_planner(_zoo(limit_mib=1.0), 400.0)).values()), _planner(silent, 1.0).question) is None


def test_a_refuted_plan_is_not_made_again() -> None:
    """After a validation that missed, the set and all larger ones are out."""
    planner = _planner(_zoo(), 400.0)
    first = _answers(planner)["idle"]
    planner.refute("idle", first.services)
    again = planner.answer("idle", may_measure=False)
    assert len(again.places) < len(first.places)


def test_a_spent_budget_leaves_the_answer_to_the_model() -> None:
    """With no window to spare nothing is measured beyond the profile, and there is still an answer."""
    planner = _planner(_zoo(), 24.0)
    planner.budget = 0
    _answers(planner)
    assert planner.measured == len(planner.conditions())


@pytest.mark.parametrize("goal", ["count", "goodput", "training"])
def test_every_goal_plans_a_set_that_fits(goal: str) -> None:
    """count, goodput and training pick among the largest sets; the one for training trains at least as fast."""
    by_count = _answers(_planner(_zoo(), 20.0))["none"]
    answer = _answers(_planner(_zoo(), 20.0, goal=goal))["none"]
    assert len(answer.places) == len(by_count.places)
    if goal == "training":
        assert (answer.training or 0) >= (by_count.training or 0) - 1e-9


def test_what_a_service_can_take_is_at_least_what_it_gets() -> None:
    """In a plan the model believes in, the rate a service can take is not below its own."""
    for place in _answers(_planner(_zoo(), 60.0))["idle"].places:
        assert place.can_take >= 0.99 * place.candidate.rate
        assert place.tail.low_ms <= place.tail.predicted_ms <= place.tail.high_ms


def test_without_a_job_services_are_planned_alone() -> None:
    """--train none: no policy, no training speed, the trainer is never asked for."""
    zoo = _zoo()
    question = Question(None, make_candidates(NAMES, 20.0), Slo(90, 25.0))
    planner = Planner(question, Profile(), Machine(2, 1, Limits(1e9)), zoo.measure)
    (answer,) = planner.answers()
    assert answer.training is None
    assert not any(condition.job for condition, _ in zoo.asked)
    assert answer.places


def test_copies_of_a_model_share_its_profile() -> None:
    """Four copies of one model cost one window alone; the count among them is the answer."""
    zoo = _zoo()
    question = Question(JOB, make_candidates(["c"], 15.0, copies=4), Slo(90, 30.0), ("idle",))
    planner = Planner(question, Profile(), Machine(2, 1, Limits(1e9)), zoo.measure)
    (answer,) = planner.answers()
    assert sum(not condition.job for condition, _ in zoo.asked) == 1
    assert [place.candidate.name for place in answer.places] == [one.name for one in question.candidates][
        : len(answer.places)
    ]


# Batches


def _batched(zoo: Zoo, rate: float, max_batch: int, bound_ms: float, names: str = "abc") -> Planner:
    """A planner whose services are served in batches; the profile has the models' curves."""
    profile = Profile()
    for name in NAMES:
        profile.add_curve(name, zoo.curve(name, (1, 2, 4, 8)))
    candidates = [replace(one, max_batch=max_batch) for one in make_candidates(names, rate)]
    question = Question(JOB, tuple(candidates), Slo(90, bound_ms), ("idle",))
    return Planner(question, profile, Machine(2, 1, Limits(1e9)), zoo.measure, looks=2)


def test_services_in_batches_carry_what_one_by_one_cannot() -> None:
    """150/s of 9 ms each is too much for one by one; in batches it fits, and `can take` is above one by one's limit."""
    zoo = _zoo(growth=0.1)
    single, batched = (_batched(zoo, 150.0, size, 80.0, "c") for size in (1, 8))
    assert _answers(single)["idle"].places == ()
    (place,) = _answers(batched)["idle"].places
    assert place.can_take > max(150.0, 1000 / SERVICE_MS["c"])


def test_the_prediction_of_batched_services_is_near_what_is_measured() -> None:
    """Alone and beside the trainer, at two rates: the predicted percentile within a third of a window's own."""
    zoo = _zoo(growth=0.2, seconds=60.0)
    for rate in (20.0, 90.0):
        planner = _batched(zoo, rate, 8, 80.0)
        planner.profile_alone()
        planner.profile_policy("idle")
        estimate = planner.estimate("idle")
        for one in planner.question.candidates:
            window = zoo.window(Condition(((one.kind, rate),), JOB.label, "idle"))
            truth = np.quantile(window.samples[0].sojourns_ms, 0.9)
            assert estimate.points([one])[0] == pytest.approx(truth, rel=0.35)


def test_windows_of_other_batches_stay_apart() -> None:
    """One profile answers for one by one and for batches; what was measured of the one is not reused for the other."""
    zoo = _zoo(growth=0.1)
    first = _batched(zoo, 20.0, 1, 80.0)
    _answers(first)
    second = _batched(zoo, 20.0, 8, 80.0)
    second.profile = first.profile
    _answers(second)
    assert second.measured > 0
    kinds = {kind for condition, _ in zoo.asked for kind, _ in condition.loads}
    assert kinds == {"a", "b", "c", "a[8]", "b[8]", "c[8]"}
    third = _batched(zoo, 20.0, 1, 80.0)
    third.profile = first.profile
    assert _answers(third)["idle"].places
    assert third.measured == 0


# What is kept

windows = st.builds(
    Window,
    st.builds(
        Condition,
        st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([5.0, 10.0])), max_size=3).map(tuple),
        st.sampled_from(["", "j_16"]),
        st.sampled_from(["idle", "none"]),
    ),
    st.integers(0, 3),
    st.just(2.0),
    st.lists(
        st.builds(
            Sample,
            st.sampled_from("ab"),
            st.just(5.0),
            st.lists(st.sampled_from([1.25, 3.5, float("inf")]), max_size=4).map(tuple),
            st.lists(st.sampled_from([1.25, 3.5]), max_size=4).map(tuple),
            st.lists(st.integers(1, 8), max_size=4).map(tuple),
        ),
        max_size=2,
    ).map(tuple),
    st.none() | st.just(12.5),
    st.just({"server a": Memory(1.5, 2.5, 0.0)}),
    st.just(0.25),
    st.sampled_from(["", "killed"]),
)


@given(st.lists(windows, max_size=5))
@settings(max_examples=25)
def test_a_profile_is_read_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, kept: list[Window]
) -> None:
    """Windows, infinite sojourns and faults survive the file; the last of a condition and repeat counts."""
    path = tmp_path_factory.mktemp("profile") / "p.json"
    profile = Profile(path, {"cpu": "x"})
    for window in kept:
        profile.add(window)
    assert Profile.open(path, {"cpu": "x"}).windows() == profile.windows()
    assert len(Profile.open(path, {"cpu": "x"}, fresh=True)) == 0


curves = st.builds(
    Curve,
    st.just((1, 2, 4)),
    st.lists(
        st.builds(
            Point,
            st.integers(1, 8),
            st.lists(st.sampled_from([1.25, 3.5]), min_size=1, max_size=4).map(tuple),
            st.just(Memory(1.5, 2.5, 0.0)),
            st.none() | st.just(12.5),
            st.none() | st.just(7.5),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    st.just(0.25),
    st.just(0.01),
)


@given(st.dictionaries(st.sampled_from("ab"), curves, max_size=2), st.lists(windows, max_size=2))
@settings(max_examples=25)
def test_curves_are_kept_beside_the_windows(
    tmp_path_factory: pytest.TempPathFactory, curves: dict[str, Curve], kept: list[Window]
) -> None:
    """Curves survive the file with every time and size; neither they nor the windows replace each other."""
    path = tmp_path_factory.mktemp("profile") / "p.json"
    profile = Profile(path, {"cpu": "x"})
    for model, curve in curves.items():
        profile.add_curve(model, curve)
    for window in kept:
        profile.add(window)
    if not (curves or kept):
        return
    again = Profile.open(path, {"cpu": "x"})
    assert dict(again.curves) == curves
    assert again.windows() == profile.windows()


def test_a_damaged_curve_says_what_to_do(tmp_path: Path) -> None:
    """As a damaged window does."""
    path = tmp_path / "p.json"
    path.write_text('{"schema": 1, "windows": [], "curves": {"a": {"points": []}}}')
    with pytest.raises(InputError, match="--fresh"):
        Profile.open(path, {})


def test_a_damaged_profile_says_what_to_do(tmp_path: Path) -> None:
    """Not a traceback: the file's name and --fresh."""
    path = tmp_path / "p.json"
    path.write_text('{"schema": 1, "windows": [{}]}')
    with pytest.raises(InputError, match="--fresh"):
        Profile.open(path, {})


def test_a_condition_is_the_same_whatever_the_order() -> None:
    """Loads are sorted, and without a job the policy has nothing to say."""
    one, other = Condition((("b", 5), ("a", 5)), "j", "idle"), Condition((("a", 5.0), ("b", 5.0)), "j", "idle")
    assert one == other
    assert Condition((("a", 5),), "", "idle") == Condition((("a", 5),), "", "none")


def test_the_fingerprint_follows_the_machine() -> None:
    """Another core or library is another machine; the order of the facts is not."""
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
