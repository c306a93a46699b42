"""The bounded queue between the thread that reads sockets and the thread that runs the model.

The reader never blocks: what does not fit is handed back to be answered REJECTED, and counted. The model thread
sleeps on one lock used as a binary semaphore, which costs a third of what threading.Condition does; it is
released only while somebody really sleeps. Tasks (load, warm-up, arm) go before requests, between two batches.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from corun.clock import NS_PER_S, now_ns
from corun.serve.batcher import NEVER, Batcher
from corun.serve.policies import QueuePolicy
from corun.wire import STAMPS, RequestHeader, Status

if TYPE_CHECKING:
    from corun.registry import ServableInfo
    from corun.serve.connection import Connection
    from corun.serve.statistics import Segment

Task = Callable[[], None]

PICKED = STAMPS.index("picked")
BATCHED = STAMPS.index("batched")
_UNREACHED = (0,) * (len(STAMPS) - 2)


class Request:
    """One inference request on its way through the server.

    stamps: ns of CLOCK_MONOTONIC in the order of wire.STAMPS, 0 = not reached. payload is emptied once it is
    decoded; payload_bytes stays. reply, status, detail and batch are filled by the engine. info: the model
    that answered.
    """

    __slots__ = (
        "batch",
        "connection",
        "detail",
        "header",
        "info",
        "payload",
        "payload_bytes",
        "queue_len",
        "reply",
        "segment",
        "stamps",
        "status",
    )

    def __init__(
        self,
        connection: Connection,
        header: RequestHeader,
        payload: bytes | bytearray,
        t_first: int,
        t_done: int,
        segment: Segment,
    ) -> None:
        self.connection = connection
        self.header = header
        self.payload = payload
        self.payload_bytes = header.payload_len
        self.segment = segment
        self.stamps = [t_first, t_done, *_UNREACHED]
        self.status: int = 0
        self.reply = b""
        self.detail = ""
        self.batch = 0
        self.queue_len = 0
        self.info: ServableInfo | None = None

    @property
    def t_first(self) -> int:
        """First byte received, ns."""
        return self.stamps[0]

    @property
    def t_done(self) -> int:
        """Last byte received, ns: its arrival at the queue."""
        return self.stamps[1]

    def end(self, status: Status, detail: str, reply: bytes = b"") -> None:
        """Give it an answer that is not a result."""
        self.status, self.detail, self.reply = status, detail, reply
        self.payload = b""


class RequestQueue:
    """At most `limit` waiting requests in the order of `policy`, taken in batches as `batcher` says."""

    def __init__(self, policy: QueuePolicy[Request], batcher: Batcher, limit: int) -> None:
        self._policy = policy
        self._batcher = batcher
        self._limit = limit
        self._lock = threading.Lock()
        self._wake = threading.Lock()
        self._wake.acquire()
        self._sleeping = False
        self._tasks: deque[Task] = deque()
        self._closed = False
        self.in_flight = 0

    def __len__(self) -> int:
        return len(self._policy)

    @property
    def idle(self) -> bool:
        """No request waits and none is being answered."""
        with self._lock:
            return not (self._policy or self.in_flight)

    def offer(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Enqueue in order; returns those that found the queue full, untouched but for queue_len."""
        with self._lock:
            waiting, push = len(self._policy), self._policy.push
            room = self._limit - waiting
            accepted = requests if len(requests) <= room else requests[:room]
            for request in accepted:
                request.queue_len = waiting
                push(request)
                waiting += 1
            wake, self._sleeping = self._sleeping, False
        if wake:
            self._wake.release()
        rejected = requests[len(accepted) :]
        for request in rejected:
            request.queue_len = waiting
        return rejected

    def post(self, task: Task) -> None:
        """Have the model thread do something between two batches, before any waiting request."""
        with self._lock:
            self._tasks.append(task)
            wake, self._sleeping = self._sleeping, False
        if wake:
            self._wake.release()

    def close(self) -> None:
        """Let the model thread end: `take` returns None from now on."""
        with self._lock:
            self._closed = True
            wake, self._sleeping = self._sleeping, False
        if wake:
            self._wake.release()

    def clear(self) -> list[Request]:
        """Remove and return everything that waits."""
        with self._lock:
            return [self._policy.pop(now_ns()) for _ in range(len(self._policy))]

    def take(self) -> list[Request] | Task | None:
        """The next batch, picked and closed, or a task, or None once closed; sleeps until there is one.

        What was taken counts as in flight until `done`.
        """
        held: list[Request] = []
        while True:
            with self._lock:
                if not held and (self._tasks or self._closed):
                    return self._tasks.popleft() if self._tasks else None
                wait_until_ns = self._pick(held)
                if wait_until_ns is None:
                    break
                self._sleeping = True
            self._sleep(wait_until_ns)
        closed_ns = now_ns()
        for request in held:
            request.stamps[BATCHED] = closed_ns
        return held

    def _pick(self, held: list[Request]) -> int | None:
        """Move what the batcher takes from the policy to `held`; None when the batch is closed."""
        policy, batcher = self._policy, self._batcher
        while True:
            now = now_ns()
            oldest_ns = min(request.stamps[1] for request in held) if held else 0
            take, close, wait_until_ns = batcher.decide(len(held), len(policy), oldest_ns, now)
            for _ in range(take):
                request = policy.pop(now)
                request.stamps[PICKED] = now
                held.append(request)
            self.in_flight = len(held)
            if close:
                return None
            if not take:
                return wait_until_ns

    def _sleep(self, wait_until_ns: int) -> None:
        """Wait for a wake-up; afterwards nobody owes one."""
        if wait_until_ns == NEVER:
            self._wake.acquire()
            return
        remaining_s = max(0, wait_until_ns - now_ns()) / NS_PER_S
        if self._wake.acquire(timeout=remaining_s):
            return
        with self._lock:
            woken, self._sleeping = not self._sleeping, False
        if woken:
            self._wake.acquire()

    def done(self) -> None:
        """What was taken has been answered."""
        self.in_flight = 0
