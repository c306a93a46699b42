"""Ray as this program uses it: one actor per node that starts processes and hands over files, and nothing else.

Ray is imported here and only when it is asked for. It is never in the path of a request: 0.5-1 ms per call and a
few per cent of a core would become part of what is measured. What had to be known:

- `ray.init` on an address where nobody listens takes minutes, so the address is tried by hand first.
- Ray replaces 127.0.0.1 by the host's address, on which a cluster of the loopback does not answer;
  RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 keeps it (for `ray start` as well as here), but then a cluster has one node.
  Two nodes on one machine are best called 127.0.0.2 and 127.0.0.3, which Ray leaves alone.
- `ray.init` takes over SIGTERM; the launcher's handlers are put back.
- Workers run at niceness 15 and without GPUs; see corun.launch.agent.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from corun.errors import CorunError, InputError, RunFault
from corun.launch.agent import NodeAgent
from corun.launch.placement import Node, distinct_names
from corun.registry import home
from corun.run.launching import RAY_MISSING

CALL_S = 10.0
AGENT_START_S = 60.0
KNOCK_S = 5.0
AUTO = "auto"
LOOPBACK = ("127.0.0.1", "localhost")
ELSEWHERE = ("203.0.113.1", 9)
OWN_LABEL = "ray.io/node-id"
_INTERNAL = ("node:", "memory", "object_store_memory")


class NodeLost(RunFault):
    """A node that died or cannot be reached."""


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise InputError(RAY_MISSING) from None
    return ray


def connect(address: str) -> tuple[list[Node], Node]:
    """Join the cluster as a driver, once per process: its living nodes, and the one this process is on.

    InputError when Ray is missing or nobody answers at the address.
    """
    if address != AUTO:
        _knock(address)
    ray = _ray()
    if not ray.is_initialized():
        with _own_signals():
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise InputError(
                    f"cannot join the Ray cluster at {address}: {str(error).splitlines()[0]}; this machine has to be a "
                    "node of it: ray start --address HEAD:6379"
                ) from error
    alive = [entry for entry in ray.nodes() if entry["Alive"]]
    nodes = nodes_of(alive)
    own = ray.get_runtime_context().get_node_id()
    here = [node for node in nodes if node.id == own]
    if not here:
        raise InputError("this machine's Ray node is not alive any more: ray start --address HEAD:6379")
    return nodes, here[0]


def nodes_of(entries: list[dict[str, Any]]) -> list[Node]:
    """Nodes from what ray.nodes() says of the living ones."""
    names = distinct_names([str(entry["NodeName"] or entry["NodeManagerAddress"]) for entry in entries])
    return [
        Node(
            id=entry["NodeID"],
            name=name,
            address=entry["NodeManagerAddress"],
            labels={key: value for key, value in (entry.get("Labels") or {}).items() if key != OWN_LABEL},
            resources=frozenset(
                resource for resource in entry.get("Resources") or {} if not resource.startswith(_INTERNAL)
            ),
        )
        for name, entry in zip(names, entries, strict=True)
    ]


def _knock(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f'launch.address: "{address}" is not host:port of the head, e.g. 10.0.0.1:6379, or auto')
    try:
        socket.create_connection((host, int(port)), KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster answers at {address}: {error}; start its head there: ray start --head --port {port}"
        ) from error
    if host in LOOPBACK and not _answers_outside(int(port)):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def _answers_outside(port: int) -> bool:
    """Whether a port of this host answers on the address Ray would put in place of 127.0.0.1; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(ELSEWHERE)
        socket.create_connection((probe.getsockname()[0], port), 1.0).close()
        return True
    return False


@contextmanager
def _own_signals() -> Iterator[None]:
    """Signal handlers as they were before."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            with suppress(ValueError):
                signal.signal(number, handler)


class Agent:
    """A NodeAgent on its node, called with a time limit; the first call that gets no answer loses the node for good.

    It is made at once and usable after `ready`, so that several start side by side.
    """

    def __init__(self, node: Node) -> None:
        ray = _ray()
        self.node = node
        self.lost = self.why = ""
        self.facts: dict[str, Any] = {}
        options = {"num_cpus": 0, "max_restarts": 0, "label_selector": {OWN_LABEL: node.id}}
        self._actor = ray.remote(NodeAgent).options(**options).remote()

    def ready(self) -> Agent:
        """Wait until it answers and has this launcher's paths."""
        self.facts = self.call("facts", timeout_s=AGENT_START_S)
        self.call("release", sys.executable, str(home()))
        return self

    def call(self, method: str, *arguments: Any, timeout_s: float = CALL_S) -> Any:
        """The method's answer; its own CorunError, or NodeLost with the reason."""
        if self.lost:
            raise NodeLost(self.lost)
        ray = _ray()
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CorunError):
                raise error.cause from None
            raise RunFault(f"node {self.node.name}: {method} failed: {error.cause}") from error
        except ray.exceptions.RayActorError as error:
            raise self._lose(_reason(error)) from None
        except ray.exceptions.GetTimeoutError:
            raise self._lose(f"it did not answer within {timeout_s:g} s") from None

    def _lose(self, reason: str) -> NodeLost:
        self.why = reason
        kept = f"; what it wrote is in {self.facts['directory']} there" if self.facts else ""
        self.lost = f"node {self.node.name} ({self.node.address}) was lost: {reason}{kept}"
        return NodeLost(self.lost)

    def end(self) -> None:
        """Kill the actor; whatever it started dies with it."""
        ray = _ray()
        with suppress(ray.exceptions.RayError, ValueError):
            ray.kill(self._actor)


def _reason(error: Exception) -> str:
    """One line of what Ray says about a dead actor."""
    text = str(error)
    if "ModuleNotFoundError" in text:
        return "it cannot import corun: the same checkout and Python environment have to be on every node"
    known = {"unavailable": "its connection broke", "node has died": "it died", "node died": "it died"}
    told = [sentence for sign, sentence in known.items() if sign in text]
    return (told or ["its agent died"])[0]


__all__ = ["Agent", "NodeLost", "connect", "nodes_of"]
