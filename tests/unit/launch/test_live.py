"""The live view shows what the files say, at absolute seconds, and can fail without harm to the run."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from corun.launch.live import NEVER_NS, JsonLines, Lines, Live, Panel, line, make_live, panel
from corun.launch.segments import Segment
from corun.launch.watch import (
    RECENT_S,
    FileTail,
    MachineNow,
    MachineTail,
    Now,
    RingTail,
    ServiceNow,
    TrainNow,
    TrainTail,
)
from corun.load.ring import UNSENT, Metadata, RingWriter
from corun.stats import percentile_of
from corun.wire import Status

S = 10**9
START = 1000 * S
STAMPS = [0] * 10

request = st.tuples(
    st.floats(0, 30),
    st.one_of(st.none(), st.floats(0.0001, 8)),
    st.sampled_from([Status.OK, Status.OK, Status.OK, Status.REJECTED, Status.FAILED]),
)


def _now(**changes: Any) -> Now:
    services = (ServiceNow("resnet18", 19.96, 8.12, None, 31.5, 2, 0), ServiceNow("null", 40.0, 0.2, 0.9, 1.0, 0, 3))
    machine = MachineNow({"server": 0.41, "trainer": 0.9, "profiler": 0.001}, 1.5, {"0": (81.0, 222.4)})
    values = {"arm": "corun", "repeat": 1, "elapsed_s": 12.0, "left_s": 24.4, "services": services}
    return Now(**{**values, "train": TrainNow(7.94, 127.0, 0.4321), "machine": machine, **changes})


class _Recorded:
    """A display that remembers what it was told."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.shown: list[tuple[int, Now]] = []
        self.calls: list[str] = []
        self._fault = fault

    def begin(self) -> None:
        self.calls.append("begin")

    def show(self, now: Now, tick: int) -> None:
        if self._fault:
            raise self._fault
        self.shown.append((tick, now))

    def end(self) -> None:
        self.calls.append("end")


# Rings


@settings(max_examples=40, deadline=None)
@given(st.lists(request, max_size=120), st.lists(st.floats(0.5, 40), min_size=1, max_size=8))
def test_a_ring_read_in_steps_says_what_it_holds(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[float, float | None, Status]], looks: list[float]
) -> None:
    """At every look: rate, latencies, in flight and errors are those of all requests due by then."""
    path = tmp_path_factory.mktemp("ring") / "a.0.ring"
    requests = sorted(requests, key=lambda entry: entry[0])
    due = [START + 1 + round(at * S) for at, _, _ in requests]
    ring = RingWriter(path, len(requests), Metadata())
    ring.fill(range(len(due)), due, 0, [0] * len(due))
    tail = RingTail(path, "a")
    sent: set[int] = set()
    for look in sorted(looks):
        now = START + round(look * S)
        latencies, flying, errors = [], 0, 0
        for index, (_, wait, status) in enumerate(requests):
            if due[index] > now:
                continue
            if index not in sent:
                ring.tx(index, due[index], due[index], due[index])
                sent.add(index)
            reply = None if wait is None else due[index] + round(wait * S)
            if reply is None or reply > now:
                flying += 1
                continue
            ring.rx(index, status, 1, reply, 4, STAMPS)
            errors += status != Status.OK
            if status == Status.OK and reply > max(START, now - RECENT_S * S):
                latencies.append((reply - due[index]) / 1e6)
        seen = tail.read(START, now)
        assert (seen.in_flight, seen.errors) == (flying, errors)
        assert seen.rate == pytest.approx(len(latencies) / min(look, RECENT_S))
        assert seen.p50_ms == percentile_of(latencies, 50)
        assert seen.max_ms == (max(latencies) if latencies else None)
    tail.close()
    ring.close()


def test_a_ring_that_is_missing_cut_or_foreign_shows_nothing(tmp_path: Path) -> None:
    """Before the client made it, after it was cut, and when it is something else: no requests, no exception."""
    path = tmp_path / "a.0.ring"
    tail = RingTail(path, "a")
    assert tail.read(START, START + S) == ServiceNow("a", 0.0, None, None, None, 0, 0)
    ring = RingWriter(path, 50, Metadata())
    ring.fill(range(50), [START + 1 + index for index in range(50)], 0, [0] * 50)
    assert tail.read(START, START + S).in_flight == 50
    os.truncate(path, ring.offset + 3)
    assert tail.read(START, START + S).in_flight == 0
    (tmp_path / "b.0.ring").write_bytes(b"x" * 500)
    assert RingTail(tmp_path / "b.0.ring", "b").read(START, START + S).in_flight == 0


def test_unsent_requests_that_are_due_are_in_flight(tmp_path: Path) -> None:
    """A request the client could not send yet is waited for as well; one that is not due is not."""
    ring = RingWriter(tmp_path / "a.0.ring", 2, Metadata())
    ring.fill([0, 1], [START + S, START + 9 * S], 0, [0, 0])
    assert set(ring.records["status"]) == {UNSENT}
    seen = RingTail(tmp_path / "a.0.ring", "a").read(START, START + 2 * S)
    assert (seen.in_flight, seen.errors) == (1, 0)


