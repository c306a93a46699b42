"""The CPU half of bench.sharing: real servers, clients and trainers that live through all segments.

    one repeat   alone  train  none  default  nice  idle ...      in random order, the same arrivals for all of them
    one segment  switch the policy ─ arm ─ measure ─ drain ─ foreign load above the limit? again, up to three times

A restart between policies would compare caches, pages and moods of the machine, so policies are switched on running
processes: cgroup and cores thread by thread, the gate's mode and knobs on the shared page. What cannot be switched has
processes of its own: the service with one thread and with all cores (`default`), service and trainer as threads of one
process (`one_process`), and trainers whose OpenMP threads spin or sleep (passive), that look at their gate between layers
(`elastic`), nice and idle ones among them, since nobody but root may take a thread back from there. Whoever is not in a
segment sleeps in a system call.

Foreign load is what the machine was busy with that was neither ours nor idle (corun.share.foreign).
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.sharing import Cell, Measured, Spec, picked
from corun import arrivals
from corun.arrivals import schedule as schedules
from corun.clock import NS_PER_S, now_ns
from corun.errors import InputError, RunFault
from corun.launch import commands
from corun.launch.calibrate import free_port
from corun.launch.children import Child
from corun.launch.control import wait_for_server
from corun.launch.troupe import Troupe, sojourns_ms
from corun.launch.window import channel_of
from corun.run.config import Config, Pair, Service, Train
from corun.share.foreign import DIRTY_CORES, foreign_cores, read_cpu
from corun.share.gates import GateOptions
from corun.share.host import Host
from corun.share.openmp import waiting
from corun.share.page import Knobs, Page
from corun.share.policy import Cast, Member, Rule, least_threads
from corun.share.sharing import GATE, Sharing, merge_rules, survey
from corun.share.start import Setup
from corun.wire.messages import Warmup
from corun.wire.sockets import Address

SERVICE_MODEL, SERVICE_SIZE = "resnet18", 64
TRAIN_MODEL, TRAIN_SIZE, BATCH = "resnet18", 32, 64
JOB = Train(
    arch=TRAIN_MODEL,
    data="synthetic",
    batch_size=BATCH,
    image_size=TRAIN_SIZE,
    num_classes=10,
    count=512,
    device="cpu",
)
UTILISATION = 0.3
WARM_S = 3.0
TRIES = 3
DRAIN_S = 30.0
QUIET_LOOK_S, QUIET_PATIENCE_S = 0.2, 4.0
START_S = 180.0
PAYLOADS = 16
SEED = 20240921
ARMS = {"alone": "alone", "train": "train"}

ONE, ALL, TOGETHER = "one thread", "all cores", "one process"
SPINNING, PASSIVE, LAYERS = "spinning", "passive", "-layers"
KINDS = {
    SPINNING: Setup(),
    PASSIVE: Setup(),
    f"{SPINNING}-nice": Setup(nice=19),
    f"{PASSIVE}-nice": Setup(nice=19),
    f"{PASSIVE}-idle": Setup(idle=True),
}
STICKY = ("nice", "idle")


def cpu_specs(alone_p99_ms: float) -> dict[str, Spec]:
    """The policies of the CPU table; those the machine refuses are left out with their reasons."""
    slo_ms = round(2 * alone_p99_ms, 3)
    return {
        "none": {"policy": "none"},
        "one_process": {"policy": "none", "one_process": True},
        "default": {"policy": "default"},
        "nice": {"policy": "nice"},
        "idle": {"policy": "idle"},
        "cgroup": {"policy": "cgroup"},
        "elastic": {"policy": "elastic"},
        "idle+elastic": {"policy": "idle+elastic"},
        "cgroup+elastic": {"policy": "cgroup+elastic"},
        "partition": {"policy": "partition"},
        "throttle": {"policy": "throttle", "duty": 0.5},
        "slo": {"policy": "slo", "slo_ms": slo_ms, "window_s": 1.0},
        "preempt": {"policy": "preempt", "micro": 4},
        "predictive": {"policy": "predictive"},
        "idle+preempt": {"policy": "idle+preempt", "micro": 4},
        "idle+slo": {"policy": "idle+slo", "slo_ms": slo_ms, "window_s": 1.0},
    }


@dataclass(frozen=True)
class Part:
    """Who plays in an arm: which service (with the client of that name) and which trainer; None = not at all."""

    service: str | None
    trainer: str | None
    sharing: Sharing | None = None


class Players(Troupe):
    """All processes, by the names above, and the page they share."""

    def __init__(self, out: Path, page: Page) -> None:
        super().__init__(out, DRAIN_S)
        self.page = page
        self.servers: dict[str, Child] = {}
        self.clients: dict[str, Child] = {}
        self.trainers: dict[str, Child] = {}


@dataclass(frozen=True)
class Segment:
    """One measured window: cores that others used, cores the service used, and at which try it was taken."""

    cell: Cell
    foreign: float
    service_cores: float
    tries: int


def measure_cpu(repeats: int, chosen: Sequence[str], seconds: float) -> Measured:
    """Every policy this machine allows, interleaved, `repeats` times, on the same arrivals."""
    with tempfile.TemporaryDirectory(prefix="corun-sharing-") as folder, ExitStack() as stack:
        stage = _open_stage(Path(folder), stack)
        if not chosen or "one_process" in chosen:
            _start_together(stage)
        rate = _rate(stage)
        planned = _plan(stage.out, rate, repeats, seconds)
        _start_clients(stage, planned.path, rate)
        runner = Runner(stage, seconds)
        base_ms = _warm(runner, planned)
        specs = picked(cpu_specs(base_ms), chosen)
        parts, refused = _parts(specs, stage, stack)
        _start_trainers(stage, parts)
        _warm_trainers(runner, stage)
        found = _interleave(runner, planned, parts, repeats)
    details = {"rate": rate, "seconds": seconds, "repeats": repeats, "alone_p99_ms": base_ms, "refused": refused}
    bites = {
        name: part.sharing.shares.service for name, part in parts.items() if part.sharing and part.sharing.shares
    }
    used = {name: specs[name] for name in parts if name in specs}
    return _measured(found, {**details, "service_share_of_a_core": bites, "specs": used})


# Processes


def _open_stage(out: Path, stack: ExitStack) -> Players:
    """Servers that answer, and the page on which they announce."""
    stage = stack.enter_context(Players(out, stack.enter_context(Page.create())))
    for slot, (name, threads) in enumerate(((ONE, 1), (ALL, len(stage.host.cores)))):
        address = Address("tcp", "127.0.0.1", free_port())
        child = stage.family.start("server", _file_name(name), *_server(stage, name, threads, address, slot))
        _await_server(stage, name, child, address)
    return stage


def _server(stage: Players, name: str, threads: int, address: Address, slot: int) -> commands.Command:
    argv, environment = commands.server(_service(name, threads), address, stage.out, os.getpid())
    return [*argv, "--announce", f"{stage.page.path}:{slot}"], environment


def _await_server(stage: Players, name: str, child: Child, address: Address) -> None:
    stage.servers[name] = child
    wait_for_server(child, address, stage.family, START_S)
    child.hello["address"] = address


def _start_together(stage: Players) -> None:
    """The service with one thread and a trainer, in one process."""
    address, cores, name = Address("tcp", "127.0.0.1", free_port()), len(stage.host.cores), _file_name(TOGETHER)
    parts = [_server(stage, TOGETHER, 1, address, 2)[0], _trainer(stage, TOGETHER)[0]]
    names = [("server", name), ("trainer", name)]
    server, stage.trainers[TOGETHER] = stage.family.start_together(names, *commands.together(parts, {}, cores))
    _await_server(stage, TOGETHER, server, address)
    stage.control.wait_for([stage.trainers[TOGETHER]], stage.family, START_S)


def _service(name: str, threads: int = 1, rate: float = 0.0) -> Service:
    return Service(
        arch=SERVICE_MODEL,
        name=_file_name(name),
        rate=rate,
        data="synthetic",
        count=PAYLOADS,
        image_size=SERVICE_SIZE,
        device="cpu",
        threads=threads,
    )


def _file_name(name: str) -> str:
    return name.replace(" ", "-")


def _rate(stage: Players) -> float:
    """Requests/s that keep the one-thread service busy UTILISATION of its core, by its own warm-up times."""
    taken = channel_of(stage.servers[ONE]).request(Warmup(40), START_S)["ms"]
    return UTILISATION * 1000 / float(np.median(taken[10:]))


@dataclass(frozen=True)
class Planned:
    """The schedule file, and the rows (first, last) of each repeat; the last entry is the warm-up's."""

    path: Path
    rows: list[tuple[int, int]]


