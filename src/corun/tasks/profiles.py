"""Measures a model on this machine with the programs that will serve it, and keeps what was found.

    server (max_batch b) ─ WARMUP ─▶ time of one batch ─▶ capacity = b / time
      client, open loop Poisson, at shares of that capacity ─▶ one Point each          alone
      the same with a training process beside it ─▶ one Point each, its steps/s        beside training

Rates are tried from the lowest up; the first one the server does not keep up with is the last. A profile belongs to the
machine it was made on: it is kept under a fingerprint of processor, cores, memory, GPUs and library versions.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.errors import InputError, RunFault
from corun.process import die_with_parent, thread_environment
from corun.registry import home
from corun.run.config import digest
from corun.run.directory import hardware, result_root, versions, write_json
from corun.run.read import Table, read_table
from corun.run.records import INFER_CLIENT, TRAIN
from corun.stats.percentiles import percentile_of
from corun.tasks.process_runtime import ProcessRuntime, read_tail
from corun.tasks.profile import PERCENTILES, Point, Profile, from_json, to_json
from corun.tasks.runtime import Handle, ReplicaSpec, last_words
from corun.tasks.variant import Variant
from corun.wire.channel import Channel
from corun.wire.messages import Warmup
from corun.wire.sockets import connect

SCHEMA: Final = 1
START_S: Final = 180.0
WARMUP_S: Final = 300.0
DRAIN_S: Final = 10.0
POLL_S: Final = 0.1
SERVICE: Final = "profiled"
LATE_SHARE: Final = 0.05
LATE_LEAST_MS: Final = 250.0

Say = Callable[[str], None]

_CLIENT = tuple(
    column for column in INFER_CLIENT if column.name in ("status", "t_intended_ns", "t_rx_ns", "sojourn_ms")
)
_STEPS = tuple(column for column in TRAIN if column.name in ("t_start_ns", "t_end_ns"))


@dataclass(frozen=True)
class Trainer:
    """The training job a model is measured beside."""

    model: str
    data: str = "digits"
    batch_size: int = 16
    threads: int = 1
    image_size: int | None = None

    @property
    def label(self) -> str:
        """As in tables: resnet18_16."""
        return f"{self.model}_{self.batch_size}"


@dataclass(frozen=True)
class Settings:
    """How a model is measured.

    loads: rates as shares of the measured capacity; rates: requests/s instead of them. seconds: of each window, longer
    where `least` requests would not come in that time. rounds: warm-up batches of each size. trainer: None = only alone.
    """

    device: str = "cpu"
    threads: int = 1
    weights: str | None = None
    max_batches: tuple[int, ...] = (1,)
    loads: tuple[float, ...] = (0.25, 0.5, 0.75)
    rates: tuple[float, ...] = ()
    seconds: float = 10.0
    least: int = 20
    rounds: int = 10
    data: str = "sample"
    count: int = 16
    seed: int = 0
    trainer: Trainer | None = None

    def __post_init__(self) -> None:
        problems = []
        if not self.max_batches or min(self.max_batches) < 1:
            problems.append("max_batches: give numbers of 1 or more")
        if not (self.loads or self.rates) or min(self.loads + self.rates, default=0.0) <= 0:
            problems.append("loads and rates: give numbers above 0")
        if not 0 < self.seconds < 86_400:
            problems.append(f"seconds: give more than 0 (got {self.seconds:g})")
        if self.rounds < 1 or self.threads < 1:
            problems.append("rounds and threads: give 1 or more")
        if problems:
            raise InputError("a model cannot be measured like this", problems)


class Stop(Protocol):
    """What interrupts a measurement: corun.process.StopSignal."""

    requested: bool


def measure(model: str, settings: Settings, say: Say = lambda line: None, stop: Stop | None = None) -> Profile:
    """Measure one model with real processes on this machine; a minute or so.

    Raises InputError for an unknown model, RunFault when a process dies, KeyboardInterrupt on `stop`.
    """
    variant = Variant.parse(model)
    with tempfile.TemporaryDirectory(prefix="corun-profile-") as folder:
        session = _Session(str(variant), settings, Path(folder), say, stop)
        for max_batch in settings.max_batches:
            session.measure(max_batch)
    return session.profile()


class _Session:
    """One measurement: what was found so far."""

    def __init__(self, model: str, settings: Settings, folder: Path, say: Say, stop: Stop | None) -> None:
        self.model, self.settings, self.folder, self.say = model, settings, folder, say
        self._stop = stop
        self.points: list[Point] = []
        self.batch_ms: dict[int, float] = {}
        self.cpu_s, self.requests = 0.0, 0
        self.rss_mib = 0.0
        self.gpu_mib: float | None = None
        self._clients = 0

    def profile(self) -> Profile:
        settings = self.settings
        return Profile(
            model=self.model,
            machine=fingerprint(),
            device=settings.device,
            threads=settings.threads,
            points=tuple(self.points),
            batch_ms=dict(sorted(self.batch_ms.items())),
            cpu_ms=1000 * self.cpu_s / max(self.requests, 1),
            rss_mib=self.rss_mib,
            gpu_mib=self.gpu_mib,
            weights=settings.weights or "random",
            trainer=settings.trainer.label if settings.trainer else "",
            measured=datetime.now().astimezone().isoformat(timespec="seconds"),
        )

    def measure(self, max_batch: int) -> None:
        """Everything with one batch limit."""
        settings = self.settings
        with self._server(max_batch) as server:
            self._batches(server, max_batch)
            capacity = 1000 * max_batch / max(self.batch_ms[max_batch], 1e-3)
            rates = sorted(settings.rates or {round(share * capacity, 2) for share in settings.loads})
            self.say(f"{self.model}: {self.batch_ms[max_batch]:.3g} ms a batch of {max_batch}")
            self._curve(server, max_batch, rates, None)
            if settings.trainer:
                with self._trainer(settings.trainer) as steps:
                    begin = now_ns()
                    self._rest(settings.seconds)
                    alone = _steps_per_s(steps, begin, now_ns())
                    self._curve(server, max_batch, rates, steps, alone)
            self._note_use(server)

    def _batches(self, server: Handle, max_batch: int) -> None:
        channel = Channel(connect(server.address))
        try:
            taken = channel.request(Warmup(self.settings.rounds), WARMUP_S)["ms"]
        finally:
            channel.close()
        for place, size in enumerate(sorted({1, max_batch})):
            mine = taken[place * self.settings.rounds : (place + 1) * self.settings.rounds]
            self.batch_ms[size] = statistics.median(mine)

    def _curve(
        self, server: Handle, max_batch: int, rates: list[float], steps: Path | None, alone: float = 0.0
    ) -> None:
        for rate in rates:
            point = confirmed(partial(self._beside, server, max_batch, rate, steps, alone))
            self.points.append(point)
            self.say(f"{self.model}: {_sentence(point)}")
            if point.lost:
                return

    def _beside(self, server: Handle, max_batch: int, rate: float, steps: Path | None, alone: float) -> Point:
        """One window at a rate, with what it cost the server and the training job."""
        before, begin = server.usage().cpu_s, now_ns()
        point = self._point(server, rate, max_batch, training=steps is not None)
        self.cpu_s += server.usage().cpu_s - before
        self.requests += point.n
        self._note_use(server)
        if steps is not None and alone:
            beside = _steps_per_s(steps, begin, now_ns())
            point = replace(point, slowdown=alone / beside if beside else None)
        return point

    def _note_use(self, server: Handle) -> None:
        use = server.usage()
        self.rss_mib = max(self.rss_mib, use.rss_mib or 0.0)
        if use.gpu_mib is not None:
            self.gpu_mib = max(self.gpu_mib or 0.0, use.gpu_mib)

    def _point(self, server: Handle, rate: float, max_batch: int, training: bool) -> Point:
        settings = self.settings
        seconds = max(settings.seconds, settings.least / rate)
        self._clients += 1
        out = self.folder / f"client-{self._clients}"
        given: dict[str, Any] = {
            "--host": server.address.host,
            "--port": server.address.port,
            "--name": SERVICE,
            "--rate": rate,
            "--duration": seconds,
            "--seed": settings.seed + self._clients,
            "--data": settings.data,
            "--count": settings.count,
            "--drain-timeout": DRAIN_S,
            "--out": out,
        }
        argv = [sys.executable, str(home() / "src" / "client_async.py"), *_words(given)]
        with self._process(argv, self.folder / f"client-{self._clients}.log", 1) as client:
            while client.poll() is None:
                self._rest(POLL_S)
        files = sorted(out.rglob(f"{SERVICE}.csv"))
        if not files or not server.alive():
            why = last_words(read_tail(self.folder / f"client-{self._clients}.log"))
            raise RunFault(f"{self.model} could not be measured at {rate:g}/s: {why}; server {server.how_it_ended()}")
        return point_of(read_table(files[0], _CLIENT), rate, seconds, max_batch, training)

    @contextmanager
    def _server(self, max_batch: int) -> Iterator[Handle]:
        settings = self.settings
        spec = ReplicaSpec(
            task_id="profile",
            index=os.getpid(),
            model=self.model,
            weights=settings.weights,
            port=_free_port(),
            log_path=self.folder / "server.log",
            threads=settings.threads,
            device=settings.device,
            max_batch=max_batch,
            queue_limit=100_000,
        )
        handle = ProcessRuntime().start(spec)
        try:
            deadline = time.monotonic() + START_S
            while not handle.healthy():
                if not handle.alive():
                    raise RunFault(f"{self.model} cannot be served: it {handle.how_it_ended()}")
                if time.monotonic() > deadline:
                    raise RunFault(f"{self.model} was not ready within {START_S:g} s: {last_words(handle.logs())}")
                self._rest(POLL_S)
            yield handle
        finally:
            handle.kill()

    @contextmanager
    def _trainer(self, job: Trainer) -> Iterator[Path]:
        """A training process at work; gives the file its steps are written to."""
        out = self.folder / f"train-{len(self.points)}"
        given = {
            "--model": job.model,
            "--data": job.data,
            "--batch-size": job.batch_size,
            "--threads": job.threads,
            "--epochs": 0,
            "--device": self.settings.device,
            "--out": out,
        } | ({"--image-size": job.image_size} if job.image_size else {})
        log, steps = self.folder / "trainer.log", out / "train.csv"
        with self._process([sys.executable, "-m", "corun.train", *_words(given)], log, job.threads) as trainer:
            deadline = time.monotonic() + START_S
            while len(read_table(steps, _STEPS)["t_end_ns"]) < 2:
                if trainer.poll() is not None or time.monotonic() > deadline:
                    raise RunFault(f"training {job.label} did not get going: {last_words(read_tail(log))}")
                self._rest(POLL_S)
            yield steps
            if trainer.poll() is not None:
                raise RunFault(f"training {job.label} ended during the measurement: {last_words(read_tail(log))}")

    @contextmanager
    def _process(self, argv: list[str], log: Path, threads: int) -> Iterator[subprocess.Popen[bytes]]:
        """A child in its own process group that does not outlive this, whatever ends it."""
        environment = {**os.environ, **thread_environment(threads), "PYTHONPATH": str(home() / "src")}
        with open(log, "wb") as output:
            popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=home(),
                env=environment,
                process_group=0,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        try:
            yield popen
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()

    def _rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._stop and self._stop.requested:
                raise KeyboardInterrupt
            time.sleep(min(left, POLL_S))


def confirmed(measure: Callable[[], Point]) -> Point:
    """One window, and a second one in its place when the first lost requests.

    A pause of the machine at a window's end looks like a server that falls behind, but hardly twice.
    """
    point = measure()
    return measure() if point.lost else point


def point_of(rows: Table, rate: float, seconds: float, max_batch: int, training: bool) -> Point:
    """What a client's rows say. A reply that comes later than 5 % of the window (0.25 s at least) after its end counts
    as lost: the server did not keep up, so latencies of this rate would grow with the length of the window."""
    answered = rows["status"] == "OK"
    latency = np.asarray(rows["sojourn_ms"], dtype=np.float64)[answered]
    late = 0
    if answered.any():
        end_ns = int(rows["t_intended_ns"].min()) + round(seconds * NS_PER_S)
        grace_ns = round(
            max(LATE_SHARE * seconds * 1000, LATE_LEAST_MS, 3 * float(np.quantile(latency, 0.1))) * NS_PER_MS
        )
        late = int((rows["t_rx_ns"][answered] > end_ns + grace_ns).sum())
    values = {f"p{percentile}_ms": percentile_of(latency, percentile) for percentile in PERCENTILES}
    return Point(
        rate=rate,
        n=len(latency),
        mean_ms=float(latency.mean()) if len(latency) else 0.0,
        max_ms=float(latency.max()) if len(latency) else 0.0,
        max_batch=max_batch,
        training=training,
        lost=int((~answered).sum()) + late,
        **values,
    )


def _steps_per_s(path: Path, begin_ns: int, end_ns: int) -> float:
    """Training steps per second in a window, the parts of steps at its ends included."""
    rows = read_table(path, _STEPS)
    start, end = rows["t_start_ns"].astype(float), rows["t_end_ns"].astype(float)
    inside = np.clip(np.minimum(end, end_ns) - np.maximum(start, begin_ns), 0, None)
    return float((inside / np.maximum(end - start, 1)).sum()) / ((end_ns - begin_ns) / NS_PER_S)


def _words(given: dict[str, Any]) -> list[str]:
    return [word for flag, value in given.items() for word in (flag, str(value))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _sentence(point: Point) -> str:
    beside = " beside training" if point.training else ""
    if not point.n:
        return f"{point.rate:.4g}/s{beside}: nothing was answered"
    shown = "".join(
        f", p{percentile} {value:.3g} ms"
        for percentile in (50, 99)
        if (value := getattr(point, f"p{percentile}_ms")) is not None
    )
    slower = f", training x{point.slowdown:.2f} slower" if point.slowdown else ""
    lost = f", does not keep up ({point.lost} lost or late)" if point.lost else ""
    return f"{point.rate:.4g}/s{beside}: {point.n} answered{shown}, max {point.max_ms:.3g} ms{slower}{lost}"


# What was measured before


def fingerprint() -> str:
    """Twelve hex digits of what decides the figures: processor, cores, memory, GPUs, kernel, library versions."""
    facts = hardware()
    kept = {name: facts[name] for name in ("cpu", "cores_available", "memory_kib")}
    gpus = sorted(path.name for path in Path("/proc/driver/nvidia/gpus").glob("*"))
    models = [_gpu_model(name) for name in gpus]
    libraries = {name: versions().get(name) for name in ("torch", "torchvision", "numpy")}
    return digest({**kept, "gpus": models, "versions": libraries})[:12]


def _gpu_model(slot: str) -> str:
    text = Path(f"/proc/driver/nvidia/gpus/{slot}/information").read_text(encoding="utf-8", errors="replace")
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Model")), slot)


class Profiles:
    """The profiles of this machine in a directory: one file each, replaced in one step, so several may write.

    root: default result/profiles/tasks. machine: default this one's fingerprint.
    """

    def __init__(self, root: Path | None = None, machine: str | None = None) -> None:
        self.machine = machine or fingerprint()
        self.directory = (root or result_root() / "profiles" / "tasks") / self.machine

    def put(self, profile: Profile) -> Path:
        """Keep a profile; RunFault when the disk refuses. It replaces one of the same model, device, threads, trainer."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFault(f"cannot make {self.directory}: {error.strerror}") from error
        key = (profile.model, profile.device, profile.threads, profile.trainer, profile.weights)
        path = self.directory / f"{profile.model.partition(':')[0]}-{digest(key)[:12]}.json"
        write_json(path, {"schema": SCHEMA, **to_json(profile)})
        return path

    def all(self) -> list[Profile]:
        """Every profile of this machine, oldest measurement first; files of another schema are left out."""
        found = []
        for path in sorted(self.directory.glob("*.json")):
            value = _read(path)
            if value.pop("schema", None) == SCHEMA:
                try:
                    found.append(from_json(value))
                except (TypeError, KeyError) as error:
                    raise InputError(f"{path} is no profile ({error}); delete it and measure again") from None
        return sorted(found, key=lambda profile: profile.measured)

    def find(self, model: str, resource: str, training: bool = False) -> Profile | None:
        """The newest profile of a model on the CPU or a GPU; with `training` one that was measured beside training."""
        name = str(Variant.parse(model))
        mine = [
            profile
            for profile in self.all()
            if profile.model == name
            and profile.device.startswith("cuda") == (resource == "gpu")
            and (not training or any(point.training for point in profile.points))
        ]
        return mine[-1] if mine else None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a profile: {error}; delete it and measure again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is no profile; delete it and measure again")
    return value


__all__ = ["Profiles", "Settings", "Trainer", "fingerprint", "measure", "point_of"]
