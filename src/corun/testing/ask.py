"""One request, one reply, over a real socket: for tests and benches that care about the answer and not about the load.

with Asker(Address.parse("127.0.0.1:54100")) as asker:
    answer = asker.ask(jpeg)            # answer.status, answer.payload, answer.ms
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from dataclasses import dataclass

from corun.clock import NS_PER_MS, now_ns
from corun.errors import PeerClosed
from corun.wire import PART, Address, Frame, Kind, ReplyHeader, ReplyReader, connect, number_in, pack_request


@dataclass(frozen=True)
class Answer:
    """A reply's status, payload and batch size, and the milliseconds from the first byte sent to the last received.

    parts: payloads of the parts before it, tokens: as its header counts them.
    """

    status: int
    payload: bytes
    batch: int
    ms: float
    parts: tuple[bytes, ...] = ()
    tokens: int = 0


class Asker:
    """A connection; `ask` has one request in flight, `send` and `receive` any number."""

    def __init__(self, address: Address, timeout_s: float = 10.0, retry: bool = True) -> None:
        self._sock = connect(address, timeout_s, retry=retry)
        self._reader = ReplyReader()
        self._next_id = 0
        self._begun: dict[int, int] = {}
        self._parts: dict[int, list[bytes]] = {}
        self._answers: dict[int, Answer] = {}

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sock.close()

    def ask(self, payload: bytes, timeout_s: float = 60.0, flags: int = 0) -> Answer:
        """Send one INFER and wait for its reply; PeerClosed when none came in time."""
        return self.receive(self.send(payload, flags), timeout_s)

    def send(self, payload: bytes, flags: int = 0, due_ns: int | None = None) -> int:
        """Send one INFER, which was due at `due_ns` (default: now); its id."""
        id, self._next_id = self._next_id, self._next_id + 1
        begin = self._begun[id] = now_ns()
        due_ns = begin if due_ns is None else due_ns
        self._sock.sendall(pack_request(Kind.INFER, 0, id, len(payload), due_ns, begin, flags=flags) + payload)
        return id

    def cancel(self, id: int) -> None:
        """Take a request back."""
        self._sock.sendall(pack_request(Kind.CANCEL, 0, id, 0))

    def receive(self, id: int, timeout_s: float = 60.0) -> Answer:
        """The reply to a request, after all its parts."""
        self._until(lambda: id in self._answers, f"no reply to request {id}", timeout_s)
        return self._answers.pop(id)

    def parts(self, id: int, count: int, timeout_s: float = 60.0) -> list[bytes]:
        """Wait until so many parts of a reply are here, or all of it; the parts so far."""
        found = self._parts.setdefault(id, [])
        self._until(lambda: len(found) >= count or id in self._answers, f"no {count} parts of reply {id}", timeout_s)
        return list(found)

    def _until(self, there: Callable[[], bool], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not there():
            ready, _, _ = select.select([self._sock], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise PeerClosed(f"{what} within {timeout_s:g} s")
            for frame in self._reader.receive(self._sock):
                self._keep(frame)

    def _keep(self, frame: Frame) -> None:
        header, payload = frame.header, bytes(frame.payload)
        assert isinstance(header, ReplyHeader)
        parts = self._parts.setdefault(header.id, [])
        if header.flags & PART:
            parts.append(payload)
            return
        ms = (frame.t_done_ns - self._begun[header.id]) / NS_PER_MS
        tokens = number_in(header.flags)
        self._answers[header.id] = Answer(header.status, payload, header.batch, ms, tuple(parts), tokens)