def _plan(out: Path, rate: float, repeats: int, seconds: float) -> Planned:
    """One Poisson schedule a repeat, whatever the policy: the arrivals are common to all of them."""
    stream = schedules.Stream(0, arrivals.of_rate(rate), PAYLOADS)
    drawn = [schedules.make([stream], seconds, SEED, repeat) for repeat in range(repeats)]
    drawn.append(schedules.make([stream], WARM_S, SEED, repeats))
    whole, given = schedules.join(drawn)
    path = out / "schedule.npy"
    schedules.save(whole, path)
    return Planned(path, [(rows[0].start, rows[0].stop) if 0 in rows else (0, 0) for rows in given])


def _start_clients(stage: Players, schedule: Path, rate: float) -> None:
    for name, server in stage.servers.items():
        service, address = _service(name, rate=rate), server.hello["address"]
        cell = Pair(train=None, services=(service,), arms=("alone",), config=Config())
        command = commands.client(service, address, 0, schedule, cell, stage.out, stage.control.address)
        stage.clients[name] = stage.family.start("client", server.name, *command)
    stage.control.wait_for(list(stage.clients.values()), stage.family, START_S)


def _start_trainers(stage: Players, parts: Mapping[str, Part]) -> None:
    """One trainer of each kind, with one gate that serves every cooperative policy: the page's mode chooses."""
    rule = merge_rules(part.sharing.rule for part in parts.values() if part.sharing)
    options = {"page": str(stage.page.path), **(rule.options if rule else {}), **_limits(parts, stage)}
    known = {name: value for name, value in options.items() if name in GateOptions.__dataclass_fields__}
    wanted = dict.fromkeys(part.trainer for part in parts.values() if part.trainer)
    started = {}
    for kind in (kind for kind in wanted if kind not in stage.trainers):
        argv, environment = _trainer(stage, kind)
        argv = [*argv, "--gate", GATE, "--gate-options", json.dumps(known)]
        argv += ["--layer-gate"] if kind.endswith(LAYERS) else []
        environment = {**environment, **waiting(kind.startswith(PASSIVE))}
        setup = KINDS[kind.removesuffix(LAYERS)]
        started[kind] = stage.family.start("trainer", kind, setup.command(argv), environment)
    stage.trainers |= started
    stage.control.wait_for(list(started.values()), stage.family, START_S)


