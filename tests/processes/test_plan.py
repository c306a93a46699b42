"""plan.py with real processes: bad input, a dry run, a plan measured, validated, and answered again from its profile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.processes.tools import Program

from corun.launch.stage import Stages
from corun.plan.ask import asker
from corun.plan.cells import Setup, cell
from corun.plan.measured import Condition
from corun.plan.question import Job, Question, Slo, make_candidates

Start = Callable[..., Program]
NULL = ("--services", "null", "--rate", "200", "--slo", "p90=2s", "--seconds", "1", "--looks", "1")


def test_bad_flags_are_one_error_that_lists_them_all(start: Start) -> None:
    """Exit code 2, every problem on its own line, no traceback."""
    program = start("plan.py", "--services", "resnet5,null", "--train", "resnet50_x", "--rate", 0, "--slo", "p99")
    assert program.wait() == 2
    output = program.output()
    assert output.count("error:") == 1
    for part in ("resnet5", "resnet50_x", "--rate", "--slo"):
        assert part in output
    assert "Traceback" not in output


def test_several_words_may_follow_services(start: Start, tmp_path: Path) -> None:
    """`--services a b c` as written; a dry run shows the windows of the profile and makes no directory."""
    program = start(
        "plan.py", "--train", "resnet50_16", "--services", "resnet50", "yolov5n", "mobilenet_v3_small", "--rate", 10,
        "--slo", "p99=200ms", "--policies", "none", "--dry-run", "--out", tmp_path / "out",
    )  # fmt: skip
    assert program.wait() == 0
    lines = program.output().splitlines()
    assert "measure yolov5n@10 beside resnet50_16 (none)" in lines
    assert any(line.startswith("8 windows") for line in lines)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_plan_is_measured_validated_and_kept(start: Start, tmp_path: Path) -> None:
    """Two null services without training fit; the second time nothing is measured and the answer is the same."""
    answers: list[dict[str, Any]] = []
    for flags in (("--validate-seconds", "1"), ("--no-validate",)):
        program = start("plan.py", *NULL, "--copies", 2, *flags, "--json", "--out", tmp_path / "out")
        assert program.wait() == 0, program.output()
        answers.append(json.loads(next(line for line in program.output().splitlines() if line.startswith("{"))))
    first, again = (answer["policies"]["none"] for answer in answers)
    assert [service["name"] for service in first["services"]] == ["null", "null-2"]
    assert first["validation"]["status"] == "complete"
    assert all(service["validated"] == "met" for service in first["services"])
    assert answers[0]["windows"]["measured"] > 0
    assert answers[1]["windows"] == {"measured": 0, "reused": answers[0]["windows"]["measured"]}
    assert [one["predicted_ms"] for one in again["services"]] == [one["predicted_ms"] for one in first["services"]]
    assert list((tmp_path / "out" / "profiles").glob("*.json"))


@pytest.mark.slow
def test_a_stage_answers_for_any_subset_and_says_when_it_cannot(free_port: Callable[..., int]) -> None:
    """Windows of two services, of one at twice its rate, of the trainer alone; a killed process is a sentence."""
    candidates = make_candidates(["null"], 100.0, copies=2)
    question = Question(Job("resnet18", 4), candidates, Slo(90, 1000), ("none",))
    setup = Setup(seconds=1.0, train_image_size=32, train_data="synthetic")
    by_name = {one.name: one for one in candidates}

    def pair_of(policy: str, names: Any) -> Any:
        return cell(question, setup, policy, [by_name[name] for name in names], port=free_port(len(names)))

    with Stages(pair_of, (2.0,), 1, setup.seconds) as stages:
        measure = asker(
            candidates, "none", setup.seconds, lambda policy, *rest: stages.observe(policy, list(by_name), *rest)
        )
        both = measure(Condition((("null", 100.0), ("null", 100.0)), question.job.label, "none"), 0)  # type: ignore[union-attr]
        assert not both.fault
        assert [len(sample.services_ms) > 50 for sample in both.samples] == [True, True]
        assert both.memory["server null"].private_mib > 1
        assert both.memory["trainer resnet18_4"].private_mib > 10
        twice = measure(Condition((("null", 200.0),)), 0)
        assert len(twice.samples[0].sojourns_ms) > len(both.samples[0].sojourns_ms)
        assert twice.samples_per_s is None
        trained = measure(Condition((), "resnet18_4", "none"), 0)
        assert trained.samples_per_s is not None
        assert trained.samples_per_s > 0
        stage = stages._open[1]  # type: ignore[index]
        stage._servers["null-2"].popen.kill()
        assert "null" in stages.observe("none", list(by_name), list(by_name), 1.0, 0, False)  # type: ignore[operator]
        assert not isinstance(stages.observe("none", list(by_name), ["null"], 1.0, 0, False), str)
