"""Tasks of several sentences on one model: which waiting task is next, really or in virtual time.

    tasks arrive ──▶ queue policy ──▶ up to task_batch tasks together ──▶ batches of batch_size_predict sentences
                     fifo sjf edf hrrn      whole tasks, non-preemptive      each takes a + b n seconds when simulated

A task is a dictionary, in a file or in memory:

    sentence      a text or a list of texts
    data_length   its length for the shortest-first order; by default the number of its sentences
    start_time    when it arrives, seconds after the start; by default `interval_time` after the one before
    true_time     its time limit, seconds after its arrival; by default none

The loop is the same for a model and for the simulator: only the clock and what executes a batch differ.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from corun.clock import NS_PER_S, now_ns
from corun.errors import InputError, suggest
from corun.serve.policies import Edf, Fifo, Hrrn, HrrnStale, QueuePolicy, Ranking, Sjf
from corun.stats import percentile_of

MODES = ("fifo", "sjf", "edf", "hrrn")
TASK_KEYS = ("sentence", "data_length", "start_time", "true_time")
NO_DEADLINE_NS = sys.maxsize


@dataclass(frozen=True)
class Task:
    """One task; arrival_ns and deadline_ns count from the start of the run, deadline None = no limit."""

    number: int
    sentences: tuple[str, ...]
    data_length: float
    arrival_ns: int
    deadline_ns: int | None = None


@dataclass(frozen=True)
class Done:
    """A finished task: begun when its batch began, ended with it."""

    task: Task
    begun_ns: int
    ended_ns: int
    answers: tuple[str, ...] = ()

    @property
    def turnaround_s(self) -> float:
        return (self.ended_ns - self.task.arrival_ns) / NS_PER_S

    @property
    def missed(self) -> bool:
        """True when it had a deadline and ended after it."""
        return self.task.deadline_ns is not None and self.ended_ns > self.task.deadline_ns


def make_tasks(rows: Sequence[Mapping[str, Any]], interval_time: float = 0.1) -> list[Task]:
    """Tasks from dictionaries; InputError lists every wrong one."""
    problems, tasks, arrival_s = [], [], 0.0
    for number, row in enumerate(rows):
        wrong = _problems(row)
        problems += [f"task {number}: {problem}" for problem in wrong]
        if wrong:
            continue
        given = row["sentence"]
        sentences = (given,) if isinstance(given, str) else tuple(given)
        arrival_s = float(row["start_time"]) if row.get("start_time") is not None else arrival_s
        arrival_ns = round(arrival_s * NS_PER_S)
        limit = row.get("true_time")
        deadline_ns = None if limit is None else arrival_ns + round(limit * NS_PER_S)
        tasks.append(Task(number, sentences, row.get("data_length") or len(sentences), arrival_ns, deadline_ns))
        arrival_s += interval_time
    if problems or not tasks:
        raise InputError("the tasks are wrong" if problems else "there are no tasks", problems[:8])
    return tasks


def _problems(row: Any) -> list[str]:
    if not isinstance(row, Mapping):
        return ['it is not an object, e.g. {"sentence": ["hello"], "data_length": 1}']
    problems = [f'key "{key}" is unknown{suggest(key, TASK_KEYS)}' for key in row if key not in TASK_KEYS]
    given = row.get("sentence")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        problems.append("sentence is neither a text nor a list of texts")
    for key in TASK_KEYS[1:]:
        value = row.get(key)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9
        ):
            problems.append(f"{key} is {value!r}: give a number, 0 or more")
    return problems


def read_tasks(path: Path, interval_time: float = 0.1) -> list[Task]:
    """Tasks from a JSON file that holds a list of them."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(rows, list):
        raise InputError(f"{path} does not hold a list of tasks")
    return make_tasks(rows, interval_time)


