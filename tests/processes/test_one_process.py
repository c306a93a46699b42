"""Trainer and services as threads of one process: a whole run, its end by STOP and by kill, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.processes.tools import Program, is_running, wait_until

Start = Callable[..., Program]
Ports = Callable[..., int]
WriteConfig = Callable[[dict[str, Any]], Path]

TRAIN = {"arch": "squeezenet1_1", "data": "digits", "batch_size": 8, "image_size": 32, "count": 64, "threads": 1}
FAST = {"arch": "null", "rate": 40, "image_size": 32, "count": 4}
REAL = {"arch": "mobilenet_v3_small", "rate": 10, "image_size": 64, "count": 4}
TOGETHER = {"policy": "none", "one_process": True}


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _run_directory(root: Path) -> Path:
    (path,) = (entry for entry in root.iterdir() if entry.is_dir())
    return path


def _processes(run: Path) -> dict[str, int]:
    lines = (run / "processes.jsonl").read_text().splitlines()
    return {row["role"]: row["pid"] for row in map(json.loads, lines)}


def _manifest(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return value


@pytest.mark.slow
def test_a_run_of_one_process_has_everything_a_run_has(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Two services and a trainer, preempted, in three arms: all measured, every row there, one pid for the three."""
    config = write_config(
        {
            "train": [TRAIN],
            "infer": [[REAL, FAST]],
            "duration_s": 3,
            "port": free_port(2),
            "sharing": {**TOGETHER, "policy": "preempt", "micro": 2},
        }
    )
    program = start("main.py", "--config", config, "--no-report", "--out", tmp_path / "result", "--json")
    assert program.wait() == 0, program.output()
    answer = json.loads(program.output().splitlines()[-1])
    run = _run_directory(tmp_path / "result")
    assert set(answer["arms"]) == {"alone", "train", "corun"}
    for arm in ("alone", "corun"):
        for name in ("mobilenet_v3_small", "null"):
            service = answer["arms"][arm]["services"][name]
            assert (service["errors"], service["requests"] > 10) == (0, True)
    assert answer["arms"]["corun"]["train_samples_per_s"] > 0

    manifest = _manifest(run)
    assert manifest["status"] == "complete"
    assert manifest["sharing"]["one_process"] is True
    assert manifest["sharing"]["policy"] == "preempt"
    pids = {row["role"]: row["pid"] for row in manifest["processes"] if row["role"] in ("server", "trainer")}
    assert len(set(pids.values())) == 1
    assert len({row["pid"] for row in manifest["processes"]}) == 4
    assert _processes(run)["server+trainer"] == pids["trainer"]
    hello = next(row["hello"] for row in manifest["processes"] if row["role"] == "trainer")
    assert hello["one_process"] == ["server mobilenet_v3_small", "server null", "trainer squeezenet1_1"]

    for name in ("mobilenet_v3_small", "null"):
        clients, servers = (_rows(run / side / f"{name}.csv") for side in ("infer_client", "infer_server"))
        assert {(row["arm"], row["id"]) for row in clients} == {(row["arm"], row["id"]) for row in servers}
    steps = _rows(run / "train.csv")
    assert {row["arm"] for row in steps} == {"train", "corun"}
    assert {row["micro"] for row in steps if row["arm"] == "corun"} == {"2"}
    roles = {row["role"] for row in _rows(run / "process.csv")}
    assert {"server+trainer", "client", "profiler", "launcher"} <= roles
    assert not roles & {"server", "trainer"}
    assert all(not is_running(pid) for pid in _processes(run).values() if pid != os.getpid())


