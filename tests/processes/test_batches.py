"""Time against batch size from real servers over the wire: sizes reached, a short budget, a server that cannot run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.processes.tools import Program

from corun.launch import batches
from corun.launch.stage import Stages
from corun.plan.ask import asker, read_curve
from corun.plan.cells import Setup, cell
from corun.plan.measured import Condition
from corun.plan.question import Question, Slo, make_candidates
from corun.run import config
from corun.run.config import Pair

Start = Callable[..., Program]


def _pair(**service: Any) -> Pair:
    (pair,) = config.pairs(config.parse({"infer": [{"device": "cpu", "data": "synthetic", **service}]}))
    return pair


def test_the_sizes_asked_are_the_sizes_that_were_served() -> None:
    """Replies say that each burst was one batch of its size; a batch takes at least what the model takes."""
    seen = batches.measure(_pair(arch="null", extra={"service_ms": 4}), (1, 2, 4))
    assert not isinstance(seen, str), seen
    assert [one.size for one in seen.sizes] == [1, 2, 4]
    for one in seen.sizes:
        assert len(one.times_ms) >= batches.LEAST
        assert min(one.times_ms) >= 4
        assert one.footprint.private_mib > 1
        assert one.rss_mib is not None
        assert one.rss_mib > 1
    curve = read_curve((1, 2, 4), seen)
    assert curve.covers((1, 2, 4))
    assert curve.points[-1].per_s > curve.points[0].per_s


def test_sizes_that_would_take_too_long_are_left_out() -> None:
    """Without time only the smallest is measured, and the server ends as it should."""
    seen = batches.measure(_pair(arch="null", extra={"service_ms": 30}), (1, 2, 4), budget_s=0.01)
    assert not isinstance(seen, str), seen
    assert [one.size for one in seen.sizes] == [1]


def test_a_server_that_does_not_start_is_a_sentence() -> None:
    """What it said is the answer; nothing is raised and nothing stays behind."""
    seen = batches.measure(_pair(arch="null", extra={"no_such_option": 1}), (1, 2))
    assert isinstance(seen, str)
    assert "no_such_option" in seen


@pytest.mark.slow
def test_a_real_model_is_served_in_the_batches_asked() -> None:
    """resnet18 at 32 pixels: batches of 1, 2, 4 and 8 with a time each, and memory that does not shrink."""
    seen = batches.measure(_pair(arch="resnet18", image_size=32), (1, 2, 4, 8))
    assert not isinstance(seen, str), seen
    assert [one.size for one in seen.sizes] == [1, 2, 4, 8]
    peaks = [one.footprint.private_mib for one in seen.sizes]
    assert peaks == sorted(peaks)
    assert all(time > 0 for one in seen.sizes for time in one.times_ms)
    assert seen.overhead_ms > 0


@pytest.mark.slow
def test_a_window_of_a_batched_service_says_how_it_was_batched(free_port: Callable[..., int]) -> None:
    """Batches within the bound, one for each answer; the time that a batch was held for is no service time."""
    (plain,) = make_candidates(["null"], 100.0)
    one = replace(plain, max_batch=4, max_delay_ms=30.0)
    question = Question(None, (one,), Slo(90, 1000), ("none",))

    def pair_of(policy: str, names: Any) -> Pair:
        return cell(question, Setup(seconds=1.0), policy, [one], port=free_port(1))

    with Stages(pair_of, (), 1, 1.0) as stages:
        measure = asker([one], "none", 1.0, lambda policy, *rest: stages.observe(policy, ["null"], *rest))
        window = measure(Condition(((one.kind, 100.0),)), 0)
    assert not window.fault
    (sample,) = window.samples
    assert sample.model == "null[4, 30 ms]"
    assert len(sample.batches) == len(sample.services_ms) == len(sample.sojourns_ms)
    assert set(sample.batches) <= {1, 2, 3, 4}
    waits = [total - own for total, own in zip(sample.sojourns_ms, sample.services_ms, strict=True)]
    assert max(waits) >= 30
    assert "server null[4, 30 ms]" in window.memory


@pytest.mark.slow
def test_a_plan_chooses_batches_validates_with_them_and_keeps_the_curve(start: Start, tmp_path: Path) -> None:
    """--max-batch auto on real processes: curve, choice and reason in the answer, the validated run has the choice."""
    answers: list[dict[str, Any]] = []
    for flags in (("--validate-seconds", "1"), ("--no-validate",)):
        program = start(
            "plan.py", "--services", "null", "--rate", 200, "--slo", "p90=2s", "--seconds", 1, "--looks", 1,
            "--max-batch", "auto", "--largest-batch", 4, *flags, "--json", "--out", tmp_path / "out",
        )  # fmt: skip
        assert program.wait() == 0, program.output()
        answers.append(json.loads(next(line for line in program.output().splitlines() if line.startswith("{"))))
    first, again = answers
    (service,) = first["policies"]["none"]["services"]
    assert [point["batch"] for point in service["curve"]] == [1, 2, 4]
    assert service["batch"]["max_batch"] in (1, 2, 4)
    assert service["batch"]["why"] in program.output()
    assert service["can_take"] > 200
    manifest = json.loads((Path(first["policies"]["none"]["validation"]["run"]) / "manifest.json").read_text())
    assert manifest["config"]["services"][0]["max_batch"] == service["batch"]["max_batch"]
    assert again["curves"] == first["curves"]
    assert again["windows"]["measured"] == 0
