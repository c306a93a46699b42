"""The figures besides the timeline: their numbers, and that every one draws in every look."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.report import interference, page, slowdown, speed, stages, tail
from corun.report.exhibit import Data, shown
from corun.report.interference import Condition
from corun.report.look import LOOKS, png
from corun.report.summary import Summary, summarise
from corun.run.read import Run, read
from corun.stats.intervals import Interval
from corun.testing.runs import FakeRun, FakeService, FakeTrain, write_run, write_sweep

pytestmark = pytest.mark.timeout(600)  # a guard against hanging, wide enough for a machine with ten times the work
SHORT = {"alone": 4.0, "train": 2.0, "corun": 4.0}


def test_every_figure_draws_in_every_look(run: Run, summary: Summary) -> None:
    """A figure is a PNG of its look's width, has alt text that names numbers, and its data."""
    for exhibit in page.exhibits(run, summary):
        assert exhibit.draw is not None, exhibit.caption
        assert any(letter.isdigit() for letter in exhibit.alt)
        assert exhibit.data is not None
        assert exhibit.data.rows
        for look in LOOKS:
            image = png(exhibit.draw, look)
            assert image.startswith(b"\x89PNG")
            width, _ = struct.unpack(">II", image[16:24])
            assert width == round(look.width * look.dpi)


# Stages


def test_stages_sum_to_the_sojourn(run: Run) -> None:
    """The eleven stages of every answered request sum to its sojourn."""
    table = run.infer_client["yolov5n"]
    ok = {name: values[table["status"] == "OK"] for name, values in table.items()}
    assert stages.stage_ms(ok).shape[1] == len(stages.NAMES) == 11
    assert np.allclose(stages.stage_ms(ok).sum(axis=1), ok["sojourn_ms"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**9), st.booleans()), min_size=12, max_size=12))
def test_missing_stamps_lose_no_time(steps: list[tuple[int, bool]]) -> None:
    """A stage that was not stamped counts as 0 and its time goes to the next one; the sum stays the sojourn."""
    at, rows = 1, {}
    for name, (step, stamped) in zip(stages.STAMPS, steps, strict=True):
        at += step
        ends = name in (stages.STAMPS[0], stages.STAMPS[-1])
        rows[name] = np.array([at if stamped or ends else 0])
    times = stages.stage_ms(rows)[0]
    assert (times >= 0).all()
    assert times.sum() == pytest.approx((rows["t_rx_ns"][0] - rows["t_intended_ns"][0]) / 1e6)


def test_tail_breakdown_needs_enough_requests(run: Run) -> None:
    """The breakdown of the slowest hundredth is given from 662 answers on, and is no shorter than p99."""
    found = {(row.service, row.arm): row for row in stages.make(run)}
    long, short = found["resnet18", "corun"], found["yolov5n", "corun"]
    assert long.requests >= 662
    assert long.tail is not None
    assert long.p99 is not None
    assert long.tail.sum() >= long.p99
    assert short.tail is None


# Distribution


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.1, 1e5), min_size=1, max_size=300))
def test_exceedance_falls_from_one_to_half_a_sample(values: list[float]) -> None:
    """The share of slower requests falls from just below one to half a sample, never to zero (the axis is a log)."""
    share = tail.exceedance(np.sort(np.array(values)))
    n = len(values)
    assert share[0] == pytest.approx((n - 0.5) / n)
    assert share[-1] == pytest.approx(0.5 / n)
    assert (np.diff(share) < 0).all()


# Slowdown


@settings(max_examples=60, deadline=None)
@given(
    *[st.tuples(st.floats(0.1, 100), st.floats(1.0, 3.0), st.floats(1.0, 3.0)) for _ in range(2)],
)
def test_ratio_interval_holds_its_ratio(alone: tuple[float, ...], corun: tuple[float, ...]) -> None:
    """The combined interval holds the ratio, is never narrower than either side's, and inverts when sides swap."""
    sides = [Interval(p / low, p * high, p, "", 100) for p, low, high in (alone, corun)]
    ratio = slowdown.mover_ratio(*sides)
    assert ratio.low <= ratio.point <= ratio.high
    width = math.log(ratio.high / ratio.low)
    assert width >= max(math.log(side.high / side.low) for side in sides) / math.sqrt(2) - 1e-9
    swapped = slowdown.mover_ratio(*sides[::-1])
    assert swapped.low == pytest.approx(1 / ratio.high)


def test_one_repeat_is_labelled(run: Run, summary: Summary) -> None:
    """With one repeat every interval says that it lies within one run; below its floor a percentile has no bar."""
    found = slowdown.make(run, summary)
    assert {row.name for row in found if row.service == "resnet18"} == {"p50", "p90", "p95", "p99"}
    assert "p99" not in {row.name for row in found if row.service == "yolov5n"}
    assert all(row.method.startswith(slowdown.WITHIN) for row in found)


