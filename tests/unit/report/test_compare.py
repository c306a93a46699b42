"""Comparisons of runs: the repeat is the unit, and "cannot tell" is an answer."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from corun.errors import InputError
from corun.report import compare as comparing
from corun.report.compare_console import show
from corun.stats.compare import Verdict
from corun.testing.runs import FakeRun, FakeService, FakeTrain, write_run, write_sweep

TIMES = {"alone": 4.0, "train": 3.0, "corun": 4.0}


def _run(path: Path, **fields: object) -> Path:
    defaults = {"services": (FakeService(rate=60, service_ms=3.0),), "repeat": 5, "noise": 0.02, "duration_s": TIMES}
    return write_run(path, FakeRun(**{**defaults, **fields}))  # type: ignore[arg-type]


def _verdicts(result: comparing.Result) -> dict[tuple[str, str], Verdict]:
    return {(line.arm, line.figure): line.result.verdict for line in result.lines}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("base") / "a")


def test_slower_is_seen(tmp_path: Path, base: Path) -> None:
    """Services a third slower are called slower, with a ratio near 1.3; what did not change is not."""
    result = comparing.compare(base, _run(tmp_path / "b", factor=1.3, draw=1))
    verdicts = _verdicts(result)
    assert verdicts["alone", "p50"] == verdicts["corun", "p50"] == Verdict.SLOWER
    (p50,) = [line for line in result.lines if (line.arm, line.figure) == ("alone", "p50")]
    assert p50.paired
    assert p50.result.ratio is not None
    assert p50.result.ratio.contains(1.3) or 1.25 < p50.result.ratio.point < 1.45
    assert verdicts["alone", "answers"] == Verdict.NO_DIFFERENCE
    assert verdicts["train", "training"] not in (Verdict.SLOWER, Verdict.FASTER)


def test_same_services_are_not_told_apart(tmp_path: Path, base: Path) -> None:
    """An A/A pair, alike but for chance, is not called different after correction, and says what it could have seen."""
    result = comparing.compare(base, _run(tmp_path / "b", draw=1))
    assert not [line for line in result.lines if _verdict_stands(line)]
    assert all(line.result.detectable is not None for line in result.lines if line.result.ratio)


def _verdict_stands(line: comparing.Line) -> bool:
    return line.result.verdict in (Verdict.SLOWER, Verdict.FASTER) and not comparing.chance(line)


def test_one_repeat_cannot_tell(tmp_path: Path) -> None:
    """With one repeat a side every answer is "cannot tell", however far apart the numbers are."""
    a, b = _run(tmp_path / "a", repeat=1), _run(tmp_path / "b", repeat=1, factor=3.0)
    result = comparing.compare(a, b)
    assert set(_verdicts(result).values()) == {Verdict.CANNOT_TELL}
    assert any("one repeat a side" in note for note in result.notes)
    assert all(line.result.ratio is None for line in result.lines)


def test_other_schedules_are_not_paired(tmp_path: Path, base: Path) -> None:
    """Sides with different arrivals are compared unpaired, and the differing seed is named."""
    result = comparing.compare(base, _run(tmp_path / "b", seed=7))
    assert not any(line.paired for line in result.lines)
    assert ("config.seed", 0, 7) in result.differences


def test_directories_of_runs(tmp_path: Path) -> None:
    """Single runs of one cell in a directory count as repeats; cells that only one side has are named."""
    sides = {}
    for side, factor in (("a", 1.0), ("b", 1.5)):
        runs = [_fake(seed, factor, side) for seed in range(3)]
        if side == "b":
            runs.append(FakeRun(services=(FakeService("other", rate=30),), duration_s=TIMES))
        sides[side] = write_sweep(tmp_path / side, runs)
    result = comparing.compare(sides["a"], sides["b"])
    assert {line.result.baseline_runs for line in result.lines} == {3}
    assert all(line.paired for line in result.lines)
    assert _verdicts(result)["alone", "p50"] == Verdict.SLOWER
    assert result.unmatched == ("other + resnet18_16 (30/s)",)


def _fake(seed: int, factor: float, side: str) -> FakeRun:
    service = FakeService(rate=60, service_ms=3.0)
    return FakeRun((service,), seed=seed, draw=ord(side), factor=factor, noise=0.02, duration_s=TIMES)


def test_two_cells_of_different_names(tmp_path: Path, base: Path) -> None:
    """Two single runs are compared even when their training jobs differ: that is the question asked."""
    result = comparing.compare(base, _run(tmp_path / "b", train=FakeTrain(batch_size=32)))
    assert ("alone", "p50") in _verdicts(result)
    assert ("train", "training") not in _verdicts(result), "the two jobs are different things"
    assert result.unmatched == ()


def test_nothing_in_common(tmp_path: Path, base: Path) -> None:
    """Runs without a common service or job are refused, with what each side has."""
    other = _run(tmp_path / "b", services=(FakeService("other", rate=30),), train=None, repeat=1)
    with pytest.raises(InputError, match="nothing in common"):
        comparing.compare(base, other)


def test_json_and_console(tmp_path: Path, base: Path) -> None:
    """The JSON has every line with its verdict and p after correction; the console says the same in words."""
    result = comparing.compare(base, _run(tmp_path / "b", factor=1.3, draw=1))
    answer = json.loads(json.dumps(comparing.as_json(result)))
    p50 = next(line for line in answer["lines"] if (line["arm"], line["figure"]) == ("alone", "p50"))
    assert p50["verdict"] == "slower"
    assert p50["runs"] == [5, 5]
    assert p50["p"] <= p50["p_holm"]
    console = Console(width=160, record=True, file=io.StringIO())
    show(result, console)
    printed = console.export_text()
    assert "slower" in printed
    assert "5 against 5 repeats, paired" in printed
    assert "about 4000 a repeat" in printed or "n/a" in printed