# Tables


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.text('ab,"\n', max_size=5)), max_size=20), st.data())
def test_a_file_read_in_pieces_gives_its_rows_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str]], data: st.DataObject
) -> None:
    """However a table's bytes arrive, each whole row is given once and in order; half a row waits."""
    rows = [(number, text.replace("\n", "")) for number, text in rows]
    quoted = [f'{number},"{text.replace(chr(34), chr(34) * 2)}"\n' for number, text in rows]
    content = ("n,text\n" + "".join(quoted)).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=6)))
    path = tmp_path_factory.mktemp("table") / "t.csv"
    tail = FileTail(path)
    assert list(tail.rows(("n",))) == []
    found: list[list[str]] = []
    for begin, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        with open(path, "ab") as file:
            file.write(content[begin:end])
        found += tail.rows(("text", "absent", "n"))
    assert found == [[text, "", str(number)] for number, text in rows]
    tail.close()


def test_training_speed_is_that_of_the_last_seconds(tmp_path: Path) -> None:
    """Steps and samples per second over the last 10 s, or since the window began; loss of the newest step."""
    path = tmp_path / "train.csv"
    tail = TrainTail(path)
    assert tail.read(START, START + S) == TrainNow(0.0, 0.0, None)
    steps = [f"{START + round(0.5 * number * S)},16,{1 / (number + 1)}\n" for number in range(1, 41)]
    path.write_text("t_end_ns,samples,loss\n" + "".join(steps))
    now = tail.read(START, START + 20 * S)
    assert (now.steps_per_s, now.samples_per_s) == (2.0, 32.0)
    assert now.loss == pytest.approx(1 / 41)
    assert tail.read(START + 18 * S, START + 20 * S).steps_per_s == 2.0


def test_cores_by_role_and_gpus(tmp_path: Path) -> None:
    """CPU is the difference of two ticks, summed over the processes of a role; what is not measured is not shown."""
    busy = "cpu_user_ns,cpu_nice_ns,cpu_system_ns,cpu_irq_ns,cpu_softirq_ns"
    (tmp_path / "process.csv").write_text("t_ns,pid,role,cpu_ns\n")
    (tmp_path / "profile.csv").write_text(f"t_ns,{busy}\n")
    tail = MachineTail(tmp_path)
    assert tail.read() == MachineNow({}, None, {})
    for tick in (1, 2):
        with open(tmp_path / "process.csv", "a") as file:
            file.write(f"{tick * S},7,server,{tick * S // 4}\n{tick * S},8,server,{tick * S // 2}\n")
        with open(tmp_path / "profile.csv", "a") as file:
            file.write(f"{tick * S},{tick * S},0,{tick * S // 2},0,0\n")
        (tmp_path / "gpu.csv").write_text("t_ns,gpu,util_gpu_pct,power_mw\n1,0,81,\n")
        tail.read()
    assert tail.read() == MachineNow({"server": 0.75}, 1.5, {"0": (81.0, None)})
    tail.close()


# Ticks


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5 * S), min_size=1, max_size=40))
def test_looks_keep_to_whole_seconds(tmp_path_factory: pytest.TempPathFactory, steps: list[int]) -> None:
    """However late the launcher wakes: at most one look per second of the window, the next one always ahead."""
    clock = START
    display = _Recorded()
    live = Live(display, lambda: clock)
    live.begin(tmp_path_factory.mktemp("run"), Segment(0, "corun", 0, 60.0), ["a"], START, START + 60 * S)
    for step in steps:
        clock += step
        live.tick()
        assert clock < live.next_ns <= clock + S
        assert (live.next_ns - START) % S == 0
    ticks = [tick for tick, _ in display.shown]
    assert ticks == sorted(set(ticks))
    assert all(now.elapsed_s + now.left_s == pytest.approx(max(60.0, now.elapsed_s)) for _, now in display.shown)
    live.end()
    assert (display.calls, live.next_ns) == (["begin", "end"], NEVER_NS)
    assert live.cost()["ticks"] == len(ticks)
    live.close()


@pytest.mark.parametrize("fault", [OSError("disk"), ValueError("cell"), BrokenPipeError()])
def test_a_display_that_fails_ends_itself_only(tmp_path: Path, fault: Exception) -> None:
    """A broken pipe or an unreadable cell stops the looks, for this window and later ones, and is recorded."""
    clock = START + 5 * S
    live = Live(_Recorded(fault), lambda: clock)
    live.begin(tmp_path, Segment(0, "alone", 0, 60.0), ["a"], START, START + 60 * S)
    live.tick()
    assert live.next_ns == NEVER_NS
    live.begin(tmp_path, Segment(1, "alone", 1, 60.0), ["a"], START, START + 60 * S)
    live.tick()
    live.end()
    assert live.cost()["fault"].startswith("the live display ended")


