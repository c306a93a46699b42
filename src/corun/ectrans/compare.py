"""Side by side: the published comparisons R1 to R6, conditions in turns, ratios of medians with their intervals.

    R1  partition      text against ids from the client; tokenizer reloaded once a sentence (historical)
    R2  queue          fcfs, sjf, hrrn, hrrn-stale, with and without packing
    R3  executors      multitask, multiprocess, pipeline, streams: wall time, PSS and USS
    R4  overall        the same requests from the same clients under each way of serving
    R5  steps          one improvement switched on after the other
    R6  hand-off       one 64 x 40 x 512 hidden state between two processes
    corun              the fair baseline, the pipeline and streams with a training job beside them and without

Every server of a comparison is loaded, warmed up and has answered a few requests before anything is timed; then conditions
take turns, in reversed order every other repeat, so that a slow minute of the machine hits all of them. Servers that
wait use no processor. Memory is read in a pass of its own, each server alone on the machine, under its load's end.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from corun.clock import NS_PER_S, now_ns
from corun.ectrans import client, mixes
from corun.ectrans.beside import Trainer
from corun.ectrans.engines import CONTINUOUS, NO_CACHE, STATIC, Model
from corun.ectrans.executors import MULTIPROCESS, MULTITASK, PIPELINE, STREAMS, Shape
from corun.ectrans.scheduler import Rules
from corun.ectrans.service import Service, ServiceOptions
from corun.errors import InputError, RunFault, suggest
from corun.process import StopSignal, die_with_parent, set_threads
from corun.run.table import TableWriter
from corun.serve.packing import Limits
from corun.wire import Address

RATIOS = ("A", "B", "metric", "median", "lo", "hi", "n")
START_S = 300.0
WARM_UP_REQUESTS = 4
REPLICATES = 2000
LEAST_ALONE_S = 2.0
Figures = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """What every comparison is made with. sentences: total of the larger loads. train: model of the job beside, or ""."""

    parts: Path
    repeats: int = 5
    workers: int = 2
    sentences: int = 256
    max_new: int = 60
    seed: int = 0
    texts: Sequence[str] = ()
    train: str = ""
    train_batch: int = 16


@dataclass(frozen=True)
class Condition:
    """One way of serving. batch: sentences in a package; partition: what the client sends; threads: a process'."""

    name: str
    executor: str = STREAMS
    workers: int = 1
    decoder: str = STATIC
    policy: str = "fcfs"
    packing: str = "off"
    batch: int = 64
    partition: str = "text"
    reload: bool = False
    start: str = "spawn"
    threads: int = 1

    def options(self, settings: Settings) -> ServiceOptions:
        """The server of this condition; one pool, no classes, as published."""
        model = Model(
            settings.parts,
            self.decoder,
            max_new=settings.max_new,
            slots=self.batch,
            reload=self.reload,
            threads=self.threads,
        )
        shape = Shape(self.executor, self.workers, max_items=self.batch, start=self.start)
        rules = Rules(self.policy, self.packing, Limits(self.batch), rt_share=0.0, batch_threshold=0)
        return ServiceOptions(model, shape, rules, Address("tcp", "127.0.0.1", 0), self.partition)


@dataclass(frozen=True)
class Ratio:
    """Median over repeats of A / B of one metric, with a bootstrap interval of 95 %."""

    a: str
    b: str
    metric: str
    median: float
    lo: float
    hi: float
    n: int

    def body(self) -> dict[str, Any]:
        return {name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(self).items()}


@dataclass
class Measured:
    """Figures of one condition, one entry a repeat."""

    condition: Condition
    runs: list[Figures] = field(default_factory=list)

    def median(self, metric: str) -> float:
        return statistics.median(run[metric] for run in self.runs)


# A server as a child


