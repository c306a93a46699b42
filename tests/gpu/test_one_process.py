"""Stream priorities and green contexts for real: one process on one GPU, measured as any run is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes.tools import SRC

from corun.errors import RunFault
from corun.registry import ModelOptions
from corun.serve.engine import CudaStages, load_engine
from corun.share.in_process import Lanes, make_lanes
from corun.train.options import TrainOptions
from corun.train.trainer import Trainer
from corun.wire.messages import Load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PRIORITY = {"kind": "priority", "service_priority": -5}
GREEN = {"kind": "green", "service_sms": 16}


def _lanes(asked: dict[str, Any]) -> Lanes:
    try:
        return make_lanes(torch, "cuda:0", asked)
    except RunFault as error:
        pytest.skip(str(error))


def _in_thread(work: Any) -> Any:
    """The result of `work` in a thread of its own."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("asked", [PRIORITY, GREEN], ids=["priority", "green"])
def test_an_engine_in_a_lane_computes_on_the_lanes_stream(asked: dict[str, Any]) -> None:
    """The engine takes the thread's stream, answers as it does outside a lane, and its stamps are in order."""
    lanes = _lanes(asked)

    def serve() -> tuple[bool, list[float]]:
        with lanes.service():
            engine = load_engine(Load("mobilenet_v3_small", {"image_size": 64}), ModelOptions(device="cuda"))
            stages = engine._device_stages
            assert isinstance(stages, CudaStages)
            same = stages._stream == torch.cuda.current_stream()
            return same and stages._stream != torch.cuda.default_stream(), engine.warm_up(3, 2)

    on_lane, taken = _in_thread(serve)
    assert on_lane
    assert len(taken) == 6


@pytest.mark.parametrize("asked", [PRIORITY, GREEN], ids=["priority", "green"])
def test_training_in_a_lane_makes_the_same_steps(asked: dict[str, Any]) -> None:
    """Losses in the trainer's lane are those of training outside: forward, backward and update are on one stream."""
    job = TrainOptions(
        "squeezenet1_1", data="digits", batch_size=8, image_size=32, count=32, device="cuda", lr=0.001, seed=3
    )

    def losses() -> list[float]:
        trainer = Trainer(job)
        return [trainer.step().loss for _ in range(4)]

    lanes = _lanes(asked)

    def inside() -> list[float]:
        with lanes.trainer():
            return losses()

    assert _in_thread(inside) == pytest.approx(_in_thread(losses), rel=1e-3)


def test_priorities_are_read_back() -> None:
    """The service's stream is of higher priority (a smaller number) than the trainer's."""
    in_force = make_lanes(torch, "cuda:0", PRIORITY).in_force
    assert in_force["service_priority"] < in_force["trainer_priority"] == 0


@pytest.mark.parametrize("policy", ["stream_priority", "green_context", "preempt+stream_priority"])
def test_a_run_under_an_in_process_policy(policy: str, tmp_path: Path) -> None:
    """All arms are measured in one process and the manifest has what the lanes report."""
    if policy == "green_context":
        _lanes(GREEN)
    image = {"image_size": 64, "device": "cuda"}
    sharing = {"policy": policy, **({"service_sms": 16} if policy == "green_context" else {})}
    config = {
        "train": [{"arch": "resnet18", "data": "digits", "batch_size": 16, "count": 64, **image}],
        "infer": [{"arch": "mobilenet_v3_small", "rate": 50, "count": 4, **image}],
        "duration_s": 3,
        "sharing": sharing,
        "calibrate": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = [sys.executable, str(SRC / "main.py"), "--config", str(tmp_path / "config.json"), "--no-report"]
    argv += ["--out", str(tmp_path / "result"), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=dict(os.environ), timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])["arms"]) == {"alone", "train", "corun"}
    (run,) = (tmp_path / "result").glob("*/manifest.json")
    manifest = json.loads(run.read_text())
    lanes = manifest["sharing"]["in_force"]["lanes"]
    assert set(lanes) >= ({"service_sms", "trainer_sms"} if policy == "green_context" else {"service_priority"})
    assert len({row["pid"] for row in manifest["processes"] if row["role"] in ("server", "trainer")}) == 1
