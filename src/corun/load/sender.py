"""The open-loop client: every request leaves at its due instant, whatever the server does.

One thread, one epoll set. A second Python thread in this process would hold the interpreter for up to 5 ms at
a time, and asyncio's timers are 0.5 ms late, so the loop is written out::

        schedule ──▶ due ────────▶ head ────────▶ kernel ──▶ server
                     │ woke up for  │ handed over             │
        timerfd ─────┘              └ EPOLLOUT when it        │
                                      was full                │
        ring ◀── status, stamps ◀── matched by id ◀───────────┘

`due` and `head` are positions in the schedule; what lies between is the send queue, kept here and not in a
blocking `send`: a server that does not read would otherwise turn the open loop into a closed one after 28
images. Nothing is ever dropped or re-anchored: a late request goes out at once and keeps its intended instant,
so the lateness is in its sojourn.

A connection that breaks is not opened again within the segment: everything outstanding and all that was still to
come is LOST, and the segment ends with its counts. The next segment connects anew.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence

from corun.clock import now_ns
from corun.errors import WireError
from corun.load.ring import RingWriter, first_class
from corun.load.timing import Waiter
from corun.load.work import Counts, Progress, Watch, Work, count, undisturbed
from corun.wire import PART, REQUEST_SIZE, Kind, ReplyHeader, ReplyReader, Status, number_in, pack_request_into

DRAIN_TIMEOUT_S = 10.0


class Sender:
    """Sends one segment's work over one connection and records it.

    The connection is this sender's alone until `run` returns. finish_by_ns: what is outstanding then is LOST.
    flags: of every request (corun.wire.request_flags).
    """

    def __init__(
        self,
        sock: socket.socket,
        work: Work,
        ring: RingWriter,
        waiter: Waiter,
        finish_by_ns: int,
        flags: int = 0,
    ) -> None:
        ring.fill(work.ids, work.intended_ns, work.stream, work.payload_of)
        self._sock = sock
        self._fd = sock.fileno()
        self._work = work
        self._ring = ring
        self._waiter = waiter
        self._finish_by = finish_by_ns
        self._flags = flags
        self._watches: dict[int, Watch] = {}
        self._reader = ReplyReader()
        self._header = bytearray(REQUEST_SIZE)
        self._slot_of = {id: index for index, id in enumerate(work.ids)}
        self._views = [memoryview(payload) for payload in work.payloads]
        self._last = len(work)
        self._due = self._head = 0
        self._wakes = [0] * len(work)
        self._rest: memoryview | None = None
        self._rest_start = 0
        self._blocked = self._dead = False
        self._sent = self._answered = self._ok = 0
        self._strays = self._backlog_max = 0
        self._fault = ""

    def run(self, watches: Sequence[Watch] = ()) -> Counts:
        """Send everything, wait for the replies, mark what is missing; never raises for what a server does."""
        ring = self._ring
        self._watches = {watch.fileno(): watch for watch in watches}
        self._sock.setblocking(False)
        self._open()
        cpu_s = time.process_time()
        try:
            with undisturbed():
                self._loop()
        finally:
            self._close()
        for index in range(self._head, self._due):
            ring.wake(index, self._wakes[index])
        ring.lose_unsent(self._last)
        return count(ring.records, self._strays, self._backlog_max, time.process_time() - cpu_s, self._fault)

    def progress(self) -> Progress:
        """Counters so far."""
        return Progress(len(self._work), self._sent, self._answered, self._ok, self._due - self._head)

    def _open(self) -> None:
        self._waiter.register(self._fd, select.EPOLLIN)
        for fd in self._watches:
            self._waiter.register(fd, select.EPOLLIN)

    def _close(self) -> None:
        for fd in (self._fd, *self._watches):
            self._waiter.unregister(fd)
        self._waiter.arm(0)

    def _loop(self) -> None:
        wait = self._waiter.wait
        self._arm()
        while not self._finished():
            events = wait()
            self._notice(now_ns())
            self._push()
            for fd, mask in events:
                if fd != self._fd:
                    self._attend(fd)
                    continue
                if mask & select.EPOLLOUT:
                    self._unblock()
                if mask & ~select.EPOLLOUT:
                    self._receive()
            self._arm()

    def _finished(self) -> bool:
        sent_all = self._head >= self._last and self._rest is None
        return bool(self._fault) or (sent_all and self._answered == self._sent) or now_ns() >= self._finish_by

    def _arm(self) -> None:
        """The next thing that happens by itself: a request falls due, or patience ends."""
        due = self._due
        self._waiter.arm(min(self._work.intended_ns[due], self._finish_by) if due < self._last else self._finish_by)

    def _notice(self, now: int) -> None:
        """Move `due` past everything whose instant has come."""
        due, last, intended = self._due, self._last, self._work.intended_ns
        while due < last and intended[due] <= now:
            self._wakes[due] = now
            due += 1
        self._due = due

    def _push(self) -> None:
        """Hand over what is due until the kernel refuses; requests that fall due meanwhile join in."""
        while self._head < self._due and not self._blocked:
            self._send(self._head)
            self._notice(now_ns())
        if self._due - self._head > self._backlog_max:
            self._backlog_max = self._due - self._head

    def _send(self, index: int) -> None:
        work, header = self._work, self._header
        payload = self._views[work.payload_of[index]]
        wake, start = self._wakes[index], now_ns()
        pack_request_into(
            header,
            Kind.INFER,
            work.stream,
            work.ids[index],
            len(payload),
            work.intended_ns[index],
            start,
            0,
            self._flags,
        )
        count = self._hand_over((header, payload))
        if count == REQUEST_SIZE + len(payload):
            self._ring.tx(index, wake, start, now_ns())
            self._sent += 1
            self._head = index + 1
            return
        self._block()
        if count:
            self._ring.tx(index, wake, start, 0)
            self._rest = memoryview(b"".join((header, payload)))[count:]
            self._rest_start = start

    def _hand_over(self, parts: Sequence[bytearray | memoryview]) -> int:
        """Bytes the kernel took: 0 when its buffer is full or the connection is broken.

        Replies that arrived before it broke are still to be read, so a break is a fault only once reading
        ends; nothing more is sent from now on.
        """
        try:
            return self._sock.sendmsg(parts)
        except BlockingIOError:
            return 0
        except OSError:
            self._dead = True
            return 0

    def _block(self) -> None:
        self._blocked = True
        self._waiter.modify(self._fd, select.EPOLLIN | (0 if self._dead else select.EPOLLOUT))

    def _unblock(self) -> None:
        """The kernel takes bytes again: first the rest of the request it has a part of, then the queue."""
        if self._rest is not None:
            self._rest = self._rest[self._hand_over((self._rest,)) :]
            if len(self._rest):
                self._block()
                return
            self._rest = None
            self._ring.tx(self._head, self._wakes[self._head], self._rest_start, now_ns())
            self._sent += 1
            self._head += 1
        self._blocked = False
        self._push()
        if not self._blocked:
            self._waiter.modify(self._fd, select.EPOLLIN)

    def _receive(self) -> None:
        try:
            frames = self._reader.receive(self._sock)
        except WireError as error:
            self._fault = str(error)
            return
        for frame in frames:
            header = frame.header
            assert isinstance(header, ReplyHeader)
            index = self._slot_of.get(header.id, self._last)
            if index >= self._head or header.stream != self._work.stream:
                self._strays += 1
                continue
            if header.flags and self._is_part(index, header.flags, frame.t_done_ns):
                continue
            del self._slot_of[header.id]
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

    def _is_part(self, index: int, flags: int, t_done_ns: int) -> bool:
        """Record tokens; True when more replies to this request follow."""
        if flags & PART:
            self._ring.token(index, t_done_ns)
            return True
        self._ring.tokens(index, number_in(flags))
        return False

    def _attend(self, fd: int) -> None:
        finish_by = self._watches[fd].attend(self.progress())
        if finish_by is not None:
            self._finish_by = finish_by
            self._last = self._due
            self._waiter.unregister(fd)
            del self._watches[fd]