class Served:
    """A server process of one condition."""

    def __init__(self, condition: Condition, settings: Settings) -> None:
        self.condition = condition
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(condition.options(settings), theirs))
        self._process.start()
        theirs.close()
        self._pipe = ours
        self._admin: client.Admin | None = None

    @property
    def admin(self) -> client.Admin:
        """Its control connection, once it has loaded; RunFault when it died before."""
        if self._admin is None:
            try:
                self._address = Address.parse(self._pipe.recv())
            except EOFError:
                raise RunFault(f"the server of {self.condition.name} ended while loading") from None
            self._admin = client.Admin(self._address, START_S)
            self._admin.drain(START_S)
        return self._admin

    def load(self, requests: Sequence[client.Request]) -> Figures:
        """One load; total and sojourn times, the server's processor time and padding."""
        admin = self.admin
        before = admin.statistics()["memory"]["cpu_s"]
        replies = client.checked(client.drive(self._address, requests))
        tally = admin.drain()
        sojourns = sorted(reply.sojourn_ms for reply in replies)
        sentences = sum(reply.size for reply in replies)
        return {
            "total_s": client.total_s(replies),
            "mean_ms": statistics.fmean(sojourns),
            "p50_ms": statistics.median(sojourns),
            "max_ms": sojourns[-1],
            "cpu_ms_per_sentence": 1000 * (tally["memory"]["cpu_s"] - before) / sentences,
            "waste": tally["padding_waste"] or 0.0,
            "occupancy": tally["occupancy"],
            "pss_mib": tally["memory"]["pss_mib"],
            "uss_mib": tally["memory"]["uss_mib"],
        }

    def stop(self) -> None:
        if self._admin is not None:
            self._admin.stop()
        self._pipe.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(options: ServiceOptions, pipe: Connection) -> None:
    die_with_parent()
    set_threads(options.model.threads)
    with StopSignal() as stop:
        service = Service(options, lambda line: None)
        pipe.send(str(service.address))
        pipe.close()
        service.serve(stop)


# Measuring


Say = Callable[[str], None]


def measure(
    conditions: Sequence[Condition], settings: Settings, loads: Mapping[str, Sequence[client.Request]], say: Say
) -> dict[str, Measured]:
    """Conditions in turns, `settings.repeats` times; loads by partition, and under "" for all others."""
    servers: list[Served] = []
    measured = {condition.name: Measured(condition) for condition in conditions}
    try:
        servers += [Served(condition, settings) for condition in conditions]
        for server in servers:
            server.load(_load_of(server.condition, loads)[:WARM_UP_REQUESTS])
        for repeat in range(settings.repeats):
            for server in servers if repeat % 2 == 0 else servers[::-1]:
                figures = server.load(_load_of(server.condition, loads))
                measured[server.condition.name].runs.append(figures)
                say(f"{repeat + 1}/{settings.repeats} {server.condition.name}: {figures['total_s']:.3f} s")
    finally:
        for server in servers:
            server.stop()
    return measured


def memory(
    conditions: Sequence[Condition], settings: Settings, requests: Sequence[client.Request]
) -> dict[str, Figures]:
    """PSS and USS of each condition's processes after a load, each alone on the machine."""
    figures: dict[str, Figures] = {}
    for condition in conditions:
        server = Served(condition, settings)
        try:
            server.load(requests[:WARM_UP_REQUESTS])
            figures[condition.name] = server.load(requests)
        finally:
            server.stop()
    return figures


def _load_of(condition: Condition, loads: Mapping[str, Sequence[client.Request]]) -> Sequence[client.Request]:
    return loads[condition.partition] if condition.partition in loads else loads[""]


def requests_for(settings: Settings, mix: str, gap_ms: float = 0.0, partition: str = "text") -> list[client.Request]:
    """The requests of a mix over the settings' sentences, which are shuffled once by the seed."""
    texts = list(settings.texts)
    random.Random(settings.seed).shuffle(texts)
    arrivals = mixes.mix(mixes.parse_mix(mix), gap_ms)
    return client.requests_of(arrivals, texts, client.maker(partition, settings.parts))


def ratio(a: Measured, b: Measured, metric: str) -> Ratio:
    """A / B by repeat: the median, and a bootstrap interval over the repeats."""
    values = [
        one[metric] / other[metric]
        for one, other in zip(a.runs, b.runs, strict=True)
        if other[metric] and one[metric]
    ]
    return ratio_of(a.condition.name, b.condition.name, metric, values)


