"""All tasks of a machine together: who is served, with what, when not everything fits."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from corun.tasks.choice import Candidate, Capacity
from corun.tasks.priorities import Placement, fit
from corun.tasks.task import Task

_PATH = Path(__file__).parent / "test_choice.py"
_SPEC = importlib.util.spec_from_file_location("corun_tests_choice", _PATH)
assert _SPEC
assert _SPEC.loader
made = importlib.util.module_from_spec(_SPEC)
sys.modules["corun_tests_choice"] = made
_SPEC.loader.exec_module(made)


def machine(memory_mib: float, cores: float = 8.0) -> Capacity:
    """A machine with so much memory."""
    return Capacity(cores, memory_mib)


SMALL, LARGE = made.candidate("small", 60, memory_mib=500), made.candidate("large", 80, memory_mib=1500)


def two(memory_mib: float) -> Placement:
    """Tasks high and low on a machine, each with the same two models to choose from."""
    tasks = [made.task(id="low", priority=1), made.task(id="high", priority=9)]
    return fit(tasks, {"low": [SMALL, LARGE], "high": [SMALL, LARGE]}, machine(memory_mib))


def test_with_room_for_all_everyone_gets_the_best() -> None:
    """Priorities do not matter where everything fits."""
    placement = two(3000)
    assert {id: choice.model for id, choice in placement.choices.items()} == {"high": "large", "low": "large"}
    assert placement.left.memory_mib == 0


def test_the_higher_priority_gets_the_better_model() -> None:
    """When one large and one small model fit, the higher priority has the large one and the other is told why."""
    placement = two(2000)
    assert placement.choices["high"].model == "large"
    assert placement.choices["low"].model == "small"
    assert "beside the other tasks" in placement.choices["low"].reasons["large"]


def test_nobody_is_refused_for_the_sake_of_a_better_model() -> None:
    """Where two small models fit but not a large and a small one, both tasks are served."""
    assert {choice.model for choice in two(1900).choices.values()} == {"small"}


def test_what_does_not_fit_is_refused_from_the_lowest_priority_up() -> None:
    """With room for one model only the higher priority is served, and the other one's sentence says so."""
    placement = two(900)
    assert placement.choices["high"].model == "small"
    low = placement.choices["low"]
    assert (low.model, low.replicas) == (None, 0)
    assert low.why == "not enough is left beside tasks of priority 1 and above"


def test_a_forecast_above_the_expected_rate_is_planned_for() -> None:
    """A predicted load raises what a task is planned for, never lowers it."""
    task = made.task(id="t", rate=20.0, max_replicas=4)
    models = {"t": [made.candidate("m", 70, top=25)]}
    assert fit([task], models, machine(5000)).choices["t"].replicas == 1
    busy = fit([task], models, machine(5000), lambda _: 60.0)
    assert busy.choices["t"].replicas == 3
    assert busy.rates["t"] == 60.0
    assert fit([task], models, machine(5000), lambda _: 1.0).rates["t"] == 20.0


TASK_SETS = st.lists(st.tuples(st.integers(0, 5), st.floats(1, 60), made.CANDIDATES), min_size=1, max_size=4)


def _case(sets: list[tuple[int, float, list[Candidate]]]) -> tuple[list[Task], dict[str, list[Candidate]]]:
    tasks = [
        made.task(id=f"t{place}", priority=priority, rate=rate, max_replicas=2)
        for place, (priority, rate, _) in enumerate(sets)
    ]
    return tasks, {f"t{place}": models for place, (_, _, models) in enumerate(sets)}


@settings(max_examples=80, deadline=None)
@given(TASK_SETS, made.MACHINES)
def test_everything_placed_fits_together(sets: list[tuple[int, float, list[Candidate]]], room: Capacity) -> None:
    """All choices together never take more than there is; every task has an answer with reasons for the rest."""
    tasks, models = _case(sets)
    placement = fit(tasks, models, room)
    chosen = placement.choices.values()
    assert sum(choice.cores for choice in chosen) <= room.cores * (1 + 1e-6)
    assert sum(choice.memory_mib for choice in chosen) <= room.memory_mib * (1 + 1e-6)
    for task in tasks:
        choice = placement.choices[task.id]
        assert set(choice.reasons) == {one.model for one in models[task.id]} - {choice.model}
        assert all(choice.reasons.values())


@settings(max_examples=60, deadline=None)
@given(TASK_SETS, made.MACHINES)
def test_a_new_task_of_the_lowest_priority_takes_nobody_off_the_machine(
    sets: list[tuple[int, float, list[Candidate]]], room: Capacity
) -> None:
    """Who was served without the newcomer is served with it."""
    tasks, models = _case(sets)
    before = fit(tasks, models, room)
    newcomer = made.task(id="z", priority=-1, rate=5.0)
    after = fit([*tasks, newcomer], {**models, "z": [SMALL, LARGE]}, room)
    for task in tasks:
        assert (after.choices[task.id].model is None) == (before.choices[task.id].model is None)
