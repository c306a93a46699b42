"""Tasks, models with options, and how what a user writes is checked."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError
from corun.run.config import Slo
from corun.tasks.task import Task, make, parse_slo
from corun.tasks.variant import Variant

MODELS = ("resnet18", "resnet50", "squeezenet1_1:image_size=96", "resnet18:precision=bf16")


def test_a_task_survives_its_stored_form() -> None:
    """What is stored of a task gives the same task back."""
    task = make(
        id="doors", description="who is there?", rate=12.5, slo="p99<=80, max<=1s", models=list(MODELS), priority=3
    )
    assert Task.from_json(task.to_json()) == task
    assert task.slo.bounds == {"p99_ms": 80.0, "max_ms": 1000.0}
    assert task.input == "image"


def test_every_problem_of_a_task_is_told_at_once() -> None:
    """Bad input names each key that is wrong, with the near miss."""
    with pytest.raises(InputError) as caught:
        make(
            id="Bad Id",
            kind="clasification",
            priority="high",
            rate=-1,
            slo="p98<=100",
            models=["resnet81"],
            min_replicas=3,
            max_replicas=2,
            runtime="dcoker",
            colour="red",
        )
    text = str(caught.value)
    for part in ('unknown key "colour"', "p98<=100", "priority: give a whole number"):
        assert part in text
    with pytest.raises(InputError) as caught:
        make(id="Bad Id", kind="clasification", rate=-1, models=["resnet81"], min_replicas=3, runtime="dcoker")
    text = str(caught.value)
    for part in (
        'id: "Bad Id"',
        'did you mean "classification"',
        "rate: give",
        'did you mean "docker"',
        "replicas: 3 to 1",
    ):
        assert part in text
    assert "resnet81" in text


@pytest.mark.parametrize(
    "value", ["p99<=80", "p99 <= 80 ms", "p99_ms=80", "p99<=0.08s", {"p99_ms": 80}, Slo(p99_ms=80)]
)
def test_a_promise_may_be_written_in_several_ways(value: object) -> None:
    """Text, a mapping and an Slo say the same."""
    assert parse_slo(value).bounds == {"p99_ms": 80.0}


@pytest.mark.parametrize("value", ["fast", "p99", "p99<=0", {"p98_ms": 1}, {"p99_ms": "soon"}, {"p99_ms": True}])
def test_a_promise_that_cannot_be_read_is_refused(value: object) -> None:
    """Each bad bound is a sentence."""
    with pytest.raises(InputError, match="SLO is wrong"):
        parse_slo(value)


def test_a_model_must_do_what_the_task_is() -> None:
    """A detector cannot serve a classification task."""
    with pytest.raises(InputError, match="yolov5n does detection, the task is classification"):
        make(id="a", models=["yolov5n"])


@pytest.mark.parametrize(
    "given",
    [{}, {"id": 5}, {"id": "a", "models": "resnet18"}, {"id": "a", "models": [1]}, {"id": "a", "rate": float("nan")}],
)
def test_values_of_a_wrong_type_are_refused(given: dict[str, object]) -> None:
    """Whatever stands in a file of tasks ends in a sentence."""
    with pytest.raises(InputError):
        make(**given)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([*Task.__dataclass_fields__, "nonsense"])


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(KEYS, JUNK, max_size=6))
def test_no_input_whatever_is_a_traceback(values: dict[str, object]) -> None:
    """A task is made or refused with InputError, never anything else."""
    with suppress(InputError):
        task = make(**values)
        assert Task.from_json(task.to_json()) == task


def test_a_weights_file_is_kept_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `up` is started must not matter; a file that is not there is told at once."""
    (tmp_path / "mine.pt").touch()
    monkeypatch.chdir(tmp_path)
    assert make(id="a", weights="mine.pt").weights == str(tmp_path / "mine.pt")
    with pytest.raises(InputError, match="there is no file"):
        make(id="a", weights="other.pt")


# Variants


@pytest.mark.parametrize(
    "text", ["resnet18", "resnet18:image_size=160,precision=bf16", "null:busy=true,service_ms=5"]
)
def test_a_variant_is_its_text(text: str) -> None:
    """A model with options is written as it is read, options in the order of their names."""
    assert str(Variant.parse(text)) == text
    turned = ",".join(reversed(text.partition(":")[2].split(",")))
    assert str(Variant.parse(f"{text.partition(':')[0]}:{turned}" if turned else text)) == text


def test_a_variant_is_a_command_line() -> None:
    """Options become the server's flags, those of a family --extra; its own weights come before the task's."""
    words = Variant.parse("resnet18:channels_last=true,image_size=96,precision=bf16").flags("default")
    assert " ".join(words) == ("--model resnet18 --weights default --precision bf16 --channels-last --image-size 96")
    assert Variant.parse("null:service_ms=5").flags(None) == ["--model", "null", "--extra", '{"service_ms": 5}']
    assert "--weights" not in Variant.parse("resnet18:weights=random").flags("default")


@pytest.mark.parametrize(
    "text",
    [
        "resnet81",
        "resnet18:",
        "resnet18:image_size",
        "resnet18:image_size=-1",
        "resnet18:precision=fp99",
        "resnet18:=3",
        "",
    ],
)
def test_a_variant_that_cannot_be_read_is_refused(text: str) -> None:
    """A bad name or option is bad input."""
    with pytest.raises(InputError):
        Variant.parse(text)
