"""One service: sockets on one side, a model on the other, a bounded queue between.

    io thread       epoll: accept, read, parse, stamp ─▶ queue ─▶ model thread    policy, batcher, engine
      control messages, refusals, backlogs, rows on disk            sends its replies itself

The io thread always drains: a model that stands still for a second delays answers, never the reading of requests,
so an open-loop client is never throttled by a full kernel buffer. A bad frame closes its connection with a
logged reason, never the server.

Rows reach the disk from the io thread, in slices of 32 (0.1 ms) and only when nothing has arrived for 2 ms, or
once rows are a second old: the model thread does nothing for them but append to a deque.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from corun.clock import NS_PER_MS, NS_PER_S, anchor, now_ns
from corun.errors import FrameError, InputError, PeerClosed, RunFault
from corun.run.table import EventLog
from corun.serve.batcher import Batcher
from corun.serve.connection import Connection
from corun.serve.control import Control
from corun.serve.engine import Engine
from corun.serve.options import ServerOptions
from corun.serve.policies import make_policy
from corun.serve.queue import Request, RequestQueue
from corun.serve.rows import RowLog
from corun.serve.statistics import Counts, Segment, Statistics, recent_ms
from corun.serve.worker import Lane, Worker, answer
from corun.wire import Address, Kind, Status, listen, number_in
from corun.wire.messages import Load, encode

ROLE = "server"
FLUSH_AFTER_S = 0.5
FLUSH_AT_LATEST_S = 1.0
QUIET_S = 0.002
JOIN_S = 0.5
IDLE_JOIN_S = 10.0
FOREVER = -1.0

EPOLLIN, EPOLLOUT = select.EPOLLIN, select.EPOLLOUT
INFER, CANCEL = int(Kind.INFER), int(Kind.CANCEL)

_REFUSALS = {
    Status.REJECTED: "the queue is full",
    Status.NOT_LOADED: "no model is loaded",
    Status.DRAINING: "the server is finishing",
    Status.CANCELLED: "cancelled by its client, or the server was stopped",
}
_REFUSAL_BODIES = {status: encode({"error": text}) for status, text in _REFUSALS.items()}


class StopRequest(Protocol):
    """What asks the server to finish: corun.process.StopSignal."""

    requested: bool

    def fileno(self) -> int: ...


class Observer(Protocol):
    """Who is told of every request's arrival and answer (corun.share.announce.Announcer)."""

    def on_request(self) -> None: ...

    def on_reply(self, latency_ns: int | None = None) -> None: ...


def _print(line: str) -> None:
    print(line, flush=True)