def test_repeats_give_a_paired_interval(repeated_path: Path) -> None:
    """With repeats the interval is the paired t-interval over them, and says when the repeats are short."""
    found = slowdown.make(read(repeated_path), summarise(repeated_path))
    p50 = next(row for row in found if row.name == "p50")
    assert p50.method.startswith("paired t over 5 repeats")
    assert p50.low is not None
    assert p50.high is not None
    assert 1.3 < p50.low < p50.ratio < p50.high < 2.6
    p99 = next(row for row in found if row.name == "p99")
    assert "an honest interval needs 4000" in p99.method


def test_no_slowdown_says_why(tmp_path: Path) -> None:
    """Without a corun arm there is a sentence, not an empty plot."""
    path = write_run(tmp_path / "run", FakeRun(train=None, duration_s=SHORT))
    exhibit = slowdown.exhibit(read(path), summarise(path))
    assert exhibit.draw is None
    assert "corun was not measured" in exhibit.caption


# Training speed


def test_training_speed(repeated_path: Path) -> None:
    """Beside the services training keeps 1 / slowdown of its speed, and the interval over repeats holds that."""
    speeds = speed.make(summarise(repeated_path))
    assert [row.arm for row in speeds] == ["train", "corun"]
    kept = speed.kept(speeds).interval
    assert kept is not None
    assert kept.contains(1 / 1.25)


def test_no_training_says_so(tmp_path: Path) -> None:
    """A run without a trainer says that there was none."""
    path = write_run(tmp_path / "run", FakeRun(train=None, duration_s=SHORT))
    assert "No training job" in speed.exhibit(summarise(path)).caption


# Interference


def test_alone_is_the_baseline() -> None:
    """A tail is compared with the service's own tail alone; beside both others and training, with both named."""
    conditions = [
        Condition(frozenset({"a"}), None, {"a": 10.0}, None),
        Condition(frozenset({"a", "b"}), None, {"a": 20.0, "b": 8.0}, None),
        Condition(frozenset({"a", "b"}), "training t", {"a": 40.0, "b": 16.0}, 50.0),
        Condition(frozenset(), "training t", {}, 100.0),
    ]
    cells = interference.tails(conditions).cells
    assert cells["b", "a"][2] == 2.0
    assert cells["b + training t", "a"][2] == 4.0
    assert cells["training t", "b"][2] == 2.0, "b never stood alone, so only the training job can be judged"
    assert interference.kept(conditions).cells["a + b", "t"][2] == 0.5


def test_repeated_conditions_are_averaged() -> None:
    """Runs of one condition count together by their geometric mean, so ratios do not depend on their order."""
    tails = [4.0, 16.0]
    conditions = [Condition(frozenset({"a"}), None, {"a": tail}, None) for tail in tails]
    conditions.append(Condition(frozenset({"a"}), "training t", {"a": 16.0}, None))
    assert interference.tails(conditions).cells["training t", "a"] == pytest.approx((8.0, 16.0, 2.0))


def test_sweep_figures(tmp_path: Path) -> None:
    """The heat maps of a sweep name what the sweep measured; services at several rates are told apart."""
    services = [FakeService(rate=180, service_ms=2.0), FakeService(rate=200, service_ms=2.0)]
    root = write_sweep(tmp_path / "sweep", [FakeRun((s,), FakeTrain(), duration_s=SHORT) for s in services])
    summaries = [summarise(path) for path in sorted(root.iterdir()) if path.is_dir()]
    tails, kept = interference.exhibits(summaries)
    assert "p99" in tails.caption
    assert tails.data is not None
    assert {row[1] for row in tails.data.rows} == {"resnet18 at 180/s", "resnet18 at 200/s"}
    assert kept.data is not None
    assert all(0.7 < row[4] < 0.9 for row in kept.data.rows)


def test_no_heat_map_says_why() -> None:
    """A sweep without anything to compare has sentences instead of heat maps."""
    assert all(exhibit.draw is None and exhibit.caption for exhibit in interference.exhibits([]))


# Cells


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        (0.01234, "0.0123"),
        (4.2671, "4.27"),
        (18.86, "18.9"),
        (1234.5, "1,234"),
        (7, "7"),
    ],
)
def test_cells(value: object, text: str) -> None:
    """Missing is empty and never zero; figures keep three digits or more."""
    assert shown(value) == text


def test_saved_data_is_exact() -> None:
    """What a figure offers to save has the digits of the records and the same emptiness."""
    assert Data(("a", "b"), [(18.858978, None), (1234.5, "x,y")]).csv() == 'a,b\n18.858978,\n1234.5,"x,y"\n'
