"""profile -> plan -> validate with programs that are formulas: what is run, refuted, kept, and the exit code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from corun.plan.cells import Setup
from corun.plan.interference import Interference
from corun.plan.measured import Condition, Memory, Sample
from corun.plan.question import Job, Kind, Question, Slo, make_candidates
from corun.plan.session import MeasureBatches, Options, Outcome, PairOf, Programs, describe, read_validation, run
from corun.plan.table import as_json, show
from corun.run.config import Pair
from corun.testing.zoo import Zoo

NAMES = ("resnet18", "squeezenet1_1", "mnasnet0_5")
RATE = 20.0
QUESTION = Question(Job("resnet18", 16), make_candidates(NAMES, RATE), Slo(90, 60.0), ("none",))


@dataclass
class _Served:
    name: str
    rate: float
    sojourns_ms: tuple[float, ...]
    services_ms: tuple[float, ...]
    batches: tuple[int, ...] = ()


@dataclass
class _Seen:
    served: list[_Served]
    samples_per_s: float | None
    memory: dict[str, Memory]
    foreign_cores: float = 0.0


class _Stages:
    """A stage that is a zoo; services are of the kind that their cell says."""

    def __init__(self, zoo: Zoo, pair_of: PairOf) -> None:
        self._zoo, self._pair_of = zoo, pair_of

    def _kinds(self, names: Sequence[str]) -> dict[str, str]:
        if not names:
            return {}
        served = self._pair_of("none", names).services
        return {str(Kind(one.label, one.max_batch, one.max_delay_ms)): one.label for one in served}

    def observe(
        self, policy: str, everybody: Sequence[str], names: Sequence[str], factor: float, repeat: int, trains: bool
    ) -> Any:
        kinds = self._kinds(names)
        window = self._zoo.measure(
            Condition(tuple((kind, RATE * factor) for kind in kinds), "resnet18_16" if trains else "", policy), repeat
        )
        samples: Sequence[Sample] = window.samples
        served = [
            _Served(kinds[one.model], one.rate, one.sojourns_ms, one.services_ms, one.batches) for one in samples
        ]
        memory = {_by_name(label, kinds): part for label, part in window.memory.items()}
        return window.fault or _Seen(served, window.samples_per_s, memory)

    def close(self) -> None:
        pass


def _by_name(label: str, kinds: Mapping[str, str]) -> str:
    role, _, name = label.partition(" ")
    return f"{role} {kinds.get(name, name)}"


def _zoo() -> Zoo:
    truth = {"none": Interference(2, 1, 1.0, 0.5, 0.2, dict.fromkeys(NAMES, 0.1), dict.fromkeys(NAMES, 0.5))}
    return Zoo(dict(zip(NAMES, (8.0, 5.0, 4.0), strict=True)), truth)


def _run(
    tmp_path: Path,
    words: Sequence[str] = ("met",),
    stop_after: int = 10**6,
    batches: MeasureBatches | None = None,
    zoo: Zoo | None = None,
    setup: Setup | None = None,
    **more: Any,
) -> tuple[Outcome, Zoo, list[Pair]]:
    """words: verdicts of the validations, one after the other, the last one for all that follow."""
    zoo, ran = zoo or _zoo(), list[Pair]()

    def validate(pair: Pair) -> Mapping[str, Any]:
        ran.append(pair)
        word = words[min(len(ran), len(words)) - 1]
        services = {one.label: {"p90_ms": 12.0} for one in pair.services}
        return {
            "status": "failed" if word == "failed" else "complete",
            "faults": ["server resnet18 was killed by SIGKILL"] if word == "failed" else [],
            "run": "result/x",
            "arms": {
                "train": {"train_samples_per_s": 50.0},
                "corun": {"services": services, "train_samples_per_s": 40.0},
            },
            "promises": [{"service": one.label, "arm": "corun", "word": word} for one in pair.services],
        }

    programs = Programs(
        lambda pair_of, *_: nullcontext(_Stages(zoo, pair_of)),
        validate,
        lambda count: 1234,
        lambda line: None,
        lambda: len(zoo.asked) >= stop_after,
        batches,
    )
    options = Options(tmp_path, 2, False, True, 20.0, **more)
    return run(QUESTION, setup or Setup(seconds=zoo.seconds), options, programs), zoo, ran


def test_a_plan_is_validated_by_a_run_of_exactly_its_services(tmp_path: Path) -> None:
    """One run, with the services, rates and policy of the plan; its figures stand in the answer; exit code 0."""
    outcome, _, ran = _run(tmp_path)
    (result,) = outcome.results
    assert [one.label for one in ran[0].services] == [one.name for one in result.answer.services]
    assert ran[0].config.sharing == "none"
    assert result.validated is not None
    assert result.validated.training == pytest.approx(0.8)
    assert outcome.exit_code == 0


def test_a_plan_that_misses_is_replaced_by_a_smaller_one(tmp_path: Path) -> None:
    """The second run has one service less, nothing more is measured, and its verdict is the one that counts."""
    outcome, zoo, ran = _run(tmp_path, ("missed", "met"))
    assert [len(pair.services) for pair in ran] == [3, 2]
    assert len(outcome.results[0].answer.places) == 2
    assert outcome.exit_code == 0
    assert len(zoo.asked) == outcome.planner.measured


def test_missing_every_time_is_exit_code_3_and_a_died_run_1(tmp_path: Path) -> None:
    """At most three plans are tried; a run that died is a failure, not a missed promise."""
    outcome, _, ran = _run(tmp_path / "missed", ("missed",))
    assert len(ran) <= 3
    assert outcome.exit_code == 3
    failed, _, _ = _run(tmp_path / "failed", ("failed",))
    assert failed.exit_code == 1


def test_an_interrupted_plan_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """What was measured is in the profile; the second start measures only the rest."""
    first, zoo, _ = _run(tmp_path, stop_after=4)
    assert first.interrupted
    assert first.exit_code == 130
    second, rest, _ = _run(tmp_path)
    assert second.exit_code == 0
    assert not set(zoo.asked) & set(rest.asked)
    assert second.planner.reused >= 4


def test_the_dry_run_says_what_is_missing(tmp_path: Path) -> None:
    """Every window of the profile with "measure" or "reuse", and the total."""
    setup, options = Setup(seconds=_zoo().seconds), Options(tmp_path, 2, False, True, 20.0)
    before = list(describe(QUESTION, setup, options))
    assert sum(line.startswith("measure ") for line in before) == 3 + 1 + 3 + 1
    _run(tmp_path)
    after = list(describe(QUESTION, setup, options))
    assert sum(line.startswith("reuse ") for line in after) == 8
    assert after[-2].startswith("0 windows")


def test_the_table_and_the_json_say_the_same(tmp_path: Path) -> None:
    """Every service, its validated percentile, the policy that is best and what was reused are in both."""
    outcome, _, _ = _run(tmp_path)
    text = StringIO()
    show(Console(file=text, width=140), QUESTION, outcome.results, outcome.best, outcome.planner)
    value = as_json(QUESTION, outcome.results, outcome.best, outcome.planner)
    plan = value["policies"]["none"]
    assert value["best"] == "none"
    assert plan["count"] == len(plan["services"])
    for service in plan["services"]:
        assert service["name"] in text.getvalue()
        assert service["validated_ms"] == 12.0
    assert f"{value['windows']['measured']} windows measured" in text.getvalue()
    assert "best for count: none" in text.getvalue()


def test_a_validation_without_enough_requests_is_not_a_success_by_silence() -> None:
    """No percentile: n/a, and the run's own word (cannot tell) stands; a run without the arm has nothing."""
    seen = {
        "status": "complete",
        "arms": {"corun": {"services": {"a": {"p90_ms": None}}}},
        "promises": [{"service": "a", "arm": "corun", "word": "cannot tell"}],
    }
    found = read_validation(seen, QUESTION, "corun")
    assert found.measured_ms == {"a": None}
    assert found.words == {"a": "cannot tell"}
    assert found.training is None
    assert read_validation({"status": "failed", "faults": ["x"]}, QUESTION, "corun").reason == "x"


