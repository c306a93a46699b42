"""Many short windows on processes that stay: servers, clients and a trainer started once, any subset of them measured.

    open     servers ─ ready ─▶ clients with one schedule for every rate and repeat ─ trainer ─ policy applied, warmed up
    window   ARM those who take part ─ START ─ sleep ─ DRAIN ─ rings read ─ memory read
    close    STOP to all

A planner asks hundreds of small questions; a restart before each would cost more than the answer and compare caches.
Whoever is not in a window sleeps in a system call: resident, not running. On a CPU that does not change the latency of
the others (memory is taken, which is why memory is read process by process and added up for the set in question).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from corun.arrivals import schedule as schedules
from corun.clock import NS_PER_MS
from corun.errors import RunFault
from corun.launch import commands
from corun.launch.calibrate import free_port
from corun.launch.children import Child, lanes_of
from corun.launch.control import wait_for_server
from corun.launch.segments import process_of
from corun.launch.troupe import ANSWER_S, Troupe, Window, sojourns_ms
from corun.launch.window import channel_of
from corun.profile.footprint import Footprint, footprint
from corun.run.config import Pair, Service
from corun.share.foreign import DIRTY_CORES
from corun.share.host import Host
from corun.share.policy import Cast, Member
from corun.share.sharing import Sharing
from corun.wire import STAMPS, Status
from corun.wire.messages import Warmup
from corun.wire.sockets import Address

WARM_REQUESTS: Final = 10
WARM_S: Final = 2.0
TRIES: Final = 2
PICKED, BATCHED, SENT = STAMPS.index("picked"), STAMPS.index("batched"), STAMPS.index("tx")


Spec = Mapping[str, Any] | str


@dataclass(frozen=True)
class Served:
    """One service in one window. sojourns_ms: intended send until reply, inf = none. services_ms: of answered ones,
    without the time that a batch was held for; batches: how many were in the batch of each of those.
    """

    name: str
    rate: float
    sojourns_ms: tuple[float, ...]
    services_ms: tuple[float, ...]
    batches: tuple[int, ...] = ()


@dataclass(frozen=True)
class Observation:
    """What one window showed. memory: by label of the process. foreign_cores: what others used meanwhile."""

    served: tuple[Served, ...]
    samples_per_s: float | None
    memory: Mapping[str, Footprint]
    foreign_cores: float


class Stage:
    """Processes of one cell under one sharing policy; a context. `factors` multiply the services' rates.

    The cell names its devices (no "auto") and the trainer's threads: what is measured must not depend on the set.
    specs: further policies that `switch` may put in force between windows; they act by the gate alone.

    Raises InputError (the policy is refused), RunFault (a process did not start or died).
    """

    def __init__(
        self, pair: Pair, factors: Sequence[float], repeats: int, seconds: float, specs: Sequence[Spec] = ()
    ) -> None:
        self._pair, self._seconds = pair, seconds
        self._specs = tuple(specs)
        self._factors = tuple(dict.fromkeys((1.0, *factors)))
        self._repeats = repeats
        self._stack = ExitStack()
        self._host = Host()
        self._servers: dict[str, Child] = {}
        self._clients: dict[str, Child] = {}
        self._trainer: Child | None = None
        self._rows: dict[tuple[str, float, int], tuple[int, int]] = {}
        self.warm_ms: dict[str, float] = {}

    def __enter__(self) -> Stage:
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def names(self) -> frozenset[str]:
        """Services that are here."""
        return frozenset(self._servers)

    # Opening

    def _open(self) -> None:
        self._out = Path(tempfile.mkdtemp(prefix="corun-stage-"))
        self._stack.callback(shutil.rmtree, self._out, ignore_errors=True)
        self._sharing = self._stack.enter_context(self._prepare())
        self._troupe = self._stack.enter_context(Troupe(self._out, self._pair.config.drain_timeout_s))
        self._control, self._family = self._troupe.control, self._troupe.family
        addresses = self._start_servers()
        schedule = self._out / "schedule.npy"
        schedules.save(self._draw(), schedule)
        reporting = [
            self._start_client(index, service, address, schedule)
            for index, (service, address) in enumerate(zip(self._pair.services, addresses, strict=True))
        ]
        self._control.wait_for(
            [*reporting, *([self._trainer] if self._trainer else [])], self._family, self._pair.config.start_timeout_s
        )
        self._apply()
        self._warm()

    def _prepare(self) -> Sharing:
        pair = self._pair
        services = tuple(Member("server", one.label, one.threads, index) for index, one in enumerate(pair.services))
        trainer = Member("trainer", pair.train_label, pair.train.threads or 1) if pair.train else None
        devices = {one.device for one in pair.services} | ({pair.train.device} if pair.train else set())
        cast = Cast(services, trainer, frozenset(devices))
        return Sharing.prepare(pair.config.sharing, cast, self._host, also=self._specs)

    def _start_servers(self) -> list[Address]:
        pair, cast = self._pair, self._sharing.cast
        addresses = [Address("tcp", pair.config.host, free_port()) for _ in pair.services]
        hosts = []
        for member, service, address in zip(cast.services, pair.services, addresses, strict=True):
            service = service.model_copy(update={"threads": self._sharing.threads(member)})
            hosts.append((member, commands.server(service, address, self._out, os.getpid())))
        if pair.train and cast.trainer:
            threads = self._sharing.threads(cast.trainer)
            command = commands.trainer(pair.train, threads, pair.config.seed, self._out, self._control.address)
            hosts.append((cast.trainer, command))
        children = self._start_together(hosts) if cast.one_process else [self._start(*host) for host in hosts]
        self._servers = {child.name: child for child in children if child.role == "server"}
        self._trainer = next((child for child in children if child.role == "trainer"), None)
        for child, address in zip(self._servers.values(), addresses, strict=True):
            wait_for_server(child, address, self._family, pair.config.start_timeout_s)
        return addresses

    def _start(self, member: Member, command: commands.Command) -> Child:
        argv, environment = command
        sharing = self._sharing
        argv = sharing.command(member, [*argv, *sharing.flags(member)])
        return self._family.start(member.role, member.name, argv, {**environment, **sharing.environment(member)})

    def _start_together(self, hosts: Sequence[tuple[Member, commands.Command]]) -> list[Child]:
        """All of them as threads of one process, by the command lines they have as processes."""
        sharing = self._sharing
        parts = [[*argv, *sharing.flags(member)] for member, (argv, _) in hosts]
        threads = max(sharing.threads(member) for member, _ in hosts)
        names = [(member.role, member.name) for member, _ in hosts]
        return self._family.start_together(names, *commands.together(parts, sharing.lanes, threads))

    def _start_client(self, stream: int, service: Service, address: Address, schedule: Path) -> Child:
        command = commands.client(service, address, stream, schedule, self._pair, self._out, self._control.address)
        self._clients[service.label] = self._family.start("client", service.label, *command)
        return self._clients[service.label]

    def _draw(self) -> schedules.Schedule:
        """Arrivals of every factor and repeat, for all services; windows of one repeat share them between sets."""
        keys = [(factor, repeat) for factor in self._factors for repeat in range(self._repeats)]
        drawn = []
        for factor, repeat in keys:
            streams = [
                schedules.Stream(number, process_of(_at(service, factor)), service.count)
                for number, service in enumerate(self._pair.services)
            ]
            drawn.append(schedules.make(streams, self._seconds, self._pair.config.seed, repeat))
        whole, given = schedules.join(drawn)
        for (factor, repeat), by_stream in zip(keys, given, strict=True):
            for stream, ids in by_stream.items():
                name = self._pair.services[stream].label
                self._rows[name, factor, repeat] = (ids.start, ids.stop)
        return whole

    def _apply(self) -> None:
        pids = {(child.role, child.name): child.popen.pid for child in self._family.children}
        members = [member for member in self._sharing.cast.members if (member.role, member.name) in pids]
        self._sharing.started({member: pids[member.role, member.name] for member in members})
        if self._sharing.lanes:
            self._sharing.heard(lanes_of(self._family.children))

    def _warm(self) -> None:
        """Every model some times, the trainer some steps, so that the first window is like the others."""
        for name, child in self._servers.items():
            taken = channel_of(child).request(Warmup(WARM_REQUESTS), ANSWER_S)["ms"]
            self.warm_ms[name] = float(np.median(taken[len(taken) // 2 :]))
        if self._trainer:
            self._run([self._trainer], {}, "train", 0, WARM_S)

    def describe(self) -> dict[str, Any]:
        """The sharing policy as a manifest has it: asked for, in force, refused."""
        return self._sharing.describe()

    # Windows

    def switch(self, spec: Spec) -> None:
        """Another policy from the next window on: the cell's own or one of `specs`. InputError: it takes a restart."""
        self._sharing.switch(spec)

    def observe(
        self, services: Sequence[str], factor: float = 1.0, repeat: int = 0, trains: bool = True
    ) -> Observation:
        """One window in which only these services are asked, at `factor` times their rates.

        A window in which others used the machine is measured again, up to TRIES times; the least disturbed one counts.
        RunFault: a process died or did not answer; the stage is of no use afterwards.
        """
        seen: list[Observation] = []
        while not seen or (seen[-1].foreign_cores > DIRTY_CORES and len(seen) < TRIES):
            seen.append(self._observe(services, factor, repeat, trains))
        return min(seen, key=lambda one: one.foreign_cores)

    def _observe(self, services: Sequence[str], factor: float, repeat: int, trains: bool) -> Observation:
        arm = "corun" if services and trains else "train" if trains else "alone"
        rows = {name: self._rows.get((name, factor, repeat), (0, 0)) for name in services}
        playing = [self._clients[name] for name in services] + [self._servers[name] for name in services]
        if trains and self._trainer:
            playing.append(self._trainer)
        window = self._run(playing, rows, arm, repeat, self._seconds)
        asked = {one.label: _at(one, factor) for one in self._pair.services}
        served = tuple(self._served(asked[name], window) for name in services)
        speed = self._troupe.samples_per_s(window) if trains and self._trainer else None
        return Observation(served, speed, self._memory(playing), window.foreign_cores)

    def _run(
        self, playing: Sequence[Child], rows: Mapping[str, tuple[int, int]], arm: str, repeat: int, seconds: float
    ) -> Window:
        self._sharing.enter(arm)
        return self._troupe.window(playing, arm, repeat, seconds, rows)

    def _served(self, asked: Service, window: Window) -> Served:
        name, rate = asked.label, asked.rate
        records = self._troupe.records(name, window)
        if records is None:
            return Served(name, rate, (), ())
        answered = records["status"] == Status.OK
        stamps = records["stamps"][answered]
        service = (stamps[:, SENT] - stamps[:, BATCHED if asked.max_delay_ms else PICKED]) / NS_PER_MS
        batches = tuple(records["batch"][answered].tolist())
        return Served(name, rate, tuple(sojourns_ms(records).tolist()), tuple(service.tolist()), batches)

    def _memory(self, playing: Sequence[Child]) -> dict[str, Footprint]:
        members = [child for child in playing if child.role in ("server", "trainer")]
        on_gpu = self._sharing.cast.on_gpu
        return {child.label: footprint(child.popen.pid, on_gpu) for child in members}


