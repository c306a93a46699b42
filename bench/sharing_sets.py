"""The GPU half of bench.sharing: a set of processes for each way of starting them, all alive at once.

    set             service, client and trainer of its own            policies switched on it
    separate        processes, a gate                                 none, throttle, slo, preempt
    memory_cap      the trainer capped from its first allocation
    mps             under the MPS daemon
    one_process     threads of one process
    stream_priority the same with lanes                               preempt+stream_priority
    green_context   the same with lanes of their own SMs

    one repeat   alone  train  none  one_process  mps ...    in random order, the same arrivals for all of them

A set that cannot be had, or dies, is listed with its reasons; the others go on. `alone` and `train` are those of the
separate processes, so a common process is measured against what it gives up. The same sets run on a CPU, where those
that need a GPU are refused.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from bench.sharing import Cell, Measured, Spec, picked
from corun.errors import CorunError, InputError
from corun.launch.stage import Observation, Stage
from corun.process import available_cores
from corun.run import config
from corun.run.config import Pair
from corun.share.host import Host
from corun.share.policy import Cast, Member
from corun.share.sharing import survey
from corun.share.spec import NAIVE, in_one_process, parse

UTILISATION = 0.3
SEED = 20240921
PAYLOADS = 16
BASELINES = ("alone", "train")


@dataclass(frozen=True)
class Settings:
    """What serves and trains, where, and for how long. image_size, train_size: None = the models' own."""

    service: str
    trainer: str
    device: str = "cuda"
    batch_size: int = 32
    seconds: float = 8.0
    repeats: int = 5
    image_size: int | None = None
    train_size: int | None = None
    data: str = "synthetic"
    utilisation: float = UTILISATION


def require_gpu() -> None:
    """InputError where there is no GPU to share."""
    if Host().driver_version is None:
        raise InputError("there is no NVIDIA driver on this machine: --device cpu and --device simulated need none")


def gpu_specs(alone_p99_ms: float) -> dict[str, Spec]:
    """The policies of the GPU table; those the machine refuses are left out with their reasons."""
    return {
        "none": {"policy": "none"},
        "one_process": {"policy": "none", "one_process": True},
        "stream_priority": {"policy": "stream_priority"},
        "green_context": {"policy": "green_context", "service_sms": 32},
        "mps": {"policy": "mps", "trainer_percent": 40},
        "memory_cap": {"policy": "memory_cap", "memory_fraction": 0.5},
        "throttle": {"policy": "throttle", "duty": 0.5},
        "slo": {"policy": "slo", "slo_ms": round(2 * alone_p99_ms, 3), "window_s": 1.0},
        "preempt": {"policy": "preempt", "micro": 4},
        "preempt+stream_priority": {"policy": "preempt+stream_priority", "micro": 4},
    }


def sets_of(specs: Mapping[str, Spec]) -> list[list[str]]:
    """Names of specs that the same processes can be switched between, in their order."""
    sets: dict[str, list[str]] = {}
    for name, spec in specs.items():
        sets.setdefault(_start(spec), []).append(name)
    return list(sets.values())


def _start(spec: Spec) -> str:
    """What processes have to be started with: everything but the rules of the gate."""
    fixed = [repr(policy) for policy in parse(spec) if policy.rule() is None and policy.name != NAIVE]
    return json.dumps([in_one_process(spec), sorted(fixed)])


def measure_sets(settings: Settings, chosen: Sequence[str]) -> Measured:
    """Every policy this machine allows, interleaved, `settings.repeats` times, on the same arrivals."""
    rate, alone_p99_ms = _look(settings)
    specs = picked(gpu_specs(alone_p99_ms), chosen)
    specs = {NAIVE: gpu_specs(alone_p99_ms)[NAIVE], **specs}
    runner = Runner(settings, rate, specs)
    with runner:
        seen = runner.interleave()
    cells = {name: [_cell(one) for one in windows] for name, windows in seen.items()}
    busy = [sum(one.served[0].services_ms) / (1000 * settings.seconds) for one in seen["alone"]]
    details = {
        "service": f"{settings.service} on {settings.device}",
        "trainer": f"{settings.trainer} on {settings.device}, {settings.batch_size}",
        "rate": rate,
        "seconds": settings.seconds,
        "repeats": settings.repeats,
        "alone_p99_ms": alone_p99_ms,
        "refused": runner.refused,
        "specs": {name: specs[name] for name in cells if name in specs},
        "in_force": runner.in_force,
        "foreign_cores": {name: [round(one.foreign_cores, 3) for one in windows] for name, windows in seen.items()},
    }
    return Measured(cells, float(np.mean(busy)), details)


def _cell(seen: Observation) -> Cell:
    sojourns = np.array(seen.served[0].sojourns_ms if seen.served else (), dtype=np.float64)
    return Cell(sojourns, seen.samples_per_s)


