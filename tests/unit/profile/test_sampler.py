"""Rules of a tick's rows, of the windows they belong to, and of the talk with the launcher."""

from __future__ import annotations

import csv
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from corun.clock import Anchor
from corun.errors import InputError, RunFault
from corun.process import StopSignal
from corun.profile.control import Control, waiter
from corun.profile.gpu import GpuUse
from corun.profile.grid import Tick
from corun.profile.host import CpuTimes, Memory
from corun.profile.processes import ProcessTable
from corun.profile.sampler import IDLE, Sampler, SamplerStatistics, Sources, Tables, Window
from corun.profile.session import ProfilerOptions, profile
from corun.profile.source import Faults, Row, Status
from corun.profile.tables import GPU, PROCESS, PROFILE
from corun.profile.watch import Watched, WatchFile
from corun.run.records import names
from corun.testing.sysfs import FakeMachine
from corun.wire.channel import Channel
from corun.wire.messages import Arm, Clock, Drain, Load, Message, Start, Stats, Stop


def table(path: Path) -> list[dict[str, str]]:
    """A CSV file as rows of text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class FakeGpus:
    """A GPU source that says what it is told to say."""

    def __init__(self, uses: dict[int, GpuUse]) -> None:
        self.uses = uses

    def read(self) -> tuple[list[Row], dict[int, GpuUse]]:
        return [{"gpu": 0, "energy_mj": 12}, {"gpu": 1}], self.uses

    def status(self) -> Status:
        return Status("nvml")

    def close(self) -> None: ...


class Rig:
    """A sampler on a fake machine with a clock that moves 250 µs with every look at it."""

    def __init__(self, tmp_path: Path, uses: dict[int, GpuUse] | None = None) -> None:
        self.machine = FakeMachine(tmp_path / "root").host().process(7)
        self.out = tmp_path / "out"
        self.faults = Faults()
        self.processes = ProcessTable(self.machine.root, self.faults, lambda *event: None, drm=True)
        self.watch_path = tmp_path / "processes.jsonl"
        self.now = 0
        self.segment: Row = {}
        host = [CpuTimes(self.machine.root), Memory(self.machine.root)]
        watch = WatchFile(self.watch_path, lambda error: self.faults.record("watch", error))
        self.sources = Sources(host, self.processes, FakeGpus(uses or {}), watch)
        self.tables = Tables(self.out, host)
        anchor = Anchor(0, 1_000_000)
        self.sampler = Sampler(self.sources, self.tables, self.faults, self.look, anchor, lambda t_ns: self.segment)

    def look(self) -> int:
        self.now += 250_000
        return self.now

    def close(self) -> None:
        self.tables.close()
        self.sources.close()

    def sample(self, number: int, late_ns: int = 0, missed: int = 0) -> None:
        self.now = number * 1_000_000_000 + late_ns
        self.sampler.sample(Tick(number, number * 1_000_000_000, late_ns, missed))


MakeRig = Callable[..., Rig]


@pytest.fixture
def rig_with(tmp_path: Path) -> Iterator[MakeRig]:
    """Makes a rig, given what NVML says about processes."""
    made: list[Rig] = []

    def make(uses: dict[int, GpuUse] | None = None) -> Rig:
        made.append(Rig(tmp_path, uses))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def rig(rig_with: MakeRig) -> Rig:
    """A rig whose GPUs nobody uses."""
    return rig_with()


def test_a_tick_is_a_row_in_every_table(rig: Rig) -> None:
    """One tick: one profile row, one row per GPU, one per process, all with the same tick and time."""
    rig.processes.watch([Watched(7, "server", "a")])
    rig.sample(3, late_ns=42_000, missed=2)
    [row], gpus, [process] = (table(rig.out / f"{name}.csv") for name in ("profile", "gpu", "process"))
    assert list(row) == list(names(PROFILE))
    assert list(gpus[0]) == list(names(GPU))
    assert list(process) == list(names(PROCESS))
    assert (row["tick"], row["t_ns"], row["t_wall_ns"]) == ("3", "3000042000", "3001042000")
    assert (row["late_us"], row["missed"], row["read_us"], row["read_errors"]) == ("42", "2", "250", "0")
    assert [gpu["gpu"] for gpu in gpus] == ["0", "1"]
    assert {(row["tick"], row["t_ns"]) for row in [*gpus, process]} == {("3", "3000042000")}


def test_missing_is_empty_never_zero(rig: Rig) -> None:
    """What no source gave is an empty cell."""
    rig.sample(0)
    [row] = table(rig.out / "profile.csv")
    assert row["psi_cpu_some_us"] == row["net_rx_bytes"] == row["arm"] == row["repeat"] == ""
    assert table(rig.out / "gpu.csv")[1]["energy_mj"] == ""


def test_rows_are_on_disk_after_every_tick(rig: Rig) -> None:
    """The files can be read while the profiler runs; nothing waits for the end."""
    for number in range(3):
        rig.sample(number)
        assert len(table(rig.out / "profile.csv")) == number + 1


def test_a_failing_source_costs_its_cells_only(rig: Rig) -> None:
    """A reading that fails is counted in read_errors, and the next tick is read as ever."""
    rig.sample(0)
    rig.machine.write("/proc/stat", "junk\n")
    rig.sample(1)
    rig.machine.host()
    rig.sample(2)
    rows = table(rig.out / "profile.csv")
    assert [row["read_errors"] for row in rows] == ["0", "1", "1"]
    assert [row["cpu_user_ns"] for row in rows] == ["1000000000", "", "1000000000"]
    assert rows[1]["mem_total_mib"] == "16384.0"


def test_processes_named_while_running_are_followed(rig: Rig) -> None:
    """A row appended to the watch file is followed from the next tick on."""
    rig.sample(0)
    rig.watch_path.write_text('{"pid": 7, "role": "trainer", "name": "t"}\n')
    rig.sample(1)
    assert [(row["tick"], row["role"]) for row in table(rig.out / "process.csv")] == [("1", "trainer")]


def test_nvmls_share_stands_in_the_process_row(rig_with: MakeRig) -> None:
    """A watched process on the GPU gets its cells; one that is not on it stays empty."""
    rig = rig_with({7: GpuUse("0", 512.0, 61, "nvml_sm")})
    rig.machine.process(8)
    rig.processes.watch([Watched(7, "server", "a"), Watched(8, "client", "c")])
    rig.sample(0)
    on, off = table(rig.out / "process.csv")
    assert (on["gpu"], on["gpu_mem_mib"], on["gpu_sm_pct"], on["gpu_attr"]) == ("0", "512.0", "61", "nvml_sm")
    assert (off["gpu"], off["gpu_mem_mib"], off["gpu_sm_pct"], off["gpu_attr"]) == ("", "", "", "")


def test_engine_time_is_better_than_sm_samples(rig_with: MakeRig) -> None:
    """Where DRM counts the engine time of a process, that is its attribution."""
    rig = rig_with({7: GpuUse("0", 512.0, 61, "nvml_sm")})
    rig.machine.drm(7, 5, 1, busy_ns=99)
    rig.processes.watch([Watched(7, "server", "a")])
    rig.sample(0)
    [row] = table(rig.out / "process.csv")
    assert (row["gpu_attr"], row["gpu_busy_ns"], row["gpu"]) == ("fdinfo", "99", "0")


def test_process_numbers_of_another_namespace_are_told_once(rig_with: MakeRig) -> None:
    """In a container NVML may speak of the host's processes; that is said once, with the remedy."""
    rig = rig_with({99999: GpuUse("0", 512.0, 61, "nvml_sm")})
    rig.sample(0)
    rig.sample(1)
    assert rig.faults.by_source["nvml"] == 1