def _limits(parts: Mapping[str, Part], stage: Players) -> dict[str, Any]:
    """What a gate is told of the machine and of the services by their slots on the page."""
    fewest = [least_threads(part.sharing.cast) for part in parts.values() if part.sharing]
    cores = len(stage.host.cores)
    return {"least_threads": max(fewest, default=0), "cores": cores, "service_threads": [1, cores, 1]}


def _trainer(stage: Players, kind: str) -> commands.Command:
    return commands.trainer(JOB, len(stage.host.cores), 0, stage.out / kind, stage.control.address)


# Policies


def _parts(
    specs: Mapping[str, Spec], stage: Players, stack: ExitStack
) -> tuple[dict[str, Part], dict[str, list[str]]]:
    """Every arm that can be had here, and the reasons why others cannot; the priority policies prove that they bite."""
    cores = len(stage.host.cores)
    cast = Cast((Member("server", "service", 1),), Member("trainer", "trainer", cores))
    refused = survey(cast, stage.host)
    parts = {"alone": Part(ONE, None), "train": Part(None, SPINNING)}
    for name, spec in specs.items():
        try:
            sharing = stack.enter_context(Sharing.prepare(spec, cast, stage.host))
        except (InputError, RunFault) as error:
            refused[name] = [str(error)]
            continue
        service = TOGETHER if sharing.cast.one_process else ALL if name == "default" else ONE
        parts[name] = Part(service, _kind(sharing), sharing)
        shares = sharing.self_test()
        if shares:
            print(f"{name}: {shares.sentence()}", flush=True)
    return parts, refused