@pytest.mark.slow
def test_a_killed_process_is_the_end_of_both_sides(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """kill -9 during a window: service and trainer are each named as killed, and their rows up to then are kept."""
    config = write_config(
        {
            "train": [TRAIN],
            "infer": [FAST],
            "duration_s": 10,
            "port": free_port(),
            "arms": ["corun"],
            "sharing": TOGETHER,
        }
    )
    program = start("main.py", "--config", config, "--no-report", "--quiet", "--out", tmp_path / "result")
    run = Path(wait_until(lambda: next((tmp_path / "result").glob("*/train.csv"), None))).parent
    wait_until(lambda: len(_rows(run / "train.csv")) > 2)
    os.kill(_processes(run)["server+trainer"], signal.SIGKILL)
    assert program.wait() == 1, program.output()
    manifest = _manifest(run)
    assert manifest["status"] == "failed"
    faults = " ".join(manifest["faults"])
    assert "server null was killed by SIGKILL" in faults
    assert "trainer squeezenet1_1_8 was killed by SIGKILL" in faults
    assert len(_rows(run / "train.csv")) > 2
    assert _rows(run / "infer_client" / "null.csv")


def _block(checkpoint: Path) -> None:
    """Put a directory where the trainer writes its checkpoint at every epoch's end."""
    while not checkpoint.is_dir():
        checkpoint.unlink(missing_ok=True)
        with suppress(FileExistsError):
            checkpoint.mkdir()


@pytest.mark.slow
def test_a_trainer_that_fails_is_a_named_fault_and_the_service_serves_on(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """The trainer's thread ends with its reason during the window; requests are answered until the window's end."""
    config = write_config(
        {
            "train": [{**TRAIN, "data": "synthetic", "count": 32, "checkpoint": True}],
            "infer": [FAST],
            "duration_s": 10,
            "port": free_port(),
            "arms": ["corun"],
            "sharing": TOGETHER,
        }
    )
    program = start("main.py", "--config", config, "--no-report", "--quiet", "--out", tmp_path / "result")
    checkpoint = Path(wait_until(lambda: next((tmp_path / "result").glob("*/checkpoint.pt"), None)))
    run = checkpoint.parent
    _block(checkpoint)
    assert program.wait() == 1, program.output()
    (fault,) = _manifest(run)["faults"]
    assert fault.startswith(
        "trainer squeezenet1_1_8 ended: error: trainer squeezenet1_1: cannot write the checkpoint"
    )
    last_step = max(int(row["t_end_ns"]) for row in _rows(run / "train.csv"))
    rows = _rows(run / "infer_client" / "null.csv")
    answered = [row for row in rows if row["status"] == "OK"]
    assert len(answered) > 0.9 * len(rows)
    assert max(int(row["t_rx_ns"]) for row in answered) > last_step


def test_a_part_that_cannot_start_is_named(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """A trainer that refuses its batch ends the run at the start, with its name and its own sentence."""
    config = write_config(
        {
            "train": [{**TRAIN, "data": "synthetic", "count": 4}],
            "infer": [FAST],
            "duration_s": 1,
            "port": free_port(),
            "sharing": TOGETHER,
        }
    )
    program = start("main.py", "--config", config, "--no-report", "--out", tmp_path / "result")
    assert program.wait() == 1, program.output()
    (fault,) = _manifest(_run_directory(tmp_path / "result"))["faults"]
    assert "server null and trainer squeezenet1_1_8 exited with 2" in fault
    assert "fewer than one batch" in fault


def test_streams_are_refused_without_a_gpu_and_processes_without_processes(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """`--policy stream_priority` asks for one process by itself and is refused for the GPU's sake alone; idle beside
    one_process is refused because the trainer is no process."""
    for policy, sharing, sentence in (
        ("stream_priority", {}, "not on a GPU"),
        ("idle", {"one_process": True}, "no process of its own"),
    ):
        train = {**TRAIN, "device": "cpu"}
        value = {"train": [train], "infer": [{**FAST, "device": "cpu"}], "duration_s": 1, "port": free_port()}
        config = write_config({**value, **({"sharing": sharing} if sharing else {})})
        out = tmp_path / policy
        program = start("main.py", "--config", config, "--policy", policy, "--no-report", "--out", out)
        assert program.wait() == 1
        (fault,) = _manifest(_run_directory(out))["faults"]
        assert sentence in fault
        assert "separate processes" not in fault
        assert not (_run_directory(out) / "train.csv").exists()


def test_one_process_is_refused_on_a_cluster(start: Start, write_config: WriteConfig, tmp_path: Path) -> None:
    """Before a cluster is even asked, with what to do instead."""
    config = write_config({"train": [TRAIN], "infer": [FAST], "sharing": TOGETHER, "launch": {"backend": "ray"}})
    program = start("main.py", "--config", config, "--out", tmp_path / "result")
    assert program.wait() == 2
    assert "on the launcher's own machine only" in " ".join(program.output().split())
    assert not (tmp_path / "result").exists()
