"""Three tasks, one of each priority, under Poisson load while one of their servers is killed: processes and containers."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.processes.engine import BASE_IMAGE, engine_host
from tests.processes.supervised import Up

from corun import registry
from corun.tasks.monitor import history, log_names, log_tail
from corun.tasks.store import Store
from corun.tasks.supervisor import UpOptions, running
from corun.testing.drive import Drive, Outcomes, poisson_dues_ns

IMAGE_TASK = {"kind": "classification", "weights": "random", "slo": "p99<=500"}
TASKS: tuple[dict[str, Any], ...] = (
    {"id": "doors", "priority": 2, "models": ["mobilenet_v3_small:image_size=64"], **IMAGE_TASK},
    {"id": "shelves", "priority": 1, "models": ["squeezenet1_1:image_size=64"], **IMAGE_TASK},
    {"id": "meters", "priority": 0, "kind": "null", "models": ["null:service_ms=2"], "slo": "p99<=100"},
)
VICTIMS = {"process": "doors", "docker": "meters"}
RATE = 15.0
SECONDS = 6.0


def payloads(task: dict[str, Any]) -> list[bytes]:
    if task["kind"] == "null":
        return [b"meter"]
    return [one.data for one in registry.dataset("synthetic").requests(registry.DataOptions(image_size=64, count=4))]


@contextlib.contextmanager
def poisson_load(up: Up) -> Iterator[dict[str, Drive]]:
    """Open-loop clients of all three tasks."""
    with contextlib.ExitStack() as stack:
        yield {
            values["id"]: stack.enter_context(
                Drive(up.address(values["id"]), poisson_dues_ns(RATE, SECONDS, seed), payloads(values))
            )
            for seed, values in enumerate(TASKS)
        }


def kill(up: Up, runtime: str) -> str:
    """End the only replica of one task as an accident would; its id."""
    victim: str = up.live(VICTIMS[runtime])["replicas"][0]["id"]
    if runtime == "process":
        os.kill(int(victim), signal.SIGKILL)
    else:
        import docker

        with contextlib.closing(docker.from_env()) as client:
            client.containers.get(victim).kill()
    return victim


@pytest.mark.timeout(900)
@pytest.mark.parametrize("runtime", ["process", "docker"])
def test_three_tasks_survive_a_kill(runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request is answered or counted as an error, the killed server is replaced, each task has its report."""
    if runtime == "docker":
        monkeypatch.setenv("DOCKER_HOST", engine_host())
    hit = VICTIMS[runtime]
    registered = [{**values, "runtime": runtime} for values in TASKS]
    options = UpOptions(image=BASE_IMAGE, checkout=True, directory=tmp_path / "run")
    with Up(tmp_path, registered, options) as up:
        up.wait(up.all_ready)
        assert running(up.store) == os.getpid()
        with poisson_load(up) as drives:
            time.sleep(SECONDS / 4)
            victim = kill(up, runtime)
            up.wait(lambda: "replica 0 was killed" in "".join(up.said) or "exited with 137" in "".join(up.said))
            up.wait(lambda: up.all_ready() and up.live(hit)["replicas"][0]["id"] != victim)
        outcomes = {name: drive.outcomes() for name, drive in drives.items()}
    assert up.fault is None
    check_outcomes(outcomes, hit)
    for values in TASKS:
        check_files(up, values["id"], outcomes[values["id"]])
    report = json.loads((tmp_path / "run" / f"{hit}.json").read_text())
    assert report["replica_restarts"] == 1
    assert {"up", "start", "ready", "end"} <= {event["kind"] for event in report["events"]}
    assert running(up.store) is None
    assert all(up.store.replicas(values["id"]) == [] for values in TASKS)
    if runtime == "docker":
        check_no_container_is_left(up.store)


def check_outcomes(outcomes: dict[str, Outcomes], hit: str) -> None:
    """Nothing is lost; the tasks whose servers lived have no error at all, the other one an answer for each request."""
    assert sum(one.lost for one in outcomes.values()) == 0
    for name, one in outcomes.items():
        assert set(one.counts) <= ({"OK", "NOT_LOADED", "FAILED", "EXPIRED"} if name == hit else {"OK"})
        assert one.counts["OK"] > 0


def check_files(up: Up, task: str, outcomes: Outcomes) -> None:
    """The report, the rows and the store all count what the client saw."""
    run = up.supervisor.directory
    report = json.loads((run / f"{task}.json").read_text())
    sent = len(outcomes.status)
    assert report["received"] == sent
    assert sum(report["answered"].values()) == sent
    assert report["unanswered"] == 0
    assert report["answered"]["ok"] == outcomes.counts["OK"]
    assert f"# {task}" in (run / f"{task}.md").read_text()
    with open(run / f"{task}.csv", newline="") as file:
        assert sum(int(row["received"]) for row in csv.DictReader(file)) == sent
    total = up.store.statistics(task)
    assert (total.requests, total.errors) == (report["answered"]["ok"], report["errors"])
    assert total.cpu_s > 0
    assert len(history(run, task)) > 2
    names = log_names(run, task)
    assert names == [f"{task}.log", f"{task}-router.log", f"{task}-0.log"]
    assert all(log_tail(run, task, name) for name in names)


def check_no_container_is_left(store: Store) -> None:
    import docker

    with contextlib.closing(docker.from_env()) as client:
        label = {"label": f"corun.owner={store.path.resolve()}"}
        assert client.containers.list(all=True, filters=label) == []
