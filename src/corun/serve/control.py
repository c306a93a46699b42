"""Control messages of a server: what is answered at once, what goes through the model thread, what waits.

    at once              HELLO CLOCK STATS START
    model thread         LOAD WARMUP ARM          in order, before waiting requests; answered when done
    once all is settled  DRAIN STOP               queue empty, replies flushed, rows written

While a DRAIN is pending new requests are answered DRAINING; afterwards the server serves on, for the next segment.
STOP and signals end it. STOP cancels what still waits; a signal lets it finish.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from corun import __version__
from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.errors import FrameError, RunFault
from corun.process import clock_id
from corun.serve.connection import Connection
from corun.serve.engine import Engine
from corun.serve.queue import Task
from corun.serve.statistics import Segment, count_body
from corun.serve.worker import settle_memory
from corun.wire import Kind, RequestHeader, Status, pack_reply
from corun.wire.frames import NO_STAMPS
from corun.wire.messages import Arm, Clock, Drain, Hello, Load, Start, Stats, Stop, Warmup, decode, encode

if TYPE_CHECKING:
    from corun.serve.server import Server

FOREVER = -1.0


class Caller(NamedTuple):
    """Who waits for an answer, and until when (0 = as long as it takes)."""

    connection: Connection
    header: RequestHeader
    deadline_ns: int = 0


class Control:
    """The control side of one server; `handle` and `finished` run on the io thread.

    pending: a DRAIN or STOP waits for the server to settle (or the first load failed): new requests are turned
    away and `finished` is to be asked after every turn.
    """

    def __init__(self, server: Server, load: Callable[[Load], Engine]) -> None:
        self._server = server
        self._load_engine = load
        self._drains: list[Caller] = []
        self._stops: list[Caller] = []
        self._stop_by_ns = 0
        self.pending = False
        self.start_error: BaseException | None = None

    def begin(self, initial: Load | None) -> None:
        """Load the first model, if any; a failure ends the server."""
        if initial is None:
            self._server.say(f"ready on {self._server.address} without a model: waiting for LOAD, pid {os.getpid()}")
            return

        def load() -> None:
            try:
                self._load(initial)
            except Exception as error:  # noqa: BLE001 - a plug-in may raise anything; serve() raises it again
                self.start_error = error
                self.pending = True
                self._server.wake()

        self._server.queue.post(load)

    def handle(self, connection: Connection, header: RequestHeader, payload: bytes | bytearray, t_first: int) -> None:
        """Answer a control frame, or see to it that it will be answered."""
        caller = Caller(connection, header)
        try:
            message = decode(header.kind, payload)
        except FrameError as error:
            reply(caller, Status.BAD_REQUEST, {"error": str(error)})
            return
        server = self._server
        match message:
            case Clock():
                reply(caller, Status.OK, {"t1_ns": t_first, "t2_ns": now_ns()})
            case Hello():
                reply(caller, Status.OK, msgspec.structs.asdict(self.hello(connection)))
            case Stats():
                reply(caller, Status.OK, server.statistics().body())
            case Start():
                self._start(caller, message)
            case Load():
                server.queue.post(self._task(caller, lambda: self._load(message)))
            case Warmup():
                server.queue.post(self._task(caller, lambda: self._warm_up(message.count)))
            case Arm():
                server.queue.post(self._task(caller, lambda: self._arm(message)))
            case Drain():
                self._watch()
                deadline_ns = now_ns() + message.timeout_ms * NS_PER_MS
                self._drains.append(caller._replace(deadline_ns=deadline_ns))
            case Stop():
                self._stops.append(caller)
                self.stop(message.reason or "STOP", cancel=True)

    # At once

    def hello(self, connection: Connection) -> Hello:
        """This server, its model and how it runs."""
        server = self._server
        engine = server.worker.engine
        info = engine.info if engine else None
        return Hello(
            role="server",
            name=server.options.name,
            pid=os.getpid(),
            version=__version__,
            model=info.model if info else "",
            device=info.device if info else "",
            shapes={"image_size": info.image_size} if info else {},
            clock_ns=now_ns(),
            host=socket.gethostname(),
            info={**self._model_info(), **self._settings(), "buffers": connection.buffers, "clock": clock_id()},
        )

    def _model_info(self) -> dict[str, Any]:
        engine = self._server.worker.engine
        if engine is None:
            return {}
        info = engine.info
        names = ("task", "params", "weights", "precision", "notes")
        return {name: getattr(info, name) for name in names}

    def _settings(self) -> dict[str, Any]:
        options = self._server.options
        return {
            "address": str(self._server.address),
            "threads": options.threads,
            "queue_limit": options.queue_limit,
            "policy": options.policy,
            "max_batch": options.max_batch,
            "max_delay_ms": options.max_delay_ns / NS_PER_MS,
            "deadline_ms": options.deadline_ms,
            "warmup": options.warmup,
            "switch_interval_ms": options.switch_interval_s * 1000,
            "backlog_limit_bytes": options.backlog_limit,
            "gc": "collected and frozen after each load",
            "python": platform.python_version(),
            "torch": _version("torch"),
            **options.facts,
        }

    def _start(self, caller: Caller, start: Start) -> None:
        armed = self._server.segment.index
        if armed == start.segment:
            reply(caller, Status.OK, {})
        else:
            armed_text = "none is" if armed is None else f"{armed} is"
            reply(caller, Status.FAILED, {"error": f"segment {start.segment} is not armed; {armed_text}"})

    # On the model thread

    def _task(self, caller: Caller, work: Callable[[], dict[str, Any]]) -> Task:
        """Do `work` between two batches and answer with its body, or with the reason why not."""

        def run() -> None:
            try:
                body, status = work(), Status.OK
            except Exception as error:  # noqa: BLE001 - a plug-in may raise anything; the caller gets the reason
                name = Kind(caller.header.kind).name
                text = str(error).encode("utf-8", "replace").decode() or type(error).__name__
                body, status = {"error": text}, Status.FAILED
                self._server.fault(f"{name} failed: {text}")
            reply(caller, status, body)

        return run

    def _load(self, load: Load) -> dict[str, Any]:
        """Load and warm up, then switch; until then, and if it fails, the old model stays."""
        server = self._server
        began = now_ns()
        engine = self._load_engine(load)
        loaded_ms = (now_ns() - began) / NS_PER_MS
        info = engine.info
        server.event("load", f"{info.model}, {info.device}, {info.precision}, {info.weights}, {loaded_ms:.0f} ms")
        if server.options.warmup:
            self._run_warm_up(engine, server.options.warmup)
        server.worker.engine = engine
        settle_memory()
        line = self._ready_line(engine)
        server.event("ready", line)
        server.say(line)
        return {"model": info.model, "device": info.device, "load_ms": loaded_ms, **self._model_info()}

    def _ready_line(self, engine: Engine) -> str:
        info, threads = engine.info, self._server.options.threads
        weights = "no" if info.weights == "none" else info.weights
        return (
            f"{info.model} ready on {self._server.address}, {info.device}, {info.precision}, {weights} weights, "
            f"{threads} thread{'s' * (threads != 1)}, pid {os.getpid()}"
        )

    def _warm_up(self, count: int) -> dict[str, Any]:
        return {"ms": self._run_warm_up(self._engine(), count)}

    def _run_warm_up(self, engine: Engine, count: int) -> list[float]:
        taken = engine.warm_up(count, self._server.options.max_batch)
        self._server.event("warmup", ", ".join(f"{ms:.1f}" for ms in taken) + " ms")
        return taken

    def _arm(self, arm: Arm) -> dict[str, Any]:
        self._engine()
        self._server.arm(Segment(arm.arm, arm.repeat, arm.segment))
        self._server.event("arm", f"{arm.arm}, repeat {arm.repeat}, segment {arm.segment}")
        return {"segment": arm.segment}

    def _engine(self) -> Engine:
        engine = self._server.worker.engine
        if engine is None:
            raise RunFault("no model is loaded: send LOAD first")
        return engine

    # Once all is settled

    def stop(self, reason: str, cancel: bool = False) -> None:
        """Finish: take no more requests, answer what is there (or cancel what waits), then leave the loop."""
        server = self._server
        if not self._stop_by_ns:
            self._watch()
            self._stop_by_ns = now_ns() + round(server.options.finish_s * NS_PER_S)
            server.event("drain", f"finishing because of {reason}")
        if cancel:
            server.refuse(server.queue.clear(), Status.CANCELLED)

    def _watch(self) -> None:
        self.pending = self._server.worker.watched = True

    def finished(self) -> bool:
        """Answer who waits for a settled server; True when the server should end."""
        if self.start_error:
            return True
        settled = self._server.settled()
        self._answer_drains(settled)
        if not self._stop_by_ns:
            return False
        if now_ns() > self._stop_by_ns:
            self._server.refuse(self._server.queue.clear(), Status.CANCELLED)
        elif not settled:
            return False
        self._answer_stops()
        return self._server.settled() or now_ns() > self._stop_by_ns

    def _answer_drains(self, settled: bool) -> None:
        waiting: list[Caller] = []
        now = now_ns()
        for caller in self._drains:
            if settled:
                self._server.flush_rows(everything=True)
                reply(caller, Status.OK, self._segment_body())
            elif now > caller.deadline_ns:
                waits = len(self._server.queue) + self._server.queue.in_flight
                text = f"not drained in time: {waits} requests are not answered yet, or replies were not read"
                reply(caller, Status.FAILED, {"error": text, **self._segment_body()})
            else:
                waiting.append(caller)
        self._drains = waiting
        if not (waiting or self._stop_by_ns):
            self.pending = self._server.worker.watched = False

    def _segment_body(self) -> dict[str, Any]:
        return count_body(self._server.segment.counts())

    def _answer_stops(self) -> None:
        self._server.flush_rows(everything=True)
        body = self._server.statistics().body()
        for caller in self._stops:
            reply(caller, Status.OK, body)
        self._stops = []

    def timeout_s(self) -> float:
        """Until the next deadline in here; FOREVER without one."""
        deadlines = [caller.deadline_ns for caller in self._drains]
        if self._stop_by_ns:
            deadlines.append(self._stop_by_ns)
        if not deadlines:
            return FOREVER
        return max(0.0, (min(deadlines) - now_ns()) / NS_PER_S) + 0.001


def reply(caller: Caller, status: Status, body: dict[str, Any]) -> None:
    """Answer a control frame; from any thread."""
    payload = encode(body)
    header = caller.header
    packed = pack_reply(header.kind, header.stream, header.id, status, NO_STAMPS, len(payload))
    caller.connection.send(packed, payload)


def _version(distribution: str) -> str:
    try:
        return package_version(distribution)
    except PackageNotFoundError:
        return ""
