"""tasks.py as a user runs it: register, measure and choose, serve, ask, look, stop; in processes and in containers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.processes.engine import BASE_IMAGE, TEST_S, engine_host
from tests.processes.tools import SRC, Program, wait_until

from corun.tasks.profile import Point, Profile
from corun.tasks.profiles import Profiles, Settings, Trainer, fingerprint, measure
from corun.tasks.store import Store

pytestmark = pytest.mark.timeout(TEST_S)

QUALITY = {"null:service_ms=20": 40, "null:service_ms=60": 99}


class Tasks:
    """The command line on one registry."""

    def __init__(self, directory: Path) -> None:
        self.store = directory / "tasks.sqlite"
        self.environment = {"CORUN_TASKS": str(self.store), "CORUN_RESULT": str(directory / "result")}

    def __call__(self, *words: object, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, str(SRC / "tasks.py"), *map(str, words)],
            capture_output=True,
            text=True,
            timeout=400,
            env={**os.environ, **self.environment},
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def ready(self, id: str) -> bool:
        """Whether a replica of a task is ready, as the supervisor last wrote."""
        with Store(self.store) as store:
            live = store.state("live") or {}
        states = [one["state"] for task in live.get("tasks", ()) if task["id"] == id for one in task["replicas"]]
        return "ready" in states


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    return Tasks(tmp_path)


def test_a_task_from_registration_to_report(tasks: Tasks, start: Callable[..., Program], tmp_path: Path) -> None:
    """The best model that keeps its promise is measured, chosen, served, asked and reported; the others learn why not."""
    quality, request = tmp_path / "quality.json", tmp_path / "request.bin"
    quality.write_text(json.dumps(QUALITY))
    request.write_bytes(b"?")
    models = [word for model in QUALITY for word in ("--model", model)]
    slow = Point(rate=10, n=1000, mean_ms=6500, max_ms=9000, p99_ms=8000)
    Profiles(tmp_path / "result" / "profiles" / "tasks").put(
        Profile("null:service_ms=60", fingerprint(), "cpu", 1, (slow,), measured="2026-01-01")
    )
    tasks("register", "echo", "--kind", "null", "--rate", 2, "--slo", "p99<=5s", *models)
    planned = json.loads(tasks("plan", "--measure", "--seconds", 0.5, "--quality", quality, "--json"))
    choice = planned["choices"]["echo"]
    assert choice["model"] == "null:service_ms=20"
    assert choice["reasons"]["null:service_ms=60"] == "p99 8000 ms at 2 requests/s, 5000 ms are promised"
    supervisor = start("tasks.py", "up", "--replan", 2, **tasks.environment)
    wait_until(lambda: tasks.ready("echo"))
    assert "request.bin: OK" in tasks("infer", "echo", request, "--count", 3, "--out", tmp_path / "replies")
    assert (tmp_path / "replies" / "request.reply").read_bytes() == bytes(4)
    assert "already" in tasks("up", code=2)
    assert "ready on" in tasks("logs", "echo", "--name", "echo-0.log")
    assert "down" in tasks("down")
    assert supervisor.wait() == 0, supervisor.output()
    assert "planning again failed" not in supervisor.output()
    shown = json.loads(tasks("show", "echo", "--json"))
    assert shown["statistics"]["requests"] == 3
    assert shown["replicas"] == []
    assert "3 received" in tasks("report", "echo")
    assert "is not up" in tasks("infer", "echo", request, code=2)
    tasks("remove", "echo")
    assert "no tasks" in tasks("list")


def test_a_task_in_containers(tasks: Tasks, start: Callable[..., Program]) -> None:
    """The same task in a container of a real engine: asked through its router, limited, and gone after `down`."""
    import docker

    host = engine_host()
    tasks("register", "boxed", "--kind", "null", "--model", "null:reply_bytes=6", "--runtime", "docker",
          "--cpu-limit", 1, "--memory-limit-mib", 600)  # fmt: skip
    supervisor = start("tasks.py", "up", "--image", BASE_IMAGE, "--checkout", DOCKER_HOST=host, **tasks.environment)
    wait_until(lambda: tasks.ready("boxed") or supervisor.popen.poll() is not None)
    assert "OK" in tasks("infer", "boxed")
    client = docker.DockerClient(host)
    mine = {"label": f"corun.owner={tasks.store.resolve()}"}
    (container,) = client.containers.list(filters=mine)
    assert container.attrs["HostConfig"]["Memory"] == 600 << 20
    tasks("down")
    assert supervisor.wait() == 0
    assert client.containers.list(all=True, filters=mine) == []
    client.close()


def test_a_measurement_beside_training_has_both_curves(tmp_path: Path) -> None:
    """A real server, client and trainer give points alone and beside training, memory, CPU and the trainer's loss."""
    trainer = Trainer("mobilenet_v3_small", data="synthetic", batch_size=2, image_size=32)
    settings = Settings(rates=(20.0,), seconds=0.5, rounds=2, trainer=trainer)
    found = measure("null:service_ms=2", settings)
    assert [(point.training, point.slowdown is not None) for point in found.points] == [(False, False), (True, True)]
    assert found.batch_ms[1] >= 2
    assert found.rss_mib > 5
    assert found.trainer == "mobilenet_v3_small_2"
    profiles = Profiles(tmp_path)
    profiles.put(found)
    assert profiles.find("null:service_ms=2", "cpu", training=True) == found
