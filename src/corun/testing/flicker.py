"""Requests that come and go on a shared page, for trainers that must be held by them.

Usage::

    with Flicker(page) as service:
        train(PageGate(page, stale_ns=NEVER_STALE_NS))      # is held at least once
    service.times
"""

from __future__ import annotations

import threading
import time

from corun.clock import now_ns
from corun.share.announce import Announcer
from corun.share.page import Page

NEVER_STALE_NS = 10**18
"""For a gate whose test must not depend on how promptly the service's beat is renewed."""

PENDING_S = 0.003
PAUSE_S = 0.002
LOOK_S = 0.001


class Flicker:
    """A service in a thread; its first request stays until the trainer sleeps at its gate, or the block ends.

    times: (arrived, answered) stamps, taken inside the time that the request was announced; complete after the block.
    """

    def __init__(self, page: Page, slot: int = 0) -> None:
        self.times: list[tuple[int, int]] = []
        self._page = page
        self._service = Announcer(page, slot)
        self._service.on_request()
        self._arrived_ns = now_ns()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flicker")

    def __enter__(self) -> Flicker:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        self._service.close()

    def _run(self) -> None:
        while not (self._page.somebody_sleeps or self._ended.wait(LOOK_S)):
            pass
        while True:
            time.sleep(PENDING_S)
            self.times.append((self._arrived_ns, now_ns()))
            self._service.on_reply()
            if self._ended.wait(PAUSE_S):
                return
            self._service.on_request()
            self._arrived_ns = now_ns()
