"""The models of all tasks of a machine together: who gets what when not everything fits.

Two rounds over the tasks, the highest priority first:

    1 serve     each task reserves the cheapest option that keeps its promises; one that no longer fits is refused
    2 improve   each served task takes the best quality that fits beside the reservations of all the others

So no task is refused for the sake of a better model of another one, and none because of a task of lower priority,
though that may keep it from a better model. Both rounds are greedy; "cheapest" is the smallest share of the scarcest
resource.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from corun.tasks.choice import (
    Candidate,
    Capacity,
    Choice,
    Demand,
    Option,
    beaten,
    best_first,
    judge,
    none_why,
)
from corun.tasks.task import Task

Forecast = Callable[[Task], float | None]


@dataclass(frozen=True)
class Placement:
    """What was decided for every task, and what is left of the machine. rates: the requests/s each was planned for."""

    choices: Mapping[str, Choice]
    left: Capacity
    rates: Mapping[str, float]


@dataclass
class _Case:
    """One task on its way through the rounds."""

    task: Task
    candidates: Sequence[Candidate]
    options: list[Option]
    reasons: dict[str, str]
    taken: Option | None = None


def fit(
    tasks: Sequence[Task],
    candidates: Mapping[str, Sequence[Candidate]],
    machine: Capacity,
    forecast: Forecast | None = None,
) -> Placement:
    """Choose for all tasks at once.

    candidates: by task id. forecast: requests/s to plan a task for, None = nothing is known; a task is planned for the
    larger of that and the rate it was registered with.
    """
    planned = [expected(task, forecast) for task in sorted(tasks, key=lambda task: (-task.priority, task.id))]
    cases = []
    for task in planned:
        mine = candidates.get(task.id, ())
        options, reasons = judge(task, mine, machine)
        cases.append(_Case(task, mine, options, reasons))
    left = _serve(cases, machine)
    left = _improve(cases, machine, left)
    choices = {case.task.id: _decision(case, cases, machine) for case in cases}
    return Placement(choices, left, {task.id: task.rate for task in planned})


def expected(task: Task, forecast: Forecast | None) -> Task:
    """The task at the rate it is planned for."""
    told = forecast(task) if forecast else None
    return replace(task, rate=max(task.rate, told)) if told is not None else task


def _serve(cases: Sequence[_Case], machine: Capacity) -> Capacity:
    """Round one: reservations."""
    left = machine
    for case in cases:
        fitting = [option for option in case.options if not option.demand.problems(left)]
        if fitting:
            case.taken = min(
                fitting, key=lambda option: (option.demand.share(machine), -option.quality, option.candidate.model)
            )
            left = left.less(case.taken.demand)
    return left


def _improve(cases: Sequence[_Case], machine: Capacity, left: Capacity) -> Capacity:
    """Round two: the best that fits beside the others' reservations."""
    for case in cases:
        if case.taken is None:
            continue
        others = _without(cases, case, machine)
        fitting = [option for option in case.options if not option.demand.problems(others)]
        if fitting:
            case.taken = min(fitting, key=lambda option: best_first(option, machine))
            left = others.less(case.taken.demand)
    return left


def _without(cases: Sequence[_Case], own: _Case, machine: Capacity) -> Capacity:
    """What the machine has beside all reservations but one."""
    left = machine
    for case in cases:
        if case is not own and case.taken is not None:
            left = left.less(case.taken.demand)
    return left


def _decision(case: _Case, cases: Sequence[_Case], machine: Capacity) -> Choice:
    beside = _without(cases, case, machine)
    reasons = dict(case.reasons)
    for option in case.options:
        if option is case.taken:
            continue
        alone, together = option.demand.problems(machine), option.demand.problems(beside)
        if alone:
            reasons[option.candidate.model] = "; ".join(alone)
        elif together:
            reasons[option.candidate.model] = f"{'; '.join(together)} beside the other tasks"
        elif case.taken is not None:
            reasons[option.candidate.model] = beaten(option, case.taken)
    if case.taken is not None:
        return case.taken.choice(reasons)
    if any(not option.demand.problems(machine) for option in case.options):
        why = f"not enough is left beside tasks of priority {case.task.priority} and above"
        return Choice(None, reasons, why, replicas=0)
    return Choice(None, reasons, none_why(case.task, case.candidates), replicas=0)


__all__ = ["Demand", "Forecast", "Placement", "expected", "fit"]
