"""The profiler from its options to its last row: probe, say what there is, sample, leave profiler.json."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from corun.clock import NS_PER_S, Anchor, anchor, now_ns
from corun.errors import InputError
from corun.process import StopSignal, set_timer_slack
from corun.profile import fdinfo, nvml
from corun.profile.control import Control, waiter
from corun.profile.device import Device
from corun.profile.device_file import DeviceFile
from corun.profile.device_file import load as load_device_file
from corun.profile.gpu import Gpus
from corun.profile.grid import Grid
from corun.profile.host import CpuTimes, Memory, Network, Pressure
from corun.profile.processes import ProcessTable
from corun.profile.rapl import Rapl
from corun.profile.sampler import GpuSource, Sampler, SamplerStatistics, Sources, Tables, run
from corun.profile.source import Faults, HostSource, Row, Status, Unavailable, open_sources
from corun.profile.watch import Watched, WatchFile
from corun.registry import home
from corun.run.directory import result_root
from corun.run.records import SCHEMA_VERSION
from corun.run.table import EventLog
from corun.wire.channel import Channel
from corun.wire.sockets import Address, connect

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ProfilerOptions:
    """What the command line says. count 0 = until stopped; device_file None = the one of the checkout."""

    out: Path
    period_s: float = 1.0
    count: int = 0
    device_file: Path | None = None
    root: Path | None = None
    watch: Path | None = None
    pids: tuple[Watched, ...] = ()
    control: str | None = None


def default_out() -> Path:
    """Where a profiler started by hand writes: result/profile-YYYYMMDD-HHMMSS."""
    return result_root() / time.strftime("profile-%Y%m%d-%H%M%S")


def profile(options: ProfilerOptions, say: Callable[[str], None] = print) -> SamplerStatistics:
    """Sample until stopped; every row is on disk when this returns, and when it does not."""
    device = _check(options)
    _allow_many_files()
    set_timer_slack(1)
    options.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        events = stack.enter_context(closing(EventLog(options.out / "events.csv")))
        faults = Faults(lambda source, text: events.write("fault", "profiler", "profiler", f"{source}: {text}"))
        sources, statuses = _open(options, device, faults, events)
        stack.enter_context(closing(sources))
        for status in statuses:
            say(status.line())
            if not status.available:
                events.write("unavailable", "profiler", status.name, status.reason)
        tables = stack.enter_context(closing(Tables(options.out, sources.host)))
        stop = stack.enter_context(StopSignal())
        started = anchor()
        _write_about(options, started, sources, statuses, None)
        statistics, ended = _sample(options, sources, tables, faults, started, stop, events, say)
        _write_about(options, started, sources, _at_end(sources, statuses), statistics)
        events.write("stop", "profiler", "profiler", ended)
    return statistics


def _check(options: ProfilerOptions) -> DeviceFile | None:
    """Everything the user can have got wrong, before anything is made."""
    problems = []
    if not options.period_s > 0:
        problems.append(f"--period must be more than 0 seconds, not {options.period_s}")
    if options.count < 0:
        problems.append(f"--count must be 0 (no limit) or more, not {options.count}")
    if (options.out / "profile.csv").exists():
        problems.append(f"{options.out} holds a profile.csv already; choose another --out")
    if problems:
        raise InputError("the profiler cannot start", problems)
    if options.control:
        Address.parse(options.control)
    default = home() / "device.json"
    if options.device_file is None and not default.exists():
        return None
    return load_device_file(options.device_file or default)


def _allow_many_files() -> None:
    """Two descriptors per watched thread add up; take what the hard limit allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _open(
    options: ProfilerOptions, device: DeviceFile | None, faults: Faults, events: EventLog
) -> tuple[Sources, list[Status]]:
    """Probe every source once."""
    root = options.root or Path(device.root if device else "/")

    def open_device() -> HostSource:
        if device is None:
            raise Unavailable(f"no device file at {home() / 'device.json'}")
        return Device(device, root, faults)

    host, statuses = open_sources(
        [
            ("cpu", lambda: CpuTimes(root)),
            ("memory", lambda: Memory(root)),
            ("pressure", lambda: Pressure(root)),
            ("network", lambda: Network(root)),
            ("rapl", lambda: Rapl(root)),
            ("device", open_device),
        ],
        now_ns,
    )
    gpus, gpu_status = _open_gpus(faults)
    drm = fdinfo.probe(root)
    processes = ProcessTable(root, faults, events.write, drm.available)
    processes.watch([Watched(os.getpid(), "profiler", "profiler"), *options.pids])
    watch = WatchFile(options.watch, lambda error: faults.record("watch", error)) if options.watch else None
    return Sources(host, processes, gpus, watch), [*statuses, gpu_status, drm]


def _open_gpus(faults: Faults) -> tuple[GpuSource | None, Status]:
    try:
        gpus = Gpus(faults)
    except Unavailable as error:
        problem = nvml.binding_problem()
        return None, Status("nvml", "; ".join(filter(None, [str(error), problem])))
    return gpus, gpus.status()


def _sample(
    options: ProfilerOptions,
    sources: Sources,
    tables: Tables,
    faults: Faults,
    started: Anchor,
    stop: StopSignal,
    events: EventLog,
    say: Callable[[str], None],
) -> tuple[SamplerStatistics, str]:
    """The loop; returns the counts and why it ended."""
    control = _connect(options, lambda: sampler.statistics())
    segment_at: Callable[[int], Row] = control.segment_at if control else lambda t_ns: {}
    sampler = Sampler(sources, tables, faults, now_ns, started, segment_at)
    if control:
        control.hello({"period_s": options.period_s})
    events.write("start", "profiler", "profiler", f"pid {os.getpid()}, every {options.period_s:g} s")
    say(f"sampling every {options.period_s:g} s into {options.out}")
    gc.freeze()
    grid = Grid(now_ns(), round(options.period_s * NS_PER_S))
    run(grid, waiter(stop, control), now_ns, sampler.sample, options.count)
    ended = control.ended if control and control.ended else "stop signal" if stop.requested else "count reached"
    return sampler.statistics(), ended


def _connect(options: ProfilerOptions, statistics: Callable[[], SamplerStatistics]) -> Control | None:
    if not options.control:
        return None
    return Control(Channel(connect(Address.parse(options.control), CONNECT_TIMEOUT_S, retry=True)), statistics)


def _at_end(sources: Sources, statuses: Sequence[Status]) -> list[Status]:
    """The probes' findings with the GPUs asked again: their error counters matter at the start and the end."""
    if not sources.gpus:
        return list(statuses)
    again = sources.gpus.status()
    return [
        dataclasses.replace(status, details={"start": status.details, "end": again.details})
        if status.name == again.name
        else status
        for status in statuses
    ]


def _write_about(
    options: ProfilerOptions,
    started: Anchor,
    sources: Sources,
    statuses: Sequence[Status],
    statistics: SamplerStatistics | None,
) -> None:
    """profiler.json, replaced atomically: what was read, what was not and why, and at the end the counts."""
    about: Mapping[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "state": "running" if statistics is None else "complete",
        "pid": os.getpid(),
        "period_s": options.period_s,
        "anchor": dataclasses.asdict(started),
        "sources": [dataclasses.asdict(status) | {"available": status.available} for status in statuses],
        "columns": [dataclasses.asdict(column) for source in sources.host for column in source.columns],
        "statistics": dataclasses.asdict(statistics) if statistics else None,
    }
    path = options.out / "profiler.json"
    draft = path.with_suffix(".json.tmp")
    draft.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)