# Batches


class _Bursts:
    """launch.batches.measure of a zoo; asked: (model, sizes) of every call."""

    def __init__(self, zoo: Zoo) -> None:
        self.zoo = zoo
        self.asked: list[tuple[str, tuple[int, ...]]] = []

    def __call__(self, pair: Pair, sizes: Sequence[int]) -> Any:
        model = pair.services[0].arch
        self.asked.append((model, tuple(sizes)))
        curve = self.zoo.curve(model, sizes)
        return _Batches([_OneSize(one.size, one.times_ms) for one in curve.points])


@dataclass
class _OneSize:
    size: int
    times_ms: tuple[float, ...]
    footprint: Any = Memory(100.0, 300.0)  # noqa: RUF009 - frozen
    rss_mib: float | None = 400.0
    pss_mib: float | None = None


@dataclass
class _Batches:
    sizes: list[_OneSize]
    overhead_ms: float = 0.3
    foreign_cores: float = 0.0
    fault: str = ""


def _batching_zoo() -> Zoo:
    return replace(_zoo(), growth=0.1)


def test_each_models_curve_is_measured_once_and_kept(tmp_path: Path) -> None:
    """Three models, three curves, and none the second time; a longer one is measured when it is asked for."""
    bursts = _Bursts(_batching_zoo())
    _run(tmp_path, batches=bursts, zoo=bursts.zoo, largest_batch=8)
    assert bursts.asked == [(name, (1, 2, 4, 8)) for name in NAMES]
    second, rest, _ = _run(tmp_path, batches=bursts, zoo=_batching_zoo(), largest_batch=4)
    assert len(bursts.asked) == 3
    assert not rest.asked
    assert set(second.planner.profile.curves) == set(NAMES)
    _run(tmp_path, batches=bursts, zoo=_batching_zoo(), largest_batch=16)
    assert len(bursts.asked) == 6