def test_windows_of_two_runs_are_not_mixed(tmp_path: Path) -> None:
    """After close the next run's files are read, and its cost is its own."""
    for name, steps in (("one", 3), ("two", 5)):
        (tmp_path / name).mkdir()
        text = "t_end_ns,samples,loss\n" + "".join(
            f"{START + number * S // 10},1,\n" for number in range(1, steps + 1)
        )
        (tmp_path / name / "train.csv").write_text(text)
    clock = START + S
    display = _Recorded()
    live = Live(display, lambda: clock)
    for name in ("one", "two"):
        live.begin(tmp_path / name, Segment(0, "train", 0, 60.0), ["a"], START, START + 60 * S)
        live.tick()
        live.end()
        assert live.cost()["ticks"] == 1
        live.close()
    assert [now.train.steps_per_s for _, now in display.shown if now.train] == [3.0, 5.0]
    assert all(now.services == () for _, now in display.shown)


# Displays


def test_the_line_and_the_panel_say_the_same() -> None:
    """Rates, latencies with n/a below the floor, in flight, errors, training, CPU and GPU stand in both."""
    text = line(_now())
    console = Console(file=io.StringIO(), width=100)
    console.print(panel(_now()))
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("20.0", "8.1", "n/a", "31.5", "127.0 samples/s", "1.50 cores", "server 0.41", "GPU 0 81.0 % 222 W"):
        assert word in text
        assert word in drawn
    assert "3 errors" in text
    assert "profiler" not in text
    assert "24 s left" in text
    assert "24 s left" in drawn
    assert max(map(len, drawn.splitlines())) <= 100


def test_nothing_known_is_still_a_line() -> None:
    """The first second of a window has neither answers nor a profiler tick."""
    empty = ServiceNow("a", 0.0, None, None, None, 0, 0)
    text = line(_now(services=(empty,), train=None, machine=MachineNow({}, None, {})))
    assert text == "corun 12 s, 24 s left; a 0.0/s, p50 n/a p99 n/a max n/a ms, 0 in flight"


def test_plain_lines_are_rare_and_json_lines_are_whole() -> None:
    """Without a terminal every tenth look is a line; with --json every look is one object."""
    said: list[str] = []
    lines, text = Lines(said.append), io.StringIO()
    objects = JsonLines(text)
    for tick in range(1, 31):
        lines.show(_now(), tick)
        objects.show(_now(), tick)
    assert len(said) == 3
    parsed = [json.loads(row)["live"] for row in text.getvalue().splitlines()]
    assert len(parsed) == 30
    assert parsed[0]["services"][1] == {
        "name": "null",
        "rate": 40.0,
        "p50_ms": 0.2,
        "p99_ms": 0.9,
        "max_ms": 1.0,
        "in_flight": 0,
        "errors": 3,
    }


def test_the_panel_leaves_no_trace() -> None:
    """A terminal's panel is redrawn in place and gone at the end; it makes no thread."""
    before = set(threading.enumerate())
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    display = Panel(console)
    display.show(_now(), 1)
    display.begin()
    display.show(_now(), 1)
    display.show(_now(), 2)
    display.end()
    display.end()
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert output.count("resnet18") >= 2
    assert output.endswith("\x1b[1A\x1b[2K")
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize(
    ("terminal", "quiet", "as_json", "expected"),
    [
        (True, False, False, Panel),
        (False, False, False, Lines),
        (True, True, False, None),
        (True, True, True, JsonLines),
        (False, False, True, JsonLines),
    ],
)
def test_the_display_that_fits(terminal: bool, quiet: bool, as_json: bool, expected: type | None) -> None:
    """--json wins over --quiet, --quiet over the rest; a panel needs a terminal."""
    console = Console(file=io.StringIO(), force_terminal=terminal)
    live = make_live(console, lambda text: None, quiet, io.StringIO() if as_json else None)
    assert (live is None) == (expected is None)
    if live is not None and expected is not None:
        assert isinstance(live._display, expected)


def test_a_look_is_cheap(tmp_path: Path) -> None:
    """What a look keeps does not grow with the run: answered slots that are no longer recent are stepped over."""
    count = 30_000
    ring = RingWriter(tmp_path / "a.0.ring", count, Metadata())
    due = START + np.arange(1, count + 1, dtype=np.int64) * (S // 1000)
    ring.fill(range(count), due.tolist(), 0, [0] * count)
    records = ring.records
    records["t_rx"], records["status"] = due + S // 1000, Status.OK
    tail = RingTail(tmp_path / "a.0.ring", "a")
    for second in range(1, 29):
        assert tail.read(START, START + second * S).rate == pytest.approx(1000, rel=0.01)
    assert tail._first >= 17_000
