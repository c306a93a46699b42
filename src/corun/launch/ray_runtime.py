"""Replicas of the control plane on the nodes of a Ray cluster: the runtime `process`, elsewhere.

    runtime = RayRuntime(Launch(backend="ray", address="10.0.0.1:6379", placement=...))
    handle = runtime.start(spec)         replica k on the k-th node that fits "server", round about
    runtime.close()                      everything it started ends, and so it does with this process

    Supervisor(store, options, runtimes=placed(launch, make_runtime))      tasks of runtime `process` go to the nodes

Each node's agent starts a replica as the runtime `process` does there, with the limits of that node; requests go
straight to the node's address. A node that is lost is a replica that ended, so whoever supervises starts another one,
which then is placed on a node that answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final

from corun.errors import RunFault
from corun.launch import ray_cluster
from corun.launch.placement import place
from corun.launch.ray_cluster import Agent, NodeLost
from corun.launch.ray_crew import wants
from corun.run.launching import Launch
from corun.tasks.runtime import ReplicaSpec, Runtime, Usage, answers
from corun.wire.sockets import Address

LOOK_EVERY_S: Final = 0.1
ON_NODES: Final = "process"
NODES: Final = 1000


class RayRuntime:
    """Starts replicas on the nodes that fit `placement.server`. InputError when cluster or placement cannot be had."""

    name = "ray"

    def __init__(self, launch: Launch) -> None:
        nodes, home = ray_cluster.connect(launch.address)
        placed = place(nodes, home, wants(launch.placement), services=NODES, trains=False, clients=0)
        self._nodes = tuple(dict.fromkeys(placed.servers))
        self._agents: dict[str, Agent] = {}
        self._lock = threading.Lock()

    def start(self, spec: ReplicaSpec) -> RayHandle:
        """Start one and return at once; RunFault when no node is left or the one it was placed on refuses."""
        with self._lock:
            agent = self._agent(spec.index)
        there = replace(spec, host=agent.node.address)
        key, limits = agent.call("start_replica", there)
        return RayHandle(there, agent, key, limits)

    def _agent(self, index: int) -> Agent:
        living = [node for node in self._nodes if node.id not in self._agents or not self._agents[node.id].lost]
        if not living:
            raise RunFault(
                f"no node is left for replicas: {'; '.join(agent.lost for agent in self._agents.values())}"
            )
        node = living[index % len(living)]
        if node.id not in self._agents:
            self._agents[node.id] = Agent(node).ready()
        return self._agents[node.id]

    def close(self) -> None:
        """End everything that was started."""
        for agent in self._agents.values():
            with suppress(RunFault):
                agent.call("terminate")
                agent.call("remove")
            agent.end()
        self._agents = {}


def placed(launch: Launch, here: Callable[[str], Runtime]) -> Callable[[str], Runtime]:
    """Makes runtimes by name: `process` on the cluster `launch` asks for, anything else (and all without one) `here`."""

    def make(name: str) -> Runtime:
        return RayRuntime(launch) if name == ON_NODES and not launch.local else here(name)

    return make


class RayHandle:
    """A replica on another node."""

    def __init__(self, spec: ReplicaSpec, agent: Agent, key: str, limits: dict[str, str]) -> None:
        self.spec = spec
        self.limits_in_force = limits
        self._agent = agent
        self._key = key
        self._used = Usage(0.0, None)

    @property
    def address(self) -> Address:
        return self.spec.address

    @property
    def id(self) -> str:
        return f"{self._agent.node.name}:{self._key}"

    @property
    def pid(self) -> int | None:
        """None: it is a process of another host."""
        return None

    def alive(self) -> bool:
        try:
            return bool(self._agent.call("replica", self._key, "alive"))
        except NodeLost:
            return False

    def healthy(self, timeout_s: float = 2.0) -> bool:
        body = answers(self.address, timeout_s)
        return body is not None and str(body.get("pid")) == self._key and bool(body.get("model"))

    def logs(self, tail: int = 50) -> str:
        try:
            return str(self._agent.call("replica", self._key, "logs", tail))
        except NodeLost as error:
            return str(error)

    def how_it_ended(self) -> str:
        try:
            return str(self._agent.call("replica", self._key, "how_it_ended"))
        except NodeLost as error:
            return f"ended with its node: {error}"

    def stop(self, grace_s: float = 10.0) -> None:
        with suppress(NodeLost):
            self._agent.call("end_replica", self._key)
            patience = time.monotonic() + grace_s
            while self.alive() and time.monotonic() < patience:
                time.sleep(LOOK_EVERY_S)
            self.kill()

    def kill(self) -> None:
        with suppress(NodeLost):
            self._agent.call("replica", self._key, "kill")

    def usage(self) -> Usage:
        """What it uses; what it had used when its node was lost."""
        try:
            self._used = self._agent.call("replica", self._key, "usage")
        except NodeLost:
            return Usage(self._used.cpu_s, 0.0)
        return self._used


__all__ = ["RayHandle", "RayRuntime", "placed"]
