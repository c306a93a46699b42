"""How long one service takes for batches of each size: bursts over its own wire, on its real server, alone.

    server with max_batch = the largest size, its batches held up to HOLD_MS
    burst of n requests in one write ─▶ one batch of n ─▶ n replies with batch = n and their stage stamps
    time of the batch = last tx - batched: what the model thread is busy for, the holding left out

Sizes go upwards and the server starts without a warm-up, so its peak memory after a size is the peak of batches up to
that size. A burst that arrived so slowly that it fell into several batches does not count and is sent again. A size
ends after REPEATS batches or its share of the time; the next one is left out when not even LEAST of it would fit, and
when the server never makes a batch of this one (continuous batching answers each request by itself). A size that the
server fails at or dies of (memory) ends the curve; the smaller ones stand.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from corun import registry
from corun.clock import NS_PER_MS, now_ns
from corun.errors import CorunError, RunFault
from corun.launch import commands
from corun.launch.calibrate import free_port
from corun.launch.children import Child, Family
from corun.launch.control import wait_for_server
from corun.launch.window import channel_of
from corun.profile.footprint import Footprint, footprint, resident_mib
from corun.run.config import Pair, Service
from corun.share.foreign import DIRTY_CORES, foreign_cores, read_cpu
from corun.share.host import Host
from corun.wire import STAMPS, Address, Kind, ReplyHeader, Status, connect, pack_request
from corun.wire.messages import Stop, decode_body
from corun.wire.reader import ReplyReader

HOLD_MS: Final = 25.0
REPEATS: Final = 12
LEAST: Final = 4
WARM: Final = 2
BUDGET_S: Final = 8.0
TRIES: Final = 2
ANSWER_S: Final = 120.0
STOP_S: Final = 30.0
IMAGE_SIZE: Final = 224
RX, BATCHED, TX = (STAMPS.index(name) for name in ("rx_first", "batched", "tx"))


@dataclass(frozen=True)
class Burst:
    """Replies to n requests sent together: sizes of their batches, ms from the first batch's closing to the last
    reply's leaving, ms that a request was on the way to the server and back.
    """

    sizes: tuple[int, ...]
    batch_ms: float
    way_ms: float

    @property
    def whole(self) -> bool:
        """Whether all were one batch."""
        return set(self.sizes) == {len(self.sizes)}


@dataclass(frozen=True)
class OneSize:
    """Batches of one size. footprint: the server's peak in MiB so far; rss_mib, pss_mib: resident after them."""

    size: int
    times_ms: tuple[float, ...]
    footprint: Footprint
    rss_mib: float | None
    pss_mib: float | None


@dataclass(frozen=True)
class Batches:
    """All sizes that the time sufficed for. overhead_ms: median way to the server and back of single requests.

    fault: what ended it before the largest size, "" if nothing did.
    """

    sizes: tuple[OneSize, ...]
    overhead_ms: float
    foreign_cores: float = 0.0
    fault: str = ""


class Bursts(Protocol):
    """What sends bursts: a Sender."""

    def burst(self, size: int) -> Burst: ...


class Sender:
    """Sends bursts over one connection and waits for their replies."""

    def __init__(self, address: Address, payloads: Sequence[bytes]) -> None:
        self._sock: socket.socket = connect(address, ANSWER_S)
        self._sock.settimeout(ANSWER_S)
        self._reader = ReplyReader()
        self._payloads = payloads
        self._next = 0

    def close(self) -> None:
        self._sock.close()

    def burst(self, size: int) -> Burst:
        """`size` requests in one write. RunFault: one was not answered with OK. PeerClosed: the server is gone."""
        sent_ns = now_ns()
        self._sock.sendall(b"".join(self._frame(sent_ns) for _ in range(size)))
        replies: list[tuple[ReplyHeader, int]] = []
        while len(replies) < size:
            for frame in self._reader.receive(self._sock):
                header = frame.header
                assert isinstance(header, ReplyHeader)
                if header.status != Status.OK:
                    raise RunFault(_refusal(header, frame.payload))
                replies.append((header, frame.t_done_ns))
        first, at_ns = replies[0]
        stamps = np.array([header.stamps for header, _ in replies])
        return Burst(
            tuple(header.batch for header, _ in replies),
            (stamps[:, TX].max() - stamps[:, BATCHED].min()) / NS_PER_MS,
            (at_ns - sent_ns - (first.stamps[TX] - first.stamps[RX])) / NS_PER_MS,
        )

    def _frame(self, sent_ns: int) -> bytes:
        payload = self._payloads[self._next % len(self._payloads)]
        self._next += 1
        return pack_request(Kind.INFER, 0, self._next, len(payload), sent_ns, sent_ns) + payload


