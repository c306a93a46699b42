"""profile -> plan -> validate with programs that are formulas: what is run, refuted, kept, and the exit code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from corun.plan.cells import Setup
from corun.plan.interference import Interference
from corun.plan.measured import Condition, Memory, Sample
from corun.plan.question import Job, Question, Slo, make_candidates
from corun.plan.session import Options, Outcome, Programs, describe, read_validation, run
from corun.plan.table import as_json, show
from corun.run.config import Pair
from corun.testing.zoo import Zoo

NAMES = ("resnet18", "squeezenet1_1", "mnasnet0_5")
QUESTION = Question(Job("resnet18", 16), make_candidates(NAMES, 20.0), Slo(90, 60.0), ("none",))


@dataclass
class _Served:
    name: str
    rate: float
    sojourns_ms: tuple[float, ...]
    services_ms: tuple[float, ...]


@dataclass
class _Seen:
    served: list[_Served]
    samples_per_s: float | None
    memory: dict[str, Memory]
    foreign_cores: float = 0.0


class _Stages:
    """A stage that is a zoo."""

    def __init__(self, zoo: Zoo) -> None:
        self._zoo = zoo

    def observe(
        self, policy: str, everybody: Sequence[str], names: Sequence[str], factor: float, repeat: int, trains: bool
    ) -> Any:
        window = self._zoo.measure(
            Condition(tuple((name, 20.0 * factor) for name in names), "resnet18_16" if trains else "", policy), repeat
        )
        samples: Sequence[Sample] = window.samples
        served = [_Served(one.model, one.rate, one.sojourns_ms, one.services_ms) for one in samples]
        return window.fault or _Seen(served, window.samples_per_s, dict(window.memory))

    def close(self) -> None:
        pass


def _zoo() -> Zoo:
    truth = {"none": Interference(2, 1, 1.0, 0.5, 0.2, dict.fromkeys(NAMES, 0.1), dict.fromkeys(NAMES, 0.5))}
    return Zoo(dict(zip(NAMES, (8.0, 5.0, 4.0), strict=True)), truth)


def _run(tmp_path: Path, words: Sequence[str] = ("met",), stop_after: int = 10**6) -> tuple[Outcome, Zoo, list[Pair]]:
    """words: verdicts of the validations, one after the other, the last one for all that follow."""
    zoo, ran = _zoo(), list[Pair]()

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
        lambda *_: nullcontext(_Stages(zoo)),
        validate,
        lambda count: 1234,
        lambda line: None,
        lambda: len(zoo.asked) >= stop_after,
    )
    options = Options(tmp_path, 2, False, True, 20.0)
    return run(QUESTION, Setup(seconds=zoo.seconds), options, programs), zoo, ran


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
