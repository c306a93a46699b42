"""The model thread: takes a batch or a task from the queue, runs it, sends the replies itself, forever.

Replies leave from here and not through the io thread: a second hand-over would cost another wake-up. Models are
loaded, warmed up and armed here too, between two batches, so an engine never sees two threads.

An engine that answers later (continuous batching) is handed requests while it has room for one, so that the others
wait where the policy ranks them; each answer comes back to this thread as a task.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from corun.clock import now_ns
from corun.process import set_timer_slack
from corun.serve.engine import Engine
from corun.serve.generation import CANCELLED, EXPIRED, SubmittingEngine
from corun.serve.queue import Request, RequestQueue
from corun.serve.statistics import RECENT
from corun.wire import STAMPS, Kind, Status, pack_reply, reply_flags
from corun.wire.messages import encode

TX = STAMPS.index("tx")
REPLY = int(Kind.REPLY)
MAX_FAULTS = 64

Lane = Callable[[], AbstractContextManager[Any]]


class Worker:
    """One thread around one queue; `engine` is swapped by tasks that run in it.

    record: takes every answered request. fault: told each distinct reason of a failure once. wake: called after
    each piece of work while `watched` is set. lane: a context the thread is inside of for all its life, e.g. a stream.
    """

    def __init__(
        self,
        queue: RequestQueue,
        record: Callable[[Request], None],
        fault: Callable[[str], None],
        wake: Callable[[], None],
        lane: Lane = nullcontext,
    ) -> None:
        self._engine: Engine | None = None
        self._later: SubmittingEngine | None = None
        self.watched = False
        self.crash: BaseException | None = None
        self.recent: deque[int] = deque(maxlen=RECENT)
        self._queue = queue
        self._record = record
        self._fault = fault
        self._wake = wake
        self._lane = lane
        self._faults: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    @property
    def engine(self) -> Engine | None:
        """What answers; one that answers later is closed when another takes its place."""
        return self._engine

    @engine.setter
    def engine(self, engine: Engine | None) -> None:
        if self._later is not None:
            self._later.close()
        self._engine = engine
        self._later = engine if isinstance(engine, SubmittingEngine) else None

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; False when it is still busy then."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            with self._lane():
                self._work_until_closed()
        except BaseException as error:  # noqa: BLE001 - top of the thread: the io thread raises it
            self.crash = error
            self._wake()

    def _work_until_closed(self) -> None:
        set_timer_slack(1)
        queue = self._queue
        while (work := queue.take(self._later is None or self._later.has_room)) is not None:
            if isinstance(work, list):
                self._serve(work)
            else:
                work()
            queue.done()
            if self.watched:
                self._wake()
        if self._later is not None:
            self._later.close()

    def _serve(self, batch: list[Request]) -> None:
        engine = self.engine
        for request in batch:
            if request.connection.closed:
                request.end(Status.CANCELLED, "the client is gone")
            elif request.given_up:
                request.end(Status.CANCELLED, CANCELLED)
            elif request.deadline_ns and now_ns() >= request.deadline_ns:
                request.end(Status.EXPIRED, EXPIRED)
            elif engine is None:
                request.end(Status.NOT_LOADED, "no model is loaded")
        live = [request for request in batch if not request.status]
        if self._later is not None and live:
            kept = self._later.submit(live, self._finished)
            self._queue.keep(kept)
            batch = [request for request in batch if request not in kept]
        elif engine is not None and live:
            engine.run(live)
        for request in batch:
            self._answer(request)

    def _finished(self, request: Request) -> None:
        """An engine that answers later has finished one; from its thread."""
        self._queue.post(lambda: self._complete(request))

    def _complete(self, request: Request) -> None:
        self._queue.release(request)
        self._answer(request)

    def _answer(self, request: Request) -> None:
        if request.status:
            self._explain(request)
        request.segment.answered[request.status] += 1
        answer(request)
        if not request.status:
            self.recent.append(request.stamps[TX] - request.stamps[1])
        self._record(request)

    def _explain(self, request: Request) -> None:
        """A reply with the reason; a failure of the engine is also an event, once per reason."""
        request.reply = encode({"error": request.detail})
        if request.status == Status.FAILED and request.detail not in self._faults:
            if len(self._faults) < MAX_FAULTS:
                self._faults.add(request.detail)
            self._fault(f"the model failed: {request.detail}")


def answer(request: Request) -> None:
    """Send a request's reply, stamped tx."""
    header = request.header
    request.stamps[TX] = now_ns()
    flags = 0 if request.tokens is None else reply_flags(request.tokens.out)
    packed = pack_reply(
        REPLY, header.stream, header.id, request.status, request.stamps, len(request.reply), request.batch, flags
    )
    request.connection.send(packed, request.reply)


def settle_memory() -> None:
    """After a load: free what the old model held and exempt the new one from garbage collection.

    A full collection over a model's objects would stop the server for tens of milliseconds.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