def _kind(sharing: Sharing) -> str:
    """The trainer an arm needs: how its threads wait, and the class they never leave."""
    if sharing.cast.one_process:
        return TOGETHER
    setup, passive = sharing.setup(sharing.cast.members[-1]), bool(sharing.environment(sharing.cast.members[-1]))
    kind = (PASSIVE if passive else SPINNING) + ("-idle" if setup.idle else "-nice" if setup.nice else "")
    if kind not in KINDS:
        raise InputError(f"there is no {kind} trainer in this benchmark; it has {', '.join(KINDS)}")
    return kind + (LAYERS if sharing.rule and sharing.rule.layers else "")


@contextmanager
def _in_force(part: Part, stage: Players) -> Iterator[None]:
    """The arm's policies on its processes, and everything put back afterwards."""
    sharing = part.sharing
    if sharing is None:
        yield
        return
    service, trainer = sharing.cast.members
    pids = {service: stage.servers[part.service or ONE].popen.pid, trainer: _trainer_pid(part, stage)}
    rule = sharing.rule or Rule()
    try:
        for note in sharing.started(pids):
            if "NOT" in note or "could not" in note:
                print(f"{sharing.name}: {note}", flush=True)
        stage.page.set_knobs(Knobs(rule.micro, rule.duty, sharing.threads(trainer)))
        stage.page.mode = rule.mode
        yield
    finally:
        stage.page.mode = 0
        stage.page.set_knobs(Knobs())
        for policy in sharing.policies:
            for member, pid in pids.items() if policy.name not in STICKY else ():
                policy.detach(member, pid, stage.host)


def _trainer_pid(part: Part, stage: Players) -> int:
    return stage.trainers[part.trainer or SPINNING].popen.pid


# Segments


class Runner:
    """Measures one segment after the other on a stage."""

    def __init__(self, stage: Players, seconds: float) -> None:
        self._stage = stage
        self._seconds = seconds

    @property
    def services(self) -> list[str]:
        return list(self._stage.servers)

    def clean(self, part: Part, rows: tuple[int, int], arm: str, repeat: int) -> Segment:
        """A segment that others did not disturb, or the least disturbed of a few."""
        taken: list[Segment] = []
        for tries in range(1, TRIES + 1):
            taken.append(self.once(part, rows, arm, repeat, self._seconds, tries))
            if taken[-1].foreign <= DIRTY_CORES:
                return taken[-1]
            print(f"{arm}: others used {taken[-1].foreign:.2f} cores", flush=True)
        return min(taken, key=lambda segment: segment.foreign)

    def once(
        self, part: Part, rows: tuple[int, int], arm: str, repeat: int, seconds: float, tries: int = 1
    ) -> Segment:
        """One segment under the part's policies."""
        stage, client = self._stage, _file_name(part.service or "")
        _wait_for_quiet(stage.host)
        with _in_force(part, stage):
            window = stage.window(self._cast(part), ARMS.get(arm, "corun"), repeat, seconds, {client: rows})
        service = [stage.servers[part.service].popen.pid] if part.service else []
        records = stage.records(client, window)
        sojourns = np.empty(0) if records is None else sojourns_ms(records)
        speed = stage.samples_per_s(window, stage.out / part.trainer) if part.trainer else None
        return Segment(Cell(sojourns, speed), window.foreign_cores, window.own_cores(service), tries)

    def _cast(self, part: Part) -> list[Child]:
        """Clients first: they stop sending before anybody else is drained."""
        stage = self._stage
        serving = [stage.clients[part.service], stage.servers[part.service]] if part.service else []
        return serving + ([stage.trainers[part.trainer]] if part.trainer else [])


