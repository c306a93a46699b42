"""Which model serves a task: the best quality that keeps its SLO within the memory and cores that are there.

For each candidate the replicas are found first: the fewest n, from the task's least to its most, for which the
measured latency at rate / n keeps every bound. A candidate loses with a sentence that says by how much:

    quality unknown or too low  ->  never measured here  ->  SLO missed at every n  ->  memory or cores do not reach

Of what is left the highest quality wins, then the smaller footprint. Latencies beside training are used when a
training job runs on the machine. Everything is a pure function of profiles and capacity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from corun.tasks.profile import Profile
from corun.tasks.task import Task

GPU_NAMES: Final = ("cuda", "gpu")


@dataclass(frozen=True)
class Candidate:
    """A model that may serve a task. quality: in percent of `metric`, None = unknown. profile: None = not measured."""

    model: str
    quality: float | None = None
    metric: str = ""
    profile: Profile | None = None


@dataclass(frozen=True)
class Capacity:
    """What is free for services: cores, host memory, GPUs with their free memory in MiB.

    training: a job runs beside. max_slowdown: how many times slower one model may make it, None = any.
    """

    cores: float
    memory_mib: float
    gpu_mib: tuple[float, ...] = ()
    training: bool = False
    max_slowdown: float | None = None

    def less(self, demand: Demand) -> Capacity:
        """What is left beside a demand."""
        return Capacity(
            self.cores - demand.cores,
            self.memory_mib - demand.memory_mib,
            tuple(
                sorted(
                    (free - demand.gpu_mib if place == 0 else free for place, free in enumerate(self._gpus())),
                    reverse=True,
                )
            ),
            self.training,
            self.max_slowdown,
        )

    def _gpus(self) -> tuple[float, ...]:
        return tuple(sorted(self.gpu_mib, reverse=True))

    @property
    def largest_gpu_mib(self) -> float:
        return max(self.gpu_mib, default=0.0)


@dataclass(frozen=True)
class Demand:
    """What a choice takes: cores kept busy, host memory and GPU memory in MiB (on one device)."""

    cores: float
    memory_mib: float
    gpu_mib: float = 0.0

    def problems(self, machine: Capacity) -> list[str]:
        """Why it does not fit, one sentence each."""
        pairs = (
            ("cores", self.cores, machine.cores, "{:.2g} cores busy"),
            ("memory", self.memory_mib, machine.memory_mib, "{:.0f} MiB of memory"),
            ("GPU memory", self.gpu_mib, machine.largest_gpu_mib, "{:.0f} MiB of GPU memory"),
        )
        return [
            f"takes {text.format(asked)}, {max(free, 0):.4g} are free"
            for _, asked, free, text in pairs
            if asked > max(free, 0.0) * (1 + 1e-9) and asked > 0
        ]

    def share(self, machine: Capacity) -> float:
        """The largest part it takes of anything the machine has."""
        pairs = (
            (self.cores, machine.cores),
            (self.memory_mib, machine.memory_mib),
            (self.gpu_mib, machine.largest_gpu_mib),
        )
        return (
            max((asked / free if free > 0 else float("inf")) for asked, free in pairs if asked > 0)
            if any(asked > 0 for asked, _ in pairs)
            else 0.0
        )


@dataclass(frozen=True)
class Choice:
    """What was decided. model: None when no candidate can do it. reasons: why each other candidate lost.

    why: the sentence about the winner, or about there being none. expected_ms: each promised bound as profiled at the
    task's rate. cores, memory_mib, gpu_mib: what all its replicas take together.
    """

    model: str | None
    reasons: Mapping[str, str] = field(default_factory=dict)
    why: str = ""
    replicas: int = 1
    max_batch: int = 1
    quality: float | None = None
    metric: str = ""
    expected_ms: Mapping[str, float] = field(default_factory=dict)
    cores: float = 0.0
    memory_mib: float = 0.0
    gpu_mib: float = 0.0


@dataclass(frozen=True)
class Option:
    """A candidate that keeps the task's promises, and what it takes to do so."""

    candidate: Candidate
    replicas: int
    max_batch: int
    expected_ms: Mapping[str, float]
    demand: Demand
    slowdown: float | None = None
    """How many times slower the training job is beside it."""
    by_maximum: tuple[str, ...] = ()
    """Bounds judged by the longest of too few requests: on the safe side, and worth a longer measurement."""

    @property
    def quality(self) -> float:
        return self.candidate.quality or 0.0

    def choice(self, reasons: Mapping[str, str]) -> Choice:
        """As a decision; `reasons` of the others."""
        return Choice(
            model=self.candidate.model,
            reasons=dict(reasons),
            why=self.why,
            replicas=self.replicas,
            max_batch=self.max_batch,
            quality=self.candidate.quality,
            metric=self.candidate.metric,
            expected_ms=dict(self.expected_ms),
            cores=self.demand.cores,
            memory_mib=self.demand.memory_mib,
            gpu_mib=self.demand.gpu_mib,
        )

    @property
    def why(self) -> str:
        """`69.8 top-1 %; p99 41 ms expected; 2 replicas`."""
        parts = [quality_text(self.candidate)]
        parts += [
            f"{_short(name)} {value:.3g} ms expected" + " (the longest of few requests)" * (name in self.by_maximum)
            for name, value in self.expected_ms.items()
        ]
        parts += [f"{self.replicas} replica{'s' * (self.replicas != 1)}"]
        parts += [f"batches up to {self.max_batch}"] if self.max_batch > 1 else []
        parts += [f"training x{self.slowdown:.3g} slower"] if self.slowdown is not None else []
        return "; ".join(parts)


