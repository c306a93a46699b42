"""The bounded queue between the thread that reads sockets and the thread that runs the model.

The reader never blocks: what does not fit is handed back to be answered REJECTED, and counted. Tasks (load,
warm-up, arm) go before requests, between two batches.

The model thread sleeps in a read of an eventfd. Writing to it lets go of the interpreter, so the sleeper can run
the moment it is woken; a threading.Lock is released with the interpreter held, and on a shared core the woken
thread then only finds it taken (measured: 7 instead of 14 µs from the last byte to the pick). Only a batch that
is held until a deadline sleeps on a lock, for its timeout is finer than a millisecond.
"""

from __future__ import annotations

import os
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
    from corun.serve.generation import Tokens
    from corun.serve.statistics import Segment

Task = Callable[[], None]

PICKED = STAMPS.index("picked")
BATCHED = STAMPS.index("batched")
_UNREACHED = (0,) * (len(STAMPS) - 2)


class Request:
    """One inference request on its way through the server.

    stamps: ns of CLOCK_MONOTONIC in the order of wire.STAMPS, 0 = not reached. payload is emptied once it is
    decoded. reply, status, detail and batch are filled by the engine. info: the model
    that answered. deadline_ns: nothing is computed for it after that, 0 = none. given_up: its sender took it back;
    whoever computes it looks at this. tokens: what was counted of a generated answer.
    """

    __slots__ = (
        "batch",
        "connection",
        "deadline_ns",
        "detail",
        "given_up",
        "header",
        "info",
        "payload",
        "queue_len",
        "reply",
        "segment",
        "stamps",
        "status",
        "tokens",
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
        self.segment = segment
        self.stamps = [t_first, t_done, *_UNREACHED]
        self.status: int = 0
        self.reply = b""
        self.detail = ""
        self.batch = 0
        self.queue_len = 0
        self.info: ServableInfo | None = None
        self.deadline_ns = 0
        self.given_up = False
        self.tokens: Tokens | None = None

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
        self._single = batcher.max_batch == 1
        self._limit = limit
        self._lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._alarm = threading.Lock()
        self._alarm.acquire()
        self._waker: Callable[[], None] | None = None
        self._tasks: deque[Task] = deque()
        self._closed = False
        self._taken: list[Request] = []
        self._kept: set[Request] = set()

    def __len__(self) -> int:
        return len(self._policy)

    @property
    def in_flight(self) -> int:
        """Requests picked and not answered yet."""
        return len(self._taken) + len(self._kept)

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
            for request in requests if len(requests) <= room else requests[:room]:
                request.queue_len = waiting
                push(request)
                waiting += 1
            wake, self._waker = self._waker, None
        if wake is not None:
            wake()
        if len(requests) <= room:
            return ()
        for request in requests[room:]:
            request.queue_len = waiting
        return requests[room:]

    def post(self, task: Task) -> None:
        """Have the model thread do something between two batches, before any waiting request."""
        with self._lock:
            self._tasks.append(task)
            wake, self._waker = self._waker, None
        if wake is not None:
            wake()

    def close(self) -> None:
        """Let the model thread end: `take` returns None from now on."""
        with self._lock:
            self._closed = True
            wake, self._waker = self._waker, None
        if wake is not None:
            wake()

    def clear(self) -> list[Request]:
        """Remove and return everything that waits."""
        with self._lock:
            return [self._policy.pop(now_ns()) for _ in range(len(self._policy))]

    def cancel(self, connection: Connection, stream: int, id: int) -> list[Request]:
        """Take one request back: removed and returned where it waits, marked `given_up` where it is being answered."""

        def named(request: Request) -> bool:
            header = request.header
            return request.connection is connection and header.id == id and header.stream == stream

        with self._lock:
            for request in (*self._taken, *self._kept):
                request.given_up |= named(request)
            waiting = [self._policy.pop(now_ns()) for _ in range(len(self._policy))]
            for request in waiting:
                if not named(request):
                    self._policy.push(request)
        return [request for request in waiting if named(request)]

    def give_up(self) -> None:
        """Mark all that is being answered as taken back."""
        with self._lock:
            for request in (*self._taken, *self._kept):
                request.given_up = True

    def take(self, requests: bool = True) -> list[Request] | Task | None:
        """The next batch, picked and closed, or a task, or None once closed; sleeps until there is one.

        requests: False takes tasks only. What was taken counts as in flight until `done`.
        """
        held: list[Request] = []
        self._taken = held
        while True:
            with self._lock:
                if not held and (self._tasks or self._closed):
                    return self._tasks.popleft() if self._tasks else None
                if not requests:
                    wait_until_ns: int | None = NEVER
                else:
                    wait_until_ns = self._pick_one(held) if self._single else self._pick(held)
                if wait_until_ns is None:
                    break
                self._waker = self._write if wait_until_ns == NEVER else self._alarm.release
            self._sleep(wait_until_ns)
        closed_ns = now_ns()
        for request in held:
            request.stamps[BATCHED] = closed_ns
        return held

    def _pick_one(self, held: list[Request]) -> int | None:
        """What `_pick` comes to for a batcher that makes batches of one."""
        if not self._policy:
            return NEVER
        now = now_ns()
        request = self._policy.pop(now)
        request.stamps[PICKED] = now
        held.append(request)
        return None

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
            if close:
                return None
            if not take:
                return wait_until_ns

    def _write(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _sleep(self, wait_until_ns: int) -> None:
        """Wait for a wake-up; afterwards nobody owes one."""
        if wait_until_ns == NEVER:
            os.eventfd_read(self._wake_fd)
            return
        remaining_s = max(0, wait_until_ns - now_ns()) / NS_PER_S
        if self._alarm.acquire(timeout=remaining_s):
            return
        with self._lock:
            owed, self._waker = self._waker is None, None
        if owed:
            self._alarm.acquire()

    def done(self) -> None:
        """What was taken has been answered, or is kept."""
        self._taken = []

    def keep(self, requests: Sequence[Request]) -> None:
        """These were taken and will be answered later: each is in flight until `release`."""
        with self._lock:
            self._kept.update(requests)

    def release(self, request: Request) -> None:
        """One that was kept is answered now."""
        with self._lock:
            self._kept.discard(request)

    def dispose(self) -> None:
        """Release the descriptor, once the model thread has ended."""
        os.close(self._wake_fd)
