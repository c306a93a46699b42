"""The open-loop client that takes requests back: what is not answered `cancel_after_ns` after it was sent is cancelled.

A class of its own, so that clients that never cancel have nothing of it in their loop. A CANCEL is sent between two
requests, never inside one, and the server's reply to the request (CANCELLED, or its answer if that was sooner) is
waited for like any other.
"""

from __future__ import annotations

import socket
from collections import deque

from corun.clock import now_ns
from corun.load.ring import RingWriter
from corun.load.sender import Sender
from corun.load.timing import Waiter
from corun.load.work import Work
from corun.wire import Kind, pack_request


class CancellingSender(Sender):
    """A Sender whose requests have a patience of `cancel_after_ns` after their send."""

    def __init__(
        self,
        sock: socket.socket,
        work: Work,
        ring: RingWriter,
        waiter: Waiter,
        finish_by_ns: int,
        flags: int,
        cancel_after_ns: int,
    ) -> None:
        super().__init__(sock, work, ring, waiter, finish_by_ns, flags)
        self._after_ns = cancel_after_ns
        self._cancels: deque[tuple[int, int]] = deque()
        self._cut = b""

    def _send(self, index: int) -> None:
        super()._send(index)
        if self._head > index:
            self._cancels.append((now_ns() + self._after_ns, self._work.ids[index]))

    def _unblock(self) -> None:
        if self._cut:
            self._cut = self._cut[self._hand_over((bytearray(self._cut),)) :]
            if self._cut:
                return
        begun, head = self._rest is not None, self._head
        super()._unblock()
        if begun and self._head > head:
            self._cancels.append((now_ns() + self._after_ns, self._work.ids[head]))

    def _push(self) -> None:
        self._cancel_due()
        super()._push()

    def _cancel_due(self) -> None:
        """Send what has become due and is still unanswered; a full kernel buffer delays it."""
        now = now_ns()
        while self._cancels and self._cancels[0][0] <= now and not self._blocked:
            id = self._cancels[0][1]
            if id in self._slot_of:
                frame = pack_request(Kind.CANCEL, self._work.stream, id, 0, 0, now)
                taken = self._hand_over((bytearray(frame),))
                if taken < len(frame):
                    self._block()
                    self._cut = frame[taken:] if taken else b""
                    if not taken:
                        return
            self._cancels.popleft()

    def _arm(self) -> None:
        super()._arm()
        while self._cancels and self._cancels[0][1] not in self._slot_of:
            self._cancels.popleft()
        if self._cancels and not self._blocked:
            due = self._due
            next_due = self._work.intended_ns[due] if due < self._last else self._finish_by
            self._waiter.arm(min(self._cancels[0][0], next_due, self._finish_by))
