"""The pure parts of the launcher: arguments, windows, schedules, command lines, sweeps."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun.errors import InputError, RunFault
from corun.launch import commands, sweep
from corun.launch.arguments import spread
from corun.launch.segments import make_schedule, plan, process_of
from corun.run import config
from corun.run.directory import RunDirectory
from corun.wire.sockets import Address

WORD = st.text("abc", min_size=1, max_size=3)


def _pair(**settings: Any) -> config.Pair:
    value = {
        "train": [{"arch": "resnet18"}],
        "infer": [[{"arch": "a", "rate": 50}, {"arch": "b", "rate": 50}]],
        **settings,
    }
    (cell,) = config.pairs(config.parse(value))
    return cell


@given(st.lists(WORD, min_size=1), st.lists(WORD, min_size=1))
def test_spread_repeats_the_option_for_every_word(names: list[str], rest: list[str]) -> None:
    """`--models a b --other c` becomes `--models a --models b --other c`."""
    expected = [part for name in names for part in ("--models", name)]
    assert spread(["--models", *names, "--other", *rest], "--models") == [*expected, "--other", *rest]


def test_spread_leaves_ordinary_command_lines_alone() -> None:
    """A command line that already repeats its options is not changed."""
    argv = ["--models", "a", "--models", "b", "--port", "5"]
    assert spread(argv, "--models") == argv


def test_odd_repeats_run_the_arms_backwards() -> None:
    """ABBA order: a drift over the run hits every arm alike."""
    assert [segment.arm for segment in plan(_pair(repeat=2))] == [
        "alone",
        "train",
        "corun",
        "corun",
        "train",
        "alone",
    ]


def test_arms_of_one_repeat_share_their_arrivals() -> None:
    """alone and corun of a repeat are compared on the very same arrivals; repeats and streams differ."""
    pair = _pair(repeat=2, duration_s=5)
    segments = plan(pair)
    planned = make_schedule(pair, segments)

    def due(index: int, stream: int) -> list[int]:
        first, last = planned.rows[index, stream]
        return planned.schedule.of_stream(stream).intended_ns[first:last].tolist()

    alone, train, corun = segments[:3]
    assert due(alone.index, 0) == due(corun.index, 0)
    assert due(alone.index, 0) != due(alone.index, 1)
    assert due(alone.index, 0) != due(segments[3].index, 0)
    assert (train.index, 0) not in planned.rows


def test_the_schedule_depends_on_the_seed_alone() -> None:
    """The same configuration gives the same hash, another seed another one."""
    hashes = [make_schedule(pair, plan(pair)).schedule.sha256 for pair in (_pair(), _pair(), _pair(seed=1))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_rate_zero_is_the_azure_trace() -> None:
    """The original's convention on the command line."""
    (cell,) = config.pairs(config.parse({"infer": [{"arch": "a", "rate": 0}]}))
    assert process_of(cell.services[0]).rate == pytest.approx(10.34, abs=0.01)


def test_an_unknown_process_is_refused() -> None:
    """A mistyped arrival process gets a suggestion."""
    (cell,) = config.pairs(config.parse({"infer": [{"arch": "a", "process": "poison"}]}))
    with pytest.raises(InputError, match="poisson"):
        process_of(cell.services[0])


def test_threads_are_always_explicit() -> None:
    """Every role's command line and environment name its thread count."""
    pair = _pair()
    argv, environment = commands.server(pair.services[0], Address("tcp", "127.0.0.1", 1), Path("out"), 7)
    assert argv[argv.index("--threads") + 1] == "1"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert pair.train is not None
    argv, environment = commands.trainer(pair.train, 3, 0, Path("out"), Address("unix", "/tmp/x"))
    assert argv[argv.index("--threads") + 1] == "3" == environment["OMP_NUM_THREADS"]


@dataclass(frozen=True)
class _Cell:
    name: str
    label: str = "cell"
    expected_s: float = 1.0

    def resolved(self) -> dict[str, Any]:
        return {"name": self.name}


class _Bench:
    """Measures cells and remembers which; fails or is killed where told to."""

    def __init__(self, fail: str = "", kill_at: str = "") -> None:
        self.measured: list[str] = []
        self._fail = fail
        self._kill_at = kill_at

    def __call__(self, cell: sweep.Cell, run: RunDirectory) -> sweep.CellResult:
        assert isinstance(cell, _Cell)
        self.measured.append(cell.name)
        if cell.name == self._kill_at:
            raise KeyboardInterrupt
        if cell.name == self._fail:
            raise RunFault("it broke")
        run.finish("complete")
        return sweep.CellResult("complete", (), {"figure": cell.name})


def _sweep(root: Path, bench: _Bench, names: str, fresh: bool = False) -> list[sweep.Row]:
    return sweep.run_sweep([_Cell(name) for name in names], root, bench, lambda line: None, lambda: False, fresh)


def test_a_failed_cell_is_a_row_and_the_sweep_goes_on(tmp_path: Path) -> None:
    """The index has one row per cell, the failed one with its reason."""
    rows = _sweep(tmp_path, _Bench(fail="b"), "abc")
    assert [row.result.status for row in rows] == ["complete", "failed", "complete"]
    with open(tmp_path / "index.csv", newline="") as file:
        index = list(csv.DictReader(file))
    assert [(row["status"], row["reason"], row["figure"]) for row in index] == [
        ("complete", "", "a"),
        ("failed", "it broke", ""),
        ("complete", "", "c"),
    ]


def test_a_killed_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Complete cells are not measured twice, their figures stay in the index; the interrupted one is."""
    with pytest.raises(KeyboardInterrupt):
        _sweep(tmp_path, _Bench(kill_at="c"), "abcd")
    second = _Bench()
    rows = _sweep(tmp_path, second, "abcd")
    assert second.measured == ["c", "d"]
    assert [dict(row.result.figures or {}).get("figure") for row in rows] == ["a", "b", "c", "d"]


def test_fresh_measures_everything_again(tmp_path: Path) -> None:
    """--fresh ignores what is complete."""
    _sweep(tmp_path, _Bench(), "ab")
    again = _Bench()
    _sweep(tmp_path, again, "ab", fresh=True)
    assert again.measured == ["a", "b"]


def test_the_sweep_is_named_by_its_cells() -> None:
    """The same cells are the same sweep; another cell makes another."""
    one, same, other = ([_Cell(name) for name in names] for names in ("ab", "ab", "ac"))
    assert sweep.sweep_name(one) == sweep.sweep_name(same) != sweep.sweep_name(other)
