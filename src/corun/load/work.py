"""What a client has to do in one segment, and the counts it answers with."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from corun.errors import InputError
from corun.load.ring import UNSENT, Records
from corun.wire import MAX_PAYLOAD, Status

UNPLANNED_NS = -1


@dataclass(frozen=True)
class Work:
    """The requests of one segment in schedule order; instants are absolute (CLOCK_MONOTONIC ns).

    A free-running loop has no instants: intended_ns is empty then.
    """

    stream: int
    ids: Sequence[int]
    intended_ns: Sequence[int]
    payload_of: Sequence[int]
    payloads: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of_rows(cls, rows: NDArray[np.void], start_at_ns: int, stream: int, payloads: Sequence[bytes]) -> Work:
        """From schedule rows (`corun.arrivals.schedule.ROW`) of one stream; the payload index wraps around.

        Raises InputError when there is no payload to send, or one over the protocol's limit.
        """
        if not payloads:
            raise InputError("the data set has no payload to send")
        longest = max(map(len, payloads))
        if longest > MAX_PAYLOAD:
            raise InputError(f"a payload of {longest} bytes is over the protocol's limit of {MAX_PAYLOAD}")
        rows = rows[np.argsort(rows["intended_ns"], kind="stable")]
        return cls(
            stream=stream,
            ids=rows["id"].tolist(),
            intended_ns=(rows["intended_ns"] + start_at_ns).tolist(),
            payload_of=(rows["payload"] % len(payloads)).tolist(),
            payloads=tuple(payloads),
        )


@dataclass(frozen=True)
class Progress:
    """A segment so far: requests sent, answered, answered with OK, and due but not yet with the kernel."""

    scheduled: int
    sent: int
    answered: int
    ok: int
    backlog: int

    def as_dict(self) -> dict[str, Any]:
        """For the STATS reply."""
        return asdict(self)


@dataclass(frozen=True)
class Counts:
    """How a segment ended: ok + errors + lost + unsent = scheduled.

    sent: handed to the kernel whole. errors: answered with another status than OK. lost: begun or due, never
    answered. unsent: not yet due when the segment was ended early. strays: replies that matched no request.
    backlog_max: most requests that were due and refused by the kernel at one moment. cpu_s: of this process
    while the segment lasted. fault: why the connection was given up, or "".
    """

    scheduled: int
    sent: int
    ok: int
    errors: int
    lost: int
    unsent: int = 0
    strays: int = 0
    backlog_max: int = 0
    cpu_s: float = 0.0
    fault: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For the DRAIN reply."""
        return asdict(self)


def count(records: Records, strays: int, backlog_max: int, cpu_s: float, fault: str) -> Counts:
    """Tally the used slots of a ring."""
    used = records[records["t_intended"] != 0]
    status = used["status"]
    ok, lost, unsent = (int((status == code).sum()) for code in (Status.OK, Status.LOST, UNSENT))
    return Counts(
        scheduled=len(used),
        sent=int((used["t_tx_done"] != 0).sum()),
        ok=ok,
        errors=len(used) - ok - lost - unsent,
        lost=lost,
        unsent=unsent,
        strays=strays,
        backlog_max=backlog_max,
        cpu_s=cpu_s,
        fault=fault,
    )


class Watch(Protocol):
    """A descriptor to look at while a segment runs: the control channel, the stop signal."""

    def fileno(self) -> int: ...

    def attend(self, progress: Progress) -> int | None:
        """The descriptor is readable. An instant (ns) to be done by ends the segment early; None goes on."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection inside: what exists is frozen, what is made is freed by reference count.

    Nothing slow happens here, the window may already have begun; a collection belongs to arming.
    """
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
