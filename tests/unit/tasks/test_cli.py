"""The commands of tasks.py that start nothing: what they print, refuse and keep."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from corun.tasks.choice import Capacity, Choice
from corun.tasks.planning import Planner, predicted_rate
from corun.tasks.profile import Point, Profile
from corun.tasks.profiles import Profiles
from corun.tasks.quality import QualityTable
from corun.tasks.replan import Context, replanning
from corun.tasks.replies import readable
from corun.tasks.statistics import Statistics
from corun.tasks.store import Replica, Store
from corun.tasks.task import make

_SPEC = importlib.util.spec_from_file_location(
    "corun_front_tasks", Path(__file__).resolve().parents[3] / "src/tasks.py"
)
assert _SPEC
assert _SPEC.loader
front = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(front)

Tasks = Callable[..., str]
ROOM = Capacity(cores=4, memory_mib=4000)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh registry, results beside it."""
    monkeypatch.setenv("CORUN_TASKS", str(tmp_path / "tasks.sqlite"))
    monkeypatch.setenv("CORUN_RESULT", str(tmp_path / "result"))
    return tmp_path / "tasks.sqlite"


@pytest.fixture
def tasks(path: Path) -> Tasks:
    """Run a command and check its exit code; gives all it printed."""

    def run(*words: object, code: int = 0) -> str:
        result = CliRunner().invoke(front.app, [str(word) for word in words])
        assert result.exit_code == code, result.output
        return result.output

    return run


def test_bad_input_lists_every_problem_and_changes_nothing(tasks: Tasks, path: Path, tmp_path: Path) -> None:
    """A file with faulty tasks registers none of its tasks and names each fault; the exit code is 2."""
    file = tmp_path / "tasks.json"
    good = {"id": "good", "kind": "null"}
    file.write_text(json.dumps([good, {"id": "a", "kind": "nul"}, {"id": "b", "slo": "fast"}, 7, good]))
    output = tasks("register", "--file", file, code=2)
    for part in ('a: kind: "nul"', 'b: slo: "fast"', "3: a task is a JSON object", "good: stands twice"):
        assert part in output
    with Store(path) as store:
        assert store.all() == []
    file.write_text(json.dumps([good, {"id": "next", "kind": "null"}]))
    tasks("register", "--file", file)
    assert "--replace" in tasks("register", "--file", file, code=2)
    assert "replaced" in tasks("register", "--file", file, "--replace")
    assert "cannot read tasks" in tasks("register", "--file", tmp_path / "none", code=2)


def test_commands_about_what_is_not_there_say_so(tasks: Tasks, tmp_path: Path) -> None:
    """An unknown task gets the near miss; what was never up has no logs; nothing runs, so nothing is ended."""
    assert "register one first" in tasks("up", code=2)
    tasks("register", "good", "--kind", "null")
    assert 'did you mean "good"' in tasks("show", "god", code=2)
    assert "no task" in tasks("up", "--task", "gone", code=2)
    assert "was ever up" in tasks("logs", "good", code=2)
    assert "no supervisor" in tasks("down")
    assert "is not up" in tasks("infer", "good", code=2)
    assert "cannot read" in tasks("infer", "good", tmp_path / "none.jpg", code=2)
    assert "no supervisor is running" in tasks("status")


def test_what_is_known_of_a_task_is_shown(tasks: Tasks, path: Path) -> None:
    """show and report have the promise, the choice with its reasons, statistics and replicas, as text and as JSON."""
    tasks(
        "register", "doors", "--slo", "p99<=80", "--model", "resnet18", "--weights", "random", "--description", "who?"
    )
    with Store(path) as store:
        store.set_choice(
            "doors", Choice("resnet18", {"resnet50": "too slow"}, "good", quality=69.8, metric="top-1 %")
        )
        store.record("doors", Statistics.of([10.0, 20.0], cpu_s=0.1, rss_mib=300, span_s=3600))
        store.set_replica("doors", Replica(0, "resnet18", "ready", "127.0.0.1:5"))
    text = tasks("show", "doors")
    for part in (
        "who?",
        "p99 <= 80 ms",
        "not resnet50: too slow",
        "2 answered",
        "replica 0: resnet18 ready",
        "random",
    ):
        assert part in text
    assert "that of released weights" in text
    assert json.loads(tasks("show", "doors", "--json"))["statistics"]["requests"] == 2
    assert "doors" in tasks("list")
    assert json.loads(tasks("list", "--json"))[0]["slo"] == {"p99_ms": 80.0}
    assert "15" in tasks("report")
    assert json.loads(tasks("report", "--json"))["doors"]["mean_ms"] == 15
    tasks("remove", "doors")
    assert "no tasks" in tasks("list")


