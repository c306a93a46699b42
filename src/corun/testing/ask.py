"""One request, one reply, over a real socket: for tests and benches that care about the answer and not about the load.

with Asker(Address.parse("127.0.0.1:54100")) as asker:
    answer = asker.ask(jpeg)            # answer.status, answer.payload, answer.ms
"""

from __future__ import annotations

import select
import time
from dataclasses import dataclass

from corun.clock import NS_PER_MS, now_ns
from corun.errors import PeerClosed
from corun.wire import Address, Kind, ReplyHeader, ReplyReader, connect, pack_request


@dataclass(frozen=True)
class Answer:
    """A reply's status, payload and batch size, and the milliseconds from the first byte sent to the last received."""

    status: int
    payload: bytes
    batch: int
    ms: float


class Asker:
    """A connection with one request in flight."""

    def __init__(self, address: Address, timeout_s: float = 10.0, retry: bool = True) -> None:
        self._sock = connect(address, timeout_s, retry=retry)
        self._reader = ReplyReader()
        self._next_id = 0

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sock.close()

    def ask(self, payload: bytes, timeout_s: float = 60.0) -> Answer:
        """Send one INFER and wait for its reply; PeerClosed when none came in time."""
        id, self._next_id = self._next_id, self._next_id + 1
        begin = now_ns()
        self._sock.sendall(pack_request(Kind.INFER, 0, id, len(payload), begin, begin) + payload)
        deadline = time.monotonic() + timeout_s
        while True:
            ready, _, _ = select.select([self._sock], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise PeerClosed(f"no reply to request {id} within {timeout_s:g} s")
            for frame in self._reader.receive(self._sock):
                header = frame.header
                if isinstance(header, ReplyHeader) and header.id == id:
                    return Answer(
                        header.status, bytes(frame.payload), header.batch, (frame.t_done_ns - begin) / NS_PER_MS
                    )
