"""The translation server: one thread that reads sockets, schedules, feeds an executor and sends replies.

    sockets ─▶ requests ─▶ Scheduler ─▶ packages ─▶ executor lanes ─▶ answers ─▶ replies, in the order of the sentences
      epoll       text becomes ids          by room         processes or threads        to the connection that asked

The thread computes nothing but token ids, so it always drains its sockets. Requests over the queue's limit are
answered REJECTED with the reason, late ones EXPIRED; those of a connection that closed are cancelled. A package whose
worker died is sent once more, then its requests are answered FAILED.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from corun import __version__
from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.ectrans import memory, wire
from corun.ectrans.engines import Answers, Model, Work
from corun.ectrans.executors import Executor, Lost, Shape, make_executor
from corun.ectrans.outputs import Files, Tally
from corun.ectrans.scheduler import Job, Package, Rules, Scheduler
from corun.ectrans.tokens import Tokenizer
from corun.errors import FrameError, InputError, PeerClosed
from corun.serve.connection import Connection
from corun.serve.packing import rest_cost
from corun.wire import Address, Kind, RequestHeader, Status, listen, pack_reply
from corun.wire.frames import NO_STAMPS, number_in
from corun.wire.messages import Clock, Drain, Hello, Stats, Stop, decode, encode

SWITCH_INTERVAL_S = 0.0005
PROFILE_EVERY_NS = NS_PER_S
MAX_FAULTS = 64


class StopRequest(Protocol):
    """What asks the server to finish: corun.process.StopSignal."""

    requested: bool

    def fileno(self) -> int: ...


@dataclass(frozen=True)
class ServiceOptions:
    """How a translation server runs. out: directory for its files, None = none. deadline_ms: of requests without one."""

    model: Model
    shape: Shape = field(default_factory=Shape)
    rules: Rules = field(default_factory=Rules)
    address: Address = field(default_factory=lambda: Address("tcp", "127.0.0.1", 5550))
    partition: str = wire.TEXT
    deadline_ms: int = 0
    out: Path | None = None
    finish_s: float = 30.0

    def __post_init__(self) -> None:
        if self.partition not in (wire.TEXT, wire.IDS, wire.EMBED, wire.ENCODER):
            raise InputError(f'partition "{self.partition}" is not one of text, ids, embed, encoder')

    def settings(self) -> dict[str, Any]:
        """Everything as plain values."""
        return msgspec.to_builtins(
            {
                "model": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self.model).items()},
                "shape": asdict(self.shape),
                "rules": asdict(self.rules),
                "partition": self.partition,
                "deadline_ms": self.deadline_ms,
            }
        )


class Pending:
    """What the server keeps of an admitted request; the stamps are those of its package that came back first."""

    __slots__ = ("answers", "connection", "dec0_ns", "enc0_ns", "enc1_ns", "header", "sentences", "t_first_ns")

    def __init__(
        self, connection: Connection, header: RequestHeader, sentences: wire.Sentences, t_first_ns: int
    ) -> None:
        self.connection, self.header, self.sentences = connection, header, sentences
        self.t_first_ns = t_first_ns
        self.answers: list[list[int] | None] = [None] * len(sentences)
        self.enc0_ns = self.enc1_ns = self.dec0_ns = 0


class Service:
    """Listens from the moment it is made; `serve` runs until STOP or a signal.

    say: takes one line for the user. Raises InputError when the address cannot be had or the model not be read.
    """

    def __init__(self, options: ServiceOptions, say: Callable[[str], None] = print) -> None:
        self.options = options
        rules = replace(options.rules, slots=options.shape.workers)
        self.scheduler = Scheduler(rules)
        self.tally = Tally()
        self._say = say
        self._tokenizer = Tokenizer.load(options.model.parts)
        self._width = _config_number(options.model.parts, "d_model")
        self._max_tokens = min(wire.MAX_TOKENS, _config_number(options.model.parts, "max_position_embeddings", 512))
        self._listener = listen(options.address)
        self._listener.setblocking(False)
        self.address = _bound(options.address, self._listener.getsockname())
        self._files = Files(options.out, options.settings())
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._watched: set[int] = set()
        self._keys: dict[tuple[int, int, int], int] = {}
        self._next_key = 0
        self._drains: list[tuple[Connection, RequestHeader, int]] = []
        self._stopping = 0
        self._profiled_ns = 0
        self._faults = 0
        self.executor: Executor = make_executor(options.model, options.shape)

    # The loop

    def serve(self, stop: StopRequest | None = None) -> dict[str, Any]:
        """Serve until asked to stop; returns the summary."""
        interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            self.executor.wait_ready()
            self._epoll.register(self._listener.fileno(), select.EPOLLIN)
            if stop:
                self._epoll.register(stop.fileno(), select.EPOLLIN)
            self._watch_executor()
            self.tally = Tally()
            self._say(f"ready on {self.address}, {self._describe()}, pid {os.getpid()}")
            while not self._finished():
                self._turn(stop)
            self._answer_drains()
        finally:
            sys.setswitchinterval(interval_s)
            summary = self._close()
        return summary

    def _describe(self) -> str:
        model, shape, rules = self.options.model, self.options.shape, self.scheduler.rules
        return f"{shape.executor} x {shape.workers}, {model.decoder}, {rules.policy}, packing {rules.packing}"

    def _turn(self, stop: StopRequest | None) -> None:
        """One poll, everything it brought, and what can be sent after it."""
        for fd, events in self._epoll.poll(self._timeout_s()):
            connection = self._connections.get(fd)
            if connection is not None:
                if events & select.EPOLLOUT:
                    connection.flush()
                if events & ~select.EPOLLOUT:
                    self._receive(connection)
            elif fd == self._listener.fileno():
                self._accept()
            elif stop and fd == stop.fileno():
                self._epoll.unregister(fd)
                self._finish()
        self._collect()
        self._dispatch()
        self._answer_drains()
        self._profile()

    def _timeout_s(self) -> float:
        """Until something is due without any event."""
        now = now_ns()
        instants = [now + NS_PER_S // 2]
        due_ns = self.scheduler.due_ns() if any(lane.room for lane in self.executor.lanes) else None
        if due_ns is not None:
            instants.append(due_ns)
        deadline_ns = self.scheduler.next_deadline_ns()
        if deadline_ns is not None:
            instants.append(deadline_ns)
        return max(0.0, (min(instants) - now) / NS_PER_S)

    def _watch_executor(self) -> None:
        """Poll exactly the descriptors that the executor has now; a closed one left the epoll by itself."""
        wanted = set(self.executor.fds())
        for fd in wanted:
            with suppress(FileExistsError):
                self._epoll.register(fd, select.EPOLLIN)
        self._watched = wanted

    # Requests

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            connection = Connection(sock, self._epoll)
            self._connections[connection.fd] = connection

    def _receive(self, connection: Connection) -> None:
        try:
            if connection.reason:
                raise PeerClosed(connection.reason)
            frames = connection.reader.receive(connection.sock)
        except (PeerClosed, FrameError) as error:
            self._drop(connection, str(error) if isinstance(error, FrameError) else "")
            return
        for frame in frames:
            header: Any = frame.header
            if header.kind == Kind.INFER:
                self._request(connection, header, frame.payload, frame.t_first_ns, frame.t_done_ns)
            elif header.kind == Kind.CANCEL:
                self._cancel(connection, header)
            else:
                self._control(connection, header, frame.payload, frame.t_first_ns)

    def _drop(self, connection: Connection, reason: str) -> None:
        if reason:
            self._fault(f"closed the connection of {connection.peer}: {reason}")
        self._connections.pop(connection.fd, None)
        for key in [key for (fd, _, _), key in self._keys.items() if fd == connection.fd]:
            job = self.scheduler.cancel(key, now_ns(), detail="the client is gone")
            if job is not None:
                self._ended(job)
        self._drains = [drain for drain in self._drains if drain[0] is not connection]
        connection.close()

    def _request(
        self, connection: Connection, header: RequestHeader, payload: bytes | bytearray, first: int, done: int
    ) -> None:
        if self._stopping:
            self._refuse(connection, header, Status.DRAINING, "the server is finishing")
            return
        try:
            sentences = self._read(payload)
        except FrameError as error:
            self._refuse(connection, header, Status.BAD_REQUEST, str(error))
            return
        name = (connection.fd, header.stream, header.id)
        if name in self._keys:
            self._refuse(connection, header, Status.BAD_REQUEST, f"request {header.id} is still being answered")
            return
        self._next_key += 1
        pending = Pending(connection, header, sentences, first)
        deadline_ms = number_in(header.flags) or self.options.deadline_ms
        deadline_ns = first + deadline_ms * NS_PER_MS if deadline_ms else None
        job = Job(self._next_key, done, sentences.tokens, sentences.kind, deadline_ns, pending)
        reason = self.scheduler.offer(job)
        if reason:
            self._refuse(connection, header, Status.REJECTED, reason)
            return
        self._keys[name] = job.key

    def _read(self, payload: bytes | bytearray) -> wire.Sentences:
        """The sentences of a request, texts with their ids; FrameError when they are not for this server."""
        sentences = wire.unpack_sentences(payload, self._width, self._tokenizer.size)
        partition = self.options.partition
        known = (wire.TEXT, wire.IDS) if partition in (wire.TEXT, wire.IDS) else (partition,)
        if sentences.partition not in known:
            raise FrameError(f'this server serves {" and ".join(known)}, not "{sentences.partition}"')
        if sentences.partition == wire.TEXT:
            sentences = replace(sentences, ids=tuple(self._tokenizer.encode(text) for text in sentences.texts))
        longest = max(sentences.tokens)
        if longest > self._max_tokens:
            raise FrameError(f"a sentence of {longest} tokens; the model takes {self._max_tokens}")
        return sentences

    def _refuse(self, connection: Connection, header: RequestHeader, status: Status, reason: str) -> None:
        self.tally.refused(status)
        self._send(connection, header, status, encode({"error": reason}), NO_STAMPS)

    def _send(
        self, connection: Connection, header: RequestHeader, status: Status, body: bytes, stamps: Sequence[int]
    ) -> None:
        kind = Kind.REPLY if header.kind == Kind.INFER else header.kind
        connection.send(pack_reply(kind, header.stream, header.id, status, stamps, len(body)), body)

    def _cancel(self, connection: Connection, header: RequestHeader) -> None:
        key = self._keys.get((connection.fd, header.stream, header.id))
        job = None if key is None else self.scheduler.cancel(key, now_ns())
        if job is not None:
            self._ended(job)

    # Packages

    def _dispatch(self) -> None:
        """Send what is worth sending to the lanes, the emptiest first."""
        for job in self.scheduler.expire(now_ns()):
            self._ended(job)
        while self.scheduler.waiting_items:
            sent = False
            order = sorted(range(len(self.executor.lanes)), key=lambda i: sum(self.executor.lanes[i].out.values()))
            for number in order:
                lane = self.executor.lanes[number]
                room = lane.room
                if room:
                    package = self.scheduler.next(now_ns(), lane.idle, number, room)
                    if package is not None:
                        self.executor.submit(number, self._work(package))
                        sent = True
            if not sent:
                return

    def _work(self, package: Package) -> Work:
        items = package.items
        lengths = [item.length for item in items]
        sentences = [(item.owner.payload.sentences, item.index) for item in items]
        if self.options.partition in (wire.TEXT, wire.IDS):
            texts = []
            if self.options.model.reload:
                texts = [one.texts[index] for one, index in sentences if one.texts]
            ids = [one.ids[index] for one, index in sentences]
            return Work(package.number, lengths, ids=ids, texts=texts if len(texts) == len(ids) else [])
        values = np.zeros((len(items), max(lengths), self._width), np.float32)
        for row, (one, index) in enumerate(sentences):
            values[row, : lengths[row]] = one.values[index]
        return Work(package.number, lengths, self.options.partition, values=values.tobytes())

    def _collect(self) -> None:
        restarted = False
        for event in self.executor.poll():
            if isinstance(event, Lost):
                restarted = True
                self._lost(event)
            else:
                self._answers(event)
        if restarted:
            self._watch_executor()

    def _answers(self, answers: Answers) -> None:
        package = self.scheduler.in_flight.get(answers.number)
        if package is None:
            return
        items = []
        for place, ids in answers.rows:
            item = package.items[place]
            pending: Pending = item.owner.payload
            pending.answers[item.index] = ids
            if not pending.enc0_ns:
                pending.enc0_ns, pending.enc1_ns, pending.dec0_ns = answers.enc0_ns, answers.enc1_ns, answers.dec0_ns
            items.append(item)
        if answers.last:
            taken_ns = answers.enc1_ns - answers.enc0_ns + answers.dec1_ns - answers.dec0_ns
            self.scheduler.finish(package, taken_ns / NS_PER_S)
            self.tally.package(package, answers)
            self._files.package(package)
        for job in self.scheduler.items_done(items, now_ns()):
            self._ended(job)

    def _lost(self, lost: Lost) -> None:
        self._fault(lost.detail + (", starting it anew" if lost.again else ", it stays down"))
        for number in lost.numbers:
            package = self.scheduler.in_flight.get(number)
            if package is not None:
                back = [item for item in package.items if item.owner.payload.answers[item.index] is None]
                for job in self.scheduler.failed(package, now_ns(), lost.detail, back):
                    self._ended(job)
        if not any(lane.alive for lane in self.executor.lanes):
            self._finish()
            for job in self.scheduler.clear(now_ns(), "no worker is left"):
                self._ended(job)

    def _ended(self, job: Job) -> None:
        """Answer a request that has its outcome, and record it."""
        pending: Pending = job.payload
        header = pending.header
        self._keys.pop((pending.connection.fd, header.stream, header.id), None)
        assert job.status is not None
        answers = [ids for ids in pending.answers if ids is not None]
        if job.status == Status.OK:
            body = self._body(job, pending, answers)
        else:
            body = encode({"error": job.detail})
        now = now_ns()
        first = job.first_ns or 0
        stamps = (pending.t_first_ns, job.arrival_ns, first, first, pending.enc0_ns, pending.enc0_ns)
        self._send(pending.connection, header, job.status, body, (*stamps, pending.enc1_ns, now, now, now))
        out_tokens = sum(map(len, answers))
        packages, padded = rest_cost(pending.sentences.tokens, self.scheduler.rules.limits.max_items)
        alone_s = self.scheduler.estimate.seconds(packages, padded)
        slowdown = (now - job.arrival_ns) / NS_PER_S / alone_s if job.status == Status.OK else None
        self.tally.request(job, out_tokens, slowdown)
        instants = (header.t_tx, job.arrival_ns, first or None, pending.enc0_ns or None, pending.enc1_ns or None)
        self._files.request(
            (
                header.id,
                job.kind,
                job.size,
                job.tokens,
                out_tokens,
                *instants,
                pending.dec0_ns or None,
                now,
                None if slowdown is None else round(slowdown, 3),
                job.status.name,
            )
        )

    def _body(self, job: Job, pending: Pending, answers: list[list[int]]) -> bytes:
        head = wire.ReplyHead(
            pending.header.id,
            list(range(job.size)),
            [len(ids) for ids in answers],
            "int32",
            job.first_ns or 0,
            pending.enc0_ns,
            pending.enc1_ns,
            pending.dec0_ns,
            job.done_ns or 0,
        )
        if pending.sentences.partition != wire.TEXT:
            return wire.pack_answers(head, answers)
        return wire.pack_texts(head, [self._tokenizer.decode(ids) for ids in answers])

    # Control

    def _control(self, connection: Connection, header: RequestHeader, payload: bytes | bytearray, first: int) -> None:
        try:
            message = decode(header.kind, payload)
        except FrameError as error:
            self._send(connection, header, Status.BAD_REQUEST, encode({"error": str(error)}), NO_STAMPS)
            return
        body: dict[str, Any] = {}
        status = Status.OK
        match message:
            case Hello():
                body = self._hello()
            case Clock():
                body = {"t1_ns": first, "t2_ns": now_ns()}
            case Stats():
                body = self.statistics()
            case Drain():
                self._drains.append((connection, header, now_ns() + message.timeout_ms * NS_PER_MS))
                return
            case Stop():
                self._finish()
            case _:
                status, body = Status.BAD_REQUEST, {"error": "a translation server has no such control message"}
        self._send(connection, header, status, encode(body), NO_STAMPS)

    def _hello(self) -> dict[str, Any]:
        model = self.options.model
        hello = Hello(
            role="server",
            name="ectrans",
            pid=os.getpid(),
            version=__version__,
            model=str(model.parts),
            device=model.device,
            shapes={"width": self._width, "max_tokens": self._max_tokens},
            clock_ns=now_ns(),
            info=self.options.settings(),
        )
        return msgspec.structs.asdict(hello)

    def _answer_drains(self) -> None:
        """Answer who waits for an empty server; afterwards a new tally begins."""
        if not self._drains:
            return
        empty, now = not len(self.scheduler), now_ns()
        waiting = []
        for drain in self._drains:
            connection, header, until_ns = drain
            if empty:
                self._send(connection, header, Status.OK, encode(self.statistics()), NO_STAMPS)
            elif now > until_ns:
                body = {"error": f"{len(self.scheduler)} requests are not answered yet"}
                self._send(connection, header, Status.FAILED, encode(body), NO_STAMPS)
            else:
                waiting.append(drain)
        if empty:
            self.tally = Tally()
        self._drains = waiting

    def statistics(self) -> dict[str, Any]:
        """The tally so far, with memory now."""
        rows = memory.of_group([os.getpid(), *self.executor.pids()])
        self.tally.memory(rows)
        ready = self.executor.ready()
        return {
            **self.tally.body(self.scheduler.rules.limits.max_items),
            "memory": memory.total(rows),
            "processes": len(rows),
            "waiting": self.scheduler.waiting_items,
            "in_flight": len(self.scheduler.in_flight),
            "load_ms": [round(one.load_ms, 1) for one in ready],
            "warmup_ms": [round(one.warm_ms, 1) for one in ready],
            "tokenizer_loads": Tokenizer.loads,
        }

    def _profile(self) -> None:
        """Once a second, where there is a directory."""
        now = now_ns()
        if self.options.out is not None and now - self._profiled_ns >= PROFILE_EVERY_NS:
            self._profiled_ns = now
            rows = memory.of_group([os.getpid(), *self.executor.pids()])
            self.tally.memory(rows)
            self._files.memory(rows, os.getpid())

    # The end

    def _finish(self) -> None:
        """Take no more requests; end when those that are here have their answers."""
        self._stopping = self._stopping or now_ns()

    def _finished(self) -> bool:
        if not self._stopping:
            return False
        if now_ns() - self._stopping > self.options.finish_s * NS_PER_S:
            for job in self.scheduler.clear(now_ns(), "the server was stopped"):
                self._ended(job)
        return not len(self.scheduler)

    def _fault(self, reason: str) -> None:
        self._faults += 1
        if self._faults <= MAX_FAULTS:
            self._say(reason)

    def _close(self) -> dict[str, Any]:
        summary = self.statistics()
        for connection in list(self._connections.values()):
            connection.flush()
            connection.close()
        self._listener.close()
        self.executor.close()
        self._files.close(summary)
        self._epoll.close()
        return summary


def _bound(asked: Address, name: Any) -> Address:
    return asked if asked.scheme == "unix" else Address("tcp", asked.host, int(name[1]))


def _config_number(parts: Path, name: str, otherwise: int = 0) -> int:
    """A number of the model's configuration; InputError when there is no configuration."""
    try:
        fields = msgspec.json.decode((parts / "config.json").read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise InputError(f"{parts} is not a parts directory: {error}", ["make one: ectrans.py split"]) from None
    return int(fields.get(name, otherwise))
