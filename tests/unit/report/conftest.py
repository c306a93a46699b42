"""Runs made once for all tests of the report; tests that write into one make their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from corun.report.summary import Summary, summarise
from corun.run.read import Run, read
from corun.testing.runs import FakeRun, FakeService, write_run

SHORT = {"alone": 4.0, "train": 2.0, "corun": 4.0}


@pytest.fixture(scope="session")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One repeat of two services beside training on a GPU, long enough for p99 of the first."""
    services = (FakeService("resnet18", rate=180, service_ms=2.0), FakeService("yolov5n", rate=20, lost_share=0.05))
    return write_run(tmp_path_factory.mktemp("one") / "run", FakeRun(services, gpu=True, duration_s=SHORT))


@pytest.fixture(scope="session")
def run(run_path: Path) -> Run:
    return read(run_path)


@pytest.fixture(scope="session")
def summary(run_path: Path) -> Summary:
    return summarise(run_path)


@pytest.fixture(scope="session")
def repeated_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five repeats of one service beside training."""
    fake = FakeRun((FakeService(rate=180, service_ms=2.0),), repeat=5, noise=0.05, duration_s=SHORT)
    return write_run(tmp_path_factory.mktemp("five") / "run", fake)
