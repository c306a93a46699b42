"""Makes run directories without measuring anything: the real tables and manifest around a simulated queue.

Every request waits in one first-in-first-out queue for a server with lognormal service times, so latencies are
correlated in time as they are in a real run (a test that assumes independence fails here as it would there).
Arms of one repeat share their arrivals; each repeat and arm also gets its own factor on the service time, the
spread between runs that a comparison has to live with.

    write_run(path, FakeRun(services=(FakeService("resnet18", rate=40),), train=FakeTrain(), repeat=5))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corun.arrivals import schedule as schedules
from corun.clock import NS_PER_MS, NS_PER_S
from corun.launch.segments import Planned, Segment, make_schedule, plan
from corun.profile.tables import GPU, PROCESS, PROFILE
from corun.run import config as configs
from corun.run.directory import RunDirectory
from corun.run.records import INFER_CLIENT, INFER_SERVER, SCHEMA_VERSION, TRAIN
from corun.run.table import EventLog, TableWriter
from corun.wire import STAMPS

Row = dict[str, Any]
Generator = np.random.Generator

T0_NS = 1_000 * NS_PER_S
WALL0_NS = 1_790_000_000 * NS_PER_S
START_S = 6.0
BETWEEN_S = 1.5
CORES = 4
_WORK = {"decoded": 0.12, "preprocessed": 0.18, "h2d": 0.03, "device": 0.60, "d2h": 0.02, "tx": 0.05}


@dataclass(frozen=True)
class FakeService:
    """One service: `service_ms` is the median time of one request in the server, `slowdown` its factor by arm.

    stall_share of the requests of the corun arm wait another `stall_ms` (mean, exponential) for the device.
    """

    name: str = "resnet18"
    rate: float = 20.0
    service_ms: float = 8.0
    spread: float = 0.2
    slowdown: Mapping[str, float] = field(default_factory=lambda: {"corun": 1.5})
    stall_share: float = 0.03
    stall_ms: float = 15.0
    lost_share: float = 0.0
    slip_us: float = 40.0


@dataclass(frozen=True)
class FakeTrain:
    """One training job: median step time, and its factor in the corun arm."""

    arch: str = "resnet18"
    batch_size: int = 16
    step_ms: float = 120.0
    slowdown: float = 1.25
    steps_per_epoch: int = 64


@dataclass(frozen=True)
class FakeRun:
    """One run. factor: on every service time. noise: standard deviation of the log factor of one window.

    seed decides what is scheduled, draw everything that is not: two runs of one seed and different draws are an
    A/A pair.
    """

    services: Sequence[FakeService] = (FakeService(),)
    train: FakeTrain | None = field(default_factory=FakeTrain)
    arms: Sequence[str] = ("alone", "train", "corun")
    repeat: int = 1
    duration_s: Mapping[str, float] = field(default_factory=lambda: {"alone": 36.0, "train": 8.0, "corun": 36.0})
    seed: int = 0
    draw: int = 0
    factor: float = 1.0
    noise: float = 0.0
    gpu: bool = False
    profiler: bool = True
    status: str = "complete"
    faults: Sequence[str] = ()
    stop_after: int | None = None


def write_run(path: Path, fake: FakeRun) -> Path:
    """Write the run directory of `fake` and return its path; stop_after windows it is as a killed run leaves it."""
    pair = _pair(fake)
    segments = plan(pair)[: fake.stop_after]
    planned = make_schedule(pair, plan(pair))
    path.mkdir(parents=True, exist_ok=True)
    schedules.save(planned.schedule, path / "schedule.npy")
    run = RunDirectory(path, _manifest(path, fake, pair, planned))
    run.update(status="running")
    windows = list(_windows(segments))
    busy = _Busy(windows)
    counts = _requests(path, fake, pair, planned, windows, busy)
    _training(path, fake, pair, windows, busy)
    _events(path, fake, pair, windows)
    if fake.profiler:
        _profile(path, fake, pair, windows, busy)
    run.update(segments=[_entry(window) for window in windows], counts=counts, faults=list(fake.faults))
    if fake.stop_after is None:
        run.update(status=fake.status, finished="2026-11-20T10:05:00+00:00")
    return path


def write_sweep(root: Path, runs: Sequence[FakeRun]) -> Path:
    """Write several runs as the cells of one sweep, each in the directory its configuration names."""
    root.mkdir(parents=True, exist_ok=True)
    cells = [(fake, _pair(fake)) for fake in runs]
    with TableWriter(root / "index.csv", ("cell", "label", "status", "reason", "seconds")) as index:
        for fake, pair in cells:
            name = pair.digest()[:12]
            write_run(root / name, fake)
            index.row((name, pair.label, fake.status, "; ".join(fake.faults), round(pair.expected_s, 1)))
    return root


@dataclass(frozen=True)
class _Window:
    segment: Segment
    start_ns: int
    stop_ns: int

    @property
    def cells(self) -> Row:
        return {"arm": self.segment.arm, "repeat": self.segment.repeat, "segment": self.segment.index}


class _Busy:
    """Core nanoseconds each process used, by whole second since T0."""

    def __init__(self, windows: Sequence[_Window]) -> None:
        self.seconds = math.ceil((max((w.stop_ns for w in windows), default=T0_NS) - T0_NS) / NS_PER_S) + 2
        self._used: dict[tuple[str, str], NDArray[np.float64]] = {}

    def of(self, role: str, name: str) -> NDArray[np.float64]:
        return self._used.setdefault((role, name), np.zeros(self.seconds))

    def add(self, role: str, name: str, begin_ns: int, end_ns: int, cores: float) -> None:
        """Spread `cores` over [begin, end)."""
        used = self.of(role, name)
        for second in range((begin_ns - T0_NS) // NS_PER_S, (end_ns - T0_NS) // NS_PER_S + 1):
            low = T0_NS + second * NS_PER_S
            if 0 <= second < self.seconds:
                used[second] += cores * max(0, min(end_ns, low + NS_PER_S) - max(begin_ns, low))

    @property
    def processes(self) -> list[tuple[str, str]]:
        return list(self._used)


def _pair(fake: FakeRun) -> configs.Pair:
    config: Row = {
        "arms": list(fake.arms),
        "duration_s": dict(fake.duration_s),
        "repeat": fake.repeat,
        "seed": fake.seed,
    }
    if fake.services:
        config["infer"] = [[{"arch": s.name, "name": s.name, "rate": s.rate} for s in fake.services]]
    if fake.train:
        config["train"] = [{"arch": fake.train.arch, "batch_size": fake.train.batch_size}]
    return configs.pairs(configs.parse(config))[0]


def _windows(segments: Sequence[Segment]) -> Iterator[_Window]:
    at_ns = T0_NS + round(START_S * NS_PER_S)
    for segment in segments:
        stop_ns = at_ns + round(segment.duration_s * NS_PER_S)
        yield _Window(segment, at_ns, stop_ns)
        at_ns = stop_ns + round(BETWEEN_S * NS_PER_S)


def _entry(window: _Window) -> Row:
    segment = window.segment
    return {
        "index": segment.index,
        "arm": segment.arm,
        "repeat": segment.repeat,
        "duration_s": segment.duration_s,
        "start_ns": window.start_ns,
        "stop_ns": window.stop_ns,
    }


def _manifest(path: Path, fake: FakeRun, pair: configs.Pair, planned: Planned) -> Row:
    threads = {f"server {service.label}": service.threads for service in pair.services}
    return {
        "schema_version": SCHEMA_VERSION,
        "run": path.name,
        "status": "running",
        "config": pair.resolved(),
        "config_sha256": pair.digest(),
        "argv": ["src/main.py", "--config", "config.json"],
        "git": {"commit": "0" * 40, "dirty": False},
        "versions": {"python": "3.11.2", "numpy": np.__version__, "torch": None},
        "hardware": {"cpu": "made up by corun.testing", "cores": CORES, "cores_available": CORES, "governor": None},
        "clock_anchor": {"mono_ns": T0_NS, "wall_ns": WALL0_NS},
        "started": "2026-11-20T10:00:00+00:00",
        "schedule_sha256": planned.schedule.sha256,
        "threads": {**threads, **({"trainer": 1} if fake.train else {}), "client": 1, "profiler": 1},
        "sharing": {"policy": "none"},
        "processes": list(_processes(fake, pair)),
    }


def _cast(fake: FakeRun, pair: configs.Pair) -> list[tuple[str, str]]:
    """Role and name of every process, in the order they start."""
    services = [service.label for service in pair.services]
    return [
        *([("profiler", "profiler")] if fake.profiler else []),
        *(("server", name) for name in services),
        *([("trainer", pair.train_label)] if fake.train else []),
        *(("client", name) for name in services),
    ]


def _processes(fake: FakeRun, pair: configs.Pair) -> Iterator[Row]:
    for number, (role, name) in enumerate(_cast(fake, pair)):
        hello = {"weights_label": "random", "device": "cuda:0" if fake.gpu else "cpu"}
        yield {
            "role": role,
            "name": name,
            "pid": 1000 + number,
            "hello": hello if role in ("server", "trainer") else {},
        }


# Requests


def _requests(
    path: Path, fake: FakeRun, pair: configs.Pair, planned: Planned, windows: Sequence[_Window], busy: _Busy
) -> list[Row]:
    counts = []
    for stream, service in enumerate(fake.services):
        due = planned.schedule.of_stream(stream).rows["intended_ns"]
        with (
            TableWriter(path / "infer_client" / f"{service.name}.csv", INFER_CLIENT) as client,
            TableWriter(path / "infer_server" / f"{service.name}.csv", INFER_SERVER) as server,
        ):
            for window in (window for window in windows if window.segment.serves):
                first, last = planned.rows.get((window.segment.index, stream), (0, 0))
                rows = list(_window_rows(fake, service, pair, window, stream, range(first, last), due, busy))
                client.rows(rows)
                server.rows([_server_row(row) for row in rows if row["s_tx_ns"]])
                counts.append(
                    {
                        "segment": window.segment.index,
                        "role": "client",
                        "name": service.name,
                        "sent": len(rows),
                        "cpu_s": 0.0004 * len(rows),
                    }
                )
    return counts


def _window_rows(
    fake: FakeRun,
    service: FakeService,
    pair: configs.Pair,
    window: _Window,
    stream: int,
    ids: range,
    due: NDArray[np.int64],
    busy: _Busy,
) -> Iterator[Row]:
    rng = np.random.default_rng([fake.seed, fake.draw, window.segment.index, stream])
    factor = fake.factor * service.slowdown.get(window.segment.arm, 1.0) * math.exp(fake.noise * rng.normal())
    common = {
        "infer_model_name": service.name,
        "train_model_name": pair.train_label if window.segment.trains else configs.NONE,
        "image_size": 224,
        "device": "cuda:0" if fake.gpu else "cpu",
        "request_rate": service.rate,
        "service": service.name,
        "stream": stream,
        **window.cells,
    }
    free_ns = 0
    for id in ids:
        intended_ns = window.start_ns + int(due[id])
        stamps = _stamps(rng, service, window, factor, intended_ns, free_ns)
        free_ns = stamps["s_tx_ns"]
        busy.add("server", service.name, stamps["s_picked_ns"], free_ns, 0.97)
        busy.add("client", service.name, intended_ns, intended_ns + 400_000, 1.0)
        yield {**common, "id": id, **_request(rng, service, intended_ns, stamps)}


def _stamps(
    rng: Generator, service: FakeService, window: _Window, factor: float, intended_ns: int, free_ns: int
) -> dict[str, int]:
    """Client and server stamps of one request that finds the server free at free_ns."""
    slip_ns = int(service.slip_us * 1e3 * rng.lognormal(0, 0.4))
    wire_ns = [int(value) for value in rng.lognormal(math.log(55_000), 0.3, 3)]
    at = {"t_tx_start_ns": intended_ns + slip_ns}
    at["s_rx_first_ns"] = at["t_tx_start_ns"] + wire_ns[0]
    at["s_rx_done_ns"] = at["s_rx_first_ns"] + wire_ns[1] // 2
    at["s_picked_ns"] = max(at["s_rx_done_ns"] + 9_000, free_ns + 6_000)
    at["s_batched_ns"] = at["s_picked_ns"] + 5_000
    work_ns = factor * service.service_ms * NS_PER_MS * rng.lognormal(0, service.spread)
    stalls = window.segment.arm == "corun" and rng.random() < service.stall_share
    stall_ns = rng.exponential(service.stall_ms) * NS_PER_MS if stalls else 0.0
    reached = at["s_batched_ns"]
    for stage, share in _WORK.items():
        reached += int(share * work_ns + (stall_ns if stage == "device" else 0.0))
        at[f"s_{stage}_ns"] = reached
    at["t_rx_ns"] = reached + wire_ns[2]
    return at


def _request(rng: Generator, service: FakeService, intended_ns: int, stamps: dict[str, int]) -> Row:
    """Everything of a client's row that was measured; a lost request has neither reply nor server stamps."""
    start_ns, rx_ns = stamps["t_tx_start_ns"], stamps["t_rx_ns"]
    sent = {
        "work_start": f"{(intended_ns - T0_NS + WALL0_NS) / NS_PER_S:.6f}",
        "file_name": f"sample-{rng.integers(64):02d}.jpg",
        "t_intended_ns": intended_ns,
        "t_wake_ns": start_ns - 4_000,
        "t_tx_start_ns": start_ns,
        "t_tx_done_ns": start_ns + 12_000,
        "slip_ms": (start_ns - intended_ns) / NS_PER_MS,
    }
    if rng.random() < service.lost_share:
        return {**sent, "status": "LOST", **{f"s_{name}_ns": None for name in STAMPS}}
    return {
        **sent,
        **stamps,
        "status": "OK",
        "latency": (rx_ns - intended_ns) / NS_PER_MS,
        "sojourn_ms": (rx_ns - intended_ns) / NS_PER_MS,
        "response_ms": (rx_ns - start_ns) / NS_PER_MS,
        "reply_bytes": 40,
        "batch": 1,
    }