def test_the_profiler_says_how_it_is_doing(rig: Rig) -> None:
    """Ticks, missed ticks, faults, the worst lateness and the mean reading time."""
    rig.sample(0, late_ns=5_000)
    rig.sample(4, late_ns=90_000, missed=3)
    assert rig.sampler.statistics() == SamplerStatistics(2, 3, 0, 90, 250.0, 0)


def test_a_full_disk_ends_the_run_with_a_sentence(rig: Rig) -> None:
    """Rows that cannot be written are a fault of the run, named with the file."""
    rig.sample(0)
    descriptor = rig.tables.profile._file.fileno()
    real, full = os.dup(descriptor), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, descriptor)
    with pytest.raises(RunFault, match=r"profile\.csv: No space left"):
        rig.sample(1)
    os.dup2(real, descriptor)
    os.close(real)
    os.close(full)


def test_rows_carry_the_arm_only_inside_the_window() -> None:
    """start_at <= t < stop_at: outside it the arm is idle and the repeat empty."""
    window = Window("corun", 2, 5, 100, 200)
    inside = {"arm": "corun", "repeat": 2, "segment": 5}
    assert [window.cells(t_ns) for t_ns in (99, 100, 199, 200)] == [IDLE, inside, inside, IDLE]


class Launcher:
    """The other end of the control connection."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        self.peer = Channel(theirs)
        self.control = Control(self.peer, lambda: SamplerStatistics(9, 1, 0, 120, 88.5, 3))

    def close(self) -> None:
        self.channel.close()
        self.peer.close()

    def ask(self, message: Message) -> tuple[bool, dict[str, Any]]:
        """Send one message, let the profiler answer, and give back whether it goes on, and its answer."""
        number = self.channel.send(message)
        goes_on = self.control.answer()
        return goes_on, self.channel.wait_reply(number, 1.0)


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    """A launcher connected to a profiler's control."""
    made = Launcher()
    yield made
    made.close()


