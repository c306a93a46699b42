"""What client.py and client_async.py do with their flags: one client, by hand or under a launcher."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import numpy as np

from corun import arrivals, registry
from corun.arrivals import Schedule, Stream
from corun.arrivals import schedule as schedules
from corun.clock import NS_PER_S
from corun.errors import EXIT_INTERRUPTED, InputError, RunFault
from corun.load import target as targets
from corun.load.client import Client, ClientOptions
from corun.load.flags import Flags
from corun.load.ring import open_ring, ring_to_csv
from corun.load.session import Session, run_by_hand
from corun.load.summary import line
from corun.load.target import Target
from corun.load.timing import prepare
from corun.load.work import Counts
from corun.process import StopSignal, die_with_parent
from corun.run.directory import result_root
from corun.wire import Address, connect
from corun.wire.channel import Channel

DEFAULT_IMAGE_SIZE = 224


def run(flags: Flags) -> None:
    """Find the server, load the payloads, then measure by hand or as the launcher says."""
    if flags.control and not (flags.schedule and flags.out):
        raise InputError("--control needs --schedule and --out: under a launcher the schedule is made before the run")
    if flags.control:
        die_with_parent()
    address = Address.parse(flags.address or f"{flags.host}:{flags.port}")
    timing = prepare(flags.priority, _cores(flags.cores), flags.rate)
    options = {"image_size": flags.image_size} if flags.image_size else {}
    with StopSignal() as stop:
        target = targets.find(address, flags.model, options, flags.wait_s)
        size = flags.image_size or target.image_size or DEFAULT_IMAGE_SIZE
        payloads = registry.request_payloads(
            registry.fitting_data(flags.data, target.task),
            registry.DataOptions(image_size=size, count=flags.count, seed=flags.seed),
        )
        schedule = _schedule(flags, len(payloads))
        client = Client(_options(flags, target), target, payloads, timing)
        try:
            if flags.control:
                _controlled(flags.control, client, schedule, stop)
            else:
                _by_hand(flags, client, schedule, stop)
        finally:
            client.close()


def _controlled(control: str, client: Client, schedule: Schedule, stop: StopSignal) -> None:
    Session(client, schedule, Channel(connect(Address.parse(control))), stop).run()


def _by_hand(flags: Flags, client: Client, schedule: Schedule, stop: StopSignal) -> None:
    duration_s = _duration_s(flags, schedule)
    counts, elapsed_s = run_by_hand(client, schedule, duration_s, stop)
    ring = client.ring_path(0)
    csv = client.directory / f"{client.options.service}.csv"
    ring_to_csv(ring, csv)
    records = open_ring(ring).records
    ring.unlink()
    span_s = min(elapsed_s, duration_s) if stop.requested else duration_s
    print(f"{line(counts, records, _asked(client), span_s)} -> {csv}", flush=True)
    _judge(counts, stop)


def _asked(client: Client) -> str:
    if client.free_running:
        return "one after another"
    rate = client.options.rate
    return f"asked {rate:.4g}/s" if rate else "as in the trace"


def _duration_s(flags: Flags, schedule: Schedule) -> float:
    """--duration, or the length of a schedule that was given."""
    if not flags.schedule or not schedule.is_open_loop:
        return flags.duration_s
    instants = schedule.intended_ns
    if (np.diff(instants) < 0).any():
        raise InputError(
            f"{flags.schedule} holds several segments, each with instants of its own: only a launcher can run it"
        )
    return (int(instants[-1]) + 1) / NS_PER_S if len(instants) else flags.duration_s


def _judge(counts: Counts, stop: StopSignal) -> None:
    if stop.requested:
        raise SystemExit(EXIT_INTERRUPTED)
    if counts.fault:
        raise RunFault(f"{counts.fault}; {counts.lost} of {counts.scheduled} requests are recorded as LOST")
    if counts.lost:
        raise RunFault(f"{counts.lost} of {counts.scheduled} requests got no reply")
    if counts.scheduled and not counts.ok:
        raise RunFault(f"none of {counts.scheduled} requests was answered with OK; see the column status")


def _options(flags: Flags, target: Target) -> ClientOptions:
    service = flags.name or flags.model or target.model or "service"
    return ClientOptions(
        service=service,
        out=flags.out or _fresh_directory(service),
        stream=flags.stream,
        image_size=flags.image_size,
        train_model=flags.train_model,
        rate=flags.rate,
        one_at_a_time=flags.one_at_a_time,
        after_reply=flags.after_reply,
        think_ns=round(flags.think_s * NS_PER_S),
        tokens=target.generates and not flags.whole,
        deadline_ms=flags.deadline_ms,
        cancel_after_ms=flags.cancel_after_ms,
        drain_timeout_s=flags.drain_timeout_s,
    )


def _fresh_directory(service: str) -> Path:
    return result_root() / f"{datetime.now():%Y%m%d-%H%M%S}-client-{service.replace('/', '_')}-{os.getpid()}"


def _schedule(flags: Flags, payloads: int) -> Schedule:
    """The schedule file, or by hand the schedule of this stream from the seed."""
    if flags.schedule:
        return schedules.load(flags.schedule).of_stream(flags.stream)
    process = arrival_process(flags.process, flags.rate)
    return schedules.make([Stream(flags.stream, process, payloads)], flags.duration_s, flags.seed)


def arrival_process(text: str, rate: float) -> arrivals.Process:
    """`poisson` at --rate, or `gamma:rate=10,shape=0.5` with its own parameters; rate 0 is the recorded trace."""
    name, colon, _ = text.partition(":")
    if colon or name in ("closed", "closed-loop"):
        return arrivals.from_text(text)
    if rate == 0:
        return arrivals.of_rate(0) if name == "poisson" else arrivals.parse(name)
    return arrivals.parse(name, rate=rate)


def _cores(text: str) -> list[int]:
    if not text:
        return []
    try:
        return [int(core) for core in text.split(",")]
    except ValueError:
        raise InputError(f'--cores "{text}": give core numbers, e.g. 0,1') from None
