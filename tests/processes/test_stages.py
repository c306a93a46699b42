"""The stages of a request, stamped by two processes, are its latency: nothing is missing and nothing counted twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.processes.tools import SRC, PortBlocks

from corun.report.stages import NAMES, STAGES, stage_ms
from corun.run.read import Table, read, select
from corun.wire import STAMPS

TOLERANCE_MS = 0.010
NULL = {"arch": "null", "image_size": 32, "count": 4}
SERVICES = [
    {**NULL, "name": "plain", "rate": 120},
    {**NULL, "name": "batched", "rate": 150, "max_batch": 4, "max_delay_ms": 4},
    {**NULL, "name": "slow", "rate": 60, "extra": {"service_ms": 3}},
    {**NULL, "name": "one-at-a-time", "rate": 60, "mode": "paced"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four null services on one host, one run: alone, batched, with a service time, with one request in flight."""
    folder = tmp_path_factory.mktemp("stages")
    command = [sys.executable, str(SRC / "main.py"), "--config", str(folder / "config.json"), "--quiet"]
    with PortBlocks() as ports:
        config = {"infer": [SERVICES], "duration_s": 3, "port": ports.take(len(SERVICES)), "calibrate": False}
        (folder / "config.json").write_text(json.dumps(config))
        done = subprocess.run(
            [*command, "--out", str(folder / "result")], capture_output=True, text=True, timeout=500, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (entry for entry in (folder / "result").iterdir() if entry.is_dir())
    return path


def _answered(path: Path, service: str) -> Table:
    table = read(path).infer_client[service]
    answered = select(table, table["status"] == "OK")
    assert len(answered["id"]) == len(table["id"]) > 100
    return answered


def test_stages_sum_to_the_sojourn(run: Path) -> None:
    """On one clock the eleven stages of each request add up to its sojourn within 10 us at p99, none below zero."""
    for service in (str(entry["name"]) for entry in SERVICES):
        rows = _answered(run, service)
        for name in STAMPS:
            assert (rows[f"s_{name}_ns"] > 0).all(), f"{service}: {name} was not stamped"
        lengths = np.array([(rows[end] - rows[begin]) / 1e6 for _, begin, end in STAGES])
        for name, length in zip(NAMES, lengths, strict=True):
            assert length.min() >= 0, f"{service}: {name} runs backwards"
        error = np.abs(lengths.sum(axis=0) - rows["sojourn_ms"])
        assert np.quantile(error, 0.99, method="higher") <= TOLERANCE_MS
        shown = np.abs(stage_ms(rows).sum(axis=1) - rows["sojourn_ms"])
        assert np.quantile(shown, 0.99, method="higher") <= TOLERANCE_MS
        assert np.allclose(rows["sojourn_ms"], rows["slip_ms"] + rows["response_ms"], atol=1e-5)


def test_each_stage_holds_its_own_time(run: Path) -> None:
    """A service time is device time, a batch delay is batch wait, a request held back at the client is client queue."""
    stages = {str(entry["name"]): stage_ms(_answered(run, str(entry["name"]))) for entry in SERVICES}
    device, wait = NAMES.index("device"), NAMES.index("batch wait")
    assert stages["slow"][:, device].min() >= 3.0 > np.quantile(stages["plain"][:, device], 0.1)
    assert np.quantile(stages["batched"][:, wait], 0.9) > 1.0 > np.quantile(stages["plain"][:, wait], 0.1)
    rows = _answered(run, "one-at-a-time")
    late = rows["t_tx_start_ns"] - rows["t_intended_ns"]
    assert np.allclose(stage_ms(rows)[:, NAMES.index("client queue")], late / 1e6)


def test_client_and_server_tell_the_same_story(run: Path) -> None:
    """The server's own rows hold the stamps that came back in the replies, request by request."""
    for service in (str(entry["name"]) for entry in SERVICES):
        client, server = _answered(run, service), read(run).infer_server[service]
        mine, theirs = np.argsort(client["id"]), np.argsort(server["id"])
        assert (client["id"][mine] == server["id"][theirs]).all()
        for name in STAMPS:
            assert (client[f"s_{name}_ns"][mine] == server[f"s_{name}_ns"][theirs]).all()
