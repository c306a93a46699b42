"""Rows of other machines on the launcher's clock."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.launch.merge import ClockMap, Comparison, Merged, complete_rows, destination, is_instant
from corun.run.records import EVENTS, INFER_CLIENT, INFER_SERVER, TRAIN
from corun.run.table import TableWriter

S = 1_000_000_000
DAY = 86_400 * S


def _clock(*pairs: tuple[int, int]) -> ClockMap:
    return ClockMap([Comparison("during", t, offset, 10, 20) for t, offset in pairs])


offsets = st.lists(st.integers(-1000, 1000), min_size=1, max_size=6).flatmap(
    lambda bends: st.integers(-DAY, DAY).map(
        lambda base: _clock(*((10 * S * (place + 1), base + 1000 * bend) for place, bend in enumerate(bends)))
    )
)


def test_without_a_comparison_the_clocks_are_one() -> None:
    """On a node that shares the launcher's clock nothing is moved."""
    assert ClockMap().to_launcher(5) == ClockMap().to_node(5) == 5


@settings(max_examples=80)
@given(offsets, st.lists(st.integers(0, 80 * S), min_size=2, max_size=20))
def test_order_is_kept_and_comparisons_are_exact(clock: ClockMap, at: list[int]) -> None:
    """Instants keep their order on the launcher's clock, and the measured instants are hit exactly."""
    base = clock.comparisons[0].offset_ns
    moved = [clock.to_launcher(base + t) for t in sorted(at)]
    assert moved == sorted(moved)
    for one in clock.comparisons:
        assert clock.to_launcher(one.t_ns + one.offset_ns) == one.t_ns
    last = clock.comparisons[-1]
    assert clock.to_launcher(clock.to_node(last.t_ns + S)) == last.t_ns + S


@settings(max_examples=80)
@given(st.integers(-DAY, DAY), st.integers(-200, 200), st.integers(0, 100 * S))
def test_drift_between_two_comparisons_is_taken_out(offset: int, ppm: int, t: int) -> None:
    """A clock that runs `ppm` too fast is followed to within rounding between comparisons."""

    def node(t_ns: int) -> int:
        return t_ns + offset + t_ns * ppm // 1_000_000

    clock = _clock(*((at, node(at) - at) for at in (0, 50 * S, 100 * S)))
    assert abs(clock.to_launcher(node(t)) - t) <= 2


def test_instants_are_moved_and_counters_and_wall_clocks_are_not() -> None:
    """t_..._ns and s_..._ns are instants; counters in ns and the wall clock are not."""
    for table in (INFER_CLIENT, INFER_SERVER, TRAIN, EVENTS):
        ns = {column.name for column in table if column.unit == "ns" and column.kind == "int"}
        assert {name for name in ns if is_instant(name)} == ns
    for name in ("t_wall_ns", "cpu_user_ns", "throttle_power_ns", "sojourn_ms", "work_start", "slip_ms"):
        assert not is_instant(name)


rows = st.lists(
    st.tuples(st.integers(1, DAY), st.one_of(st.none(), st.integers(1, DAY)), st.text('a,"\n é', max_size=6)),
    max_size=12,
)


@settings(max_examples=60)
@given(rows, st.lists(st.integers(1, 60), max_size=8), st.integers(-DAY, DAY))
def test_rows_arrive_whole_however_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory,
    made: list[tuple[int, int | None, str]],
    cuts: list[int],
    offset: int,
) -> None:
    """A table that is read on in pieces ends as the same rows with moved instants; empty cells stay empty."""
    folder = tmp_path_factory.mktemp("merge")
    with TableWriter(folder / "there.csv", ("t_ns", "t_rx_ns", "detail")) as table:
        for row in made:
            table.row(row)
    data = (folder / "there.csv").read_bytes()
    merged = Merged(folder / "here.csv", _clock((0, offset)))
    for cut in [*cuts, len(data)]:
        merged.append(data[merged.taken : merged.taken + cut])
    while merged.append(data[merged.taken :]):
        pass
    with open(folder / "here.csv", newline="", encoding="utf-8") as file:
        header, *found = csv.reader(file)
    assert header == ["t_ns", "t_rx_ns", "detail"]
    assert found == [[str(t - offset), "" if rx is None else str(rx - offset), text] for t, rx, text in made]


def test_a_half_written_row_waits() -> None:
    """Only whole rows are taken; a line break inside quotes does not end one."""
    assert complete_rows(b"") == complete_rows(b"a,b") == 0
    assert complete_rows(b"a\nb,c") == 2
    assert complete_rows(b'a\n1,"x\n') == 2
    assert complete_rows(b'a\n1,"x\ny"\n') == len(b'a\n1,"x\ny"\n')


def test_two_nodes_share_one_table(tmp_path: Path) -> None:
    """Events of several nodes stand in one file under one header, each on the launcher's clock."""
    text = b"t_ns,kind,role,name,detail\n%d,stop,server,%s,\n"
    Merged(tmp_path / "events.csv", _clock((0, 1000))).append(text % (5000, b"a"))
    Merged(tmp_path / "events.csv", _clock((0, -1000))).append(text % (5000, b"b"))
    found = list(csv.DictReader(io.StringIO((tmp_path / "events.csv").read_text())))
    assert [(row["t_ns"], row["name"]) for row in found] == [("4000", "a"), ("6000", "b")]


def test_profiles_of_other_nodes_lie_beside_the_runs_own() -> None:
    """The measured node's profile is the run's; what the launcher has itself or nobody reads is not brought."""
    assert destination("profile.csv", "edge", measured=True) == "profile.csv"
    assert destination("profile.csv", "edge", measured=False) == "nodes/edge/profile.csv"
    assert destination("infer_client/a.csv", "edge", measured=False) == "infer_client/a.csv"
    for name in ("processes.jsonl", "schedule.npy", "infer_client/a.0.ring", "profiler.json.tmp"):
        assert destination(name, "edge", measured=False) is None
