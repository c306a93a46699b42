"""Replicas on nodes, with agents that are made up: which node, what a lost node means, how one is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from corun.errors import RunFault
from corun.launch import ray_cluster, ray_runtime
from corun.launch.placement import Node
from corun.launch.ray_cluster import NodeLost
from corun.launch.ray_runtime import RayRuntime, placed
from corun.run import config
from corun.tasks.runtime import ReplicaSpec, Usage

HOME, A, B = (
    Node("0", "home", "10.0.0.1"),
    Node("1", "a", "10.0.0.2", {"r": "s"}),
    Node("2", "b", "10.0.0.3", {"r": "s"}),
)
LAUNCH = config.parse(
    {"launch": {"backend": "ray", "address": "x:1", "placement": {"server": {"label": "r=s"}}}}
).launch


class FakeAgent:
    """A node where every replica runs until it is asked to end."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.lost = ""
        self.calls: list[tuple[Any, ...]] = []
        self.running = True

    def ready(self) -> FakeAgent:
        return self

    def call(self, method: str, *arguments: Any, timeout_s: float = 1.0) -> Any:
        if self.lost:
            raise NodeLost(self.lost)
        self.calls.append((method, *arguments))
        if method == "start_replica":
            return "77", {"cpu": "none"}
        if method == "end_replica" or arguments[1:] == ("kill",):
            self.running = False
            return None
        return {"alive": self.running, "usage": Usage(2.0, 30.0), "logs": "words", "how_it_ended": "is running"}[
            arguments[1]
        ]

    def end(self) -> None:
        self.lost = "ended"


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> RayRuntime:
    monkeypatch.setattr(ray_cluster, "connect", lambda address: ([HOME, A, B], HOME))
    monkeypatch.setattr(ray_runtime, "Agent", FakeAgent)
    return RayRuntime(LAUNCH)


def _spec(index: int) -> ReplicaSpec:
    return ReplicaSpec("task", index, "null", None, 5000 + index, Path("task.log"))


def test_replicas_go_round_the_nodes_that_fit(runtime: RayRuntime) -> None:
    """Replica k listens on the address of the k-th node that fits; the launcher's own node is none of them."""
    assert [str(runtime.start(_spec(index)).address) for index in range(3)] == [
        "10.0.0.2:5000",
        "10.0.0.3:5001",
        "10.0.0.2:5002",
    ]


def test_a_replica_of_a_lost_node_has_ended_and_the_next_one_is_elsewhere(runtime: RayRuntime) -> None:
    """Nothing of a lost node raises; its replica is dead, says why, and is started where somebody answers."""
    handle = runtime.start(_spec(0))
    assert handle.usage() == Usage(2.0, 30.0)
    runtime._agents[A.id].lost = "node a was lost: it died"
    assert not handle.alive()
    assert handle.how_it_ended() == "ended with its node: node a was lost: it died"
    assert handle.usage() == Usage(2.0, 0.0)
    assert "lost" in handle.logs()
    handle.stop(1.0)
    handle.kill()
    assert runtime.start(_spec(0)).address.host == B.address
    runtime._agents[B.id].lost = "node b was lost: it died"
    with pytest.raises(RunFault, match="no node is left"):
        runtime.start(_spec(0))


def test_stopping_asks_first_and_then_kills(runtime: RayRuntime) -> None:
    """`stop` lets the replica finish, and what is left of it is killed."""
    handle = runtime.start(_spec(0))
    handle.stop(5.0)
    asked = [call[0] if call[0] != "replica" else call[2] for call in runtime._agents[A.id].calls]
    assert asked.index("end_replica") < asked.index("kill")


def test_only_processes_are_placed_on_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cluster the runtime `process` is the nodes'; containers stay, and without one nothing changes."""
    monkeypatch.setattr(ray_runtime, "RayRuntime", lambda launch: ("nodes", launch))
    here: Any = lambda name: ("here", name)  # noqa: E731
    assert placed(LAUNCH, here)("process") == ("nodes", LAUNCH)
    assert placed(LAUNCH, here)("docker") == ("here", "docker")
    assert placed(config.parse({}).launch, here)("process") == ("here", "process")
