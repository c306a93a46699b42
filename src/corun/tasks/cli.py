"""What the commands of tasks.py do; the front door only declares their flags."""

from __future__ import annotations

import json
import select
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from corun.clock import now_ns
from corun.errors import EXIT_OK, EXIT_SLO_MISSED, InputError, PeerClosed, RunFault
from corun.process import StopSignal
from corun.tasks import monitor, supervisor
from corun.tasks.choice import Capacity, Choice, promise
from corun.tasks.planning import Planner, models_of
from corun.tasks.priorities import Placement
from corun.tasks.profiles import Settings, Trainer
from corun.tasks.replan import Context, replanning
from corun.tasks.replies import readable
from corun.tasks.runtime import Runtime
from corun.tasks.statistics import Statistics
from corun.tasks.store import Replica, Store, default_path
from corun.tasks.task import Task, make
from corun.wire import Address, Kind, ReplyHeader, ReplyReader, Status, connect, pack_request

WIDE: Final = 180
SAY: Final = Console(highlight=False, soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else WIDE)
UP_WAIT_S: Final = 60.0
LAST_EVENTS: Final = 10

Figures = Mapping[str, Any]


def open_store(path: Path | None) -> Store:
    """The registry of --store, $CORUN_TASKS or result/tasks.sqlite."""
    return Store(path or default_path())


def _json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str), flush=True)


# register, list, show, remove


def register(store: Store, values: Mapping[str, Any], file: Path | None, replace: bool) -> None:
    """Register one task by flags, or all of a JSON file: either all of them or, with every problem listed, none."""
    tasks = [make(**values)] if file is None else read_tasks(file)
    known = {task.id for task in store.all()}
    taken = [task.id for task in tasks if task.id in known]
    if taken and not replace:
        raise InputError(
            "nothing was registered", [f'task "{id}" is registered already; --replace changes it' for id in taken]
        )
    for task in tasks:
        if task.id in known:
            store.replace(task)
        else:
            store.add(task)
        SAY.print(f"{task.id}: {'replaced' if task.id in known else 'registered'}: {sentence(task)}")