def ratio_of(a: str, b: str, metric: str, values: Sequence[float]) -> Ratio:
    """Median of values with its bootstrap interval; NaN without values."""
    if not values:
        return Ratio(a, b, metric, float("nan"), float("nan"), float("nan"), 0)
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(REPLICATES))
    low, high = medians[int(0.025 * REPLICATES)], medians[int(0.975 * REPLICATES) - 1]
    return Ratio(a, b, metric, statistics.median(values), low, high, len(values))


# The comparisons


def historical(workers: int) -> Condition:
    """The published baseline: own weights, no cache, one sentence at a time, the tokenizer loaded for each."""
    return Condition("multitask (published)", MULTITASK, workers, NO_CACHE, batch=1, reload=True)


def fair(workers: int) -> Condition:
    """The fair baseline: shared weights, cache, one tokenizer, a request's sentences in batches of 8."""
    return Condition("multiprocess, batch 8 (fair)", MULTIPROCESS, workers, STATIC, batch=8)


def best() -> Condition:
    """One process, packages by padding cost, rows that join and leave."""
    return Condition("streams, continuous", STREAMS, 1, CONTINUOUS, "hrrn", "cost")


def steps(workers: int) -> list[Condition]:
    """R5: each adds one thing to the one before it."""
    base = historical(workers)
    cached = replace(base, name="+ tokenizer kept", reload=False)
    cache = replace(cached, name="+ key-value cache", decoder=STATIC)
    shared = replace(cache, name="+ shared weights", executor=MULTIPROCESS)
    batched = replace(shared, name="+ batches of 8", batch=8)
    packed = replace(batched, name="+ packages of 64", batch=64, packing="count")
    ranked = replace(packed, name="+ padding cost, hrrn", packing="cost", policy="hrrn")
    overlapped = replace(ranked, name="+ overlap (pipeline)", executor=PIPELINE, workers=max(1, workers // 2))
    single = replace(overlapped, name="+ one process", executor=STREAMS, workers=1)
    return [
        base,
        cached,
        cache,
        shared,
        batched,
        packed,
        ranked,
        overlapped,
        single,
        replace(single, name="+ continuous", decoder=CONTINUOUS),
    ]


def r1(settings: Settings, say: Say) -> list[Ratio]:
    """Partition: processor time of the server a sentence, and bytes."""
    from corun.ectrans import wire

    mix = f"1x{settings.sentences}"
    base = Condition("text", STREAMS, decoder=STATIC, packing="count")
    conditions = [
        base,
        replace(base, name="ids", partition="ids"),
        replace(base, name="text, reloading (historical)", reload=True),
    ]
    loads = {partition: requests_for(settings, mix, partition=partition) for partition in ("text", "ids")}
    found = measure(conditions, settings, loads, say)
    sizes = {name: sum(len(wire.pack_sentences(one.sentences)) for one in load) for name, load in loads.items()}
    return [
        *(ratio(found[name], found["text"], "cpu_ms_per_sentence") for name in list(found)[1:]),
        ratio_of("ids", "text", "bytes", [sizes["ids"] / sizes["text"]]),
    ]


def r2(settings: Settings, say: Say) -> list[Ratio]:
    """Queue policies: virtual time on the published mixes, and the real model on a small one."""
    from corun.ectrans import simulate

    ratios = []
    for name, text in mixes.PUBLISHED.items():
        arrivals = mixes.mix(mixes.parse_mix(text))
        outcomes = {
            f"{policy}, {packing}": simulate.run(
                arrivals, Rules(policy, packing, Limits(64), rt_share=0.0, batch_threshold=0)
            ).mean_s
            for policy in ("fcfs", "sjf", "hrrn-stale", "hrrn")
            for packing in ("off", "count")
        }
        base = outcomes["fcfs, off"]
        ratios += [
            ratio_of(key, "fcfs, off", f"mean turnaround, mix {name}, virtual", [value / base])
            for key, value in outcomes.items()
            if key != "fcfs, off"
        ]
    conditions = [
        Condition(f"{policy}, {packing}", STREAMS, 1, STATIC, policy, packing, 16)
        for policy in ("fcfs", "sjf", "hrrn-stale", "hrrn")
        for packing in ("off", "cost")
    ]
    found = measure(conditions, settings, {"": requests_for(settings, "2x64,4x4,2x32,4x8", 5.0)}, say)
    return ratios + [ratio(found[one.name], found["fcfs, off"], "mean_ms") for one in conditions[1:]]


def r3(settings: Settings, say: Say) -> list[Ratio]:
    """Executors at equal work: wall time in turns, memory each alone."""
    count = settings.workers
    conditions = [
        Condition(f"multitask x {count}", MULTITASK, count, packing="count"),
        Condition(f"multiprocess x {count}", MULTIPROCESS, count, packing="count"),
        Condition(f"pipeline x {max(1, count // 2)}", PIPELINE, max(1, count // 2), packing="count"),
        *([Condition(f"pipeline x {count}", PIPELINE, count, packing="count")] if count > 1 else []),
        Condition("streams", STREAMS, packing="count"),
    ]
    requests = requests_for(settings, f"{max(1, settings.sentences // 8)}x8")
    alone = memory(conditions, settings, requests)
    found = measure(conditions, settings, {"": requests}, say)
    base = conditions[0].name
    ratios = [ratio(found[one.name], found[base], "total_s") for one in conditions[1:]]
    return ratios + [
        ratio_of(one.name, base, metric, [alone[one.name][metric] / alone[base][metric]])
        for one in conditions[1:]
        for metric in ("pss_mib", "uss_mib")
    ]


def r4(settings: Settings, say: Say) -> list[Ratio]:
    """Overall: the same clients under each way of serving, at four loads up to `sentences`."""
    count = settings.workers
    conditions = [
        historical(count),
        Condition("multiprocess, batch 1", MULTIPROCESS, count, STATIC, batch=1),
        fair(count),
        Condition("multiprocess, packages of 64", MULTIPROCESS, count, STATIC, packing="count"),
        Condition("pipeline, packages of 64", PIPELINE, max(1, count // 2), STATIC, packing="count"),
        best(),
    ]
    ratios = []
    most = max(1, settings.sentences // 8)
    for clients in sorted({max(1, most // 8), max(1, most // 4), max(1, most // 2), most}):
        found = measure(conditions, settings, {"": requests_for(settings, f"{clients}x8")}, say)
        for metric in ("total_s", "p50_ms", "max_ms"):
            ratios += [
                replace(ratio(found[conditions[0].name], found[one.name], metric), metric=f"{metric}, {clients} x 8")
                for one in conditions[1:]
            ]
    return ratios


def r5(settings: Settings, say: Say) -> list[Ratio]:
    """Steps: what each contributes to the total time, one on top of the other."""
    found = measure(steps(settings.workers), settings, {"": requests_for(settings, _clients(settings))}, say)
    names = list(found)
    return [ratio(found[a], found[b], "total_s") for a, b in itertools.pairwise(names)] + [
        ratio(found[names[0]], found[names[-1]], "total_s")
    ]


def _clients(settings: Settings) -> str:
    return f"{max(1, settings.sentences // 8)}x8"


def r6(settings: Settings, say: Say) -> list[Ratio]:
    """Hand-off of one hidden state between processes."""
    from corun.ectrans.handoff import handoff_ms

    taken = handoff_ms(settings.repeats)
    for name, values in taken.items():
        say(f"{name}: {statistics.median(values):.2f} ms")
    return [
        ratio_of(
            name, "shm", "hand-off of 64 x 40 x 512, ms", [a / b for a, b in zip(values, taken["shm"], strict=True)]
        )
        for name, values in taken.items()
        if name != "shm"
    ]


def corun(settings: Settings, say: Say) -> list[Ratio]:
    """With training over without: total and median sojourn of each way of serving, and the training's steps a second.

    Loads with and without training take turns on the same servers; the trainer alone is measured once a repeat, as
    long as the load before it.
    """
    count = settings.workers
    conditions = [fair(count), Condition("pipeline", PIPELINE, 1, packing="cost", policy="hrrn"), best()]
    load = requests_for(settings, _clients(settings))
    without = {one.name: Measured(one) for one in conditions}
    beside = {one.name: Measured(replace(one, name=f"{one.name}, training")) for one in conditions}
    servers: list[Served] = []
    try:
        servers += [Served(condition, settings) for condition in conditions]
        for server in servers:
            server.load(load[:WARM_UP_REQUESTS])
        with Trainer(settings.train, settings.train_batch) as trainer:
            for repeat, server in itertools.product(range(settings.repeats), servers):
                name = server.condition.name
                without[name].runs.append(server.load(load))
                beside[name].runs.append(_beside(trainer, server, load))
                say(f"{repeat + 1}/{settings.repeats} {name}: {beside[name].runs[-1]['train_x']:.2f} of the training")
    finally:
        for server in servers:
            server.stop()
    return [ratio(beside[name], without[name], metric) for name in without for metric in ("total_s", "p50_ms")] + [
        ratio_of(f"{name}, training", "training alone", "steps/s", [run["train_x"] for run in beside[name].runs])
        for name in without
    ]


def _beside(trainer: Trainer, server: Served, load: Sequence[client.Request]) -> Figures:
    """One load while the trainer runs; train_x: its steps a second over those alone, in LEAST_ALONE_S or longer.

    A short load is over before a step alone is, and a speed of none is no base.
    """
    with trainer.running():
        start_ns = now_ns()
        figures = server.load(load)
        stop_ns = now_ns()
    alone = trainer.alone(max(LEAST_ALONE_S, (stop_ns - start_ns) / NS_PER_S))
    return figures | {"train_x": trainer.steps_per_s(start_ns, stop_ns) / alone if alone else float("nan")}


COMPARISONS: Mapping[str, Callable[[Settings, Say], list[Ratio]]] = {
    "R1": r1,
    "R2": r2,
    "R3": r3,
    "R4": r4,
    "R5": r5,
    "R6": r6,
}


def run(matrix: str, settings: Settings, say: Say = print) -> list[Ratio]:
    """The named comparisons, `all` of them, or the conditions of a JSON file against its first.

    The file: {"mix": "32x8", "conditions": [{"name": ..., "executor": ..., ...}, ...]}.
    """
    path = Path(matrix)
    if path.suffix == ".json":
        return _from_file(path, settings, say)
    known = dict(COMPARISONS) | ({"corun": corun} if settings.train else {})
    names = list(known) if matrix == "all" else matrix.split(",")
    for name in names:
        if name == "corun" and not settings.train:
            raise InputError("corun needs a training job: --with-train MODEL")
        if name not in known:
            names_known = [*COMPARISONS, "corun"]
            raise InputError(
                f'comparison "{name}" is not one of {", ".join(names_known)}{suggest(name, names_known)}'
            )
    return [one for name in names for one in known[name](settings, say)]


def _from_file(path: Path, settings: Settings, say: Say) -> list[Ratio]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        conditions = [Condition(**one) for one in body["conditions"]]
        requests = requests_for(settings, body["mix"], body.get("gap_ms", 0.0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a matrix: {error!r}", ['give {"mix": "8x8", "conditions": [{"name": ...}]}']
        ) from None
    if len({one.name for one in conditions}) < 2:
        raise InputError(f"{path}: give two conditions or more, with different names")
    found = measure(conditions, settings, {"": requests}, say)
    first = found[conditions[0].name]
    return [ratio(first, found[one.name], metric) for one in conditions[1:] for metric in ("total_s", "p50_ms")]


def write(out: Path, ratios: Sequence[Ratio]) -> Path:
    """ratios.csv."""
    path = out / "ratios.csv"
    with TableWriter(path, RATIOS) as table:
        for one in ratios:
            table.row((one.a, one.b, one.metric, round(one.median, 4), round(one.lo, 4), round(one.hi, 4), one.n))
    return path
