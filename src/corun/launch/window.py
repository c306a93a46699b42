"""One measured window, seen by the launcher: everybody armed for one instant, then left alone, then asked.

ARM(start_at, stop_at) to all ─ all ready ─ START to all ─ one poll(2) until stop_at ─ DRAIN
"""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.errors import PeerClosed, RunFault, WireError
from corun.launch.children import Child
from corun.launch.segments import Segment
from corun.wire.channel import Channel
from corun.wire.messages import Arm, Message, Start

ARM_AHEAD_S = 0.6
ARM_TRIES = 4
ANSWER_S = 15.0

Fault = Callable[[str], None]


class StopRequest(Protocol):
    """What ends a window early: corun.process.StopSignal."""

    requested: bool

    def fileno(self) -> int: ...


def channel_of(child: Child) -> Channel:
    """The control channel of a child; RunFault when it never said HELLO."""
    if child.channel is None:
        raise RunFault(f"{child.label} never reported")
    return child.channel


def arm(children: Sequence[Child], segment: Segment) -> int:
    """Prepare all for one instant and start them; when preparing took too long, for a later one.

    Returns that instant in ns. RunFault when one refuses or the machine is too slow for any of the tries.
    """
    ahead_s = ARM_AHEAD_S
    for _ in range(ARM_TRIES):
        start_ns = now_ns() + round(ahead_s * NS_PER_S)
        stop_ns = start_ns + round(segment.duration_s * NS_PER_S)
        message = Arm(segment.arm, segment.repeat, segment.index, start_ns, stop_ns)
        sent = [(child, channel_of(child).send(message)) for child in children]
        for child, id in sent:
            channel_of(child).wait_reply(id, ANSWER_S)
        if now_ns() < start_ns - round(0.25 * ahead_s * NS_PER_S):
            for child in children:
                channel_of(child).request(Start(segment.index), ANSWER_S)
            return start_ns
        ahead_s *= 2
    raise RunFault(f"the processes could not be armed in {ahead_s / 2:.1f} s; the machine is overloaded")


def sleep_until(stop_ns: int, children: Sequence[Child], stop: StopRequest, fault: Fault) -> None:
    """Sleep through the window; a child's death is a fault at once, a stop signal ends the window."""
    poller = select.poll()
    poller.register(stop.fileno(), select.POLLIN)
    watched = {child.pidfd: child for child in children if child.alive}
    for pidfd in watched:
        poller.register(pidfd, select.POLLIN)
    while (remaining_ns := stop_ns - now_ns()) > 0 and not stop.requested:
        for fd, _ in poller.poll(remaining_ns / NS_PER_MS + 1):
            if fd in watched:
                poller.unregister(fd)
                child = watched.pop(fd)
                child.popen.wait()
                fault(death(child))


def ask(child: Child, message: Message, timeout_s: float, fault: Fault) -> dict[str, Any] | None:
    """One request; a peer that is gone or refuses is a fault and None, never an exception."""
    try:
        return channel_of(child).request(message, timeout_s)
    except PeerClosed:
        fault(death(child) if not child.alive else f"{child.label} does not answer")
    except (WireError, RunFault) as error:
        fault(f"{child.label}: {error}")
    return None


def death(child: Child) -> str:
    """The sentence about a child that ended before it should."""
    return f"{child.label} {child.how_it_ended()} during a measurement"
