"""Which process runs on which machine: by a node's name, label or resource, decided before anything starts.

    server    spread over the nodes that fit, service 0 on the first; default: the launcher's node
    trainer   the first that fits; default: the node of the first service, where it can disturb it
    client    spread as the services are; default: the launcher's node
    profiler  every node that runs something of the above, or of those the ones that fit

Nodes are taken in the order of their names, so the same configuration gives the same placement every time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from corun.errors import InputError

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Node:
    """One machine: a name for files and messages, the address its services listen on, what it offers."""

    id: str
    name: str
    address: str
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    resources: frozenset[str] = frozenset()

    def describe(self) -> str:
        """`edge-1 (10.0.0.2; labels role=servers; resources gpu)` for messages."""
        labels = ", ".join(f"{key}={value}" for key, value in sorted(self.labels.items()))
        parts = [self.address, *([f"labels {labels}"] if labels else [])]
        if self.resources:
            parts.append(f"resources {', '.join(sorted(self.resources))}")
        return f"{self.name} ({'; '.join(parts)})"


@dataclass(frozen=True)
class Want:
    """What a node must have to be chosen for a role; all that is set must fit."""

    node: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    resource: str | None = None

    def fits(self, node: Node) -> bool:
        """True when the node has all that is asked for."""
        return (
            self.node in (None, node.name, node.address)
            and all(node.labels.get(key) == value for key, value in self.labels.items())
            and (self.resource is None or self.resource in node.resources)
        )

    def describe(self) -> str:
        """`label role=servers` for messages."""
        parts = [f"node {self.node}"] if self.node else []
        parts += [f"label {key}={value}" for key, value in sorted(self.labels.items())]
        return " and ".join([*parts, *([f"resource {self.resource}"] if self.resource else [])])


@dataclass(frozen=True)
class Placement:
    """The node of every process; `profiled` are the nodes that get a profiler, the measured one first."""

    servers: tuple[Node, ...]
    clients: tuple[Node, ...]
    trainer: Node | None
    profiled: tuple[Node, ...]
    nodes: tuple[Node, ...]

    @property
    def measured(self) -> Node:
        """The node whose profile is the run's own: that of the first service, else of the trainer, else the first."""
        return (*self.servers, *([self.trainer] if self.trainer else []), *self.nodes)[0]

    @property
    def shared(self) -> bool:
        """True when trainer and all services are on one node."""
        return len({node.id for node in (*self.servers, *([self.trainer] if self.trainer else []))}) <= 1

    def roles(self, node: Node) -> tuple[str, ...]:
        """What runs on a node: some of server, trainer, client, profiler."""
        where = (("server", self.servers), ("trainer", (self.trainer,)), ("client", self.clients))
        return tuple(role for role, nodes in (*where, ("profiler", self.profiled)) if node in nodes)


def place(
    nodes: Sequence[Node],
    home: Node,
    wants: Mapping[str, Want],
    services: int,
    trains: bool,
    clients: int | None = None,
) -> Placement:
    """Place `services` servers, as many clients (or `clients`) and a trainer; InputError lists every role nobody fits.

    home: the launcher's own node. wants: by role; roles that are left out take their default.
    """
    ordered = sorted(nodes, key=lambda node: (node.name, node.id))
    fitting = {role: tuple(filter(want.fits, ordered)) for role, want in wants.items()}
    empty = [role for role, found in fitting.items() if not found]
    if empty:
        there = ", ".join(node.describe() for node in ordered) or "no node at all"
        problems = [f"{role}: no node has {wants[role].describe()}; there are {there}" for role in empty]
        raise InputError("the placement cannot be had on this cluster", problems)
    servers = _spread(fitting.get("server", (home,)), services)
    trainer = fitting.get("trainer", (servers or (home,)))[0] if trains else None
    senders = _spread(fitting.get("client", (home,)), services if clients is None else clients)
    used = tuple(dict.fromkeys((*servers, *([trainer] if trainer else []), *senders)))
    profiled = tuple(node for node in used if node in fitting.get("profiler", used))
    if used and not profiled:
        raise InputError(
            "the placement cannot be had on this cluster",
            [f"profiler: no node with {wants['profiler'].describe()} runs a server, a trainer or a client"],
        )
    return Placement(servers, senders, trainer, profiled, used)


def _spread(nodes: Sequence[Node], count: int) -> tuple[Node, ...]:
    return tuple(nodes[index % len(nodes)] for index in range(count))


def distinct_names(names: Sequence[str]) -> list[str]:
    """Names that can be directories, each once: `edge 1`, `edge 1` become edge-1 and edge-1-2."""
    given: dict[str, int] = {}
    found = []
    for name in names:
        safe = _UNSAFE.sub("-", name).strip(".-") or "node"
        given[safe] = given.get(safe, 0) + 1
        fresh = safe if given[safe] == 1 else f"{safe}-{given[safe]}"
        while fresh in found:
            given[safe] += 1
            fresh = f"{safe}-{given[safe]}"
        found.append(fresh)
    return found


__all__ = ["Node", "Placement", "Want", "distinct_names", "place"]