def test_a_plan_without_measurements_promises_nothing(tasks: Tasks, path: Path) -> None:
    """The only model allowed serves unmeasured, a task with a choice has none until it is measured: exit code 3."""
    tasks("register", "only", "--kind", "null", "--model", "null")
    assert "the only model allowed" in tasks("plan")
    tasks("register", "many", "--kind", "null", "--model", "null", "--model", "null:service_ms=2")
    text = tasks("plan", code=3)
    assert "many: NO MODEL" in text
    assert "not measured on this machine" in text
    with Store(path) as store:
        assert store.choice("only") is None
        assert store.choice("many") == Choice(
            None, store.choice("many").reasons, store.choice("many").why, replicas=0
        )  # type: ignore[union-attr]


# Planning


def _profile(model: str, ms: float) -> Profile:
    points = tuple(Point(rate, 1000, ms, ms, p99_ms=ms) for rate in (1.0, 100.0))
    return Profile(model, "m", "cpu", 1, points, rss_mib=100, cpu_ms=1, measured="2026-01-01")


@pytest.fixture
def planner(path: Path, tmp_path: Path) -> Planner:
    """Task a with a good model of 40 ms and a plain one of 10 ms; p99 of 50 ms is promised."""
    profiles = Profiles(tmp_path, "m")
    good, plain = "null:service_ms=40", "null:service_ms=10"
    profiles.put(_profile(good, 40))
    profiles.put(_profile(plain, 10))
    store = Store(path, clock=lambda: 1000.0)
    store.add(make(id="a", kind="null", models=[good, plain], slo="p99<=50"))
    return Planner(store, profiles, QualityTable({good: (90.0, "%"), plain: (50.0, "%")}), clock=lambda: 2000.0)


def test_live_statistics_change_the_choice_and_are_remembered(planner: Planner) -> None:
    """A model that runs slower than profiled loses its place, and does not get it back because it stopped running."""
    store, good, plain = planner.store, "null:service_ms=40", "null:service_ms=10"
    assert planner.decide(ROOM).choices["a"].model == good
    store._clock = lambda: 1500.0
    store.record("a", Statistics(requests=5000, mean_ms=80.0, sd_ms=1.0, max_ms=90.0, span_s=500.0))
    changed = planner.decide(ROOM).choices["a"]
    assert changed.model == plain
    assert "50 ms are promised" in changed.reasons[good]
    assert planner.decide(ROOM).choices["a"].model == plain
    much_later = Planner(store, planner.profiles, planner.quality, clock=lambda: 2000.0 + 20 * 3600)
    assert much_later.decide(ROOM).choices["a"].model == good


def test_a_load_is_predicted_only_once_there_is_enough_to_learn_from(planner: Planner) -> None:
    """A few records say nothing; many let corun.predict forecast an upper quantile of the coming load."""
    store, task = planner.store, planner.store.get("a")
    assert predicted_rate(store, task) is None
    for number in range(90):
        store.record("a", Statistics(requests=40 + number % 5, mean_ms=1.0, span_s=2.0))
    told = predicted_rate(store, task)
    assert told is not None
    assert 15 < told < 30
    assert planner.decide(ROOM).rates["a"] == told


def test_a_later_plan_is_made_like_the_last_one(path: Path, tmp_path: Path) -> None:
    """Quality table, training and limits of `plan` are kept for the plans that follow while tasks are up."""
    (tmp_path / "q.json").write_text('{"null": 5}')
    with Store(path) as store:
        Context(tmp_path / "q.json", training=True, cores=1.5, memory_mib=100).save(store)
        kept = Context.load(store)
        assert (kept.training, kept.offered(store)) == (True, Capacity(1.5, 100, (), True))
        assert kept.planner(store).quality.of("null").value == 5


def _wait(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("not within a minute")


def test_a_plan_that_fails_while_tasks_are_up_is_said_once(path: Path, tmp_path: Path) -> None:
    """Planning again goes on after a failure, and does not repeat itself."""
    with Store(path) as store:
        store.add(make(id="a", kind="null", models=["null", "null:service_ms=1"]))
        Context(tmp_path / "q.json").save(store)
        said: list[str] = []
        with replanning(path, 0.02, said.append):
            _wait(lambda: said)
            (tmp_path / "draft").write_text("{}")
            (tmp_path / "draft").replace(tmp_path / "q.json")
            _wait(lambda: store.choice("a"))
    assert len([line for line in said if "cannot read the quality table" in line]) == 1


@pytest.mark.parametrize(
    ("kind", "reply", "text"),
    [
        ("null", bytes(4), "4 bytes"),
        ("generation", "grüß dich".encode(), "grüß dich"),
        ("generation", b"x" * 400, "x" * 300 + "..."),
        ("classification", b"\xff\xfe", "2 bytes"),
    ],
)
def test_an_answer_is_shown_in_words_where_it_has_some(kind: str, reply: bytes, text: str) -> None:
    """Text is shown as it is, anything else by its size; a top five by class and probability."""
    assert readable(kind, reply) == text
