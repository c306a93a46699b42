"""Inference loops as a person runs them: multi_infer.py with real children, killed, interrupted and misused."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

from tests.processes.tools import Start, in_a_window, is_running, wait_until
from tests.processes.tools import manifest_of as _manifest
from tests.processes.tools import pids_of as _pids

SMALL = ("--image-size", 64, "--count", 4, "--threads", 1)
TRAIN = ("--with-train", "squeezenet1_1", "--train-image-size", 32, "--train-batch-size", 8, "--train-threads", 1)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def _measuring(root: Path) -> Path:
    """The run directory, once its window has begun and both loops have rows."""
    run = in_a_window(root)
    wait_until(lambda: all(len(_rows(run / "infer_loop" / f"{name}.csv")) > 3 for name in ("null", "null-2")))
    return run


def _table_row(output: str, loop: str) -> list[str]:
    return next(line.split() for line in output.splitlines() if line.split()[:2] == [loop, "random"])


def test_loops_beside_training_from_command_to_table(start: Start, tmp_path: Path) -> None:
    """Two loops and a trainer in one window: every promised file, row and figure is there."""
    program = start(
        "multi_infer.py",
        *("--models", "mobilenet_v3_small", "squeezenet1_1", "--seconds", 3, "--out", tmp_path / "result"),
        *("--batch-size", 2, *SMALL, *TRAIN),
    )
    assert program.wait() == 0, program.output()
    (run,) = (tmp_path / "result").iterdir()
    manifest, summary = _manifest(run), json.loads((run / "loops.json").read_text())
    assert manifest["status"] == "complete"
    (window,) = manifest["segments"]
    assert manifest["threads"]["trainer squeezenet1_1_8"] == 1
    for figures in summary["loops"]:
        rows = _rows(run / "infer_loop" / f"{figures['loop']}.csv")
        assert len(rows) == figures["inferences"] > 0
        assert figures["failed"] == 0
        assert figures["weights"] == "random"
        assert figures["p50_ms"] is None or figures["p50_ms"] <= figures["max_ms"]
        assert {row["batch"] for row in rows} == {"2"}
        assert {row["train_model_name"] for row in rows} == {"squeezenet1_1_8"}
        assert all(int(row["t_start_ns"]) >= window["start_ns"] for row in rows)
        assert all(int(row["t_end_ns"]) < window["stop_ns"] for row in rows[:-1]), "the last one began before the end"
        assert _table_row(program.output(), figures["loop"])[2] == str(figures["inferences"])
    steps = _rows(run / "train.csv")
    assert steps
    assert {row["arm"] for row in steps} == {"corun"}
    assert summary["train_samples_per_s"] > 0
    assert f"training squeezenet1_1_8: {summary['train_samples_per_s']:.1f} samples/s" in program.output()
    assert {"loop", "trainer", "profiler"} <= {row["role"] for row in _rows(run / "process.csv")}
    ticks = _rows(run / "profile.csv")
    assert len(ticks) + sum(int(row["missed"]) for row in ticks) >= 3


def test_a_killed_loop_is_reported_and_survived(start: Start, tmp_path: Path) -> None:
    """kill -9 of one loop ends the run as failed with its name; the other works to the end of the window."""
    program = start("multi_infer.py", "--models", "null", "null", "--seconds", 8, "--out", tmp_path / "result")
    run = _measuring(tmp_path / "result")
    pids = _pids(run)
    os.kill(pids["loop null"], signal.SIGKILL)
    before = len(_rows(run / "infer_loop" / "null-2.csv"))
    assert program.wait() == 1, program.output()
    manifest = _manifest(run)
    assert manifest["status"] == "failed"
    assert manifest["faults"] == ["loop null was killed by SIGKILL during a measurement"]
    assert "loop null was killed by SIGKILL" in program.output()
    assert "Traceback" not in program.output()
    assert len(_rows(run / "infer_loop" / "null-2.csv")) > before
    assert _rows(run / "infer_loop" / "null.csv")
    assert [entry["name"] for entry in manifest["counts"]] == ["null-2", "profiler"]
    assert not [name for name, pid in pids.items() if name != "launcher launcher" and is_running(pid)]


def test_ctrl_c_ends_the_window_and_saves(start: Start, tmp_path: Path) -> None:
    """The first Ctrl-C drains, writes the summary and exits with 130."""
    program = start("multi_infer.py", "--models", "null", "null", "--seconds", 600, "--out", tmp_path / "result")
    run = _measuring(tmp_path / "result")
    program.signal(signal.SIGINT)
    assert program.wait() == 130, program.output()
    assert _manifest(run)["status"] == "interrupted"
    assert json.loads((run / "loops.json").read_text())["loops"][0]["inferences"] > 3


def test_loops_die_with_a_killed_launcher(start: Start, tmp_path: Path) -> None:
    """kill -9 of the launcher takes its children with it; rows written so far stay."""
    program = start("multi_infer.py", "--models", "null", "null", "--seconds", 600, "--out", tmp_path / "result")
    run = _measuring(tmp_path / "result")
    pids = _pids(run)
    program.signal(signal.SIGKILL)
    program.wait()
    wait_until(lambda: not [pid for pid in pids.values() if is_running(pid)])
    assert _manifest(run)["status"] == "running"
    assert len(_rows(run / "infer_loop" / "null.csv")) > 3


def test_a_loop_that_cannot_start_fails_the_run_with_its_reason(start: Start, tmp_path: Path) -> None:
    """Weights that are not there: exit 1, the loop's own sentence, a manifest that says failed."""
    program = start(
        "multi_infer.py",
        *("--models", "squeezenet1_1", "--seconds", 1, "--weights", "nowhere.pt", "--out", tmp_path / "result"),
    )
    assert program.wait() == 1
    (run,) = (tmp_path / "result").iterdir()
    (fault,) = _manifest(run)["faults"]
    assert "loop squeezenet1_1 exited with 2" in fault
    assert "nowhere.pt does not exist" in fault
    assert "Traceback" not in program.output()


def test_bad_input_ends_at_once(start: Start, tmp_path: Path) -> None:
    """Unknown models and data sets and a model that cannot be trained: exit 2 with a sentence, nothing made."""
    for arguments, sentence in (
        (("--models", "null", "resnet81"), 'did you mean "resnet18"'),
        (("--models", "null", "--with-train", "null"), 'model "null" cannot be trained'),
        (("--models", "null", "--data", "smaple"), 'did you mean "sample"'),
    ):
        program = start("multi_infer.py", *arguments, "--out", tmp_path / "result")
        assert program.wait() == 2
        assert sentence in program.output()
        assert "Traceback" not in program.output()
    assert not (tmp_path / "result").exists()
