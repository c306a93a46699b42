"""One run from the first process to the last row.

    start   servers ─ ready ─▶ clients, trainer, profiler ─ HELLO
    window  ARM(start_at, stop_at) to everybody ─ all ready ─ START ─ nothing ─ DRAIN ─ rows
    end     STOP to everybody, manifest

Processes live through all windows, so an arm is never compared across a restart. While a window is measured
the launcher sleeps in one poll(2) on its children's pidfds and the stop signal.
"""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from corun.arrivals import schedule as schedules
from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.errors import CorunError, PeerClosed, RunFault, WireError
from corun.launch import commands
from corun.launch.children import Child, Family
from corun.launch.commands import resolved_device
from corun.launch.control import ControlSocket, wait_for_server
from corun.launch.live import NEVER_NS, Live
from corun.launch.segments import Segment, make_schedule, plan
from corun.load.ring import ring_to_csv
from corun.process import StopSignal
from corun.run.config import Pair
from corun.run.directory import RunDirectory, Status
from corun.run.table import EventLog
from corun.share.policy import Cast, Member
from corun.share.sharing import Sharing
from corun.wire.channel import Channel
from corun.wire.messages import Arm, Drain, Message, Start, Stop
from corun.wire.sockets import Address, connect

ARM_AHEAD_S = 0.6
ARM_TRIES = 4
ANSWER_S = 15.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended and, when it was not complete, why."""

    status: Status
    reasons: tuple[str, ...] = ()


@dataclass
class _Record:
    """What the manifest will say about the windows."""

    segments: list[dict[str, Any]] = field(default_factory=list)
    counts: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def run_pair(pair: Pair, run: RunDirectory, stop: StopSignal, say: Say, live: Live | None = None) -> Outcome:
    """Measure one cell of the grid in `run`; faults are recorded and returned, never raised. `live` shows windows."""
    experiment = _Experiment(pair, run, stop, say, live)
    try:
        outcome = experiment.run()
    except (CorunError, OSError) as error:
        experiment.fault(str(error))
        outcome = Outcome("failed", tuple(experiment.record.faults))
    run.finish(
        outcome.status,
        segments=experiment.record.segments,
        counts=experiment.record.counts,
        faults=experiment.record.faults,
        **({"live": live.cost()} if live else {}),
    )
    if live:
        live.close()
    return outcome


class _Experiment:
    def __init__(self, pair: Pair, run: RunDirectory, stop: StopSignal, say: Say, live: Live | None) -> None:
        self._pair = pair
        self._run = run
        self._stop = stop
        self._say = say
        self._live = live
        self._events = EventLog(run.file("events.csv"))
        self._remotes: list[Channel] = []
        self.record = _Record()

    def fault(self, reason: str) -> None:
        """Record a fault once; the run goes on to its orderly end."""
        if reason not in self.record.faults:
            self.record.faults.append(reason)
            self._events.write("fault", "launcher", "", reason)

    def run(self) -> Outcome:
        segments = plan(self._pair)
        planned = make_schedule(self._pair, segments)
        schedules.save(planned.schedule, self._run.file("schedule.npy"))
        self._run.update(
            schedule_sha256=planned.schedule.sha256,
            threads=self._threads(),
            slo=self._pair.promises,
        )
        with self._prepare() as sharing, ControlSocket() as control, Family(self._run.path) as family:
            self._start(family, control, sharing)
            self._settle(family, sharing)
            for segment in segments:
                if self._stop.requested or self.record.faults:
                    break
                sharing.enter(segment.arm)
                self._measure(segment, planned.rows, family)
            self._run.update(sharing=sharing.describe())
            self._finish(family)
        if self._stop.requested:
            return Outcome("interrupted", ("interrupted by the user", *self.record.faults))
        return Outcome("failed" if self.record.faults else "complete", tuple(self.record.faults))

    def _threads(self) -> dict[str, int]:
        threads = {f"server {service.label}": service.threads for service in self._pair.services}
        if self._pair.train:
            threads["trainer"] = commands.trainer_threads(self._pair)
        return {**threads, "client": 1, "profiler": 1}

    # Starting

    def _prepare(self) -> Sharing:
        """The sharing policy of this cell; InputError with its reasons when it cannot be had here."""
        pair = self._pair
        services = tuple(
            Member("server", service.label, service.threads, index) for index, service in enumerate(pair.services)
        )
        trainer = Member("trainer", pair.train_label, commands.trainer_threads(pair)) if pair.train else None
        devices = {service.device for service in pair.services} | ({pair.train.device} if pair.train else set())
        cast = Cast(services, trainer, frozenset(resolved_device(device) for device in devices))
        return Sharing.prepare(pair.config.sharing, cast)

    def _start(self, family: Family, control: ControlSocket, sharing: Sharing) -> None:
        pair, out, timeout_s = self._pair, self._run.path, self._pair.config.start_timeout_s
        self._say(f"starting {pair.label}")
        reporting = [self._profiler(family, control)]
        if pair.beside is None:
            reporting += self._start_hosts(family, control, sharing)
        schedule = self._run.file("schedule.npy")
        for stream, (service, address) in enumerate(zip(pair.services, self._addresses(), strict=True)):
            argv, environment = commands.client(service, address, stream, schedule, pair, out, control.address)
            reporting.append(family.start("client", service.label, argv, environment))
        control.wait_for(reporting, family, timeout_s)
        if pair.beside is not None:
            self._remotes = [Channel(connect(address)) for address in self._addresses()]
        self._run.update(
            processes=[
                {"role": child.role, "name": child.name, "pid": child.popen.pid, "hello": child.hello}
                for child in family.children
            ]
        )

    def _start_hosts(self, family: Family, control: ControlSocket, sharing: Sharing) -> list[Child]:
        """Servers and trainer, side by side; returns once the servers answer, with the trainer to wait for."""
        pair, out = self._pair, self._run.path

        def start(member: Member, command: commands.Command) -> Child:
            argv, environment = command
            argv = sharing.command(member, [*argv, *sharing.flags(member)])
            return family.start(member.role, member.name, argv, {**environment, **sharing.environment(member)})

        servers = []
        for member, service, address in zip(sharing.cast.services, pair.services, self._addresses(), strict=True):
            service = service.model_copy(update={"threads": sharing.threads(member)})
            servers.append((start(member, commands.server(service, address, out, os.getpid())), address))
        reporting = []
        if pair.train and sharing.cast.trainer:
            threads = sharing.threads(sharing.cast.trainer)
            command = commands.trainer(pair.train, threads, pair.config.seed, out, control.address)
            reporting.append(start(sharing.cast.trainer, command))
        for child, address in servers:
            wait_for_server(child, address, family, pair.config.start_timeout_s)
        return reporting

    def _settle(self, family: Family, sharing: Sharing) -> None:
        """Apply the policy to the running processes, prove that it bites, and record what is really in force."""
        pids = {(child.role, child.name): child.popen.pid for child in family.children}
        members = [member for member in sharing.cast.members if (member.role, member.name) in pids]
        for note in sharing.started({member: pids[member.role, member.name] for member in members}):
            self._say(f"sharing {sharing.name}: {note}")
            self._events.write("policy", "launcher", sharing.name, note)
        shares = sharing.self_test()
        if shares:
            self._events.write("policy", "launcher", sharing.name, shares.sentence())
        self._run.update(sharing=sharing.describe())

    def _profiler(self, family: Family, control: ControlSocket) -> Child:
        argv, environment = commands.profiler(
            self._run.path, family.watch_file, self._pair.config.period_s, control.address
        )
        return family.start("profiler", "profiler", argv, environment)

    def _addresses(self) -> list[Address]:
        config = self._pair.config
        return [Address("tcp", config.host, config.port + index) for index in range(len(self._pair.services))]

    # One window

    def _measure(self, segment: Segment, rows: dict[tuple[int, int], tuple[int, int]], family: Family) -> None:
        cast = self._cast(segment, family)
        start_ns = self._arm(segment, rows, cast)
        stop_ns = start_ns + round(segment.duration_s * NS_PER_S)
        self._say(f"{segment.arm} (repeat {segment.repeat + 1}): {segment.duration_s:g} s")
        self._events.write("window_start", "launcher", segment.arm, f"segment {segment.index}", start_ns)
        self._watch(segment, start_ns, stop_ns, family)
        ended_ns = min(now_ns(), stop_ns)
        self._events.write("window_end", "launcher", segment.arm, f"segment {segment.index}", ended_ns)
        self.record.segments.append({**asdict(segment), "start_ns": start_ns, "stop_ns": ended_ns})
        self._drain(segment, cast)
        self._run.update(segments=self.record.segments, counts=self.record.counts)

    def _cast(self, segment: Segment, family: Family) -> list[Child]:
        """Who takes part: clients first, so that they stop sending before anybody else is drained."""
        roles = (["client", "server"] if segment.serves else []) + (["trainer"] if segment.trains else [])
        return [child for role in (*roles, "profiler") for child in family.of(role)]

    def _arm(self, segment: Segment, rows: dict[tuple[int, int], tuple[int, int]], cast: list[Child]) -> int:
        """Prepare everybody for one instant; when preparing took too long, for a later one."""
        ahead_s = ARM_AHEAD_S
        for _ in range(ARM_TRIES):
            start_ns = now_ns() + round(ahead_s * NS_PER_S)
            stop_ns = start_ns + round(segment.duration_s * NS_PER_S)
            sent = []
            for channel in self._remotes:
                channel.request(Arm(segment.arm, segment.repeat, segment.index, start_ns, stop_ns), ANSWER_S)
            for child in cast:
                stream = self._stream(child)
                first, last = rows.get((segment.index, stream), (0, 0)) if stream is not None else (0, 0)
                arm = Arm(segment.arm, segment.repeat, segment.index, start_ns, stop_ns, first, last)
                sent.append((child, _channel(child).send(arm)))
            for child, id in sent:
                _channel(child).wait_reply(id, ANSWER_S)
            if now_ns() < start_ns - round(0.25 * ahead_s * NS_PER_S):
                for child in cast:
                    _channel(child).request(Start(segment.index), ANSWER_S)
                return start_ns
            ahead_s *= 2
        raise RunFault(f"the processes could not be armed in {ahead_s / 2:.1f} s; the machine is overloaded")

    def _stream(self, child: Child) -> int | None:
        if child.role != "client":
            return None
        return next(index for index, service in enumerate(self._pair.services) if service.label == child.name)

    def _watch(self, segment: Segment, start_ns: int, stop_ns: int, family: Family) -> None:
        """Sleep through the window, with a look at it once a second where one is wanted."""
        if self._live is None:
            self._sleep_until(stop_ns, family)
            return
        services = [service.label for service in self._pair.services]
        self._live.begin(self._run.path, segment, services, start_ns, stop_ns)
        try:
            self._sleep_until(stop_ns, family)
        finally:
            self._live.end()

    def _sleep_until(self, stop_ns: int, family: Family) -> None:
        """Sleep through the window; a child's death is recorded at once, a stop signal ends the window."""
        poller = select.poll()
        poller.register(self._stop.fileno(), select.POLLIN)
        watched = {child.pidfd: child for child in family.children if child.alive}
        for pidfd in watched:
            poller.register(pidfd, select.POLLIN)
        while (now := now_ns()) < stop_ns and not self._stop.requested:
            wake_ns = min(stop_ns, self._live.next_ns if self._live else NEVER_NS)
            for fd, _ in poller.poll(max(0, wake_ns - now) / NS_PER_MS + 1):
                if fd in watched:
                    poller.unregister(fd)
                    child = watched.pop(fd)
                    child.popen.wait()
                    self.fault(f"{child.label} {child.how_it_ended()} during a measurement")
            if self._live:
                self._live.tick()

    def _drain(self, segment: Segment, cast: list[Child]) -> None:
        timeout_s = self._pair.config.drain_timeout_s
        for child in cast:
            body = self._ask(child, Drain(round(timeout_s * 1000)), timeout_s + ANSWER_S)
            if body is None:
                continue
            self.record.counts.append({"segment": segment.index, "role": child.role, "name": child.name, **body})
        for child in (child for child in cast if child.role == "client"):
            self._write_requests(segment, child)

    def _write_requests(self, segment: Segment, child: Child) -> None:
        """The client's record ring becomes rows; a killed client's ring does too."""
        directory = self._run.file("infer_client")
        ring = directory / f"{child.name}.{segment.index}.ring"
        if ring.exists():
            ring_to_csv(ring, directory / f"{child.name}.csv")
            ring.unlink()

    def _ask(self, child: Child, message: Message, timeout_s: float) -> dict[str, Any] | None:
        """One request; a peer that is gone or refuses is a recorded fault, not an exception."""
        try:
            return _channel(child).request(message, timeout_s)
        except PeerClosed:
            child.popen.poll()
            self.fault(f"{child.label} {child.how_it_ended()} during a measurement")
        except (WireError, RunFault, TimeoutError) as error:
            self.fault(f"{child.label}: {error}")
        return None

    # The end

    def _finish(self, family: Family) -> None:
        for role in ("client", "trainer", "server", "profiler"):
            for child in family.of(role):
                if child.channel:
                    self._ask(child, Stop("the run is over"), ANSWER_S)
        for child in list(family.children):
            with suppress(subprocess.TimeoutExpired):
                child.popen.wait(timeout=ANSWER_S)
        self._events.write("stop", "launcher", "", "the run is over")


def _channel(child: Child) -> Channel:
    if child.channel is None:
        raise RunFault(f"{child.label} never reported")
    return child.channel