def read_tasks(file: Path) -> list[Task]:
    """Tasks of a JSON file, one object or a list of them; InputError lists every problem of every task."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read tasks from {file}: {error}") from error
    entries = value if isinstance(value, list) else [value]
    tasks: list[Task] = []
    problems: list[str] = []
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            problems.append(f"{place}: a task is a JSON object")
            continue
        try:
            tasks.append(make(**entry))
        except InputError as error:
            problems += [f"{entry.get('id', place)}: {problem}" for problem in error.problems or (str(error),)]
    ids = [task.id for task in tasks]
    problems += [f"{id}: stands twice" for id in sorted({id for id in ids if ids.count(id) > 1})]
    if problems:
        raise InputError(f"{file} has {len(problems)} problem{'s' * (len(problems) > 1)}", problems)
    return tasks


def sentence(task: Task) -> str:
    """A task in one line."""
    models = ", ".join(task.models) or f"any {task.kind} model"
    least = f", quality {task.min_quality:g} or more" if task.min_quality else ""
    return f"{task.kind}, {task.input} in, {task.rate:g} requests/s, {promise(task)}{least}; {models}"


def listing(store: Store, as_json: bool) -> None:
    """All tasks, the highest priority first."""
    tasks = store.all()
    if as_json:
        _json([json.loads(task.to_json()) for task in tasks])
        return
    if not tasks:
        SAY.print(f"no tasks in {store.path}: `tasks.py register ID --kind ... --slo ...` makes one")
        return
    grid = _grid("task", "kind", "prio", "on", "req/s", "promise", "quality", "replicas", "runtime", "chosen")
    for task in tasks:
        choice = store.choice(task.id)
        grid.add_row(
            task.id,
            task.kind,
            str(task.priority),
            task.resource,
            f"{task.rate:g}",
            promise(task),
            f">= {task.min_quality:g}" if task.min_quality else "",
            f"{task.min_replicas} to {task.max_replicas}",
            task.runtime,
            (choice.model or "none") if choice else "not planned",
        )
    SAY.print(grid)


def show(store: Store, id: str, as_json: bool) -> None:
    """Everything known of one task."""
    task, choice, figures = store.get(id), store.choice(id), store.statistics(id)
    replicas, events = store.replicas(id), store.events(id, LAST_EVENTS)
    if as_json:
        _json(
            {
                "task": json.loads(task.to_json()),
                "choice": asdict(choice) if choice else None,
                "statistics": asdict(figures),
                "replicas": [asdict(replica) for replica in replicas],
                "events": [asdict(event) for event in events],
            }
        )
        return
    SAY.print(f"{task.id}: {task.description or 'no description'}\n{sentence(task)}")
    limits = [
        f"{value:g} {unit}" for value, unit in ((task.cpu_limit, "cores"), (task.memory_limit_mib, "MiB")) if value
    ]
    SAY.print(
        f"priority {task.priority}, {task.resource}, {task.runtime}, {task.min_replicas} to {task.max_replicas} "
        f"replicas of {' and '.join(limits) or 'any size'}, {task.weights} weights"
    )
    if choice:
        _print_choice(task, choice)
    SAY.print(statistics_line(figures))
    for replica in replicas:
        SAY.print(f"  {_replica_line(replica)}")
    for event in events:
        SAY.print(f"  {datetime.fromtimestamp(event.t_s):%Y-%m-%d %H:%M:%S}  {event.kind}: {event.detail}")


def _replica_line(replica: Replica) -> str:
    why = f", {replica.reason}" if replica.reason else ""
    return f"replica {replica.index}: {replica.model} {replica.state} on {replica.address or 'no address'}{why}"


def statistics_line(figures: Statistics) -> str:
    """`120 answered, 2 errors; response 12.1 ms (sd 3.4, max 40); 5.1 ms CPU each; 512 MiB`."""
    if not (figures.requests or figures.errors):
        return "no requests yet"
    parts = [f"{figures.requests} answered, {figures.errors} errors"]
    if figures.requests:
        parts.append(f"response {figures.mean_ms:.3g} ms (sd {figures.sd_ms:.3g}, max {figures.max_ms:.3g})")
        parts.append(f"{1000 * figures.cpu_s / figures.requests:.3g} ms CPU each")
    parts += [f"{figures.rss_mib:.0f} MiB"] if figures.rss_mib is not None else []
    parts += [f"{figures.gpu_mib:.0f} MiB GPU"] if figures.gpu_mib is not None else []
    return "; ".join(parts)


def remove(store: Store, id: str) -> None:
    """Forget a task; a supervisor that serves it lets its requests finish first."""
    store.remove(id)
    SAY.print(f"{id}: removed")


# plan


def plan(
    store: Store,
    quality: Path | None,
    measure: bool,
    trainer: Trainer | None,
    seconds: float,
    max_batches: Sequence[int],
    cores: float | None,
    memory_mib: float | None,
    max_slowdown: float | None,
    data: str,
    as_json: bool,
) -> int:
    """Choose a model for every task, together; the exit code: 3 when a task has none."""
    context = Context(quality, trainer is not None, cores, memory_mib, max_slowdown)
    planner = context.planner(store)
    if measure:
        settings = Settings(seconds=seconds, max_batches=tuple(max_batches), trainer=trainer, data=data)
        with StopSignal() as stop:
            planner.measure_missing(store.all(), settings, _aloud(as_json), stop)
    context.save(store)
    offered = context.offered(store)
    placement = planner.decide(offered)
    if as_json:
        _json(_placement(placement, offered))
    else:
        _print_placement(store, planner, placement, offered)
    served = all(store.choice(task.id) is None or _has_model(store.choice(task.id)) for task in store.all())
    return EXIT_OK if served else EXIT_SLO_MISSED


def _aloud(as_json: bool) -> Callable[[str], None]:
    return (lambda line: None) if as_json else SAY.print


def _has_model(choice: Choice | None) -> bool:
    return choice is not None and choice.model is not None


def _placement(placement: Placement, offered: Capacity) -> Figures:
    return {
        "machine": asdict(offered),
        "left": asdict(placement.left),
        "rates": dict(placement.rates),
        "choices": {id: asdict(choice) for id, choice in placement.choices.items()},
    }


def _print_placement(store: Store, planner: Planner, placement: Placement, offered: Capacity) -> None:
    training = ", beside training" if offered.training else ""
    SAY.print(
        f"machine {planner.profiles.machine}: {offered.cores:g} cores, {offered.memory_mib:.0f} MiB free{training}"
    )
    for task in store.all():
        choice = placement.choices[task.id]
        rate = placement.rates[task.id]
        if rate > task.rate:
            SAY.print(
                f"{task.id}: planned for {rate:.4g} requests/s: its load is forecast above the expected {task.rate:g}"
            )
        if store.choice(task.id) is None and choice.model is None:
            SAY.print(
                f"{task.id}: {models_of(task)[0]}, the only model allowed; not measured, so nothing is promised"
            )
        else:
            _print_choice(task, choice)
    SAY.print(f"left: {placement.left.cores:.3g} cores, {placement.left.memory_mib:.0f} MiB")


def _print_choice(task: Task, choice: Choice) -> None:
    SAY.print(f"{task.id}: {choice.model or 'NO MODEL'}: {choice.why}")
    for model, reason in choice.reasons.items():
        SAY.print(f"    not {model}: {reason}")
    documented = choice.quality is not None and "own" not in choice.metric
    if choice.model and documented and task.weights != "default":
        SAY.print("    (the quality is that of released weights; this task serves others)")


# up, status, infer, logs, report, down


def up(
    store: Store,
    options: supervisor.UpOptions,
    page: tuple[str, int, str | None] | None,
    replan_s: float,
    runtimes: Callable[[str], Runtime] | None = None,
) -> None:
    """Serve every task until Ctrl-C, `down` or a signal; with a page, and planning again every replan_s, if asked.

    runtimes: makes a runtime by name where the replicas do not run on this machine.
    """
    if not store.all():
        raise InputError(f"no tasks in {store.path}: register one first")
    for id in options.tasks:
        store.get(id)
    with StopSignal() as stop, ExitStack() as stack:
        if page is not None:
            from corun.tasks.web import in_background

            SAY.print(f"the page is at {stack.enter_context(in_background(store, *page))}")
        if replan_s > 0:
            stack.enter_context(replanning(store.path, replan_s, SAY.print))
        supervisor.Supervisor(store, options, runtimes=runtimes).run(stop)


def status(store: Store, watch: bool, as_json: bool) -> None:
    """What is up, once or redrawn every second."""
    if as_json:
        _json(monitor.snapshot(store))
    else:
        monitor.watch(store, SAY, watch)


def infer(store: Store, id: str, files: Sequence[Path], count: int, out: Path | None, timeout_s: float) -> None:
    """Send files to a task that is up and print its answers; RunFault when one was not answered OK."""
    task = store.get(id)
    payloads = [(file.name, _bytes(file)) for file in files] or [("nothing", b"")]
    address = _address_of(store, id)
    failed = 0
    for name, payload in payloads * count:
        header, reply, took_ms = ask(address, payload, timeout_s)
        if header.status != Status.OK:
            failed += 1
        text = readable(task.kind, reply) if header.status == Status.OK else reply.decode("utf-8", "replace")
        SAY.print(f"{name}: {status_name(header.status)} in {took_ms:.1f} ms: {text}")
        if out is not None and header.status == Status.OK:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{Path(name).stem}.reply").write_bytes(reply)
    if failed:
        raise RunFault(f"{failed} of {len(payloads) * count} requests were not answered OK")


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error


def _address_of(store: Store, id: str) -> Address:
    """Where a task's router listens; InputError when it is not up."""
    live = store.state("live") or {}
    for task in live.get("tasks", ()):
        if task["id"] == id and supervisor.running(store) is not None:
            return Address.parse(task["address"])
    raise InputError(f'task "{id}" is not up: `tasks.py up` serves it')


