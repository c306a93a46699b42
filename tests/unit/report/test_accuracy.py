"""Accuracy over time: every labelled request counts in its second, a failure as a wrong answer."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import drift as bench
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from corun.clock import NS_PER_S
from corun.report import accuracy, accuracy_figure
from corun.report.look import LOOKS
from corun.run.read import Run, Window

WINDOW = Window(0, "corun", 0, 100 * NS_PER_S, 104 * NS_PER_S)


def run_of(requests: list[tuple[float, str, float, float, float]]) -> Run:
    """A run of one service; a request is (second, status, label, answer, version), NaN where there is none."""
    columns = [np.array(column) for column in zip(*requests, strict=True)]
    due = 100 * NS_PER_S + (columns[0].astype(float) * NS_PER_S).astype(np.int64)
    ids = np.arange(len(requests), dtype=float)
    client = {
        "t_intended_ns": due,
        "status": columns[1].astype(object),
        "label": columns[2].astype(float),
        "answer": columns[3].astype(float),
        "segment": np.zeros(len(requests)),
        "stream": np.zeros(len(requests)),
        "id": ids,
    }
    server = {"stream": np.zeros(len(requests)), "id": ids, "weights_version": columns[4].astype(float)}
    events: dict[str, Any] = {
        "t_ns": np.array([101 * NS_PER_S, 50 * NS_PER_S]),
        "kind": np.array(["swap", "swap"], dtype=object),
        "role": np.array(["server", "server"], dtype=object),
    }
    return Run(Path("run"), {}, (WINDOW,), {"a": client}, {"a": server}, events=events)


NAN = float("nan")
SHOWN = run_of(
    [
        (0.2, "OK", 1, 1, NAN),
        (0.9, "OK", 1, 2, NAN),
        (1.1, "OK", 3, 3, 1),
        (1.2, "REJECTED", 3, NAN, NAN),
        (1.9, "OK", 2, 2, 2),
        (3.0, "OK", 0, 0, 2),
        (3.1, "OK", NAN, NAN, 2),
    ]
)


def test_each_second_counts_its_labelled_requests() -> None:
    """A rejected request is not a right answer; one without a label does not count; the newest version is named."""
    rows = accuracy.seconds(SHOWN)
    assert [(row.t_s, row.n, row.correct, row.weights_version) for row in rows] == [
        (0.0, 2, 1, None),
        (1.0, 3, 2, 2),
        (3.0, 1, 1, 2),
    ]
    assert [row.t_ns for row in rows] == [(100 + second) * NS_PER_S for second in (0, 1, 3)]
    assert accuracy.overall(rows) == {"a": {"requests": 6, "right": 4, "accuracy": round(4 / 6, 6)}}


def test_requests_without_labels_make_no_rows_no_file_and_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs on ordinary data sets look as they did."""
    plain = run_of([(0.1, "OK", NAN, NAN, NAN)])
    monkeypatch.setattr(accuracy, "read_run", lambda path: plain)
    assert accuracy.write(tmp_path) == []
    assert not (tmp_path / "accuracy.csv").exists()
    assert accuracy_figure.exhibits(plain) == []


def test_the_table_is_written_with_empty_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first publication the version is empty, not 0."""
    monkeypatch.setattr(accuracy, "read_run", lambda path: SHOWN)
    accuracy.write(tmp_path)
    with open(tmp_path / "accuracy.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["weights_version"] for row in rows] == ["", "2", "2"]


def test_the_figure_marks_the_changes_of_weights() -> None:
    """One line per change inside the windows, in every look; the caption says how many were right."""
    (exhibit,) = accuracy_figure.exhibits(SHOWN)
    assert "66.7% of 6 labelled requests" in exhibit.caption
    assert "1 change of weights" in exhibit.caption
    assert exhibit.draw is not None
    assert exhibit.data is not None
    for look in LOOKS:
        figure = Figure()
        exhibit.draw(figure, look)
        assert len(figure.axes[0].lines) == 2


# The figures of bench.drift


def seen(rate: float, right: Any, seconds: float = 30.0) -> bench.Seen:
    due = np.arange(0, seconds, 1 / rate)
    return bench.Seen(due, np.array([bool(right(second)) for second in due]), np.ones(len(due)))


def test_accuracies_are_those_of_their_stretches() -> None:
    """Before the shift, from it to the first swap after it, and the last seconds; a swap before the shift is none."""
    found = bench.accuracies(seen(10, lambda s: s < 10 or s >= 20), 10.0, [5.0, 15.0, 20.0], 5.0)
    assert found == {"acc_before": 1.0, "acc_shifted": 0.0, "acc_recovered": 1.0}


@pytest.mark.parametrize(("back", "expected"), [(20.0, 11.7), (99.0, None)])
def test_recovery_is_the_first_time_the_loss_is_regained(back: float, expected: float | None) -> None:
    """Nine tenths of the lost accuracy over two seconds; null when it never came back."""
    found = bench.recovery_s(seen(10, lambda s: s < 10 or s >= back), 10.0, 1.0, 0.0)
    assert found == (None if expected is None else pytest.approx(expected, abs=0.11))
    assert bench.recovery_s(seen(10, lambda s: True), 10.0, 0.9, 0.95) is None, "nothing was lost"


@given(st.lists(st.floats(0, 30), max_size=8))
@settings(max_examples=40)
def test_stretches_around_swaps_and_beside_them_share_no_request(swaps: list[float]) -> None:
    """A request is near a swap, beside one, or neither; near every swap that has requests there are some."""
    due = np.arange(0, 30, 0.02)
    near, beside = bench.around(due, swaps)
    assert not (near & beside).any()
    begins, length = [swap - bench.BEFORE_S for swap in swaps], bench.BEFORE_S + bench.AFTER_S
    assert near.tolist() == [any(begin <= second < begin + length for begin in begins) for second in due]


def test_a_tail_on_few_requests_is_not_quoted() -> None:
    """p99 needs 662 requests on both sides, p95 130; a failed request makes the ratio null."""
    few = bench.tail(seen(20, lambda s: True), [10.0, 20.0])
    assert few["p99_x_during_swap"] is None
    many = bench.tail(seen(400, lambda s: True), [10.0, 20.0])
    assert many["p99_x_during_swap"] == 1.0
    assert many["requests_during_swap"] == 2 * 400 * 1.5