def test_a_profile_from_before_there_were_curves_is_used_as_it_is(tmp_path: Path) -> None:
    """Its windows count, no window is measured again, only the curves are added."""
    _run(tmp_path)
    (path,) = (tmp_path / "profiles").glob("*.json")
    old = json.loads(path.read_text())
    assert old.pop("curves") == {}
    assert not any("batches" in sample for window in old["windows"] for sample in window["samples"])
    path.write_text(json.dumps(old))
    bursts = _Bursts(_batching_zoo())
    _, zoo, _ = _run(tmp_path, batches=bursts)
    assert not zoo.asked
    assert [model for model, _ in bursts.asked] == list(NAMES)
    assert len(json.loads(path.read_text())["curves"]) == 3


def test_auto_measures_plans_and_validates_with_the_batches_it_chose(tmp_path: Path) -> None:
    """Every window and the validation's cell have the bound that was chosen, and the answer says which and why."""
    bursts = _Bursts(_batching_zoo())
    outcome, zoo, ran = _run(tmp_path, batches=bursts, zoo=bursts.zoo, auto_batch=True, largest_batch=8)
    chosen = {name: choice.option.max_batch for name, choice in outcome.planner.choices.items()}
    assert set(chosen) == set(NAMES)
    assert max(chosen.values()) > 1
    assert {one.label: one.max_batch for one in ran[0].services} == {
        one.label: chosen[one.label] for one in ran[0].services
    }
    kinds = {kind for condition, _ in zoo.asked for kind, _ in condition.loads}
    assert {Kind.parse(kind).model: Kind.parse(kind).max_batch for kind in kinds} == chosen
    text = StringIO()
    show(Console(file=text, width=140), QUESTION, outcome.results, outcome.best, outcome.planner)
    plan = as_json(QUESTION, outcome.results, outcome.best, outcome.planner)
    for service in plan["policies"]["none"]["services"]:
        assert service["batch"]["max_batch"] == chosen[service["name"]]
        assert service["batch"]["why"] in text.getvalue()
        assert [point["batch"] for point in service["curve"]] == [1, 2, 4, 8]
        assert service["can_take"] > 1000 / zoo.service_ms[service["name"]]
        assert f"{service['name']} alone in batches of 1: " in text.getvalue()
    assert plan["curves"]["resnet18"]["points"][0]["rss_mib"] == 400.0
    assert {one["max_batch"] for one in plan["batches"]["resnet18"]["options"]} == {1, 2, 4, 8}
    again, rest, _ = _run(tmp_path, batches=bursts, zoo=_batching_zoo(), auto_batch=True, largest_batch=8)
    assert not rest.asked
    assert again.results[0].answer == outcome.results[0].answer


def test_a_bound_that_is_given_is_used_as_it_is(tmp_path: Path) -> None:
    """--max-batch 4: every cell has it, nothing is chosen, the windows are those without a curve."""
    bursts = _Bursts(_batching_zoo())
    setup = Setup(seconds=bursts.zoo.seconds, max_batch=4)
    outcome, zoo, ran = _run(tmp_path / "a", batches=bursts, zoo=bursts.zoo, setup=setup)
    assert {one.max_batch for one in ran[0].services} == {4}
    assert {one.max_delay_ms for one in ran[0].services} == {0.0}
    assert not outcome.planner.choices
    plan = as_json(QUESTION, outcome.results, outcome.best, outcome.planner)
    assert all(service["batch"] is None for service in plan["policies"]["none"]["services"])
    without, plain, _ = _run(tmp_path / "b", zoo=_batching_zoo(), setup=setup)
    assert [one.label for one, _ in zoo.asked] == [one.label for one, _ in plain.asked]
    assert without.results[0].answer == outcome.results[0].answer


def test_a_model_without_a_curve_is_served_one_by_one(tmp_path: Path) -> None:
    """Why its server did not answer is said; the plan is made as without batches."""
    outcome, _, ran = _run(tmp_path, batches=lambda pair, sizes: "server was killed by SIGKILL", auto_batch=True)
    assert outcome.exit_code == 0
    assert not outcome.planner.choices
    assert {one.max_batch for one in ran[0].services} == {1}


def test_the_dry_run_says_which_curves_are_missing(tmp_path: Path) -> None:
    """A line a model and no window more; with the curves there, the windows are those of the batches chosen."""
    setup, options = Setup(seconds=_zoo().seconds), Options(tmp_path, 2, False, True, 20.0, True, 8)
    before = list(describe(QUESTION, setup, options))
    assert sum(line.startswith("curve ") for line in before) == 3
    assert sum(line.startswith("measure ") for line in before) == 3 + 1 + 3 + 1
    bursts = _Bursts(_batching_zoo())
    _run(tmp_path, batches=bursts, zoo=bursts.zoo, auto_batch=True, largest_batch=8)
    after = list(describe(QUESTION, setup, options))
    assert not any(line.startswith("curve ") for line in after)
    assert after[-2].startswith("0 windows")
