"""One client through its segments: prepared before, measured without interruption, recorded after.

    arm     connect, compare clocks, make the ring, lay out the work        before the start
    run     the sender or the closed loop, nothing else                     the segment
    finish  compare clocks, complete the ring's metadata                    after it

The connection is kept from segment to segment while it is clean: once a reply is missing a new one is made, so
that no late reply of one segment is read in the next.
"""

from __future__ import annotations

import gc
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corun.clock import NS_PER_MS, NS_PER_S, anchor
from corun.errors import InputError, WireError
from corun.load import target as targets
from corun.load.cancel import CancellingSender
from corun.load.closed import ClosedLoop
from corun.load.ring import Context, Metadata, RingWriter
from corun.load.sender import DRAIN_TIMEOUT_S, Sender
from corun.load.target import Target
from corun.load.timing import Timing, Waiter, make_waiter
from corun.load.work import UNPLANNED_NS, Counts, Progress, Watch, Work
from corun.registry import Payload
from corun.wire import connect, request_flags
from corun.wire.messages import Arm

FREE_RATE = 20_000
MAX_FREE_SLOTS = 500_000


@dataclass(frozen=True)
class ClientOptions:
    """What one client does in every segment.

    service: name of the service in files and tables. one_at_a_time: one request in flight, else open loop.
    after_reply: with one in flight, take the gaps of the schedule as rests after each reply, as the original
    did, instead of keeping its instants. think_ns: rest after each reply where the schedule has no instants.
    rate: as asked, for the tables; 0 = trace. drain_timeout_s: patience after the segment's end. tokens: ask a model
    that generates for each token as it is made. deadline_ms, cancel_after_ms: the server shall end a request so long
    after its intended instant, and this client takes it back so long after it was sent; 0 = never.
    """

    service: str
    out: Path
    stream: int = 0
    image_size: int | None = None
    train_model: str = "none"
    rate: float = 0.0
    one_at_a_time: bool = False
    after_reply: bool = False
    think_ns: int = 0
    drain_timeout_s: float = DRAIN_TIMEOUT_S
    tokens: bool = False
    deadline_ms: int = 0
    cancel_after_ms: int = 0

    def __post_init__(self) -> None:
        if not self.service or "/" in self.service:
            raise InputError(f'"{self.service}" cannot name a service: it becomes a file name')


