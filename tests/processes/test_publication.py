"""Weights published to a real server under load, and a whole run that shifts, retrains and publishes."""

from __future__ import annotations

import csv
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.processes.tools import Program, wait_until

from corun import registry
from corun.clock import now_ns
from corun.load.ring import first_class
from corun.registry import DataOptions, ModelOptions
from corun.weights import Versions
from corun.wire import Address, Kind, ReplyHeader, ReplyReader, Status, connect, pack_request
from corun.wire.channel import Channel
from corun.wire.messages import Stop

MODEL, SIZE, CLASSES = "squeezenet1_1", 32, 8
TIMEOUT_S = 180.0
GAP_S = 0.004

pytestmark = pytest.mark.slow


def always(answer: int) -> dict[str, torch.Tensor]:
    """Weights of a network that answers one class, whatever it sees."""
    torch.set_num_threads(1)
    trainable = registry.model(MODEL).train(ModelOptions(image_size=SIZE, num_classes=CLASSES))  # type: ignore[misc]
    state: dict[str, torch.Tensor] = trainable.module.state_dict()
    state["classifier.1.weight"].zero_()
    state["classifier.1.bias"].zero_()[answer] = 9.0
    return state


def rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Load:
    """One request after the other until told to end; every reply's status and first class, in order."""

    def __init__(self, address: Address) -> None:
        self.payload = registry.request_payloads("drift", DataOptions(image_size=SIZE, count=1))[0].data
        self.replies: list[tuple[int, int]] = []
        self.error: Exception | None = None
        self._address = address
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    @contextmanager
    def running(self) -> Iterator[Load]:
        self._thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            self._thread.join(TIMEOUT_S)

    def more(self) -> None:
        """Wait for twenty replies that had not come yet."""
        count = len(self.replies)
        wait_until(lambda: self.error or len(self.replies) >= count + 20, TIMEOUT_S)
        assert self.error is None

    def _run(self) -> None:
        try:
            sock, reader = connect(self._address, TIMEOUT_S), ReplyReader()
            sock.settimeout(TIMEOUT_S)
            while not self._ended.is_set():
                now = now_ns()
                number = len(self.replies)
                sock.sendall(pack_request(Kind.INFER, 1, number, len(self.payload), now, now) + self.payload)
                frames: list[Any] = []
                while not frames:
                    frames = reader.receive(sock)
                header = frames[0].header
                assert isinstance(header, ReplyHeader)
                self.replies.append((header.status, first_class(frames[0].payload)))
                time.sleep(GAP_S)
            sock.close()
        except Exception as error:  # noqa: BLE001 - shown by the test
            self.error = error


@pytest.fixture
def service(start: Callable[..., Program], free_port: Callable[[], int], tmp_path: Path) -> tuple[Program, Address]:
    """A server that follows <tmp_path>/weights."""
    address = Address("tcp", "127.0.0.1", free_port())
    flags = ["--model", MODEL, "--image-size", SIZE, "--num-classes", CLASSES, "--device", "cpu", "--warmup", 1]
    flags += ["--address", address, "--name", "service", "--out", tmp_path / "out", "--follow", tmp_path / "weights"]
    program = start("server.py", *flags)
    wait_until(lambda: "ready on" in program.output() or program.popen.poll() is not None, TIMEOUT_S)
    assert program.popen.poll() is None, program.output()
    return program, address


def events(out: Path, *kinds: str) -> list[dict[str, str]]:
    return [row for row in rows(out / "events.csv") if row["kind"] in kinds]