def made_tasks(sizes: Sequence[int], interval_time: float = 0.1, limit_s: float | None = None) -> list[Task]:
    """Tasks of so many made sentences each; limit_s: time limit per sentence."""
    rows = [
        {
            "sentence": [f"sentence {i} of task {number}" for i in range(size)],
            "true_time": None if limit_s is None else limit_s * size,
        }
        for number, size in enumerate(sizes)
    ]
    return make_tasks(rows, interval_time)


def task_sjf(tasks: Sequence[Task]) -> list[Task]:
    """Waiting tasks, shortest first; ties by arrival."""
    return sorted(tasks, key=lambda task: (task.data_length, task.arrival_ns, task.number))


def task_edf(tasks: Sequence[Task]) -> list[Task]:
    """Waiting tasks, earliest deadline first, those without one last; ties by arrival."""
    return sorted(tasks, key=lambda task: (deadline_of(task), task.arrival_ns, task.number))


def deadline_of(task: Task) -> int:
    """A task's deadline in ns; one that never comes when it has none."""
    return NO_DEADLINE_NS if task.deadline_ns is None else task.deadline_ns


# Clocks


class Timer(Protocol):
    """A clock that starts at 0."""

    def now_ns(self) -> int: ...

    def sleep_until(self, at_ns: int) -> None: ...


class RealTimer:
    """CLOCK_MONOTONIC since it was made."""

    def __init__(self) -> None:
        self._start_ns = now_ns()

    def now_ns(self) -> int:
        return now_ns() - self._start_ns

    def sleep_until(self, at_ns: int) -> None:
        time.sleep(max(0, at_ns - self.now_ns()) / NS_PER_S)


@dataclass
class VirtualTimer:
    """Time that passes only when it is told to."""

    at_ns: int = 0

    def now_ns(self) -> int:
        return self.at_ns

    def sleep_until(self, at_ns: int) -> None:
        self.at_ns = max(self.at_ns, at_ns)


@dataclass(frozen=True)
class BatchCost:
    """A batch of n sentences takes start_s + sentence_s n seconds."""

    start_s: float = 0.236
    sentence_s: float = 0.0504

    def task_s(self, sentences: float, batch: int) -> float:
        """A task of so many sentences in batches of `batch`, the last one short."""
        full, rest = divmod(sentences, batch)
        whole = full * (self.start_s + self.sentence_s * batch)
        return whole + (self.start_s + self.sentence_s * rest if rest else 0.0)


# The loop

Execute = Callable[[Sequence[str]], Sequence[str]]


@dataclass(frozen=True)
class Rules:
    """task_batch: waiting tasks that are done together. batch_size_predict: sentences in one batch."""

    mode: str = "fifo"
    task_batch: int = 1
    batch_size_predict: int = 16
    service: Callable[[Task], float] = field(default=lambda task: task.data_length)

    def __post_init__(self) -> None:
        problems = []
        if self.mode not in (*MODES, "hrrn-stale"):
            problems.append(
                f'schedule_mode "{self.mode}" is not one of {", ".join(MODES)}{suggest(self.mode, MODES)}'
            )
        if self.task_batch < 1 or self.batch_size_predict < 1:
            problems.append("task_batch and batch_size_predict must be 1 or more")
        if problems:
            raise InputError("the schedule's rules are wrong", problems)

    def policy(self) -> QueuePolicy[Task]:
        """A fresh queue that ranks tasks."""
        kinds: Mapping[str, Callable[[], QueuePolicy[Task]]] = {
            "fifo": Fifo,
            "sjf": lambda: Sjf(self._ranking),
            "edf": lambda: Edf(self._ranking),
            "hrrn": lambda: Hrrn(self._ranking),
            "hrrn-stale": lambda: HrrnStale(self._ranking),
        }
        return kinds[self.mode]()

    def _ranking(self, task: Task) -> Ranking:
        return Ranking(task.arrival_ns, max(1e-9, self.service(task)), deadline_of(task))


