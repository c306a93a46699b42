"""The client with one request in flight: paced by a schedule, or free-running with a rest after each reply.

    paced   due:  1   2   3   4          sent:  1     2  3  4       a slow reply delays the sends behind it
    free    due:  1                      sent:  1 reply·rest·2 reply·rest·3 ...

A stalled server holds back the *sends* of this client, so its response times (reply - send) show one slow request
where an open-loop client would show many: coordinated omission. Paced, the intended instants are kept, and the
sojourn (reply - intended) shows the stall in full; free-running, there are no intended instants to compare with
and the stall is hidden. That mode is the synchronous client of the original.
"""

from __future__ import annotations

import select
import socket
import time
from bisect import bisect_right
from collections.abc import Sequence

from corun.clock import NS_PER_MS, now_ns
from corun.errors import WireError
from corun.load.ring import RingWriter, first_class
from corun.load.timing import Timing, sleep_until_ns
from corun.load.work import Counts, Progress, Watch, Work, count, undisturbed
from corun.wire import (
    PART,
    REQUEST_SIZE,
    Frame,
    Kind,
    ReplyHeader,
    ReplyReader,
    Status,
    number_in,
    pack_request_into,
)

LOOK_EVERY_NS = 20 * NS_PER_MS


class ClosedLoop:
    """Runs one segment's work with one request in flight and records it.

    rests_ns: None = paced by the work's intended instants; else free-running, resting that long after each
    reply (in turn, over and over), until stop_at_ns or as many requests as the ring has slots.
    finish_by_ns: what is outstanding then is LOST. flags: of every request. cancel_after_ns: a request is taken back
    when it is not answered so long after it was sent; 0 = never.
    """

    def __init__(
        self,
        sock: socket.socket,
        work: Work,
        ring: RingWriter,
        timing: Timing,
        start_at_ns: int,
        stop_at_ns: int,
        finish_by_ns: int,
        rests_ns: Sequence[int] | None = None,
        flags: int = 0,
        cancel_after_ns: int = 0,
    ) -> None:
        self._sock = sock
        self._fd = sock.fileno()
        self._work = work
        self._ring = ring
        self._early_ns = timing.early_ns
        self._ready_at = start_at_ns
        self._stop_at = stop_at_ns
        self._finish_by = finish_by_ns
        self._rests = rests_ns
        self._flags = flags
        self._cancel_after = cancel_after_ns
        self._watches: dict[int, Watch] = {}
        self._poll = select.poll()
        self._looked_at = 0
        self._reader = ReplyReader()
        self._header = bytearray(REQUEST_SIZE)
        self._last = len(work)
        self._index = 0
        self._sent = self._answered = self._ok = self._strays = 0
        self._fault = ""
        if rests_ns is None:
            ring.fill(work.ids, work.intended_ns, work.stream, work.payload_of)

    def run(self, watches: Sequence[Watch] = ()) -> Counts:
        """Send, wait, rest, until the work or the time is up; never raises for what a server does."""
        ring = self._ring
        self._watches = {watch.fileno(): watch for watch in watches}
        self._sock.setblocking(False)
        for fd in (self._fd, *self._watches):
            self._poll.register(fd, select.POLLIN)
        cpu_s = time.process_time()
        with undisturbed():
            self._loop()
        ring.lose_unsent(self._last)
        return count(ring.records, self._strays, 0, time.process_time() - cpu_s, self._fault)

    def progress(self) -> Progress:
        """Counters so far."""
        return Progress(len(self._work), self._sent, self._answered, self._ok, 0)

    def _loop(self) -> None:
        while self._goes_on():
            due = self._due_at(self._index)
            if self._rests is not None and due >= self._stop_at:
                return
            if self._sleep_until(due):
                self._exchange(self._index, due)
                self._index += 1

    def _goes_on(self) -> bool:
        return self._index < self._last and not self._fault and now_ns() < self._finish_by

    def _due_at(self, index: int) -> int:
        if self._rests is None:
            return self._work.intended_ns[index]
        return self._ready_at + (self._rests[(index - 1) % len(self._rests)] if index else 0)

    def _sleep_until(self, due: int) -> bool:
        """Wait for the instant; False when the segment was ended before it.

        The watches are looked at while there is time, and every LOOK_EVERY_NS at the least.
        """
        while self._goes_on():
            now = now_ns()
            if due - now > LOOK_EVERY_NS or now - self._looked_at > LOOK_EVERY_NS:
                self._look(max(0, due - now - LOOK_EVERY_NS))
            elif now >= due:
                return True
            elif due - now > self._early_ns:
                sleep_until_ns(due - self._early_ns)
        return False

    def _look(self, timeout_ns: int) -> int:
        """Wait on the connection and the watches; the poll mask of the connection."""
        self._looked_at = now_ns()
        mask_here = 0
        for fd, mask in self._poll.poll(min(timeout_ns, self._patience_ns()) / NS_PER_MS):
            if fd == self._fd:
                mask_here = mask
            else:
                self._attend(fd)
        if mask_here & ~select.POLLOUT:
            self._receive()
        return mask_here

    def _patience_ns(self) -> int:
        return max(0, self._finish_by - now_ns())

    def _exchange(self, index: int, due: int) -> None:
        """One request and its reply; what did not come before patience ended stays LOST."""
        work, ring, wake = self._work, self._ring, now_ns()
        payload_of = work.payload_of[index]
        payload = work.payloads[payload_of]
        if self._rests is not None:
            ring.due(index, work.ids[index], due, work.stream, payload_of)
        start = now_ns()
        pack_request_into(
            self._header, Kind.INFER, work.stream, work.ids[index], len(payload), due, start, 0, self._flags
        )
        ring.tx(index, wake, start, 0)
        if not self._hand_over(payload):
            return
        ring.tx(index, wake, start, now_ns())
        self._sent += 1
        if self._cancel_after:
            self._await_reply(start + self._cancel_after)
            if self._answered < self._sent and not self._fault:
                pack_request_into(self._header, Kind.CANCEL, work.stream, work.ids[index], 0, 0, now_ns())
                self._hand_over(b"")
        self._await_reply()

    def _await_reply(self, until_ns: int | None = None) -> None:
        """Until it is here, the instant has come, or patience ends."""
        while self._answered < self._sent and not self._fault:
            left_ns = self._patience_ns() if until_ns is None else min(self._patience_ns(), until_ns - now_ns())
            if left_ns <= 0:
                return
            self._look(left_ns)

    def _hand_over(self, payload: bytes) -> bool:
        parts = [memoryview(self._header), memoryview(payload)]
        while not self._fault and self._patience_ns():
            try:
                taken = self._sock.sendmsg(parts)
            except BlockingIOError:
                taken = 0
            except OSError as error:
                self._fault = f"the connection broke: {error.strerror or error}"
                return False
            parts = _after(parts, taken)
            if not parts:
                return True
            self._poll.modify(self._fd, select.POLLIN | select.POLLOUT)
            self._look(self._patience_ns())
            self._poll.modify(self._fd, select.POLLIN)
        return False

    def _receive(self) -> None:
        try:
            frames = self._reader.receive(self._sock)
        except WireError as error:
            self._fault = str(error)
            return
        for frame in frames:
            self._record(frame)

    def _record(self, frame: Frame) -> None:
        header, index = frame.header, self._index
        assert isinstance(header, ReplyHeader)
        outstanding = self._answered < self._sent
        if not outstanding or header.id != self._work.ids[index] or header.stream != self._work.stream:
            self._strays += 1
            return
        if header.flags:
            if header.flags & PART:
                self._ring.token(index, frame.t_done_ns)
                return
            self._ring.tokens(index, number_in(header.flags))
        self._ring.rx(
            index,
            header.status,
            header.batch,
            frame.t_done_ns,
            header.payload_len,
            header.stamps,
            first_class(frame.payload),
        )
        self._answered += 1
        self._ok += header.status == Status.OK
        self._ready_at = frame.t_done_ns

    def _attend(self, fd: int) -> None:
        finish_by = self._watches[fd].attend(self.progress())
        if finish_by is not None:
            self._finish_by = finish_by
            self._last = self._due_until_now()
            self._poll.unregister(fd)
            del self._watches[fd]

    def _due_until_now(self) -> int:
        if self._rests is not None:
            return self._index + 1 if self._answered < self._sent else self._index
        return max(self._index, bisect_right(self._work.intended_ns, now_ns()))


def _after(parts: list[memoryview], taken: int) -> list[memoryview]:
    """What is left to send after the first `taken` bytes."""
    left = []
    for part in parts:
        if taken < len(part):
            left.append(part[taken:])
        taken = max(0, taken - len(part))
    return left
