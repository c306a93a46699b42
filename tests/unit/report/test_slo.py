"""Promises: met only where it is shown, missed by requests that were refused too, and otherwise cannot tell."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun.errors import InputError
from corun.report.slo import FILE, judge, overall, verdict, write
from corun.run import config
from corun.stats import percentile_of, sample_floor
from corun.testing.runs import FakeRun, FakeService, write_run

latencies = st.lists(st.floats(0.1, 500) | st.just(math.inf), max_size=900)
figures = st.sampled_from(["p50_ms", "p90_ms", "p95_ms", "p99_ms", "max_ms"])


@given(latencies, figures, st.floats(1, 600))
def test_met_is_never_claimed_without_the_samples(values: list[float], name: str, bound: float) -> None:
    """Met needs the percentile's floor and a percentile within the bound; nothing else is met."""
    found = verdict("a", "corun", name, bound, values)
    assert found.over == sum(value > bound for value in values)
    if name == "max_ms":
        expected = bool(values) and max(values) <= bound
    else:
        exact = percentile_of(values, float(name[1:3]))
        expected = exact is not None and exact <= bound
    assert (found.word == "met") == expected
    assert found.measured_ms is None or math.isfinite(found.measured_ms)


@given(figures, st.floats(1, 600), st.integers(0, 700), st.integers(0, 700))
def test_more_slow_requests_never_help(name: str, bound: float, fast: int, slow: int) -> None:
    """Turning a fast request into a slow one never improves the verdict."""
    rank = {"missed": 0, "cannot tell": 1, "met": 2}
    words = []
    for extra in (0, 1):
        over = min(slow + extra, fast + slow)
        values = [bound / 2] * (fast + slow - over) + [bound * 2] * over
        words.append(rank[verdict("a", "corun", name, bound, values).word])
    assert words[1] <= words[0]


def test_refused_requests_are_over_every_bound() -> None:
    """Two percent of lost requests miss any p99, however fast the others are."""
    values = np.full(1000, 5.0)
    assert verdict("a", "corun", "p99_ms", 1e9, values).word == "met"
    values[:20] = np.inf
    found = verdict("a", "corun", "p99_ms", 1e9, values)
    assert (found.word, found.over, found.measured_ms) == ("missed", 20, None)


def test_too_few_requests_cannot_tell_but_can_miss() -> None:
    """Below the floor a promise is never met, and missed once the slow ones cannot be bad luck."""
    few = sample_floor(99) - 1
    assert verdict("a", "corun", "p99_ms", 10, np.full(few, 1.0)).word == "cannot tell"
    assert "needs 662" in verdict("a", "corun", "p99_ms", 10, np.full(few, 1.0)).sentence
    slow = np.full(50, 1.0)
    slow[0] = 99
    assert verdict("a", "corun", "p99_ms", 10, slow).word == "cannot tell"
    slow[:5] = 99
    assert verdict("a", "corun", "p99_ms", 10, slow).word == "missed"
    assert verdict("a", "corun", "max_ms", 10, []).word == "cannot tell"


def test_every_arm_that_serves_is_judged(tmp_path: Path) -> None:
    """alone and corun each have a verdict per promise; the worst is the run's, and slo.json has all of them."""
    seconds = {"alone": 40.0, "train": 2.0, "corun": 40.0}
    path = write_run(tmp_path / "run", FakeRun((FakeService("a"), FakeService("b")), duration_s=seconds))
    verdicts = write(path, {"a": {"p50_ms": 1000.0, "p99_ms": 0.5}})
    assert [(v.arm, v.figure, v.word) for v in verdicts] == [
        ("alone", "p50", "met"),
        ("alone", "p99", "missed"),
        ("corun", "p50", "met"),
        ("corun", "p99", "missed"),
    ]
    assert overall(verdicts) == "missed"
    assert json.loads((path / FILE).read_text())["slo"] == "missed"
    assert overall(judge(path, {"a": {"p50_ms": 1000.0}})) == "met"


def test_without_promises_there_is_nothing_to_judge(tmp_path: Path) -> None:
    """No promise: no verdict, no file."""
    path = write_run(tmp_path / "run", FakeRun(duration_s={"alone": 2.0}, arms=("alone",)))
    assert write(path, {}) == []
    assert overall([]) is None
    assert not (path / FILE).exists()


def test_promises_of_the_file_and_of_a_service() -> None:
    """A service's own bounds replace the file's of the same name; promises do not change what is measured."""
    value = {
        "infer": [[{"arch": "a", "slo": {"p99_ms": 50, "max_ms": 400}}, {"arch": "b"}]],
        "slo": {"p99_ms": 100, "p50_ms": 20},
    }
    (cell,) = config.pairs(config.parse(value))
    assert cell.promises == {
        "a": {"p99_ms": 50, "p50_ms": 20, "max_ms": 400},
        "b": {"p99_ms": 100, "p50_ms": 20},
    }
    (bare,) = config.pairs(config.parse({"infer": [[{"arch": "a"}, {"arch": "b"}]], "calibrate": False}))
    assert bare.promises == {}
    assert cell.digest() == bare.digest()


def test_a_wrong_promise_is_bad_input() -> None:
    """Unknown figures and bounds that are not positive are listed with their path."""
    with pytest.raises(InputError) as caught:
        config.parse({"infer": [{"arch": "a", "slo": {"p98_ms": 5}}], "slo": {"p99_ms": -1}})
    text = str(caught.value)
    assert 'infer.0.slo.p98_ms: unknown key; did you mean "p9' in text
    assert "slo.p99_ms: Input should be greater than 0 (got -1)" in text