def measure(pair: Pair, sizes: Sequence[int], budget_s: float = BUDGET_S) -> Batches | str:
    """Batches of each of the sizes on the server of a cell's first service; a sentence when that cannot run.

    A measurement in which others used the machine is made again, up to TRIES times; the least disturbed one counts.
    """
    service = pair.services[0].model_copy(update={"max_batch": max(sizes), "max_delay_ms": HOLD_MS})
    out = Path(tempfile.mkdtemp(prefix="corun-batches-"))
    try:
        with Family(out) as family:
            child, address = _start(service, pair, family, out)
            sender = Sender(address, _payloads(service, pair.config.seed))
            try:
                found = _least_disturbed(sender, child, service, sizes, budget_s)
                with suppress(CorunError, OSError):
                    channel_of(child).request(Stop("no more batches"), STOP_S)
            finally:
                sender.close()
    except (CorunError, OSError) as error:
        return str(error)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return found if found.sizes else f"{service.label} answered in no batch of the sizes asked"


def _start(service: Service, pair: Pair, family: Family, out: Path) -> tuple[Child, Address]:
    address = Address("tcp", pair.config.host, free_port())
    argv, environment = commands.server(service, address, out, os.getpid())
    child = family.start("server", service.label, [*argv, "--warmup", "0"], environment)
    wait_for_server(child, address, family, pair.config.start_timeout_s)
    return child, address


def _payloads(service: Service, seed: int) -> list[bytes]:
    data = registry.fitting_data(service.data, registry.model(service.arch).task)
    size = commands.image_size(service) or IMAGE_SIZE
    options = registry.DataOptions(image_size=size, count=service.count, seed=seed)
    return [payload.data for payload in registry.request_payloads(data, options)]


def _least_disturbed(
    sender: Sender, child: Child, service: Service, sizes: Sequence[int], budget_s: float
) -> Batches:
    on_gpu, seen = service.device.startswith("cuda"), list[Batches]()
    while not seen or (seen[-1].foreign_cores > DIRTY_CORES and not seen[-1].fault and len(seen) < TRIES):
        before = read_cpu([os.getpid()], Host(), now_ns())
        found = all_sizes(sender, child.popen.pid, sizes, budget_s, on_gpu)
        after = read_cpu([os.getpid()], Host(), now_ns())
        seen.append(replace(found, foreign_cores=foreign_cores(before, after)))
    best = min(seen, key=lambda one: (bool(one.fault), one.foreign_cores))
    memory = {one.size: one for one in seen[0].sizes}
    return replace(best, sizes=tuple(_with_memory_of(memory.get(one.size, one), one) for one in best.sizes))


def _with_memory_of(first: OneSize, one: OneSize) -> OneSize:
    """Times of one pass, memory of the first, in which no larger batch had been served before."""
    return OneSize(one.size, one.times_ms, first.footprint, first.rss_mib, first.pss_mib)


def all_sizes(sender: Bursts, pid: int, sizes: Sequence[int], budget_s: float, on_gpu: bool = False) -> Batches:
    """Each size in turn, from the smallest. CorunError when not even that one is answered. pid: the server's."""
    found: list[OneSize] = []
    ways_ms: list[float] = []
    fault, expected_s, end_s = "", 0.0, time.monotonic() + budget_s
    for place, size in enumerate(sorted(sizes)):
        left_s = end_s - time.monotonic()
        if place and (WARM + LEAST) * expected_s > left_s:
            break
        until_s = time.monotonic() + left_s / (len(sizes) - place)
        try:
            bursts = _one_size(sender, size, until_s)
        except (CorunError, OSError) as error:
            if not found:
                raise
            bursts, fault = [], f"batches of {size}: {error}"
        if not bursts:
            break
        times = tuple(one.batch_ms for one in bursts)
        found.append(OneSize(size, times, footprint(pid, on_gpu), *resident_mib(pid)))
        ways_ms += [one.way_ms for one in bursts if size == 1]
        expected_s = 2 * (float(np.median(times)) + HOLD_MS) / 1000
    return Batches(tuple(found), max(0.0, float(np.median(ways_ms))) if ways_ms else 0.0, fault=fault)


def _one_size(sender: Bursts, size: int, until_s: float) -> list[Burst]:
    """Whole batches of a size, after a few that do not count; [] when LEAST of them cannot be had."""
    for _ in range(WARM):
        sender.burst(size)
    found: list[Burst] = []
    for tried in range(1, 2 * REPEATS + 1):
        one = sender.burst(size)
        found += [one] if one.whole else []
        enough = len(found) >= LEAST or tried >= 2 * LEAST
        if len(found) == REPEATS or (enough and time.monotonic() > until_s) or (tried >= LEAST and not found):
            break
    return found if len(found) >= LEAST else []


def _refusal(header: ReplyHeader, payload: bytes | bytearray) -> str:
    known = {int(status): status.name for status in Status}
    return (
        f"a request was answered {known.get(header.status, header.status)}: {decode_body(payload).get('error', '')}"
    )
