"""The pipeline's programs: serve and load over real sockets, the files they leave, simulate, compare."""

from __future__ import annotations

import csv
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.processes.tools import Program, wait_until

from corun.ectrans import build, parts
from corun.ectrans.compare import RATIOS
from corun.ectrans.outputs import PACKAGES, PROFILE, REQUESTS

Start = Callable[..., Program]

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, split; its answers are as long as they may be."""
    directory = tmp_path_factory.mktemp("ectrans")
    return parts.split(build.prepare("tiny", None, 300, directory / "model"), directory / "parts")


def rows(path: Path) -> list[dict[str, str]]:
    """A CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def last(program: Program) -> Any:
    """The JSON object a program ends with."""
    assert program.wait(500) == 0, program.output()
    return json.loads(program.output().strip().splitlines()[-1])


def test_serve_and_load(start: Start, split: Path, tmp_path: Path) -> None:
    """Every request and package has its row in the documented columns; SIGTERM ends the server with a summary."""
    out = tmp_path / "run"
    server = start(
        "ectrans.py", "serve", "--parts", split, "--port", 0, "--max-new", 6, "--max-items", 8, "--out", out
    )

    def shown() -> re.Match[str] | None:
        assert server.popen.poll() is None, server.output()
        return re.search(r"ready on 127\.0\.0\.1:(\d+),", server.output())

    port = wait_until(shown)[1]
    body = last(start("ectrans.py", "load", "--port", port, "--mix", "4x3,1x20", "--gap-ms", 1))
    assert body["requests"] == {"OK": 5}
    assert body["sentences"] == body["server"]["sentences"] == 32
    poisson = ("--poisson", "--rate", 40, "--duration", 0.2, "--sizes", "1:.5,3:.5")
    assert last(start("ectrans.py", "load", "--port", port, *poisson, "--clients", 2))["requests"] == {"OK": 8}
    server.signal(signal.SIGTERM)
    summary = last(server)
    assert json.loads((out / "summary.json").read_text())["config"]["model"]["decoder"] == "continuous"
    assert summary["waiting"] == 0
    requests, packages = rows(out / "requests.csv"), rows(out / "packages.csv")
    assert (tuple(requests[0]), tuple(packages[0])) == (REQUESTS, PACKAGES)
    assert tuple(rows(out / "profile.csv")[0]) == PROFILE
    assert len(requests) == 13
    for row in requests:
        order = [int(row[name]) for name in REQUESTS[5:12]]
        assert order == sorted(order)
        assert row["status"] == "OK"
    assert sum(int(row["n"]) for row in packages) == sum(int(row["n"]) for row in requests)
    assert all(int(row["n"]) <= 8 and int(row["padded"]) == int(row["n"]) * int(row["Lmax"]) for row in packages)


def test_simulate_needs_no_model(start: Start) -> None:
    """The published mix in virtual time, its golden mean as JSON; a wrong policy is one sentence."""
    body = last(start("ectrans.py", "simulate", "--policy", "fcfs,hrrn", "--packing", "count"))
    assert (body["fcfs, count"]["mean_s"], body["hrrn, count"]["mean_s"]) == (67.173, 37.008)
    wrong = start("ectrans.py", "simulate", "--policy", "fcs")
    assert wrong.wait() == 2
    assert 'did you mean "fcfs"' in wrong.output()


def test_compare_writes_ratios(start: Start, split: Path, tmp_path: Path) -> None:
    """Two conditions of a file, in turns: ratios.csv has a row for each metric in the documented columns."""
    matrix = tmp_path / "matrix.json"
    conditions = [{"name": "eights", "batch": 8}, {"name": "packed", "packing": "count", "batch": 16}]
    matrix.write_text(json.dumps({"mix": "2x8", "conditions": conditions}))
    options = ("--parts", split, "--repeats", 2, "--out", tmp_path, "--max-new", 4)
    body = last(start("ectrans.py", "compare", matrix, *options))
    written = rows(tmp_path / "ratios.csv")
    assert tuple(written[0]) == RATIOS
    assert [row["metric"] for row in written] == ["total_s", "p50_ms"]
    assert body["ratios"][0]["n"] == 2


def test_training_beside_the_pipeline_is_compared_in_turns(start: Start, split: Path, tmp_path: Path) -> None:
    """corun gives latency with over without training, and the training's own speed; without a job it is refused."""
    options = ("--parts", split, "--repeats", 2, "--sentences", 16, "--max-new", 4, "--out", tmp_path)
    job = ("--with-train", "squeezenet1_1", "--train-batch-size", 2)
    body = last(start("ectrans.py", "compare", "corun", *options, *job))
    found = {(one["a"], one["metric"]): one for one in body["ratios"]}
    speeds = [one for (_, metric), one in found.items() if metric == "steps/s"]
    assert len(speeds) == 3
    assert all(one["median"] >= 0 and one["n"] == 2 for one in speeds)
    assert found["pipeline, training", "total_s"]["median"] > 0
    refused = start("ectrans.py", "compare", "corun", *options)
    assert refused.wait() == 2
    assert "--with-train" in refused.output()