def test_an_armed_window_marks_its_rows(launcher: Launcher) -> None:
    """Before ARM and after DRAIN rows are idle; the window starts at its instant, not at the message."""
    assert launcher.control.segment_at(150) == IDLE
    assert launcher.ask(Arm("corun", 1, 4, 100, 200)) == (True, {"ready": True})
    assert launcher.ask(Start(4)) == (True, {})
    assert launcher.control.segment_at(150) == {"arm": "corun", "repeat": 1, "segment": 4}
    assert launcher.control.segment_at(99) == IDLE
    goes_on, counts = launcher.ask(Drain())
    assert goes_on
    assert (counts["ticks"], counts["missed"], counts["late_us_max"]) == (9, 1, 120)
    assert launcher.control.segment_at(150) == IDLE


def test_statistics_and_clock_are_answered(launcher: Launcher) -> None:
    """STATS gives the counts, CLOCK both stamps in order."""
    assert launcher.ask(Stats())[1]["read_us_mean"] == 88.5
    stamps = launcher.ask(Clock(1))[1]
    assert stamps["t1_ns"] <= stamps["t2_ns"]


def test_what_a_profiler_cannot_do_is_refused_with_a_sentence(launcher: Launcher) -> None:
    """LOAD is for servers; the profiler says so and goes on."""
    with pytest.raises(RunFault, match="a profiler does not answer Load"):
        launcher.ask(Load("resnet18"))
    assert launcher.ask(Stats())[0]


def test_stop_is_answered_before_the_end(launcher: Launcher) -> None:
    """STOP gives the last counts and ends the loop."""
    goes_on, counts = launcher.ask(Stop())
    assert (goes_on, counts["ticks"]) == (False, 9)
    assert launcher.control.ended == "told to stop"


def test_a_launcher_that_goes_away_or_talks_nonsense_ends_the_loop(launcher: Launcher) -> None:
    """Without a launcher there is no run: the reason is kept for the event log."""
    launcher.channel.sock.sendall(b"GET / HTTP/1.1\r\n" * 8)
    assert not launcher.control.answer()
    assert launcher.control.ended.startswith("lost the launcher: not a corun frame")
    other = Launcher()
    other.channel.close()
    assert not other.control.answer()
    other.close()
    assert other.control.ended.startswith("lost the launcher")


def test_hello_names_role_and_process(launcher: Launcher) -> None:
    """The first message says profiler and the process number."""
    thread = threading.Thread(target=launcher.control.hello, args=({"period_s": 1.0},))
    thread.start()
    received = launcher.channel.receive(60.0)
    assert received is not None
    header, hello = received
    launcher.channel.reply(header)
    thread.join()
    assert (hello.role, hello.pid, hello.info) == ("profiler", os.getpid(), {"period_s": 1.0})  # type: ignore[union-attr]


def test_waiting_ends_at_the_deadline_a_message_or_a_signal(launcher: Launcher) -> None:
    """The wait for the tick answers messages; STOP or a signal ends it at once, however far the tick."""
    with StopSignal() as stop:
        wait_until = waiter(stop, launcher.control)
        assert wait_until(0)
        number = launcher.channel.send(Stop())
        assert not wait_until(2**62)
        assert launcher.channel.wait_reply(number, 1.0)["ticks"] == 9
        stop.request()
        assert not waiter(stop, None)(2**62)


def test_a_whole_session_on_a_fake_machine(tmp_path: Path) -> None:
    """What is there and what is not is said, written to profiler.json and logged as events."""
    machine = FakeMachine(tmp_path / "root").host().process(7).thermal_zone(0, "cpu", 41000)
    device = tmp_path / "device.json"
    reading = {"column": "zone{n}_mc", "path": "/sys/class/thermal/thermal_zone{n}/temp", "unit": "m°C"}
    device.write_text(json.dumps({"name": "fake", "readings": [reading]}))
    said: list[str] = []
    options = ProfilerOptions(tmp_path / "out", 0.001, 3, device, machine.root, pids=(Watched(7, "server", "a"),))
    assert profile(options, said.append).ticks == 3
    assert "device fake: available" in said
    assert any(line.startswith("rapl: unavailable (no ") for line in said)
    rows = table(options.out / "profile.csv")
    assert [row["zone0_mc"] for row in rows] == ["41000"] * 3
    assert [row["role"] for row in table(options.out / "process.csv")] == ["server"] * 3
    about = json.loads((options.out / "profiler.json").read_text())
    assert (about["state"], about["statistics"]["ticks"]) == ("complete", 3)
    assert about["columns"][0]["name"] == "zone0_mc"
    events = table(options.out / "events.csv")
    assert [event["kind"] for event in events][-2:] == ["start", "stop"]
    assert "rapl" in {event["name"] for event in events if event["kind"] == "unavailable"}


def test_a_session_never_overwrites_and_lists_every_mistake(tmp_path: Path) -> None:
    """A directory that holds a profile already, a period of nothing, a negative count: one error."""
    (tmp_path / "profile.csv").write_text("precious")
    with pytest.raises(InputError) as caught:
        profile(ProfilerOptions(tmp_path, period_s=0.0, count=-1))
    assert len(caught.value.problems) == 3
    assert (tmp_path / "profile.csv").read_text() == "precious"