def _server_row(row: Row) -> Row:
    inside_ms = (row["s_tx_ns"] - row["s_rx_done_ns"]) / NS_PER_MS
    waiting = int((row["s_picked_ns"] - row["s_rx_done_ns"]) // (10 * NS_PER_MS))
    return {**row, "latency": inside_ms, "payload_bytes": 18_000, "queue_len": waiting, "detail": ""}


# Training


def _training(path: Path, fake: FakeRun, pair: configs.Pair, windows: Sequence[_Window], busy: _Busy) -> None:
    if fake.train is None:
        return
    number = 0
    with TableWriter(path / "train.csv", TRAIN) as table:
        for window in (window for window in windows if window.segment.trains):
            rows = list(_steps(fake, fake.train, window, number))
            table.rows([{"train_model_name": fake.train.arch, **window.cells, **row} for row in rows])
            for row in rows:
                busy.add("trainer", pair.train_label, row["t_start_ns"], row["t_end_ns"], 1.35)
            number += len(rows)


def _steps(fake: FakeRun, train: FakeTrain, window: _Window, number: int) -> Iterator[Row]:
    rng = np.random.default_rng([fake.seed, fake.draw, window.segment.index, 2**20])
    slow = train.slowdown if window.segment.arm == "corun" else 1.0
    slow *= math.exp(fake.noise * rng.normal())
    at_ns = window.start_ns
    while at_ns < window.stop_ns:
        step_ms = train.step_ms * slow * rng.lognormal(0, 0.08)
        end_ns = at_ns + round(step_ms * NS_PER_MS)
        yield {
            "epoch": number // train.steps_per_epoch,
            "step": number,
            "t_start_ns": at_ns,
            "t_end_ns": end_ns,
            "step_ms": (end_ns - at_ns) / NS_PER_MS,
            "data_wait_ms": 0.04 * step_ms,
            "decode_ms": 0.2 * step_ms,
            "samples": train.batch_size,
            "samples_per_s": train.batch_size * 1e3 / step_ms,
            "loss": 2.3 * math.exp(-number / 400) + 0.1 * rng.random(),
            "gate_wait_ms": 0.0,
            "micro": 1,
        }
        at_ns, number = end_ns, number + 1


def _events(path: Path, fake: FakeRun, pair: configs.Pair, windows: Sequence[_Window]) -> None:
    rows: list[tuple[int, str, str, str, str]] = [(T0_NS, "start", "launcher", "", "the run begins")]
    for number, (role, name) in enumerate(_cast(fake, pair)):
        rows.append((T0_NS + (number + 1) * NS_PER_S // 2, "ready", role, name, "ready"))
    for window in windows:
        about = f"segment {window.segment.index}"
        rows.append((window.start_ns, "window_start", "launcher", window.segment.arm, about))
        rows.append((window.stop_ns, "window_end", "launcher", window.segment.arm, about))
    if fake.train:
        for window in (window for window in windows if window.segment.trains):
            middle_ns = (window.start_ns + window.stop_ns) // 2
            rows.append((middle_ns, "epoch", "trainer", fake.train.arch, "epoch done, loss 1.0000"))
    end_ns = max((window.stop_ns for window in windows), default=T0_NS)
    rows += [(end_ns, "fault", "launcher", "", fault) for fault in fake.faults]
    rows.append((end_ns + NS_PER_S, "stop", "launcher", "", "the run is over"))
    log = EventLog(path / "events.csv")
    for t_ns, kind, role, name, detail in sorted(rows):
        log.write(kind, role, name, detail, t_ns)
    log.close()


# The profiler


def _profile(path: Path, fake: FakeRun, pair: configs.Pair, windows: Sequence[_Window], busy: _Busy) -> None:
    for role, name in _cast(fake, pair):
        busy.of(role, name)
    used = {who: np.concatenate([[0.0], np.cumsum(busy.of(*who))]) for who in busy.processes}
    with (
        TableWriter(path / "profile.csv", PROFILE) as host,
        TableWriter(path / "process.csv", PROCESS) as processes,
        TableWriter(path / "gpu.csv", GPU) as gpu,
    ):
        energy_mj = 0
        for tick in range(busy.seconds + 1):
            stamp = _tick(windows, tick)
            host.row(_host_row(stamp, tick, sum(float(total[tick]) for total in used.values())))
            processes.rows(list(_process_rows(fake, pair, stamp, tick, used)))
            if fake.gpu:
                row = _gpu_row(stamp, energy_mj, len(fake.services) + bool(fake.train))
                energy_mj += row["power_mw"]
                gpu.row(row)


def _tick(windows: Sequence[_Window], tick: int) -> Row:
    t_ns = T0_NS + tick * NS_PER_S
    inside = next((window.cells for window in windows if window.start_ns <= t_ns < window.stop_ns), {"arm": "idle"})
    return {**inside, "tick": tick, "t_ns": t_ns}


def _host_row(stamp: Row, tick: int, used_ns: float) -> Row:
    other_ns = 0.06 * tick * NS_PER_S
    return {
        **stamp,
        "t_wall_ns": stamp["t_ns"] - T0_NS + WALL0_NS,
        "late_us": 90,
        "missed": 0,
        "read_us": 1400,
        "read_errors": 0,
        "cpu_user_ns": int(0.9 * (used_ns + other_ns)),
        "cpu_nice_ns": 0,
        "cpu_system_ns": int(0.1 * (used_ns + other_ns)),
        "cpu_idle_ns": int(CORES * tick * NS_PER_S - used_ns - other_ns),
        "cpu_iowait_ns": 0,
        "cpu_irq_ns": 0,
        "cpu_softirq_ns": 0,
        "cpu_steal_ns": 0,
        "mem_total_mib": 16_000.0,
        "mem_available_mib": 11_000.0,
    }


def _process_rows(
    fake: FakeRun, pair: configs.Pair, stamp: Row, tick: int, used: Mapping[tuple[str, str], NDArray[np.float64]]
) -> Iterator[Row]:
    for number, (role, name) in enumerate(_cast(fake, pair)):
        on_gpu = fake.gpu and role in ("server", "trainer")
        share = {"server": 14.0, "trainer": 61.0}[role] if on_gpu and _works(role, stamp["arm"]) else 0.0
        yield {
            **stamp,
            "pid": 1000 + number,
            "ppid": 999,
            "role": role,
            "name": name,
            "cpu_ns": int(used[role, name][tick]),
            "threads": 4,
            "rss_mib": 310.0,
            **({"gpu": "0", "gpu_mem_mib": 900.0, "gpu_sm_pct": share, "gpu_attr": "nvml_sm"} if on_gpu else {}),
        }


def _works(role: str, arm: str) -> bool:
    return arm == "corun" or arm == {"server": "alone", "trainer": "train"}.get(role)


def _gpu_row(stamp: Row, energy_mj: int, processes: int) -> Row:
    load = {"alone": 24, "train": 66, "corun": 81}.get(stamp["arm"], 0)
    return {
        **stamp,
        "gpu": 0,
        "power_mw": 60_000 + 2_000 * load,
        "energy_mj": energy_mj,
        "power_limit_mw": 300_000,
        "util_gpu_pct": load,
        "util_mem_pct": load // 2,
        "mem_used_mib": 3_000.0,
        "mem_total_mib": 24_000.0,
        "sm_clock_mhz": 1_700,
        "temp_c": 52,
        "throttle_reasons": 0,
        "processes": processes,
    }
