"""The service's side of the shared page: one call when a request arrives, one when it has been answered.

    io thread     on_request()    pending +1, as early as the request is known
    any thread    on_reply(ns)    pending -1, its latency into the ring; wakes a trainer that waits for zero

Neither makes a system call unless the trainer sleeps. A small thread renews the heartbeat, so that a request that
computes for seconds keeps the trainer waiting while a service that was killed does not.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

from corun.clock import NS_PER_S, now_ns
from corun.errors import InputError
from corun.share.page import BEAT_PERIOD_NS, Page


class Announcer:
    """Tells the trainer about the requests of one service.

    Raises InputError for a slot the page does not have. Thread safe. `close` gives the slot back.
    """

    def __init__(self, page: Page, slot: int, clock: Callable[[], int] = now_ns, beating: bool = True) -> None:
        page.claim(slot, os.getpid(), clock())
        self._page = page
        self._slot = slot
        self._clock = clock
        self._lock = threading.Lock()
        self._arrived: deque[int] = deque()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="beat", daemon=True)
        if beating:
            self._thread.start()

    def on_request(self) -> None:
        """A request arrived."""
        with self._lock:
            now = self._clock()
            self._arrived.append(now)
            self._page.beat(self._slot, now)
            self._page.set_pending(self._slot, len(self._arrived))
            self._page.count_arrival(self._slot)

    def on_reply(self, latency_ns: int | None = None) -> None:
        """A request was answered, whatever the answer.

        latency_ns: what its sender waited; without it the time since the oldest unanswered arrival, which is
        exact for a queue in order of arrival.
        """
        with self._lock:
            if not self._arrived:
                return
            now = self._clock()
            arrived = self._arrived.popleft()
            self._page.record(self._slot, now - arrived if latency_ns is None else latency_ns)
            self._page.beat(self._slot, now)
            self._page.set_pending(self._slot, len(self._arrived))
            if not self._arrived:
                self._page.ring_bell()

    def close(self) -> None:
        """Nothing is pending any more; the page itself stays open."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            self._arrived.clear()
            self._page.set_pending(self._slot, 0)
            self._page.ring_bell()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_PERIOD_NS / NS_PER_S):
            self._page.beat(self._slot, self._clock())


def parse(text: str) -> Announcer:
    """`PATH:SLOT` of a command line as an announcer; InputError when it is no such thing."""
    path, colon, slot = text.rpartition(":")
    if not colon or not slot.isdigit():
        raise InputError(f'"{text}" is not PATH:SLOT of a shared page, e.g. /dev/shm/corun-1:0')
    return Announcer(Page.open(path), int(slot))
