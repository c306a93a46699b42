"""One run from the first process to the last row.

    start   servers ─ ready ─▶ clients, trainer, profiler ─ HELLO
    window  ARM(start_at, stop_at) to everybody ─ all ready ─ START ─ nothing ─ DRAIN ─ rows
    end     STOP to everybody, manifest

Processes live through all windows, so an arm is never compared across a restart. While a window is measured
the launcher sleeps in one poll(2) on its children's pidfds (control connections of another machine's) and the stop
signal. Where they run is the crew's business.
"""

from __future__ import annotations

import select
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from corun.arrivals import schedule as schedules
from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.errors import CorunError, PeerClosed, RunFault, WireError
from corun.launch import commands, drift
from corun.launch.children import Child, lanes_of
from corun.launch.commands import resolved_device
from corun.launch.control import wait_for_server
from corun.launch.crew import Crew, Place, Shared, make_crew
from corun.launch.live import NEVER_NS, Live
from corun.launch.segments import Segment, make_schedule, plan
from corun.process import StopSignal
from corun.run.config import Pair
from corun.run.directory import RunDirectory, Status
from corun.run.table import EventLog
from corun.share.policy import Cast, Member
from corun.wire.channel import Channel
from corun.wire.messages import Arm, Drain, Message, Start, Stop
from corun.wire.sockets import Address, connect

