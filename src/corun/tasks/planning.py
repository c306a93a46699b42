"""From the registry to a placement: candidates with their profiles and quality, corrected by what runs, then the choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from corun import registry
from corun.tasks.choice import Candidate, Capacity, Choice
from corun.tasks.demand import Demand
from corun.tasks.priorities import Placement, fit
from corun.tasks.profile import LIVE_LEAST, Profile, refreshed
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
    """Chooses for every registered task. training: a training job runs on this machine, or will."""

    store: Store
    profiles: Profiles
    quality: QualityTable = field(default_factory=QualityTable)
    training: bool = False

    def candidates(self, task: Task) -> list[Candidate]:
        """Every model the task allows, with what is known of it; the model in service corrected by its live figures."""
        chosen = self.store.choice(task.id)
        found = []
        for model in models_of(task):
            known = self.quality.of(model)
            profile = self.profiles.find(model, task.resource, self.training)
            if profile is not None and chosen is not None and chosen.model == model:
                profile = self._live(task, profile, chosen)
            found.append(Candidate(model, known.value, known.metric, profile))
        return found

    def _live(self, task: Task, profile: Profile, chosen: Choice) -> Profile:
        """The profile of the model in service, corrected by what it did since it was chosen."""
        since_s = self.store.chosen_s(task.id)
        recent = [window for window in self.store.windows(task.id, LIVE_WINDOWS) if window.t_s > since_s]
        live = sum((window.statistics for window in recent), Statistics())
        rate = (live.rate or 0.0) / max(chosen.replicas, 1)
        return refreshed(profile, live.mean_ms, live.requests, rate, chosen.max_batch, self.training)

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
        """The same, kept in the registry."""
        placement = self.plan(machine, rates)
        for task_id, choice in placement.choices.items():
            self.store.set_choice(task_id, choice)
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
