"""From the registry to a placement: candidates with their profiles and quality, corrected by what runs, then the choice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from corun import registry
from corun.tasks.choice import Candidate, Capacity, Choice
from corun.tasks.demand import Demand
from corun.tasks.priorities import Placement, fit
from corun.tasks.profile import LIVE_LEAST, faded, live_factor
from corun.tasks.profiles import Profiles, Settings, Stop, measure
from corun.tasks.quality import QualityTable
from corun.tasks.statistics import Statistics
from corun.tasks.store import Store
from corun.tasks.task import Task
from corun.tasks.variant import Variant

LIVE_WINDOWS = 120
"""Recent records that correct a profile."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Planner:
    """Chooses for every registered task. training: a training job runs on this machine, or will. clock: Unix time."""

    store: Store
    profiles: Profiles
    quality: QualityTable = field(default_factory=QualityTable)
    training: bool = False
    clock: Callable[[], float] = time.time

    def candidates(self, task: Task) -> list[Candidate]:
        """Every model the task allows, with what is known of it, corrected by how it did when it served this task."""
        factors = self._factors(task)
        found = []
        for model in models_of(task):
            known = self.quality.of(model)
            profile = self.profiles.find(model, task.resource, self.training)
            if profile is not None and model in factors:
                profile = profile.slower(factors[model])
            found.append(Candidate(model, known.value, known.metric, profile))
        return found

    def _factors(self, task: Task) -> dict[str, float]:
        """By model: how much slower than profiled it served this task, faded with the time since."""
        now_s = self.clock()
        name = f"live {task.id}"
        kept: dict[str, list[float]] = self.store.state(name) or {}
        chosen = self.store.choice(task.id)
        if chosen is not None and chosen.model is not None:
            factor = self._live(task, chosen.model, chosen)
            if factor is not None:
                kept[chosen.model] = [factor, now_s]
                self.store.set_state(name, kept)
        return {model: faded(factor, now_s - seen_s) for model, (factor, seen_s) in kept.items()}

    def _live(self, task: Task, model: str, chosen: Choice) -> float | None:
        """The same for the model in service, from what was recorded since it was chosen."""
        profile = self.profiles.find(model, task.resource, self.training)
        since_s = self.store.chosen_s(task.id)
        recent = [window for window in self.store.windows(task.id, LIVE_WINDOWS) if window.t_s > since_s]
        live = sum((window.statistics for window in recent), Statistics())
        if profile is None or live.rate is None:
            return None
        serving = len(self.store.replicas(task.id)) or chosen.replicas
        return live_factor(
            profile, live.mean_ms, live.requests, live.rate / max(serving, 1), chosen.max_batch, self.training
        )

    def missing(self, task: Task) -> list[str]:
        """Allowed models that were never measured here."""
        return [model for model in models_of(task) if self.profiles.find(model, task.resource, self.training) is None]

    def measure_missing(self, tasks: Sequence[Task], settings: Settings, say: Say, stop: Stop | None = None) -> None:
        """Measure and keep every profile that the tasks lack; CorunErrors end it, what was measured stays."""
        for task in tasks:
            device = "cuda" if task.resource == "gpu" else "cpu"
            weights = None if task.weights == "random" else task.weights
            for model in self.missing(task):
                say(f"measuring {model} for {task.id}")
                self.profiles.put(measure(model, replace(settings, device=device, weights=weights), say, stop))

    def plan(self, machine: Capacity, rates: Mapping[str, float] | None = None) -> Placement:
        """Choose for all tasks together; rates: forecast requests/s by task, else from each task's recorded load."""

        def forecast(task: Task) -> float | None:
            return (rates or {}).get(task.id) if rates is not None else predicted_rate(self.store, task)

        tasks = self.store.all()
        return fit(tasks, {task.id: self.candidates(task) for task in tasks}, machine, forecast)

    def decide(self, machine: Capacity, rates: Mapping[str, float] | None = None) -> Placement:
        """The same, kept in the registry. The only model a task allows serves it unmeasured: there is no choice."""
        placement = self.plan(machine, rates)
        for task in self.store.all():
            choice = placement.choices[task.id]
            if choice.model is None and len(models_of(task)) == 1 and self.missing(task):
                continue
            self.store.set_choice(task.id, choice)
        return placement


def models_of(task: Task) -> tuple[str, ...]:
    """Models a task allows, each in its one spelling: those it names, else all of its kind."""
    if task.models:
        return tuple(str(Variant.parse(model)) for model in task.models)
    return tuple(name for name, model in registry.models().items() if model.task == task.kind)


def predicted_rate(store: Store, task: Task) -> float | None:
    """Requests/s the task will be asked next, by corun.predict once its recorded windows suffice to learn from.

    None where nothing was learned: a mean of the past adds nothing to the rate the user expects.
    """
    windows = store.windows(task.id)
    spans = sorted(window.statistics.span_s for window in windows)
    if len(windows) < LIVE_LEAST or not spans[len(spans) // 2]:
        return None
    demand = Demand(spans[len(spans) // 2])
    demand.remember(window.statistics.requests + window.statistics.errors for window in windows)
    for window in windows[-LIVE_LEAST:]:
        demand.observe(window.statistics.requests + window.statistics.errors)
    told = demand.forecast()
    return told.rate if told is not None and told.method == "learned" else None