def _at(service: Service, factor: float) -> Service:
    return service.model_copy(update={"rate": service.rate * factor})


class Stages:
    """Opens a stage when a window needs one that is not open: all services first, fewer after that has failed.

    pair_of(policy, names) makes the cell of a stage.
    """

    def __init__(
        self, pair_of: Callable[[str, Sequence[str]], Pair], factors: Sequence[float], repeats: int, seconds: float
    ) -> None:
        self._pair_of, self._factors, self._repeats, self._seconds = pair_of, factors, repeats, seconds
        self._open: tuple[str, Stage] | None = None
        self._failed: set[tuple[str, frozenset[str]]] = set()

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop whatever runs."""
        if self._open:
            _, stage = self._open
            self._open = None
            stage.__exit__(None, None, None)

    def observe(
        self, policy: str, everybody: Sequence[str], names: Sequence[str], factor: float, repeat: int, trains: bool
    ) -> Observation | str:
        """One window of `names`; a sentence when they cannot run: a process died, or did not start."""
        reason = ""
        for wanted in self._wanted(policy, frozenset(everybody), frozenset(names)):
            try:
                return self._stage(policy, [name for name in everybody if name in wanted]).observe(
                    names, factor, repeat, trains
                )
            except RunFault as error:
                reason = str(error)
                self._failed.add((policy, wanted))
                self.close()
        return reason

    def _wanted(self, policy: str, everybody: frozenset[str], names: frozenset[str]) -> list[frozenset[str]]:
        """The stages to try: the open one, one with everybody unless that has failed, one with these only."""
        here = (
            [self._open[1].names] if self._open and self._open[0] == policy and names <= self._open[1].names else []
        )
        usual = [everybody] if (policy, everybody) not in self._failed else []
        return list(dict.fromkeys([*(here or usual), names]))

    def _stage(self, policy: str, wanted: Sequence[str]) -> Stage:
        if self._open and self._open[0] == policy and self._open[1].names == frozenset(wanted):
            return self._open[1]
        self.close()
        stage = Stage(self._pair_of(policy, wanted), self._factors, self._repeats, self._seconds)
        stage.__enter__()
        self._open = (policy, stage)
        return stage