def pair_of(settings: Settings, spec: Spec, rate: float, trains: bool = True) -> Pair:
    """The cell of a set: one service at `rate` requests/s, one trainer."""
    cores = max(1, available_cores() - 1)
    service = {
        "arch": settings.service,
        "rate": rate,
        "device": settings.device,
        "data": settings.data,
        "count": PAYLOADS,
        "image_size": settings.image_size,
    }
    train = {
        "arch": settings.trainer,
        "data": "synthetic",
        "device": settings.device,
        "batch_size": settings.batch_size,
        "image_size": settings.train_size,
        "num_classes": 10,
        "count": 16 * settings.batch_size,
        "threads": cores,
    }
    raw = {"train": [train] if trains else [], "infer": [service], "sharing": spec, "seed": SEED}
    return config.pairs(config.parse(raw, "the benchmark"))[0]


def _look(settings: Settings) -> tuple[float, float]:
    """(requests/s that keep the service busy for `utilisation`, its p99 in ms then), without a trainer anywhere."""
    with Stage(pair_of(settings, NAIVE, 1.0, trains=False), (), 1, settings.seconds) as stage:
        rate = settings.utilisation * 1000 / max(stage.warm_ms.values())
    with Stage(pair_of(settings, NAIVE, rate, trains=False), (), 1, settings.seconds) as stage:
        (served,) = stage.observe(sorted(stage.names), trains=False).served
    return rate, float(np.quantile(served.sojourns_ms, 0.99, method="higher"))


class Runner:
    """All sets, open; a context. refused: why a policy has no row."""

    def __init__(self, settings: Settings, rate: float, specs: Mapping[str, Spec]) -> None:
        self._settings, self._rate, self._specs = settings, rate, specs
        self._stack = ExitStack()
        self._stages: dict[str, Stage] = {}
        self.refused: dict[str, list[str]] = {}
        self.in_force: dict[str, object] = {}

    def __enter__(self) -> Runner:
        try:
            for names in sets_of(self._specs):
                self._open(names)
            if NAIVE not in self._stages:
                raise InputError("there is nothing to compare with: none cannot be had", self.refused[NAIVE])
        except BaseException:
            self._stack.close()
            raise
        cast = Cast((Member("server", "service"),), Member("trainer", "trainer"), frozenset({self._settings.device}))
        self.refused = {**survey(cast, Host(), skip=set(self._stages)), **self.refused}
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _open(self, names: Sequence[str]) -> None:
        """One set of processes, or the reasons why it cannot be had."""
        settings, specs = self._settings, [self._specs[name] for name in names]
        pair = pair_of(settings, specs[0], self._rate)
        try:
            stage = self._stack.enter_context(Stage(pair, (), settings.repeats, settings.seconds, specs[1:]))
        except CorunError as error:
            self._refuse(names, error)
            return
        self._stages |= dict.fromkeys(names, stage)
        self.in_force |= {names[0]: stage.describe()["in_force"]}
        print(f"started for {', '.join(names)}", flush=True)

    def _refuse(self, names: Sequence[str], error: CorunError) -> None:
        given = error.problems if isinstance(error, InputError) and error.problems else (str(error),)
        reasons = [reason.removeprefix(f"{names[0]}: ") for reason in given]
        self.refused |= dict.fromkeys(names, reasons)
        print(f"no {', '.join(names)}: {'; '.join(reasons)}", flush=True)

    def interleave(self) -> dict[str, list[Observation]]:
        """All arms of a repeat in random order, repeat by repeat; arms whose processes died are left out."""
        order = random.Random(SEED)
        found: dict[str, list[Observation]] = {name: [] for name in (*BASELINES, *self._stages)}
        for repeat in range(self._settings.repeats):
            names = list(found)
            order.shuffle(names)
            for name in (name for name in names if name in found):
                try:
                    found[name].append(self._window(name, repeat))
                except CorunError as error:
                    gone = [other for other in found if self._stage(other) is self._stage(name)]
                    if BASELINES[0] in gone:
                        raise
                    self._refuse(gone, error)
                    found = {other: windows for other, windows in found.items() if other not in gone}
                else:
                    print(f"repeat {repeat + 1} {name}: {_line(found[name][-1])}", flush=True)
        return found

    def _stage(self, name: str) -> Stage:
        return self._stages[NAIVE if name in BASELINES else name]

    def _window(self, name: str, repeat: int) -> Observation:
        stage = self._stage(name)
        if name in self._specs:
            stage.switch(self._specs[name])
        serving = [] if name == "train" else sorted(stage.names)
        return stage.observe(serving, repeat=repeat, trains=name != "alone")


def _line(seen: Observation) -> str:
    sojourns = seen.served[0].sojourns_ms if seen.served else ()
    latency = f"{len(sojourns)} requests, p50 {np.median(sojourns):.1f} ms, " if sojourns else ""
    speed = f"{seen.samples_per_s:.0f} samples/s, " if seen.samples_per_s is not None else ""
    return f"{latency}{speed}others {seen.foreign_cores:.2f} cores"
