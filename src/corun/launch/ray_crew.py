"""The processes of a run on the nodes of a Ray cluster.

    launcher ── Ray: start, signal, fetch ──▶ agent of node k ── fork ──▶ server, trainer, client, profiler
        └────── control channels (TCP): ARM, CLOCK, START, DRAIN, STOP ─────────────┘

While a window is measured Ray is idle: a process that dies closes its control connection, which the launcher waits
for as it does for a pidfd; a node that vanishes without a word is found by TCP keep-alive within KEEP_ALIVE_S. The
clock of each other node is compared over the control connection of one of its processes, its profiler first, whose
round trip is a tenth of an actor call's: before each window, every COMPARE_EVERY_S during it, and after it.

Each node writes into a directory of its own. After each window, once a minute during it and at the end the rows are
brought here, on the launcher's clock (see corun.launch.merge). What was not brought from a node that is lost stays in
its directory there.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from corun.clock import NS_PER_S, now_ns
from corun.errors import InputError, RunFault, WireError
from corun.launch import drift, ray_cluster
from corun.launch.cells import NOT_ON_A_CLUSTER
from corun.launch.children import LOST, Child
from corun.launch.control import ControlSocket
from corun.launch.crew import Place, Shared
from corun.launch.live import NEVER_NS
from corun.launch.merge import ClockMap, Comparison, Merged, destination, summary
from corun.launch.placement import Node, Placement, Want, place
from corun.launch.ray_cluster import Agent, NodeLost
from corun.process import clock_id
from corun.run.config import Pair
from corun.run.directory import RunDirectory, hardware
from corun.run.launching import Roles, Where
from corun.share.policy import Cast, Member
from corun.share.selftest import Shares
from corun.share.spec import in_one_process

COMPARE_EVERY_S = 5.0
COMPARE_WAIT_S = 2.0
KEEP_ALIVE_S = 8
ENDED_WAIT_S = 5.0
STOP_S = 20.0
CHUNK = 4 << 20
NO_POLICY = "none"
BRIEFED = ("schedule.npy", drift.SPECIFICATION)


class RemoteProcess:
    """A process on another node, held like a subprocess.Popen."""

    def __init__(self, agent: Agent, pid: int) -> None:
        self.pid = pid
        self._agent = agent
        self._code: int | None = None

    @property
    def returncode(self) -> int | None:
        return self._code

    def poll(self) -> int | None:
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._look(3600.0 if timeout is None else timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"pid {self.pid} on {self._agent.node.name}", timeout or 3600.0)
        return code

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _look(self, timeout_s: float) -> int | None:
        if self._code is None:
            try:
                limit_s = timeout_s + ray_cluster.CALL_S
                self._code = self._agent.call("wait", self.pid, timeout_s, timeout_s=limit_s)
            except NodeLost:
                self._code = LOST
        return self._code

    def _signal(self, number: int) -> None:
        with suppress(NodeLost):
            self._agent.call("send_signal", self.pid, number)


class RemoteChild(Child):
    """A child on another node: its end shows at its control connection, its log is asked for."""

    agent: Agent

    @property
    def fd(self) -> int:
        return self.channel.fileno() if self.channel else -1

    def closed_fd(self) -> bool:
        try:
            self.popen.wait(ENDED_WAIT_S)
        except subprocess.TimeoutExpired:
            return False
        return True

    def log_tail(self) -> str:
        if self.agent.lost:
            return self.agent.why
        try:
            return str(self.agent.call("log_tail", self.popen.pid))
        except RunFault as error:
            return str(error)

    def close(self) -> None:
        if self.channel:
            self.channel.close()


@dataclass
class Site:
    """One node of the run: its agent, the port its processes report to, its clock, and what was brought from it."""

    node: Node
    agent: Agent
    control: ControlSocket
    same_clock: bool
    clock: ClockMap = field(default_factory=ClockMap)
    tables: dict[str, Merged] = field(default_factory=dict)
    copied: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def place(self) -> Place:
        facts = self.agent.facts
        return Place(
            self.node.name, Path(facts["directory"]), self.control.address, int(facts["pid"]), self.node.address
        )


class RayCrew:
    """The crew of one run on a cluster; make it, enter it, leave it, as corun.launch.crew.LocalCrew."""

    shows_live = False

    def __init__(self, pair: Pair, run: RunDirectory, fault: Callable[[str], None]) -> None:
        self._run = run
        self._fault = fault
        self._stack = ExitStack()
        self._sites: dict[str, Site] = {}
        self._shared: RemoteShared | None = None
        self._nodes, self._home = ray_cluster.connect(pair.config.launch.address)
        services = len(pair.services)
        elsewhere = pair.beside is not None and pair.config.launch.placement.server is None
        self.placement = place(
            self._nodes,
            self._home,
            wants(pair.config.launch.placement),
            0 if elsewhere else services,
            pair.train is not None,
            clients=services,
        )
        if pair.train and pair.train.publish and not self.placement.shared:
            raise InputError(
                "publish cannot be had here",
                [f"the services follow a directory of the trainer's node, but they are on {_where(self.placement)}"],
            )
        self.children: list[Child] = []
        self._compare_ns = NEVER_NS
        self._every_ns = round(pair.config.launch.collect_s * NS_PER_S)
        self._collect_ns = NEVER_NS

    def __enter__(self) -> Self:
        try:
            agents = [Agent(node) for node in self.placement.nodes]
            for agent in agents:
                self._stack.callback(agent.end)
            for agent in agents:
                control = self._stack.enter_context(ControlSocket(self._home.address))
                same_clock = agent.ready().facts["clock"] == clock_id()
                self._sites[agent.node.id] = Site(agent.node, agent, control, same_clock)
                self._brief(self._sites[agent.node.id])
        except BaseException:
            self._stack.close()
            raise
        return self

    def _brief(self, site: Site) -> None:
        """What processes read that are told more than their command line says."""
        for path in map(self._run.file, BRIEFED):
            if path.exists():
                site.agent.call("put", path.name, path.read_bytes(), timeout_s=STOP_S)

    def __exit__(self, *exc: object) -> None:
        with self._stack:
            for child in self.children:
                child.close()
            for site in self._sites.values():
                self._end(site)

    def _end(self, site: Site) -> None:
        """Stop what runs on a node, bring the last of its files, and leave nothing of it there."""
        try:
            site.agent.call("terminate", timeout_s=STOP_S)
            self._bring(site)
            site.agent.call("remove")
        except RunFault as error:
            self._fault(str(error))

    # Places

    def place(self, role: str, index: int = 0) -> Place:
        return self._sites[self._node(role, index).id].place

    def _node(self, role: str, index: int = 0) -> Node:
        by_role = {"server": self.placement.servers, "client": self.placement.clients}
        nodes = by_role.get(role, (self.placement.trainer,) if role == "trainer" and self.placement.trainer else ())
        return nodes[index] if nodes else self.placement.measured

    def profiled(self) -> Sequence[tuple[str, Place]]:
        measured = self.placement.measured
        ordered = sorted(self.placement.profiled, key=lambda node: node != measured)
        return [("profiler" if node == measured else node.name, self._sites[node.id].place) for node in ordered]

    def cores(self, role: str) -> int:
        return int(self._site(role).agent.facts["cores"])

    def has_cuda(self, role: str) -> bool:
        return bool(self._site(role).agent.facts["cuda"])

    def _site(self, role: str) -> Site:
        return self._sites[self._node(role).id]

    def share(self, spec: Any, cast: Cast) -> Shared:
        if in_one_process(spec):
            raise InputError("the sharing policy cannot be had here", [f"{_named(spec)}: {NOT_ON_A_CLUSTER}"])
        measured = self.placement.measured
        here = tuple(member for member in cast.services if self._node("server", member.index) == measured)
        trainer = cast.trainer if self._node("trainer") == measured else None
        if not self.placement.shared and _named(spec) != NO_POLICY:
            raise InputError(
                "the sharing policy cannot be had here",
                [
                    f"{_named(spec)}: trainer and services have to be on one node, for they share its cores and a page "
                    f"of its memory; they are on {_where(self.placement)}"
                ],
            )
        site = self._sites[measured.id]
        site.agent.call("share", spec, Cast(here, trainer, cast.devices, cast.one_process))
        self._shared = RemoteShared(site.agent, cast, frozenset((*here, *([trainer] if trainer else []))))
        return self._shared

    def deliver(self, place: Place, path: Path) -> Path:
        if path.name not in BRIEFED:
            self._by_name(place.node).agent.call("put", path.name, path.read_bytes(), timeout_s=STOP_S)
        return place.out / path.name

    def _by_name(self, name: str) -> Site:
        return next(site for site in self._sites.values() if site.node.name == name)

    # Processes

    def start(self, place: Place, role: str, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> Child:
        agent = self._by_name(place.node).agent
        argv = [word.replace(str(self._run.path), str(place.out)) for word in argv]
        pid = agent.call("start", role, name, list(argv), dict(environment))
        log = self._run.file("logs") / f"{role}-{name}.log"
        child = RemoteChild(role, name, tuple(argv), log, RemoteProcess(agent, pid), -1, node=place.node)
        child.agent = agent
        self.children.append(child)
        row = {"pid": pid, "role": role, "name": name, "node": place.node, "t_ns": now_ns(), "argv": list(argv)}
        self._run.path.mkdir(parents=True, exist_ok=True)
        with open(self._run.file("processes.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return child

    def start_together(
        self, place: Place, parts: Sequence[tuple[str, str]], argv: Sequence[str], environment: Mapping[str, str]
    ) -> list[Child]:
        raise InputError(NOT_ON_A_CLUSTER)

    def wait_for(self, children: Sequence[Child], timeout_s: float) -> None:
        for site in self._sites.values():
            site.control.wait_for([child for child in children if child.node == site.node.name], self, timeout_s)
        for child in self.children:
            if child.channel:
                _keep_alive(child.channel.sock)

    def of(self, *roles: str) -> list[Child]:
        return [child for child in self.children if child.role in roles and child.alive]

    def require_alive(self) -> None:
        ended = [child for child in self.children if not child.alive]
        if ended:
            raise RunFault("; ".join(f"{child.label} {child.how_it_ended()}" for child in ended))

    def describe(self) -> dict[str, Any]:
        """`nodes`: every node of the run with its hardware and clock; `hardware` is that of the measured one."""
        measured = self._sites[self.placement.measured.id]
        nodes = {
            site.node.name: {
                "address": site.node.address,
                "labels": dict(site.node.labels),
                "roles": self.placement.roles(site.node),
                "measured": site is measured,
                **{key: site.agent.facts[key] for key in ("hardware", "versions", "git")},
                "clock": {"same_as_launcher": site.same_clock, **summary(site.clock.comparisons)},
                **({"lost": site.agent.lost} if site.agent.lost else {}),
            }
            for site in self._sites.values()
        }
        return {
            "nodes": nodes,
            "hardware": measured.agent.facts["hardware"],
            "launcher": {"node": self._home.name, "address": self._home.address, "hardware": hardware()},
        }

    # Windows

    def to_child(self, child: Child, t_ns: int) -> int:
        return self._by_name(child.node).clock.to_node(t_ns)

    @property
    def next_ns(self) -> int:
        return min(self._compare_ns, self._collect_ns)

    def tick(self) -> None:
        if now_ns() >= self._compare_ns:
            self.compare_clocks("during")
        if now_ns() >= self._collect_ns:
            self.collect()

    def compare_clocks(self, when: str) -> None:
        """A node whose clock cannot be compared now keeps its last offset; that it is gone shows elsewhere."""
        for site in self._sites.values():
            if site.same_clock:
                continue
            for child in self._answering(site):
                with suppress(WireError, RunFault):
                    assert child.channel is not None
                    begin = now_ns()
                    offset = child.channel.clock_offset(timeout_s=COMPARE_WAIT_S)
                    site.clock.add(Comparison.of(when, (begin + now_ns()) // 2, offset))
                    break
        elsewhere = any(not site.same_clock for site in self._sites.values())
        self._compare_ns = now_ns() + round(COMPARE_EVERY_S * NS_PER_S) if elsewhere else NEVER_NS
        if when == "before":
            self._collect_ns = now_ns() + self._every_ns

    def _answering(self, site: Site) -> list[Child]:
        """Children of a node that answer CLOCK, the profiler first; never a client, which may be sending."""
        order = {"profiler": 0, "server": 1, "trainer": 2}
        known = [child for child in self.children if child.node == site.node.name and child.channel]
        return sorted((child for child in known if child.role in order), key=lambda child: order[child.role])

    def write_requests(self, service: str, segment: int) -> None:
        for site in self._sites.values():
            if site.node in self.placement.clients:
                with suppress(NodeLost):
                    site.agent.call("write_requests", service, segment, timeout_s=STOP_S)

    def collect(self) -> None:
        self._collect_ns = now_ns() + self._every_ns
        for site in self._sites.values():
            try:
                self._bring(site)
            except RunFault as error:
                self._fault(str(error))

    def _bring(self, site: Site) -> None:
        """What a node wrote since the last time: rows are appended, other files replaced."""
        measured = site.node == self.placement.measured
        for name, size, changed_ns in site.agent.call("listing"):
            there = destination(name, site.node.name, measured)
            if there is None:
                continue
            if name.endswith(".csv"):
                table = site.tables.setdefault(name, Merged(self._run.file(there), site.clock))
                self._bring_rows(site, name, table, size)
            elif site.copied.get(name) != (size, changed_ns):
                path = self._run.file(there)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"".join(self._chunks(site, name, 0, size)))
                site.copied[name] = (size, changed_ns)

    def _bring_rows(self, site: Site, name: str, table: Merged, size: int) -> None:
        rest = b""
        for chunk in self._chunks(site, name, table.taken, size):
            rest = (rest + chunk)[table.append(rest + chunk) :]

    def _chunks(self, site: Site, name: str, begin: int, end: int) -> Any:
        for offset in range(begin, end, CHUNK):
            yield site.agent.call("read", name, offset, min(CHUNK, end - offset), timeout_s=STOP_S)


class RemoteShared:
    """The sharing policy of the measured node, asked over its agent; processes of other nodes are left alone."""

    def __init__(self, agent: Agent, cast: Cast, here: frozenset[Member]) -> None:
        self.cast = cast
        self._agent = agent
        self._here = here

    @property
    def name(self) -> str:
        return str(self.describe()["policy"])

    def threads(self, member: Member) -> int:
        return int(self._ask("threads", member)) if member in self._here else member.threads

    def environment(self, member: Member) -> dict[str, str]:
        return dict(self._ask("environment", member)) if member in self._here else {}

    def command(self, member: Member, argv: Sequence[str]) -> list[str]:
        return list(self._ask("command", member, list(argv))) if member in self._here else list(argv)

    def flags(self, member: Member) -> list[str]:
        return list(self._ask("flags", member)) if member in self._here else []

    @property
    def lanes(self) -> dict[str, Any]:
        return {}

    def heard(self, lanes: Mapping[str, Any]) -> list[str]:
        """Nobody has lanes: one process is refused on a cluster."""
        return []

    def started(self, pids: Mapping[Member, int]) -> list[str]:
        return list(self._ask("started", {member: pid for member, pid in pids.items() if member in self._here}))

    def enter(self, arm: str) -> None:
        self._ask("enter", arm)

    def self_test(self) -> Shares | None:
        shares: Shares | None = self._ask("self_test")
        return shares

    def describe(self) -> dict[str, Any]:
        return dict(self._ask("describe"))

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self._agent.call("sharing", method, *arguments, timeout_s=STOP_S)


def wants(roles: Roles) -> dict[str, Want]:
    """What each role that is placed asks of its node."""
    given: dict[str, Where | None] = {
        "server": roles.server,
        "client": roles.client,
        "trainer": roles.trainer,
        "profiler": roles.profiler,
    }
    return {role: Want(where.node, where.label, where.resource) for role, where in given.items() if where}


def _named(spec: Any) -> str:
    return str(spec.get("policy", NO_POLICY) if isinstance(spec, Mapping) else spec or NO_POLICY)


def _where(placement: Placement) -> str:
    trainer = placement.trainer.name if placement.trainer else "no node"
    return f"{trainer} (trainer) and {', '.join(sorted({node.name for node in placement.servers}))} (services)"


def _keep_alive(sock: socket.socket) -> None:
    """Have the kernel ask whether the other end is still there, and close the connection when it is not."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_ALIVE_S // 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEP_ALIVE_S // 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, KEEP_ALIVE_S * 1000)


__all__ = ["RayCrew", "RemoteChild", "RemoteProcess", "RemoteShared", "wants"]