def status_name(status: int) -> str:
    """`OK`, `REJECTED`, or a number that is not known."""
    return {int(one): one.name for one in Status}.get(status, str(status))


def ask(address: Address, payload: bytes, timeout_s: float) -> tuple[ReplyHeader, bytes, float]:
    """One request and its reply over a connection of its own: header, payload, milliseconds. PeerClosed without one."""
    sock = connect(address, timeout_s)
    try:
        begin = now_ns()
        sock.sendall(pack_request(Kind.INFER, 0, 1, len(payload), begin, begin) + payload)
        reader, deadline = ReplyReader(), time.monotonic() + timeout_s
        while select.select([sock], [], [], max(0.0, deadline - time.monotonic()))[0]:
            for frame in reader.receive(sock):
                if isinstance(frame.header, ReplyHeader):
                    return frame.header, bytes(frame.payload), (frame.t_done_ns - begin) / 1e6
    finally:
        sock.close()
    raise PeerClosed(f"no reply from {address} within {timeout_s:g} s")


def directory_of(store: Store) -> Path:
    """Logs, rows and reports of the present or the last `up`; InputError before the first."""
    live = store.state("live")
    if not live:
        raise InputError(f"no task of {store.path} was ever up")
    return Path(live["directory"])


def logs(store: Store, id: str, name: str | None, lines: int) -> None:
    """The last lines of a task's log and of its replicas' logs, of the present or the last `up`."""
    directory = directory_of(store)
    names = [name] if name else monitor.log_names(directory, id)
    if not names:
        store.get(id)
        raise InputError(f'task "{id}" has no logs in {directory}')
    for each in names:
        SAY.print(f"==> {directory / each} <==")
        print(monitor.log_tail(directory, id, each, lines), flush=True)