ARM_AHEAD_S = 0.6
ARM_TRIES = 4
ANSWER_S = 15.0
WATCH_FILE = "processes.jsonl"

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
    experiment = _Experiment(drift.prepare(pair, run), run, stop, say, live)
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
        self._run.update(schedule_sha256=planned.schedule.sha256, slo=self._pair.promises)
        crew = make_crew(self._pair, self._run, self.fault)
        with crew:
            self._run.update(threads=self._threads(crew), **crew.describe())
            sharing = self._prepare(crew)
            self._start(crew, sharing)
            self._settle(crew, sharing)
            for segment in segments:
                if self._stop.requested or self.record.faults:
                    break
                sharing.enter(segment.arm)
                self._measure(segment, planned.rows, crew)
            self._describe(sharing)
            self._finish(crew)
        self._run.update(**crew.describe())
        if self._stop.requested:
            return Outcome("interrupted", ("interrupted by the user", *self.record.faults))
        return Outcome("failed" if self.record.faults else "complete", tuple(self.record.faults))

    def _threads(self, crew: Crew) -> dict[str, int]:
        threads = {f"server {service.label}": service.threads for service in self._pair.services}
        if self._pair.train:
            threads["trainer"] = self._trainer_threads(crew)
        return {**threads, "client": 1, "profiler": 1}

    def _trainer_threads(self, crew: Crew) -> int:
        """The trainer's threads on its machine, beside the services that are there too."""
        here = crew.place("trainer").node
        services = enumerate(self._pair.services if self._pair.beside is None else ())
        taken = sum(service.threads for index, service in services if crew.place("server", index).node == here)
        return commands.trainer_threads(self._pair, crew.cores("trainer") - taken)

    def _describe(self, sharing: Shared) -> None:
        """What is in force; a machine that is lost takes its answer along."""
        try:
            self._run.update(sharing=sharing.describe())
        except RunFault as error:
            self.fault(str(error))

    # Starting

    def _prepare(self, crew: Crew) -> Shared:
        """The sharing policy of this cell; InputError with its reasons when it cannot be had here."""
        pair = self._pair
        services = tuple(
            Member("server", service.label, service.threads, index) for index, service in enumerate(pair.services)
        )
        trainer = Member("trainer", pair.train_label, self._trainer_threads(crew)) if pair.train else None
        devices = {service.device for service in pair.services} | ({pair.train.device} if pair.train else set())
        cuda = crew.has_cuda("server")
        cast = Cast(services, trainer, frozenset(resolved_device(device, cuda) for device in devices))
        return crew.share(pair.config.sharing, cast)

    def _start(self, crew: Crew, sharing: Shared) -> None:
        pair, timeout_s = self._pair, self._pair.config.start_timeout_s
        self._say(f"starting {pair.label}")
        reporting = [self._profiler(crew, name, place) for name, place in crew.profiled()]
        if pair.beside is None:
            reporting += self._start_hosts(crew, sharing)
        addresses = self._addresses(crew)
        for stream, (service, address) in enumerate(zip(pair.services, addresses, strict=True)):
            place = crew.place("client", stream)
            schedule = crew.deliver(place, self._run.file("schedule.npy"))
            command = commands.client(service, address, stream, schedule, pair, place.out, place.control)
            reporting.append(crew.start(place, "client", service.label, *command))
        crew.wait_for(reporting, timeout_s)
        if pair.beside is not None:
            self._remotes = [Channel(connect(address)) for address in addresses]
        self._run.update(
            processes=[
                {
                    "role": child.role,
                    "name": child.name,
                    "pid": child.popen.pid,
                    **({"node": child.node} if child.node else {}),
                    "hello": child.hello,
                }
                for child in crew.children
            ]
        )

    def _start_hosts(self, crew: Crew, sharing: Shared) -> list[Child]:
        """Servers and trainer, side by side; returns once the servers answer, with the trainer to wait for."""
        pair, cast = self._pair, sharing.cast
        addresses = self._addresses(crew)
        hosts: list[tuple[Place, Member, commands.Command]] = []
        for member, service, address in zip(cast.services, pair.services, addresses, strict=True):
            service = service.model_copy(update={"threads": sharing.threads(member)})
            place = crew.place("server", member.index)
            hosts.append((place, member, commands.server(service, address, place.out, place.parent_pid)))
        if pair.train and cast.trainer:
            threads, place = sharing.threads(cast.trainer), crew.place("trainer")
            command = commands.trainer(pair.train, threads, pair.config.seed, place.out, place.control)
            hosts.append((place, cast.trainer, command))
        children = self._start_together(hosts, crew, sharing) if cast.one_process else []
        children = children or [self._start_host(*host, crew, sharing) for host in hosts]
        for child, address in zip(children, addresses, strict=False):
            wait_for_server(child, address, crew, pair.config.start_timeout_s)
        return [child for child in children if child.role == "trainer"]

    def _start_host(
        self, place: Place, member: Member, command: commands.Command, crew: Crew, sharing: Shared
    ) -> Child:
        argv, environment = command
        argv = sharing.command(member, [*argv, *sharing.flags(member)])
        return crew.start(place, member.role, member.name, argv, {**environment, **sharing.environment(member)})

    def _start_together(
        self, hosts: list[tuple[Place, Member, commands.Command]], crew: Crew, sharing: Shared
    ) -> list[Child]:
        """All of them as threads of one process, by the command lines they have as processes."""
        parts = [[*argv, *sharing.flags(member)] for _, member, (argv, _) in hosts]
        threads = max(sharing.threads(member) for _, member, _ in hosts)
        names = [(member.role, member.name) for _, member, _ in hosts]
        return crew.start_together(hosts[0][0], names, *commands.together(parts, sharing.lanes, threads))

    def _settle(self, crew: Crew, sharing: Shared) -> None:
        """Apply the policy to the running processes, prove that it bites, and record what is really in force."""
        pids = {(child.role, child.name): child.popen.pid for child in crew.children}
        members = [member for member in sharing.cast.members if (member.role, member.name) in pids]
        notes = sharing.started({member: pids[member.role, member.name] for member in members})
        if sharing.lanes:
            notes += sharing.heard(lanes_of(crew.children))
        for note in notes:
            self._say(f"sharing {sharing.name}: {note}")
            self._events.write("policy", "launcher", sharing.name, note)
        shares = sharing.self_test()
        if shares:
            self._events.write("policy", "launcher", sharing.name, shares.sentence())
        self._run.update(sharing=sharing.describe())

    def _profiler(self, crew: Crew, name: str, place: Place) -> Child:
        watch = place.out / WATCH_FILE
        command = commands.profiler(place.out, watch, self._pair.config.period_s, place.control)
        return crew.start(place, "profiler", name, *command)

    def _addresses(self, crew: Crew) -> list[Address]:
        """Where the services listen: on their machines, or, when they run elsewhere, where the user says."""
        config = self._pair.config
        elsewhere = self._pair.beside is not None and config.launch.placement.server is None
        hosts = [
            config.host if elsewhere else crew.place("server", index).host
            for index in range(len(self._pair.services))
        ]
        return [Address("tcp", host, config.port + index) for index, host in enumerate(hosts)]

    # One window

    def _measure(self, segment: Segment, rows: dict[tuple[int, int], tuple[int, int]], crew: Crew) -> None:
        cast = self._cast(segment, crew)
        crew.compare_clocks("before")
        start_ns = self._arm(segment, rows, cast, crew)
        stop_ns = start_ns + round(segment.duration_s * NS_PER_S)
        self._say(f"{segment.arm} (repeat {segment.repeat + 1}): {segment.duration_s:g} s")
        self._events.write("window_start", "launcher", segment.arm, f"segment {segment.index}", start_ns)
        self._watch(segment, start_ns, stop_ns, crew)
        ended_ns = min(now_ns(), stop_ns)
        self._events.write("window_end", "launcher", segment.arm, f"segment {segment.index}", ended_ns)
        self.record.segments.append({**asdict(segment), "start_ns": start_ns, "stop_ns": ended_ns})
        self._drain(segment, cast, crew)
        crew.compare_clocks("after")
        crew.collect()
        self._run.update(segments=self.record.segments, counts=self.record.counts)

    def _cast(self, segment: Segment, crew: Crew) -> list[Child]:
        """Who takes part: clients first, so that they stop sending before anybody else is drained."""
        roles = (["client", "server"] if segment.serves else []) + (["trainer"] if segment.trains else [])
        return [child for role in (*roles, "profiler") for child in crew.of(role)]

    def _arm(
        self, segment: Segment, rows: dict[tuple[int, int], tuple[int, int]], cast: list[Child], crew: Crew
    ) -> int:
        """Prepare everybody for one instant, each on its own clock; when preparing took too long, for a later one."""
        ahead_s = ARM_AHEAD_S
        for _ in range(ARM_TRIES):
            start_ns = now_ns() + round(ahead_s * NS_PER_S)
            stop_ns = start_ns + round(segment.duration_s * NS_PER_S)
            sent = []
            for channel in self._remotes:
                ahead_ns = channel.clock_offset().offset_ns
                begin_ns, end_ns = start_ns + ahead_ns, stop_ns + ahead_ns
                channel.request(Arm(segment.arm, segment.repeat, segment.index, begin_ns, end_ns), ANSWER_S)
            for child in cast:
                stream = self._stream(child)
                first, last = rows.get((segment.index, stream), (0, 0)) if stream is not None else (0, 0)
                begin_ns, end_ns = crew.to_child(child, start_ns), crew.to_child(child, stop_ns)
                arm = Arm(segment.arm, segment.repeat, segment.index, begin_ns, end_ns, first, last)
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

    def _watch(self, segment: Segment, start_ns: int, stop_ns: int, crew: Crew) -> None:
        """Sleep through the window, with a look at it once a second where one is wanted."""
        if self._live is None or not crew.shows_live:
            self._sleep_until(stop_ns, crew)
            return
        services = [service.label for service in self._pair.services]
        self._live.begin(self._run.path, segment, services, start_ns, stop_ns)
        try:
            self._sleep_until(stop_ns, crew)
        finally:
            self._live.end()

    def _sleep_until(self, stop_ns: int, crew: Crew) -> None:
        """Sleep through the window; a child's death is recorded at once, a stop signal ends the window."""
        poller = select.poll()
        poller.register(self._stop.fileno(), select.POLLIN)
        watched = {child.fd: child for child in crew.children if child.alive}
        for fd in watched:
            poller.register(fd, select.POLLIN)
        live = self._live if crew.shows_live else None
        while (now := now_ns()) < stop_ns and not self._stop.requested:
            wake_ns = min(stop_ns, crew.next_ns, live.next_ns if live else NEVER_NS)
            for fd, _ in poller.poll(max(0, wake_ns - now) / NS_PER_MS + 1):
                if fd in watched:
                    poller.unregister(fd)
                    child = watched.pop(fd)
                    ended = child.how_it_ended() if child.closed_fd() else "closed its control connection"
                    self.fault(f"{child.label} {ended} during a measurement")
            if live:
                live.tick()
            crew.tick()

    def _drain(self, segment: Segment, cast: list[Child], crew: Crew) -> None:
        timeout_s = self._pair.config.drain_timeout_s
        for child in cast:
            body = self._ask(child, Drain(round(timeout_s * 1000)), timeout_s + ANSWER_S)
            if body is None:
                continue
            self.record.counts.append({"segment": segment.index, "role": child.role, "name": child.name, **body})
        for child in (child for child in cast if child.role == "client"):
            crew.write_requests(child.name, segment.index)

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

    def _finish(self, crew: Crew) -> None:
        for role in ("client", "trainer", "server", "profiler"):
            for child in crew.of(role):
                if child.channel:
                    self._ask(child, Stop("the run is over"), ANSWER_S)
        for child in list(crew.children):
            with suppress(subprocess.TimeoutExpired):
                child.popen.wait(timeout=ANSWER_S)
        self._events.write("stop", "launcher", "", "the run is over")


def _channel(child: Child) -> Channel:
    if child.channel is None:
        raise RunFault(f"{child.label} never reported")
    return child.channel