def quality_text(candidate: Candidate) -> str:
    """`69.8 top-1 %`."""
    return "quality unknown" if candidate.quality is None else f"{candidate.quality:.4g} {candidate.metric}".strip()


def choose(task: Task, candidates: Sequence[Candidate], machine: Capacity) -> Choice:
    """The highest quality that keeps the SLO and fits; ties go to the smaller footprint, then to the name."""
    options, reasons = judge(task, candidates, machine)
    fitting = []
    for option in options:
        problems = option.demand.problems(machine)
        if problems:
            reasons[option.candidate.model] = "; ".join(problems)
        else:
            fitting.append(option)
    if not fitting:
        return Choice(None, reasons, none_why(task, candidates), replicas=0)
    fitting.sort(key=lambda option: best_first(option, machine))
    winner = fitting[0]
    for option in fitting[1:]:
        reasons[option.candidate.model] = beaten(option, winner)
    return winner.choice(reasons)


def best_first(option: Option, machine: Capacity) -> tuple[float, float, str]:
    """Order of options: quality, then footprint, then name."""
    return (-option.quality, option.demand.share(machine), option.candidate.model)


def none_why(task: Task, candidates: Sequence[Candidate]) -> str:
    """The sentence about there being no choice."""
    if not candidates:
        return f"no model of kind {task.kind} is allowed"
    return f"none of {len(candidates)} models keeps {promise(task)} at {task.rate:g} requests/s on this machine"


def promise(task: Task) -> str:
    """`p99 <= 100 ms`."""
    bounds = [f"{_short(name)} <= {bound:g} ms" for name, bound in task.slo.bounds.items()]
    return " and ".join(bounds) or "up with the load"


def beaten(option: Option, winner: Option) -> str:
    """Why an option that would do lost."""
    if option.quality < winner.quality:
        return f"would do, with less quality: {quality_text(option.candidate)} (chosen: {quality_text(winner.candidate)})"
    return "would do as well, with a larger footprint or a later name"


def judge(task: Task, candidates: Sequence[Candidate], machine: Capacity) -> tuple[list[Option], dict[str, str]]:
    """The candidates that keep the promises, whether or not they fit, and why each other one cannot."""
    options: list[Option] = []
    reasons: dict[str, str] = {}
    for candidate in candidates:
        found = _option(task, candidate, machine)
        if isinstance(found, str):
            reasons[candidate.model] = found
        else:
            options.append(found)
    return options, reasons


def _option(task: Task, candidate: Candidate, machine: Capacity) -> Option | str:
    """The smallest number of replicas with which a candidate keeps the promises, or why none does."""
    profile = candidate.profile
    if task.min_quality > 0 and candidate.quality is None:
        return f"its quality is unknown and at least {task.min_quality:g} is asked for"
    if candidate.quality is not None and candidate.quality < task.min_quality:
        return f"quality {quality_text(candidate)} is below {task.min_quality:g}"
    if profile is None:
        return "not measured on this machine: run tasks.py plan --measure"
    on_gpu = profile.device.startswith(GPU_NAMES)
    if on_gpu != (task.resource == "gpu"):
        return f"measured on {profile.device}, the task asks for {task.resource}"
    failure = f"not measured {'beside training' if machine.training else 'without training'}"
    for replicas in range(max(task.min_replicas, 1), task.max_replicas + 1):
        for max_batch in profile.max_batches():
            expected = _expected(task, profile, replicas, max_batch, machine.training)
            if isinstance(expected, str):
                failure = expected
                continue
            slowdown = profile.slowdown(task.rate, max_batch) if machine.training else None
            if machine.max_slowdown is not None and slowdown is not None and slowdown > machine.max_slowdown:
                failure = f"makes training x{slowdown:.3g} slower, x{machine.max_slowdown:g} is allowed"
                continue
            rate = task.rate / replicas
            unsure = [name for name in expected if not profile.supports(name, rate, max_batch, machine.training)]
            demand = _demand(task, profile, replicas)
            return Option(candidate, replicas, max_batch, expected, demand, slowdown, tuple(unsure))
    return failure


def _expected(task: Task, profile: Profile, replicas: int, max_batch: int, training: bool) -> dict[str, float] | str:
    """Each promised bound at the task's rate spread over the replicas, or why it is not kept."""
    rate = task.rate / replicas
    among = f" with {replicas} replicas" if replicas > 1 else ""
    curve = profile.curve(max_batch, training)
    if not curve:
        return f"not measured {'beside training' if training else 'without training'}"
    top = profile.top_rate(max_batch, training)
    if top is None:
        return f"did not keep up with {curve[0].rate:.4g} requests/s, the lowest rate it was measured at"
    if rate > top * (1 + 1e-9):
        return f"keeps up with {top * replicas:.4g} requests/s{among} as measured, {task.rate:g} are asked for"
    expected = {}
    for name, bound in task.slo.bounds.items():
        value = profile.latency_ms(name, rate, max_batch, training)
        if value is None or value > bound:
            reading = "n/a" if value is None else f"{value:.4g} ms"
            beside = " beside training" if training else ""
            return f"{_short(name)} {reading} at {task.rate:g} requests/s{among}{beside}, {bound:g} ms are promised"
        expected[name] = value
    return expected


def _demand(task: Task, profile: Profile, replicas: int) -> Demand:
    return Demand(
        cores=task.rate * profile.cpu_ms / 1000,
        memory_mib=replicas * profile.rss_mib,
        gpu_mib=replicas * (profile.gpu_mib or 0.0),
    )


def _short(name: str) -> str:
    return name.removesuffix("_ms")