def report(store: Store, id: str | None, as_json: bool) -> None:
    """Statistics of the tasks since they were registered, and where the reports of the last `up` lie."""
    tasks = [store.get(id)] if id else store.all()
    figures = {task.id: store.statistics(task.id) for task in tasks}
    if as_json:
        _json({id: asdict(one) for id, one in figures.items()})
        return
    grid = _grid("task", "answered", "errors", "mean ms", "sd ms", "max ms", "CPU ms each", "MiB", "GPU MiB", "hours")
    for task in tasks:
        one = figures[task.id]
        cpu_ms = 1000 * one.cpu_s / one.requests if one.requests else None
        cells = (one.mean_ms, one.sd_ms, one.max_ms) if one.requests else (None, None, None)
        numbers = [*cells, cpu_ms, one.rss_mib, one.gpu_mib, one.span_s / 3600]
        shown = ["" if number is None else f"{number:.4g}" for number in numbers]
        grid.add_row(task.id, str(one.requests), str(one.errors), *shown)
    SAY.print(grid)
    live = store.state("live")
    pages = [Path(live["directory"]) / f"{task.id}.md" for task in tasks] if live else []
    for page in (page for page in pages if page.exists()):
        SAY.print(page.read_text(encoding="utf-8") if id else f"report of the last run: {page}")


def down(store: Store, timeout_s: float = UP_WAIT_S) -> None:
    """End `up`: finish what is open, stop every replica, write the reports."""
    if not supervisor.down(store, timeout_s):
        SAY.print("no supervisor is running")
        return
    SAY.print("down")


def _grid(*names: str) -> Table:
    grid = Table(box=None, pad_edge=False, show_edge=False)
    for name in names:
        grid.add_column(name, overflow="fold")
    return grid


__all__ = ["down", "infer", "listing", "logs", "plan", "register", "remove", "report", "show", "status", "up"]
