"""The made-up runs that the report is tested with are shaped like measured ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.run.read import read
from corun.testing.runs import FakeRun, FakeService, FakeTrain, write_run, write_sweep
from corun.wire import STAMPS

SHORT = {"alone": 3.0, "train": 2.0, "corun": 3.0}


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**16), st.floats(1.0, 60.0), st.integers(1, 3))
def test_stamps_in_order(tmp_path_factory: pytest.TempPathFactory, seed: int, rate: float, repeat: int) -> None:
    """Stamps never run backwards, so the stages of every request sum to its sojourn."""
    fake = FakeRun((FakeService(rate=rate),), seed=seed, repeat=repeat, duration_s=SHORT)
    run = read(write_run(tmp_path_factory.mktemp("run"), fake))
    table = run.infer_client["resnet18"]
    order = ["t_intended_ns", "t_tx_start_ns", *(f"s_{name}_ns" for name in STAMPS), "t_rx_ns"]
    steps = np.diff(np.array([table[name] for name in order]), axis=0)
    assert (steps >= 0).all()
    assert np.allclose(steps.sum(axis=0) / 1e6, table["sojourn_ms"])


def test_arms_share_their_arrivals(tmp_path: Path) -> None:
    """The arms of one repeat send at the same instants of their windows; two repeats do not."""
    run = read(write_run(tmp_path / "run", FakeRun(repeat=2, duration_s=SHORT)))
    table = run.infer_client["resnet18"]

    def due(arm: str, repeat: int) -> list[int]:
        (window,) = run.select(arm, repeat)
        return (table["t_intended_ns"][table["segment"] == window.segment] - window.start_ns).tolist()

    assert due("alone", 0) == due("corun", 0)
    assert due("alone", 0) != due("alone", 1)


def test_same_seed_same_run(tmp_path: Path) -> None:
    """One seed, one run: every file but the manifest's name of the run is equal."""
    first, second = (write_run(tmp_path / name, FakeRun(duration_s=SHORT)) for name in ("a", "b"))
    for file in (path.relative_to(first) for path in first.rglob("*.csv")):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_killed_run(tmp_path: Path) -> None:
    """A run that was killed says it is running, and has the windows that were over."""
    run = read(write_run(tmp_path / "run", FakeRun(duration_s=SHORT, stop_after=1)))
    assert run.manifest["status"] == "running"
    assert run.arms == ("alone",)


def test_without_trainer_or_services(tmp_path: Path) -> None:
    """A run without training has only the alone arm, one without services only the train arm."""
    assert read(write_run(tmp_path / "a", FakeRun(train=None, duration_s=SHORT))).arms == ("alone",)
    assert read(write_run(tmp_path / "b", FakeRun(services=(), duration_s=SHORT))).arms == ("train",)


def test_sweep(tmp_path: Path) -> None:
    """A sweep has one complete run directory per cell and an index of them."""
    runs = [FakeRun(train=FakeTrain(batch_size=size), duration_s=SHORT) for size in (8, 16)]
    root = write_sweep(tmp_path / "sweep-1", runs)
    cells = [path for path in root.iterdir() if path.is_dir()]
    assert len(cells) == 2
    assert all(json.loads((cell / "manifest.json").read_text())["status"] == "complete" for cell in cells)
    assert (root / "index.csv").read_text().count("\n") == 3