def task_do(tasks: Sequence[Task], execute: Execute, batch_size_predict: int, timer: Timer) -> list[Done]:
    """Do these tasks together, now: their sentences one after another, in batches; all end with the last batch."""
    begun_ns = timer.now_ns()
    sentences = [text for task in tasks for text in task.sentences]
    answers: list[str] = []
    for start in range(0, len(sentences), batch_size_predict):
        answers += execute(sentences[start : start + batch_size_predict])
    ended_ns = timer.now_ns()
    borders = [0]
    for task in tasks:
        borders.append(borders[-1] + len(task.sentences))
    return [
        Done(task, begun_ns, ended_ns, tuple(answers[start:end]))
        for task, (start, end) in zip(tasks, pairwise(borders), strict=True)
    ]


def task_process(tasks: Sequence[Task], execute: Execute, rules: Rules, timer: Timer | None = None) -> list[Done]:
    """Let tasks arrive, queue them by the rules' policy and do them until none is left; in order of completion.

    Work-conserving: whatever waits when the model is free is done at once, up to `task_batch` tasks together.
    """
    clock, policy = timer or RealTimer(), rules.policy()
    coming = sorted(tasks, key=lambda task: (task.arrival_ns, task.number))
    admitted, done = 0, []
    while admitted < len(coming) or len(policy):
        if not len(policy):
            clock.sleep_until(coming[admitted].arrival_ns)
        now = clock.now_ns()
        while admitted < len(coming) and coming[admitted].arrival_ns <= now:
            policy.push(coming[admitted])
            admitted += 1
        chosen = [policy.pop(now) for _ in range(min(rules.task_batch, len(policy)))]
        done += task_do(chosen, execute, rules.batch_size_predict, clock)
    return done


def simulate(tasks: Sequence[Task], rules: Rules, cost: BatchCost | None = None) -> list[Done]:
    """`task_process` in virtual time, each batch taking what `cost` says; answers are empty texts.

    Service times are known to the policy: sjf and hrrn rank by `cost`, not by data_length.
    """
    costs, timer = cost or BatchCost(), VirtualTimer()

    def execute(sentences: Sequence[str]) -> list[str]:
        timer.at_ns += round((costs.start_s + costs.sentence_s * len(sentences)) * NS_PER_S)
        return [""] * len(sentences)

    known = Rules(
        rules.mode,
        rules.task_batch,
        rules.batch_size_predict,
        lambda task: costs.task_s(len(task.sentences), rules.batch_size_predict),
    )
    return task_process(tasks, execute, known, timer)


@dataclass(frozen=True)
class Outcome:
    """What one policy came to. p99_s is None below the number of tasks that supports it."""

    mode: str
    tasks: int
    mean_s: float
    p99_s: float | None
    max_s: float
    misses: int
    deadlines: int
    sentences_per_s: float


def outcome(mode: str, done: Sequence[Done]) -> Outcome:
    """Turnaround, deadline misses and throughput of a finished run."""
    turnarounds = [one.turnaround_s for one in done]
    span_s = (max(one.ended_ns for one in done) - min(one.task.arrival_ns for one in done)) / NS_PER_S
    sentences = sum(len(one.task.sentences) for one in done)
    return Outcome(
        mode=mode,
        tasks=len(done),
        mean_s=sum(turnarounds) / len(turnarounds),
        p99_s=percentile_of(turnarounds, 99),
        max_s=max(turnarounds),
        misses=sum(one.missed for one in done),
        deadlines=sum(one.task.deadline_ns is not None for one in done),
        sentences_per_s=sentences / span_s if span_s > 0 else 0.0,
    )


def comparison(outcomes: Sequence[Outcome]) -> str:
    """A table of policies side by side."""
    lines = ["policy      tasks   mean s    p99 s    max s   missed   sentences/s"]
    for row in outcomes:
        p99 = "n/a" if row.p99_s is None else f"{row.p99_s:.3f}"
        missed = f"{row.misses}/{row.deadlines}" if row.deadlines else "-"
        lines.append(
            f"{row.mode:<10} {row.tasks:>6} {row.mean_s:>8.3f} {p99:>8} {row.max_s:>8.3f} {missed:>8} {row.sentences_per_s:>13.2f}"
        )
    return "\n".join(lines)
