"""Who watches a service hears of every request once, and how long its sender waited."""

from __future__ import annotations

from tests.unit.serve.tools import Serving, until

from corun.clock import NS_PER_S, now_ns
from corun.wire import Kind, pack_request


class Watcher:
    """Counts arrivals and keeps the latencies it is told."""

    def __init__(self) -> None:
        self.arrived = 0
        self.latencies_ns: list[int] = []

    def on_request(self) -> None:
        self.arrived += 1

    def on_reply(self, latency_ns: int | None = None) -> None:
        assert latency_ns is not None
        self.latencies_ns.append(latency_ns)


def test_every_request_is_announced_and_taken_back_once() -> None:
    """Answered, refused and failed requests alike: as many replies as arrivals, or a trainer would wait for ever."""
    watcher = Watcher()
    with Serving(observer=watcher, queue_limit=2) as serving:
        client = serving.client()
        serving.servable.gate.clear()
        client.send(b"first")
        serving.servable.entered.wait(60)
        client.send(b"bad", b"x", b"rejected", b"rejected too")
        until(lambda: watcher.arrived == 5)
        serving.servable.gate.set()
        client.receive(5)
        until(lambda: len(watcher.latencies_ns) == 5)
    assert watcher.arrived == len(watcher.latencies_ns) == 5


def test_the_latency_counts_from_the_intended_time() -> None:
    """A request that should have been sent two seconds ago has waited two seconds: an SLO is about that."""
    watcher = Watcher()
    with Serving(observer=watcher) as serving:
        client = serving.client()
        late, now = now_ns() - 2 * NS_PER_S, now_ns()
        client.sock.sendall(pack_request(Kind.INFER, 0, 0, 1, late, now) + b"x")
        client.receive(1)
        until(lambda: watcher.latencies_ns)
    assert watcher.latencies_ns[0] >= 2 * NS_PER_S
