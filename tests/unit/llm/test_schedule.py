"""Tasks of sentences: dictionaries, orders, the virtual-time simulator's golden values, and the real loop."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError
from corun.llm.predict import glm_predict, load_predictor
from corun.llm.schedule import (
    MODES,
    BatchCost,
    Rules,
    VirtualTimer,
    comparison,
    made_tasks,
    make_tasks,
    outcome,
    read_tasks,
    simulate,
    task_do,
    task_edf,
    task_process,
    task_sjf,
)

ROOT = Path(__file__).resolve().parents[3]
H = [256] * 3 + [16] * 2 + [256] * 2 + [128] * 3 + [16] * 3 + [128]


@pytest.mark.parametrize(
    ("mode", "mean", "order"),
    [
        ("fifo", 97.787, list(range(14))),
        ("sjf", 58.430, [0, 3, 4, 10, 11, 12, 7, 8, 9, 13, 1, 2, 5, 6]),
        ("hrrn", 58.430, [0, 3, 4, 10, 11, 12, 7, 8, 9, 13, 1, 2, 5, 6]),
        ("hrrn-stale", 65.735, [0, 3, 4, 10, 11, 12, 1, 7, 2, 8, 5, 9, 6, 13]),
    ],
)
def test_the_published_mix_has_its_golden_values(mode: str, mean: float, order: list[int]) -> None:
    """Mix H, batches of 8, arrivals 0.1 s apart: published turnaround, order and makespan."""
    done = simulate(made_tasks(H), Rules(mode, 1, 8), BatchCost(0.236, 0.0504))
    assert outcome(mode, done).mean_s == pytest.approx(mean, abs=1e-3)
    assert [one.task.number for one in done] == order
    assert max(one.ended_ns for one in done) / 1e9 == pytest.approx(149.573, abs=1e-3)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=25),
    mode=st.sampled_from(MODES),
    together=st.integers(1, 4),
    batch=st.integers(1, 16),
)
@settings(max_examples=60, deadline=None)
def test_every_task_is_done_once_and_never_before_it_arrives(
    sizes: list[int], mode: str, together: int, batch: int
) -> None:
    """Whatever the rules, each task is done exactly once, begun after its arrival, and no time is idle while one waits."""
    tasks = made_tasks(sizes, 0.3)
    done = simulate(tasks, Rules(mode, together, batch))
    assert sorted(one.task.number for one in done) == list(range(len(tasks)))
    assert all(one.begun_ns >= one.task.arrival_ns and one.ended_ns > one.begun_ns for one in done)
    for before, after in pairwise(done):
        if after.begun_ns > before.ended_ns:
            waiting = [one.task for one in done if one.begun_ns >= after.begun_ns]
            assert all(task.arrival_ns >= after.begun_ns for task in waiting)


def test_task_dictionaries_become_tasks() -> None:
    """sentence, data_length, start_time and true_time are read; what is missing has its stated default."""
    tasks = make_tasks(
        [
            {"sentence": "one"},
            {"sentence": ["a", "b"], "data_length": 7, "true_time": 2},
            {"sentence": ["c"], "start_time": 5.0},
        ],
        interval_time=0.5,
    )
    assert [task.sentences for task in tasks] == [("one",), ("a", "b"), ("c",)]
    assert [task.data_length for task in tasks] == [1, 7, 1]
    assert [task.arrival_ns for task in tasks] == [0, 500_000_000, 5_000_000_000]
    assert [task.deadline_ns for task in tasks] == [None, 2_500_000_000, None]


def test_wrong_tasks_are_all_listed() -> None:
    """Each wrong task is named by its index, with suggestions for keys."""
    rows: list[Any] = [{"sentence": []}, {"sentence": "a", "true_tim": 1}, 3, {"sentence": "a", "start_time": -1}]
    with pytest.raises(InputError) as refused:
        make_tasks(rows)
    text = str(refused.value)
    assert "task 0: sentence is neither" in text
    assert 'did you mean "true_time"' in text
    assert "task 2: it is not an object" in text
    assert "task 3: start_time is -1" in text


def test_unreadable_task_files_are_input_errors(tmp_path: Path) -> None:
    """No file, no JSON and no list are told apart."""
    with pytest.raises(InputError, match="cannot be read"):
        read_tasks(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match="list of tasks"):
        read_tasks(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(InputError, match="no tasks"):
        read_tasks(tmp_path / "b.json")


def test_the_orders_of_waiting_tasks() -> None:
    """task_sjf goes by data_length, task_edf by arrival plus limit with unlimited tasks last."""
    tasks = make_tasks(
        [
            {"sentence": "a", "data_length": 3},
            {"sentence": "b", "data_length": 1, "true_time": 9},
            {"sentence": "c", "data_length": 2, "true_time": 1},
        ]
    )
    assert [task.number for task in task_sjf(tasks)] == [1, 2, 0]
    assert [task.number for task in task_edf(tasks)] == [2, 1, 0]


@pytest.mark.parametrize(("mode", "order"), [("sjf", task_sjf), ("edf", task_edf)])
@given(rows=st.lists(st.tuples(st.integers(1, 9), st.none() | st.integers(0, 9)), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_the_queue_agrees_with_the_sorted_orders(mode: str, order: Any, rows: list[tuple[int, int | None]]) -> None:
    """Tasks that all wait from the start are done in the order task_sjf or task_edf gives."""
    tasks = make_tasks([{"sentence": "x", "data_length": a, "true_time": b} for a, b in rows], interval_time=0.0)
    timer = VirtualTimer()
    done = task_process(tasks, lambda texts: list(texts), Rules(mode), timer)
    assert [one.task.number for one in done] == [task.number for task in order(tasks)]


def test_tasks_done_together_get_their_own_answers() -> None:
    """Sentences of several tasks share batches, never more than the limit, and come back to their tasks in order."""
    tasks, batches, timer = made_tasks([3, 1, 4], 0.0), [], VirtualTimer()

    def execute(texts: Any) -> list[str]:
        batches.append(len(texts))
        return [text.upper() for text in texts]

    done = task_do(tasks, execute, 3, timer)
    assert batches == [3, 3, 2]
    assert [one.answers for one in done] == [tuple(text.upper() for text in task.sentences) for task in tasks]


def test_edf_misses_fewer_deadlines_than_fifo() -> None:
    """On arrivals where order decides, edf meets what fifo misses; the table counts both."""
    rows = [{"sentence": ["x"] * 20}, {"sentence": ["x"] * 20, "true_time": 9}, {"sentence": ["x"], "true_time": 1.8}]
    tasks = make_tasks(rows, 0.01)
    found = {mode: outcome(mode, simulate(tasks, Rules(mode, 1, 20))) for mode in MODES}
    assert found["fifo"].misses == 1
    assert found["edf"].misses == 0
    assert found["edf"].deadlines == 2
    assert "1/2" in comparison(list(found.values()))


def test_p99_needs_enough_tasks() -> None:
    """With few tasks the p99 is n/a, with many it is a number."""
    few, many = (outcome("fifo", simulate(made_tasks([1] * n), Rules())) for n in (20, 700))
    assert few.p99_s is None
    assert "n/a" in comparison([few])
    assert many.p99_s is not None
    assert many.mean_s <= many.p99_s <= many.max_s


def test_wrong_rules_are_refused() -> None:
    """An unknown mode is suggested for; sizes must be positive."""
    with pytest.raises(InputError, match='did you mean "hrrn"'):
        Rules("hrnn")
    with pytest.raises(InputError, match="1 or more"):
        Rules("fifo", 0)


def test_a_real_model_answers_the_same_under_every_policy() -> None:
    """On the tiny model all policies give each task the answers glm_predict gives its sentences alone."""
    predictor = load_predictor("tiny", new_tokens=4)
    tasks = made_tasks([2, 1, 3], 0.001)
    expected = {task.number: tuple(glm_predict(predictor, task.sentences, 1)) for task in tasks}
    for mode in MODES:
        done = task_process(tasks, lambda texts: glm_predict(predictor, texts, 4), Rules(mode, 2, 4))
        assert {one.task.number: one.answers for one in done} == expected


def test_the_front_door_compares_policies(tmp_path: Path) -> None:
    """`schedule.py --simulate` prints a row per policy; a wrong mode exits 2 with a sentence."""
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps([{"sentence": ["a", "b"], "data_length": 2, "start_time": 0, "true_time": 1}]))
    command = [sys.executable, str(ROOT / "src" / "schedule.py"), "--simulate", "--data", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in ran.stdout.splitlines()] == ["policy", *MODES]
    wrong = subprocess.run([*command, "--schedule_mode", "sfj"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert 'did you mean "sjf"' in wrong.stderr
    assert "Traceback" not in wrong.stderr
