"""An open-loop client in a thread that goes on when its connection breaks: for tests and benches of what restarts.

The measuring client (corun.load) gives a segment up when its connection breaks, for its figures would not be one
server's any more. Here the question is what becomes of every request while routers and replicas come and go.

    with Drive(address, dues_ns, payloads) as drive:
        ...                                             # kill something
    drive.outcomes()                                    # one per request: status or LOST, sojourn
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.errors import PeerClosed, WireError
from corun.wire import PART, Address, Kind, ReplyHeader, ReplyReader, Status, connect, pack_request

LOOK_S = 0.2
CONNECT_S = 0.2


def poisson_dues_ns(rate: float, seconds: float, seed: int) -> NDArray[np.int64]:
    """Instants (n,) of a Poisson process from 0 on, in ns."""
    draw = np.random.default_rng(seed)
    count = int(draw.poisson(rate * seconds))
    return np.sort(draw.uniform(0, seconds * NS_PER_S, count)).astype(np.int64)


@dataclass(frozen=True)
class Outcomes:
    """Arrays (n,) in the order of sending: due instant (CLOCK_MONOTONIC ns), status (LOST: no reply), sojourn in ms."""

    due_ns: NDArray[np.int64]
    status: NDArray[np.int64]
    sojourn_ms: NDArray[np.float64]

    @property
    def counts(self) -> dict[str, int]:
        """`{"OK": 100, "LOST": 2}`."""
        return {Status(status).name: count for status, count in Counter(self.status.tolist()).items()}

    @property
    def lost(self) -> int:
        """Requests that nobody answered, not even with an error."""
        return int((self.status == Status.LOST).sum())

    def ok_ms(self, from_ns: int = 0, until_ns: int = 1 << 62) -> NDArray[np.float64]:
        """Sojourns of those answered OK that were due in [from_ns, until_ns)."""
        return self.sojourn_ms[(self.status == Status.OK) & (self.due_ns >= from_ns) & (self.due_ns < until_ns)]


class Drive:
    """Sends each request at its due instant, whatever happens; `join` waits until each is answered or lost.

    dues_ns: offsets from `begin_ns`, ascending. patience_s: how long the last answers are waited for.
    """

    def __init__(
        self,
        address: Address,
        dues_ns: Sequence[int] | NDArray[np.int64],
        payloads: Sequence[bytes] = (b"x",),
        patience_s: float = 40.0,
    ) -> None:
        self.begin_ns = now_ns() + 50 * NS_PER_MS
        self._address = address
        self._dues = [self.begin_ns + int(due) for due in dues_ns]
        self._payloads = payloads
        self._patience_ns = round(patience_s * NS_PER_S)
        self._status = [int(Status.LOST)] * len(self._dues)
        self._sojourn = [float("nan")] * len(self._dues)
        self._open: set[int] = set()
        self._sock: socket.socket | None = None
        self._reader = ReplyReader()
        self._thread = threading.Thread(target=self._run, name="drive", daemon=True)

    def __enter__(self) -> Drive:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self.join()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join()

    def outcomes(self) -> Outcomes:
        """What became of every request."""
        return Outcomes(np.array(self._dues), np.array(self._status), np.array(self._sojourn))

    def _run(self) -> None:
        following, end_ns = 0, (self._dues[-1] if self._dues else now_ns()) + self._patience_ns
        while (following < len(self._dues) or self._open) and now_ns() < end_ns:
            now = now_ns()
            while following < len(self._dues) and self._dues[following] <= now:
                self._send(following)
                following += 1
            wait_ns = self._dues[following] - now_ns() if following < len(self._dues) else round(LOOK_S * NS_PER_S)
            self._receive(max(0.0, min(wait_ns / NS_PER_S, LOOK_S)))
        self._disconnect()

    def _send(self, number: int) -> None:
        payload = self._payloads[number % len(self._payloads)]
        try:
            if self._sock is None:
                self._sock = connect(self._address, CONNECT_S, retry=True)
                self._reader = ReplyReader()
            header = pack_request(Kind.INFER, 0, number, len(payload), self._dues[number], now_ns())
            self._sock.sendall(header + payload)
            self._open.add(number)
        except (OSError, WireError):
            self._disconnect()

    def _receive(self, wait_s: float) -> None:
        if self._sock is None:
            select.select([], [], [], wait_s)
            return
        ready, _, _ = select.select([self._sock], [], [], wait_s)
        if not ready:
            return
        try:
            frames = self._reader.receive(self._sock)
        except PeerClosed:
            self._disconnect()
            return
        for frame in frames:
            header = frame.header
            if isinstance(header, ReplyHeader) and not header.flags & PART:
                self._open.discard(header.id)
                self._status[header.id] = header.status
                self._sojourn[header.id] = (frame.t_done_ns - self._dues[header.id]) / NS_PER_MS

    def _disconnect(self) -> None:
        """What was open on this connection is lost."""
        self._open.clear()
        sock, self._sock = self._sock, None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.close()
