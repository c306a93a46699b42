"""From flags to a question: what is understood, and that every problem is said at once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from corun import registry
from corun.errors import InputError
from corun.plan.ask import asker
from corun.plan.asked import Asked, make_cast, make_question
from corun.plan.cells import Setup, cell, validation_seconds
from corun.plan.measured import Condition
from corun.plan.question import Job, Slo, make_candidates, parse_job, parse_slo, split_words
from corun.share.host import Host

KNOWN = ("resnet50", "vit_b_16", "resnet18")


@pytest.mark.parametrize(
    ("text", "percentile", "bound_ms"),
    [("p99=200ms", 99, 200), ("P95<=0.2s", 95, 200), ("p50:12", 50, 12), (" p90 = 1.5 s ", 90, 1500)],
)
def test_promises_are_read_in_ms_and_s(text: str, percentile: float, bound_ms: float) -> None:
    """A percentile, =, <= or :, a bound in ms unless it says s."""
    assert parse_slo(text) == Slo(percentile, bound_ms)


@pytest.mark.parametrize("text", ["", "99=200ms", "p99", "p98=2ms", "p99=0ms", "p99=2m"])
def test_what_is_no_promise_is_refused(text: str) -> None:
    """The error names the flag."""
    with pytest.raises(InputError, match="--slo"):
        parse_slo(text)


@pytest.mark.parametrize(
    ("text", "job"),
    [
        ("resnet50_16", Job("resnet50", 16)),
        ("vit_b_16", Job("vit_b_16", 16)),
        ("vit_b_16_8", Job("vit_b_16", 8)),
        ("resnet18", Job("resnet18", 16)),
        ("None", None),
    ],
)
def test_a_job_is_an_architecture_and_a_batch_size(text: str, job: Job | None) -> None:
    """The original's label; a model whose own name ends in a number is told apart."""
    assert parse_job(text, KNOWN) == job


@pytest.mark.parametrize("text", ["resnet5_16", "resnet50_0", "resnet50_x", "_16"])
def test_an_unknown_job_is_refused(text: str) -> None:
    """The error names the flag."""
    with pytest.raises(InputError, match="--train"):
        parse_job(text, KNOWN)


def test_words_and_copies() -> None:
    """Commas and repeats are one list; copies get names of their own."""
    assert split_words(["a, b", "c", ""]) == ["a", "b", "c"]
    assert [one.name for one in make_candidates(["a", "b", "a"], 5)] == ["a", "b", "a-2"]
    assert [one.name for one in make_candidates(["a"], 5, copies=3)] == ["a", "a-2", "a-3"]


def test_every_problem_is_said_at_once() -> None:
    """One error with a line for each wrong flag."""
    asked = Asked(
        ["resnet5", "yolov5n"], "nope_1", -1.0, "p99", ["idl", "mps"], "cout", data=["no-data"], max_batch="all"
    )
    with pytest.raises(InputError) as raised:
        make_question(asked, registry.models(), make_cast(2, 1, 1, "cpu"), Host())
    said = "\n".join(raised.value.problems)
    for part in (
        "--services",
        "--train",
        "--rate",
        "--slo",
        "--policies mps",
        "idl",
        "--maximize",
        "no-data",
        "--max-batch",
    ):
        assert part in said


def test_policies_that_can_be_had_are_the_default() -> None:
    """Without --policies: at least naive sharing; without a job nothing is shared."""
    cast = make_cast(1, 1, 1, "cpu")
    asked = Asked(["resnet18"], "resnet18_8", 5.0, "p99=50ms", [], "count")
    assert "none" in make_question(asked, registry.models(), cast, Host()).policies
    alone = Asked(["resnet18"], "none", 5.0, "p99=50ms", ["idle"], "count")
    assert make_question(alone, registry.models(), cast, Host()).policies == ("none",)


def test_a_cell_is_a_run_of_the_plan() -> None:
    """Names, rates, threads, policy and promise of a plan are those of the run that validates it."""
    asked = Asked(["resnet18,resnet18"], "resnet50_16", 7.0, "p95=80ms", ["idle"], "count")
    question = make_question(asked, registry.models(), make_cast(2, 1, 1, "cpu"), Host())
    pair = cell(question, Setup(trainer_threads=3), "idle", question.candidates, arms=["corun"], port=12345)
    assert pair.train_label == "resnet50_16"
    assert pair.train is not None
    assert pair.train.threads == 3
    assert [(one.label, one.rate, one.device) for one in pair.services] == [
        ("resnet18", 7.0, "cpu"),
        ("resnet18-2", 7.0, "cpu"),
    ]
    assert pair.promises["resnet18-2"] == {"p95_ms": 80.0}
    assert pair.config.sharing == "idle"


def test_a_service_has_the_batches_chosen_for_it_and_else_those_of_the_set_up() -> None:
    """A choice of more than one replaces the set-up's bound and brings its delay; other services keep the set-up's."""
    asked = Asked(["resnet18,squeezenet1_1"], "none", 7.0, "p95=80ms", [], "count")
    question = make_question(asked, registry.models(), make_cast(2, 1, 1, "cpu"), Host())
    first, second = question.candidates
    chosen = [replace(first, max_batch=8, max_delay_ms=2.5), second]
    pair = cell(question, Setup(max_batch=3), "none", chosen, port=12345)
    assert [(one.max_batch, one.max_delay_ms) for one in pair.services] == [(8, 2.5), (3, 0.0)]


def test_a_validation_is_long_enough_for_its_percentile() -> None:
    """p99 of 10 requests/s takes over a minute; no validation is longer than allowed or shorter than 10 s."""
    candidates = make_candidates(["a"], 10.0)
    assert 66 < validation_seconds(Slo(99, 1), candidates, 600) < 90
    assert validation_seconds(Slo(99, 1), candidates, 30) == 30
    assert validation_seconds(Slo(50, 1), candidates, 30) == 10


class _Seen:
    served = ()
    samples_per_s = None
    foreign_cores = 0.0

    def __init__(self) -> None:
        self.memory: dict[str, object] = {}


def test_a_condition_is_asked_of_the_candidates_it_fits() -> None:
    """Two loads of a model are two candidates; a multiple of the rate is a factor on all of them."""
    asked: list[tuple[object, ...]] = []

    def observe(*question: object) -> _Seen:
        asked.append(question)
        return _Seen()

    measure = asker(make_candidates(["a", "b", "a"], 5.0), "idle", 2.0, observe)  # type: ignore[arg-type]
    measure(Condition((("a", 5.0), ("a", 5.0)), "j_1", "none"), 3)
    measure(Condition((("b", 20.0),)), 0)
    assert asked == [("none", ["a", "a-2"], 1.0, 3, True), ("idle", ["b"], 4.0, 0, False)]
    with pytest.raises(ValueError, match="one factor"):
        measure(Condition((("a", 5.0), ("b", 10.0))), 0)
    with pytest.raises(ValueError, match="than there are"):
        measure(Condition((("b", 5.0), ("b", 5.0))), 0)


def test_what_cannot_run_is_a_window_with_a_reason() -> None:
    """A sentence instead of an observation becomes the window's fault."""
    measure = asker(make_candidates(["a"], 5.0), "idle", 2.0, lambda *_: "server a was killed by SIGKILL")
    window = measure(Condition((("a", 5.0),), "j_1", "idle"), 0)
    assert window.fault == "server a was killed by SIGKILL"
    assert window.samples == ()