class Client:
    """One load stream against one server; `arm`, `run`, `finish` once per segment."""

    def __init__(self, options: ClientOptions, target: Target, payloads: Sequence[Payload], timing: Timing) -> None:
        self.options = options
        self.target = target
        self.timing = timing
        self._payloads = tuple(payload.data for payload in payloads)
        self._names = tuple(payload.name for payload in payloads)
        labels = tuple(payload.label for payload in payloads)
        self._labels = labels if any(label is not None for label in labels) else ()
        self._sock: socket.socket | None = None
        self._segment: _Segment | None = None
        self._next_free_id = 0
        self.free_running = False
        """Whether the last armed segment had no due instants to keep."""

    @property
    def directory(self) -> Path:
        """Where rings and tables of clients go."""
        return self.options.out / "infer_client"

    def ring_path(self, segment: int) -> Path:
        """The record file of a segment."""
        return self.directory / f"{self.options.service}.{segment}.ring"

    def arm(self, arm: Arm, rows: NDArray[np.void]) -> None:
        """Prepare a segment of these schedule rows; armed again before it ran, the earlier preparation is void.

        Raises PeerClosed when the server is gone, InputError when the rows do not fit this kind of client.
        """
        self._void()
        rests_ns = self._rests(rows)
        self.free_running = rests_ns is not None
        work = self._work(arm, rows, free=self.free_running)
        clock = {} if self.target.same_clock else {"before": targets.clock_offset(self.target.address)}
        if self._sock is None:
            self._sock = connect(self.target.address)
        metadata = Metadata(
            context=self._context(arm),
            payloads=self._names,
            labels=self._labels,
            anchor=anchor(),
            clock=clock,
            timing=self.timing.as_dict(),
            server=dict(self.target.body),
        )
        ring = RingWriter(self.ring_path(arm.segment), len(work), metadata)
        runner, waiter = self._runner(arm, work, ring, rests_ns)
        self._segment = _Segment(runner, waiter, ring, metadata, self.free_running)
        gc.collect()

    def _runner(
        self, arm: Arm, work: Work, ring: RingWriter, rests_ns: list[int] | None
    ) -> tuple[Sender | ClosedLoop, Waiter | None]:
        assert self._sock is not None
        options = self.options
        finish_by = arm.stop_at_ns + round(options.drain_timeout_s * NS_PER_S)
        flags, cancel_after_ns = (
            request_flags(options.tokens, options.deadline_ms),
            options.cancel_after_ms * NS_PER_MS,
        )
        if options.one_at_a_time:
            loop = ClosedLoop(
                self._sock,
                work,
                ring,
                self.timing,
                arm.start_at_ns,
                arm.stop_at_ns,
                finish_by,
                rests_ns,
                flags,
                cancel_after_ns,
            )
            return loop, None
        waiter = make_waiter(self.timing)
        if cancel_after_ns:
            return CancellingSender(self._sock, work, ring, waiter, finish_by, flags, cancel_after_ns), waiter
        return Sender(self._sock, work, ring, waiter, finish_by, flags), waiter

    def progress(self) -> Progress | None:
        """Counters of the armed or running segment."""
        return self._segment.runner.progress() if self._segment else None

    def run(self, watches: Sequence[Watch] = ()) -> Counts:
        """The armed segment; returns when everything was answered, given up, or cut off."""
        segment = self._segment
        assert segment is not None
        counts = segment.counts = segment.runner.run(watches)
        if counts.lost or counts.fault:
            self._disconnect()
        return counts

    def finish(self) -> dict[str, Any]:
        """Complete the ring and return the counts, how the client waited, and where the ring is."""
        segment = self._segment
        assert segment is not None
        assert segment.counts is not None
        self._segment = None
        clock = dict(segment.metadata.clock)
        if clock:
            clock.update(self._clock_after())
        counts = segment.counts.as_dict()
        segment.ring.update(replace(segment.metadata, clock=clock, counts=counts))
        segment.close(segment.counts.scheduled)
        if segment.free:
            self._next_free_id += segment.counts.scheduled
        return {**counts, "ring": str(segment.ring.path), "timing": self.timing.as_dict(), "clock": clock}

    def close(self) -> None:
        """Give up the connection and what is armed."""
        self._void()
        self._disconnect()

    def _void(self) -> None:
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _clock_after(self) -> dict[str, Any]:
        try:
            return {"after": targets.clock_offset(self.target.address)}
        except WireError as error:
            return {"after_failed": str(error)}

    def _rests(self, rows: NDArray[np.void]) -> list[int] | None:
        """Rests after each reply in ns, or None when the rows' instants are kept."""
        unplanned = bool((rows["intended_ns"] == UNPLANNED_NS).any())
        if not self.options.one_at_a_time:
            if unplanned:
                raise InputError(
                    "this schedule has requests without a due instant (a closed loop); an open-loop client cannot "
                    "send them: use client.py, or another --process"
                )
            return None
        if unplanned:
            return [self.options.think_ns]
        if self.options.after_reply:
            gaps = np.diff(np.sort(rows["intended_ns"]))
            return [int(gap) for gap in gaps] or [0]
        return None

    def _work(self, arm: Arm, rows: NDArray[np.void], free: bool) -> Work:
        work = Work.of_rows(rows, arm.start_at_ns, self.options.stream, self._payloads)
        if not free:
            return work
        slots = max(1, round((arm.stop_at_ns - arm.start_at_ns) / NS_PER_S * FREE_RATE))
        slots = min(slots, MAX_FREE_SLOTS) if len(rows) else 0
        return replace(
            work,
            ids=range(self._next_free_id, self._next_free_id + slots),
            intended_ns=(),
            payload_of=list(islice(cycle(range(len(self._payloads))), slots)),
        )

    def _context(self, arm: Arm) -> Context:
        options, target = self.options, self.target
        return Context(
            service=options.service,
            infer_model_name=target.model,
            train_model_name=options.train_model,
            image_size=options.image_size or target.image_size,
            device=target.device,
            request_rate=options.rate,
            arm=arm.arm,
            repeat=arm.repeat,
            segment=arm.segment,
        )


@dataclass
class _Segment:
    """One segment between `arm` and `finish`."""

    runner: Sender | ClosedLoop
    waiter: Waiter | None
    ring: RingWriter
    metadata: Metadata
    free: bool
    counts: Counts | None = None

    def close(self, used: int | None = None) -> None:
        self.ring.close(used)
        if self.waiter is not None:
            self.waiter.close()