def _wait_for_quiet(host: Host) -> None:
    """Let others finish what they do, if that takes seconds."""
    give_up_ns = now_ns() + round(QUIET_PATIENCE_S * NS_PER_S)
    while now_ns() < give_up_ns:
        before = read_cpu([os.getpid()], host, now_ns())
        time.sleep(QUIET_LOOK_S)
        if foreign_cores(before, read_cpu([os.getpid()], host, now_ns())) <= DIRTY_CORES:
            return


def _warm(runner: Runner, planned: Planned) -> float:
    """Serve once without training; returns its p99 (ms), from which latency bounds are made."""
    for name in (*(name for name in runner.services if name != ONE), ONE):
        warm = runner.once(Part(name, None), planned.rows[-1], "alone", 0, WARM_S)
    return float(np.quantile(warm.cell.sojourns_ms, 0.99, method="higher"))


def _warm_trainers(runner: Runner, stage: Players) -> None:
    for kind in stage.trainers:
        runner.once(Part(None, kind), (0, 0), "train", 0, WARM_S)


def _interleave(
    runner: Runner, planned: Planned, parts: Mapping[str, Part], repeats: int
) -> dict[str, list[Segment]]:
    """All arms of a repeat in random order, repeat by repeat."""
    order = random.Random(SEED)
    found: dict[str, list[Segment]] = {name: [] for name in parts}
    for repeat in range(repeats):
        names = list(parts)
        order.shuffle(names)
        for name in names:
            rows = planned.rows[repeat] if parts[name].service else (0, 0)
            segment = runner.clean(parts[name], rows, name, repeat)
            found[name].append(segment)
            print(f"repeat {repeat + 1} {name}: {_line(segment)}", flush=True)
    return found


def _line(segment: Segment) -> str:
    cell = segment.cell
    latency = f"{len(cell.sojourns_ms)} requests, " if len(cell.sojourns_ms) else ""
    if len(cell.sojourns_ms):
        latency += f"p50 {np.quantile(cell.sojourns_ms, 0.5, method='higher'):.1f} ms, "
    speed = f"{cell.samples_per_s:.0f} samples/s, " if cell.samples_per_s is not None else ""
    return f"{latency}{speed}others {segment.foreign:.2f} cores"


def _measured(found: Mapping[str, Sequence[Segment]], details: Mapping[str, Any]) -> Measured:
    cores = len(Host().cores)
    utilisation = float(np.mean([segment.service_cores for segment in found["alone"]])) / cores
    seen = {
        name: {
            "foreign_cores": [round(segment.foreign, 3) for segment in segments],
            "tries": [segment.tries for segment in segments],
            "p99_ms": [_p99(segment.cell) for segment in segments],
            "samples_per_s": [segment.cell.samples_per_s for segment in segments],
        }
        for name, segments in found.items()
    }
    dirty = [name for name, rows in seen.items() if max(rows["foreign_cores"]) > DIRTY_CORES]
    cells = {name: [segment.cell for segment in segments] for name, segments in found.items()}
    models = {"service": f"{SERVICE_MODEL} {SERVICE_SIZE} px", "trainer": f"{TRAIN_MODEL} {TRAIN_SIZE} px, {BATCH}"}
    return Measured(cells, utilisation, {**details, **models, "segments": seen, "dirty": dirty})


def _p99(cell: Cell) -> float | None:
    if not len(cell.sojourns_ms):
        return None
    return round(float(np.quantile(cell.sojourns_ms, 0.99, method="higher")), 3)
