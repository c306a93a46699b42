"""Which replica gets a request, and what becomes of requests whose replica goes away. Pure: no sockets, no clock.

    client ──▶ submit ──▶ the ready replica with the fewest outstanding ──▶ complete ──▶ client
                  │            ▲  no room: wait, oldest first               │
                  │            └──────── waiting ◀── once, if the replica ──┘
                  └▶ refused: over the limit                  died or turned it away

A replica takes at most `window` requests at a time; the rest waits here, where a replica that joins later can still
take it and one that dies cannot lose it. Every request that was submitted ends exactly once: with a replica's reply
or with a refusal. A request is sent to two replicas at most, so one that kills its server does not kill them all;
inference has no side effects, so being run twice does no harm.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from corun.wire import RequestHeader, Status

__all__ = ["Limits", "Pending", "Replica", "Routing", "State"]

ClientT = TypeVar("ClientT")
LinkT = TypeVar("LinkT")

MAX_ATTEMPTS = 2
TURNED_AWAY = frozenset({int(Status.NOT_LOADED), int(Status.DRAINING), int(Status.CANCELLED)})


class State(StrEnum):
    """What a replica is to the router."""

    DOWN = "down"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True)
class Limits:
    """How much a router holds on to.

    requests, payload_bytes: waiting and outstanding together; more are answered REJECTED. window: outstanding at one
    replica. answer_ns: longest wait for a replica's answer. hold_ns: longest wait for a replica while none is ready.
    """

    requests: int = 1024
    payload_bytes: int = 256 << 20
    window: int = 64
    answer_ns: int = 30_000_000_000
    hold_ns: int = 5_000_000_000


class Pending(Generic[ClientT]):
    """One request between its arrival and its reply; the payload is kept so that it can be sent again.

    since_ns: when it was last sent, or began to wait.
    """

    __slots__ = ("attempts", "client", "header", "payload", "received_ns", "since_ns")

    def __init__(self, client: ClientT, header: RequestHeader, payload: bytes | bytearray, received_ns: int) -> None:
        self.client = client
        self.header = header
        self.payload = payload
        self.received_ns = received_ns
        self.since_ns = received_ns
        self.attempts = 0


@dataclass(eq=False)
class Replica(Generic[ClientT, LinkT]):
    """One server behind the router; `outstanding` is in the order of sending.

    last_pick: serial number of the last request it got. busy_ns: time with something outstanding, up to `busy_since`.
    """

    name: str
    link: LinkT
    state: State = State.DOWN
    outstanding: dict[int, Pending[ClientT]] = field(default_factory=dict)
    last_pick: int = 0
    answered: int = 0
    lost: int = 0
    busy_ns: int = 0
    busy_since: int = 0

    def busy_until(self, now_ns: int) -> int:
        """Time with something outstanding up to now, ns."""
        return self.busy_ns + (now_ns - self.busy_since if self.outstanding else 0)


class Routing(Generic[ClientT, LinkT]):
    """The table of replicas and requests.

    send: hands a request to a replica under the id it is to be sent with. refuse: answers a request without a result.
    Neither may call back into the table.
    """

    def __init__(
        self,
        limits: Limits,
        send: Callable[[Replica[ClientT, LinkT], int, Pending[ClientT]], None],
        refuse: Callable[[Pending[ClientT], Status, str], None],
    ) -> None:
        self.limits = limits
        self.replicas: dict[str, Replica[ClientT, LinkT]] = {}
        self.waiting: deque[Pending[ClientT]] = deque()
        self.received = 0
        self.answered: Counter[int] = Counter()
        self.retried = 0
        self.strays = 0
        self.outstanding = 0
        self.payload_bytes = 0
        self._send = send
        self._refuse = refuse
        self._next_id = 1
        self._ready: list[Replica[ClientT, LinkT]] = []

    # Requests

    def submit(self, request: Pending[ClientT], now_ns: int) -> None:
        """Take a request in: it is sent, waits, or is refused at once."""
        self.received += 1
        limits, size = self.limits, len(request.payload)
        if (
            self.outstanding + len(self.waiting) >= limits.requests
            or self.payload_bytes + size > limits.payload_bytes
        ):
            self._end(request, Status.REJECTED, "the router holds as many requests as it may; send fewer at a time")
            return
        self.payload_bytes += size
        replica = None if self.waiting else self._choose()
        if replica is None:
            self.waiting.append(request)
        else:
            self._dispatch(replica, request, now_ns)

    def complete(
        self, replica: Replica[ClientT, LinkT], id: int, status: int, now_ns: int
    ) -> Pending[ClientT] | None:
        """The request that a reply belongs to, which is over now; None when there is nothing to pass on.

        Nothing is: the reply matches no request, or the replica turned the request away and another one gets it.
        """
        request = replica.outstanding.pop(id, None)
        if request is None:
            self.strays += 1
            return None
        self.outstanding -= 1
        if not replica.outstanding:
            replica.busy_ns += now_ns - replica.busy_since
        again = status in TURNED_AWAY and self._retry(request, replica, now_ns)
        if not again:
            replica.answered += 1
            self.answered[status] += 1
            self.payload_bytes -= len(request.payload)
        if self.waiting:
            self._pump(now_ns)
        return None if again else request

    def part(self, replica: Replica[ClientT, LinkT], id: int, now_ns: int) -> Pending[ClientT] | None:
        """The request that a part of an answer belongs to; more follows, and it is not sent elsewhere any more."""
        request = replica.outstanding.get(id)
        if request is None:
            self.strays += 1
            return None
        request.attempts, request.since_ns = MAX_ATTEMPTS, now_ns
        return request

    def take_back(self, client: ClientT, stream: int, id: int) -> tuple[Replica[ClientT, LinkT], int] | None:
        """Its client does not want this answer any more: the replica to be told so, and the id there.

        One that still waits ends here; None when there is nobody to tell.
        """
        for request in self.waiting:
            if (request.client, request.header.stream, request.header.id) == (client, stream, id):
                self.waiting.remove(request)
                self._give_up(request, Status.CANCELLED, "cancelled by its client")
                return None
        for replica in self.replicas.values():
            for number, request in replica.outstanding.items():
                if (request.client, request.header.stream, request.header.id) == (client, stream, id):
                    request.attempts = MAX_ATTEMPTS
                    return replica, number
        return None

    def headers_of(self, client: ClientT) -> list[RequestHeader]:
        """Headers of all open requests of one client."""
        outstanding = [one for replica in self.replicas.values() for one in replica.outstanding.values()]
        return [request.header for request in [*self.waiting, *outstanding] if request.client is client]

    def expire(self, now_ns: int) -> None:
        """Refuse what has waited for a replica, or for its answer, longer than the limits allow."""
        ready = bool(self._ready)
        hold_ns = self.limits.answer_ns if ready else self.limits.hold_ns
        reason = "no replica had room for it in time" if ready else "no replica is ready"
        status = Status.EXPIRED if ready else Status.NOT_LOADED
        late = [request for request in self.waiting if now_ns - request.since_ns >= hold_ns]
        for request in late:
            self.waiting.remove(request)
            self._give_up(request, status, reason)
        for replica in self.replicas.values():
            self._expire_at(replica, now_ns)

    def turn_away(self, request: Pending[ClientT]) -> None:
        """Refuse a new request because the router is finishing."""
        self.received += 1
        self._end(request, Status.DRAINING, "the router is finishing")

    def cancel(self, now_ns: int) -> None:
        """Refuse everything that is still open: the router ends."""
        while self.waiting:
            self._give_up(self.waiting.popleft(), Status.CANCELLED, "the router was stopped")
        for replica in self.replicas.values():
            for request in self._take_all(replica, now_ns):
                self._give_up(request, Status.CANCELLED, "the router was stopped")

    # Replicas

    def add(self, name: str, link: LinkT) -> Replica[ClientT, LinkT]:
        """A new replica, not ready yet; ValueError when the name is taken."""
        if name in self.replicas:
            raise ValueError(f'there already is a replica "{name}"')
        replica: Replica[ClientT, LinkT] = Replica(name, link)
        self.replicas[name] = replica
        return replica

    def ready(self, replica: Replica[ClientT, LinkT], now_ns: int) -> None:
        """The replica takes requests from now on; it starts with what waits."""
        if replica.state is State.DOWN:
            replica.state = State.READY
            replica.last_pick = self._next_id - 1
            self._ready.append(replica)
        self._pump(now_ns)

    def drain(self, name: str) -> Replica[ClientT, LinkT]:
        """The replica gets nothing new; what it has it may finish. KeyError without such a replica."""
        replica = self.replicas[name]
        replica.state = State.DRAINING
        self._unready(replica)
        return replica

    def fail(self, replica: Replica[ClientT, LinkT], now_ns: int) -> None:
        """The replica is gone: what it had goes to another one, once, else it is refused."""
        if replica.state is State.READY:
            replica.state = State.DOWN
        self._unready(replica)
        orphans = self._take_all(replica, now_ns)
        replica.lost += len(orphans)
        for request in reversed(orphans):
            if not self._retry(request, replica, now_ns):
                self._give_up(request, Status.FAILED, f"its replica {replica.name} went away before it answered")
        self._pump(now_ns)

    def remove(self, name: str, now_ns: int) -> Replica[ClientT, LinkT]:
        """Forget a replica, as if it had gone away. KeyError without such a replica."""
        replica = self.replicas[name]
        self.fail(replica, now_ns)
        del self.replicas[name]
        return replica

    @property
    def open(self) -> int:
        """Requests that wait or are outstanding."""
        return self.outstanding + len(self.waiting)

    # Steps

    def _choose(self) -> Replica[ClientT, LinkT] | None:
        """The ready replica with the fewest outstanding; of equals the one that was picked longest ago."""
        best: Replica[ClientT, LinkT] | None = None
        least, oldest = self.limits.window, 0
        for replica in self._ready:
            count = len(replica.outstanding)
            if count < least or (best is not None and count == least and replica.last_pick < oldest):
                best, least, oldest = replica, count, replica.last_pick
        return best

    def _dispatch(self, replica: Replica[ClientT, LinkT], request: Pending[ClientT], now_ns: int) -> None:
        id = self._next_id
        self._next_id = id + 1
        if not replica.outstanding:
            replica.busy_since = now_ns
        replica.outstanding[id] = request
        replica.last_pick = id
        request.since_ns = now_ns
        request.attempts += 1
        self.outstanding += 1
        self._send(replica, id, request)

    def _pump(self, now_ns: int) -> None:
        """Send what waits, oldest first, while there is room."""
        while self.waiting and (replica := self._choose()) is not None:
            self._dispatch(replica, self.waiting.popleft(), now_ns)

    def _retry(self, request: Pending[ClientT], replica: Replica[ClientT, LinkT], now_ns: int) -> bool:
        """Put it in front of what waits, if it may be sent again.

        A replica that turns requests away is not asked again: it is loading another model or about to end.
        """
        if request.attempts >= MAX_ATTEMPTS:
            return False
        if replica.state is State.READY:
            replica.state = State.DOWN
            self._unready(replica)
        request.since_ns = now_ns
        self.waiting.appendleft(request)
        self.retried += 1
        return True

    def _expire_at(self, replica: Replica[ClientT, LinkT], now_ns: int) -> None:
        outstanding, limit_ns = replica.outstanding, self.limits.answer_ns
        for id in [id for id, request in outstanding.items() if now_ns - request.since_ns >= limit_ns]:
            request = outstanding.pop(id)
            self.outstanding -= 1
            if not outstanding:
                replica.busy_ns += now_ns - replica.busy_since
            self._give_up(request, Status.EXPIRED, f"replica {replica.name} did not answer in time")

    def _take_all(self, replica: Replica[ClientT, LinkT], now_ns: int) -> list[Pending[ClientT]]:
        taken = list(replica.outstanding.values())
        replica.busy_ns = replica.busy_until(now_ns)
        replica.outstanding.clear()
        self.outstanding -= len(taken)
        return taken

    def _give_up(self, request: Pending[ClientT], status: Status, reason: str) -> None:
        self.payload_bytes -= len(request.payload)
        self._end(request, status, reason)

    def _end(self, request: Pending[ClientT], status: Status, reason: str) -> None:
        self.answered[int(status)] += 1
        self._refuse(request, status, reason)

    def _unready(self, replica: Replica[ClientT, LinkT]) -> None:
        if replica in self._ready:
            self._ready.remove(replica)