def test_publications_under_load(service: tuple[Program, Address], tmp_path: Path) -> None:
    """No reply is an error; answers follow the published versions in order, go back only at the roll-back, and a
    truncated version changes nothing."""
    program, address = service
    versions, out = Versions(tmp_path / "weights"), tmp_path / "out"
    spoilt = Versions(tmp_path / "spoilt")
    load = Load(address)

    def until(count: int) -> None:
        wait_until(lambda: load.error or len(events(out, "swap", "rollback", "refused")) >= count, TIMEOUT_S)
        load.more()

    with load.running():
        load.more()
        versions.publish(always(1), MODEL, 10)
        until(1)
        versions.publish(always(2), MODEL, 20)
        until(2)
        for _ in range(3):
            spoilt.publish(always(3), MODEL, 30)
        shutil.copy(spoilt.card_path(3), versions.directory)
        versions.tensors_path(3).write_bytes(spoilt.tensors_path(3).read_bytes()[:100_000])
        shutil.copy(spoilt.pointer_path, versions.directory / "draft")
        (versions.directory / "draft").replace(versions.pointer_path)
        until(3)
        versions.roll_back(1)
        until(4)
    channel = Channel(connect(address, TIMEOUT_S))
    channel.request(Stop("test"), TIMEOUT_S)
    channel.close()
    assert program.wait() == 0, program.output()
    assert load.error is None
    assert {status for status, _ in load.replies} == {Status.OK}
    answers = [answer for _, answer in load.replies]
    served = [int(row["weights_version"] or 0) for row in rows(out / "infer_server" / "service.csv")]
    assert len(served) == len(answers)
    assert all(version in (0, answer) for version, answer in zip(served, answers, strict=True))
    changes = [version for before, version in zip([None, *served], served, strict=False) if version != before]
    assert changes == [0, 1, 2, 1]
    kinds = [row["kind"] for row in events(out, "swap", "rollback", "refused")]
    assert kinds == ["swap", "swap", "refused", "rollback"]
    assert "cut short" in events(out, "refused")[0]["detail"]
    assert "in place in" in events(out, "swap")[0]["detail"]


def test_a_model_without_weights_cannot_follow(start: Callable[..., Program], tmp_path: Path) -> None:
    """It is a clear error at the start, not a silent service that never changes."""
    program = start("server.py", "--model", "null", "--port", 0, "--follow", tmp_path)
    assert program.wait() == 2
    assert "null cannot follow published weights" in program.output()
    assert "Traceback" not in program.output()


def test_a_run_that_shifts_retrains_and_publishes(
    start: Callable[..., Program], free_port: Callable[[], int], tmp_path: Path
) -> None:
    """main.py: requests are labelled and shift at their second, versions reach the service, accuracy is in the run."""
    torch.save(always(0), tmp_path / "start.pt")
    both = {
        "arch": MODEL,
        "data": "drift",
        "image_size": SIZE,
        "weights": str(tmp_path / "start.pt"),
        "device": "cpu",
    }
    publish = {"every_s": 0.5, "label_delay_s": 0.2, "least": 8, "samples": 16, "gain": 0}
    config = {
        "train": [{**both, "batch_size": 8, "lr": 0.005, "count": 64, "publish": publish}],
        "infer": [{**both, "name": "service", "rate": 25}],
        "arms": ["corun"],
        "duration_s": 10,
        "drift": {"shift_at_s": 5, "corruption": "contrast", "class_mix": {"after": [0, 1, 0, 0, 0, 0, 0, 0]}},
        "port": free_port(),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--config", tmp_path / "config.json", "--out", tmp_path / "result", "--no-calibrate", "--no-report"]
    program = start("main.py", *flags)
    assert program.wait() == 0, program.output()
    (run,) = (tmp_path / "result").iterdir()
    asked = rows(run / "infer_client" / "service.csv")
    begin = int(json.loads((run / "manifest.json").read_text())["segments"][0]["start_ns"])
    shifted = ["shifted" in row["file_name"] for row in asked]
    assert shifted == [int(row["t_intended_ns"]) - begin >= 5 * 10**9 for row in asked]
    assert {row["label"] for row, moved in zip(asked, shifted, strict=True) if moved} == {"1"}
    assert {row["status"] for row in asked} == {"OK"}
    assert events(run, "publish")
    assert events(run, "swap")
    assert not events(run, "refused")
    seconds = rows(run / "accuracy.csv")
    right = [row["label"] == row["answer"] for row in asked]
    assert sum(int(row["n"]) for row in seconds) == len(asked)
    assert sum(int(row["correct"]) for row in seconds) == sum(right)
    assert np.isclose(float(seconds[0]["accuracy"]), int(seconds[0]["correct"]) / int(seconds[0]["n"]))
    assert any(row["weights_version"] for row in seconds)
    assert "accuracy of service" in program.output()