class Server:
    """Listens from the moment it is made; `serve` runs the io thread's loop in the caller's thread.

    load: makes an engine from a LOAD message, on the model thread. say: takes one line for the user.
    lane: what the model thread is inside of for all its life.
    abandoned: the model thread was still busy (a load, a hanging kernel) when `serve` returned.
    Raises InputError when the address cannot be had or an option makes no sense.
    """

    def __init__(
        self,
        options: ServerOptions,
        load: Callable[[Load], Engine],
        say: Callable[[str], None] = _print,
        observer: Observer | None = None,
        lane: Lane = contextlib.nullcontext,
    ) -> None:
        self.options = options
        self.say = say
        self.queue = RequestQueue(
            make_policy(options.policy), Batcher(options.max_batch, options.max_delay_ns), options.queue_limit
        )
        self._listener = listen(options.address)
        self._listener.setblocking(False)
        self.address = _bound(options.address, self._listener.getsockname())
        self.segment = Segment()
        self.segments = [self.segment]
        self.bad_frames = 0
        self.abandoned = False
        self._made_ns = now_ns()
        self._deadline_ms = options.deadline_ms
        self._events, self._rows = self._open_files()
        self._row_fault: RunFault | None = None
        self._rows_since_ns = 0
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._connections: dict[int, Connection] = {}
        self._accepting = True
        self._observer = observer
        self._record = self._recorder()
        self.worker = Worker(self.queue, self._record, self.fault, self.wake, lane)
        self.control = Control(self, load)

    def _open_files(self) -> tuple[EventLog | None, RowLog | None]:
        out = self.options.out
        if out is None:
            return None, None
        try:
            return EventLog(out / "events.csv"), RowLog(out / "infer_server", self.options.name, anchor())
        except (OSError, RunFault) as error:
            self._listener.close()
            raise InputError(f"--out {out} cannot be written: {error}") from error

    # The loop

    def serve(self, initial: Load | None = None, stop: StopRequest | None = None) -> Statistics:
        """Serve until STOP or `stop`; returns the final counts.

        Raises what `initial` failed with, or RunFault when the rows could not all be written.
        """
        switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(self.options.switch_interval_s)
        try:
            self._register(stop)
            self.worker.start()
            self.control.begin(initial)
            while not (self.control.pending and self.control.finished()):
                self._turn(stop)
        finally:
            sys.setswitchinterval(switch_interval_s)
            self._shut_down()
        fault = self.control.start_error or self._row_fault
        if fault:
            raise fault
        return self.statistics()

    def _register(self, stop: StopRequest | None) -> None:
        for fd in (self._listener.fileno(), self._wake_fd):
            self._epoll.register(fd, EPOLLIN)
        if stop:
            self._epoll.register(stop.fileno(), EPOLLIN)
        self.event("start", f"listening on {self.address}, pid {os.getpid()}")

    def _turn(self, stop: StopRequest | None) -> None:
        """One poll and everything it brought."""
        ready = self._epoll.poll(self._timeout_s())
        for fd, events in ready:
            connection = self._connections.get(fd)
            if connection is None:
                self._other(fd, stop)
            elif events == EPOLLIN:
                self._receive(connection)
            else:
                if events & EPOLLOUT:
                    connection.flush()
                if events & ~EPOLLOUT:
                    self._receive(connection)
        if self._rows_since_ns:
            self._flush_if_due(quiet=not ready)

    def _other(self, fd: int, stop: StopRequest | None) -> None:
        if fd == self._wake_fd:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
            if self.worker.crash:
                raise RunFault(f"the model thread died: {self.worker.crash!r}") from self.worker.crash
        elif fd == self._listener.fileno():
            self._accept()
        elif stop and fd == stop.fileno():
            self._epoll.unregister(fd)
            self.control.stop("a signal")

    def _timeout_s(self) -> float:
        """How long the poll may last, by what is to be done later."""
        timeout_s = self.control.timeout_s() if self.control.pending else FOREVER
        if self._rows is None:
            return timeout_s
        now = now_ns()
        if not self._rows_since_ns:
            if not (len(self._rows) or len(self.queue) or self.queue.in_flight):
                return timeout_s
            self._rows_since_ns = now
        rest_s = max(QUIET_S, FLUSH_AFTER_S - (now - self._rows_since_ns) / NS_PER_S)
        return rest_s if timeout_s < 0 else min(timeout_s, rest_s)

    def _flush_if_due(self, quiet: bool) -> None:
        """Write a slice of rows in a quiet moment, or in any moment when they are a second old."""
        age_s = (now_ns() - self._rows_since_ns) / NS_PER_S
        if age_s >= FLUSH_AT_LATEST_S or (quiet and age_s >= FLUSH_AFTER_S):
            self.flush_rows()
            if self._rows is None or not len(self._rows):
                self._rows_since_ns = 0

    # Connections

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self.fault(f"cannot accept: {error.strerror or error}; waiting until a connection closes")
                self._epoll.modify(self._listener.fileno(), 0)
                self._accepting = False
                return
            connection = Connection(sock, self._epoll, self.options.backlog_limit)
            self._connections[connection.fd] = connection

    def _receive(self, connection: Connection) -> None:
        if connection.reason:
            self._close(connection, connection.reason)
            return
        try:
            frames: list[Any] = connection.reader.receive(connection.sock)
        except PeerClosed as error:
            self._close(connection, str(error) if connection.reader.mid_frame else "")
            return
        except FrameError as error:
            self.bad_frames += 1
            self._close(connection, str(error))
            return
        segment, requests = self.segment, []
        for header, payload, t_first, t_done in frames:
            if header.kind == INFER:
                request = Request(connection, header, payload, t_first, t_done, segment)
                if header.flags or self._deadline_ms:
                    self._limit(request)
                requests.append(request)
            elif header.kind == CANCEL:
                self._enqueue(requests)
                requests = []
                self.refuse(self.queue.cancel(connection, header.stream, header.id), Status.CANCELLED)
            else:
                self._enqueue(requests)
                self.control.handle(connection, header, payload, t_first)
                segment, requests = self.segment, []
        if requests:
            self._enqueue(requests)

    def _limit(self, request: Request) -> None:
        """Its deadline, from the intended send time where that is on this host's clock."""
        header = request.header
        limit_ns = (number_in(header.flags) or self._deadline_ms) * NS_PER_MS
        if limit_ns:
            intended_ns = header.t_intended if request.connection.local else 0
            request.deadline_ns = (intended_ns or request.t_first) + limit_ns

    def _close(self, connection: Connection, reason: str) -> None:
        if reason:
            self.fault(f"closed the connection of {connection.peer}: {reason}")
        self._connections.pop(connection.fd, None)
        connection.close()
        if not self._accepting:
            self._epoll.modify(self._listener.fileno(), EPOLLIN)
            self._accepting = True

    # Requests

    def _enqueue(self, requests: Sequence[Request]) -> None:
        if not requests:
            return
        requests[0].segment.received += len(requests)
        if self._observer:
            for _ in requests:
                self._observer.on_request()
        if self.control.pending:
            self.refuse(requests, Status.DRAINING)
        elif self.worker.engine is None:
            self.refuse(requests, Status.NOT_LOADED)
        elif rejected := self.queue.offer(requests):
            self.refuse(rejected, Status.REJECTED)

    def _recorder(self) -> Callable[[Request], None]:
        """Where an answered request goes: its row, and whoever watches the queue."""
        keep, observer = _forget if self._rows is None else self._rows.add, self._observer
        if observer is None:
            return keep

        def record(request: Request) -> None:
            intended_ns = request.header.t_intended if request.connection.local else 0
            observer.on_reply(now_ns() - (intended_ns or request.t_first))
            keep(request)

        return record

    def refuse(self, requests: Sequence[Request], status: Status) -> None:
        """Answer without running the model, counted and recorded like every other answer."""
        for request in requests:
            request.end(status, _REFUSALS[status], _REFUSAL_BODIES[status])
            answer(request)
            request.segment.refused[status] += 1
            self._record(request)

    # What others ask of it

    def wake(self) -> None:
        """Have the io thread take another turn; from any thread."""
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def arm(self, segment: Segment) -> None:
        """Requests that arrive from now on belong to `segment`."""
        self.segments.append(segment)
        self.segment = segment

    def settled(self) -> bool:
        """Nothing waits, nothing runs, every reply has left."""
        return self.queue.idle and not any(item.backlog_bytes for item in self._connections.values())

    def flush_rows(self, everything: bool = False) -> None:
        """Write rows; a disk that refuses them is reported once, and the server goes on without rows."""
        if self._rows is None:
            return
        try:
            self._rows.flush(None) if everything else self._rows.flush()
        except RunFault as error:
            self._row_fault, self._rows = error, None
            self.say(f"{error}; serving goes on without rows")

    def fault(self, reason: str) -> None:
        """Say and record what went wrong; from any thread."""
        self.say(reason)
        self.event("fault", reason)

    def event(self, kind: str, detail: str) -> None:
        """Record an event; from any thread."""
        if self._events is not None:
            try:
                self._events.write(kind, ROLE, self.options.name, detail)
            except RunFault as error:
                self.say(str(error))

    def statistics(self) -> Statistics:
        """Counters now."""
        engine, recent = self.worker.engine, list(self.worker.recent)
        return Statistics(
            counts=Counts.total(self.segments),
            queue_len=len(self.queue),
            in_flight=self.queue.in_flight,
            connections=len(self._connections),
            bad_frames=self.bad_frames,
            backlog_bytes=sum(item.backlog_bytes for item in self._connections.values()),
            rows=0 if self._rows is None else self._rows.written,
            recent_p50_ms=recent_ms(recent, 50),
            recent_p99_ms=recent_ms(recent, 99),
            model=engine.info.model if engine else "",
            uptime_s=(now_ns() - self._made_ns) / NS_PER_S,
        )

    def _shut_down(self) -> None:
        self.queue.close()
        self.queue.give_up()
        self.abandoned = not self.worker.join(JOIN_S if self.queue.in_flight else IDLE_JOIN_S)
        if self.abandoned:
            lost = self.queue.in_flight
            self.fault("stopped while the model was busy" + f"; {lost} requests are lost" * bool(lost))
        else:
            self.queue.dispose()
        gc.unfreeze()
        self.event("stop", Counts.total(self.segments).summary())
        for connection in list(self._connections.values()):
            self._close(connection, "")
        self._listener.close()
        if self.options.address.scheme == "unix":
            with contextlib.suppress(OSError):
                os.unlink(self.options.address.host)
        self._close_files()

    def _close_files(self) -> None:
        self.flush_rows(everything=True)
        if self._rows is not None:
            self._rows.close()
        events, self._events = self._events, None
        if events is not None:
            events.close()
        self._epoll.close()
        wake_fd, self._wake_fd = self._wake_fd, -1
        os.close(wake_fd)


def _forget(request: Request) -> None:
    """Without a directory there are no rows."""


def _bound(asked: Address, name: str | tuple[str, int]) -> Address:
    """The address with the port the kernel chose, where 0 was asked."""
    return asked if asked.scheme == "unix" else Address("tcp", asked.host, int(name[1]))
