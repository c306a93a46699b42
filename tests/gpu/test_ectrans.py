"""The pipeline on a GPU: the same answers under every executor and decoder, and memory of each process by NVML."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.ectrans.serving import answered, ragged, reference, serving

from corun.ectrans import client, parts, training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TEXTS = training.tiny_sentences(23)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tiny model, split."""
    directory = tmp_path_factory.mktemp("gpu")
    return parts.split(training.trained_tiny(directory), directory / "parts")


@pytest.mark.parametrize("decoder", ["static", "continuous"])
@pytest.mark.parametrize(("executor", "workers"), [("multiprocess", 2), ("pipeline", 1), ("streams", 1)])
def test_every_executor_gives_the_reference_on_a_gpu(split: Path, executor: str, workers: int, decoder: str) -> None:
    """What the CPU answers sentence by sentence, the GPU answers in packages, through CUDA IPC and streams too."""
    expected, requests = reference(split, TEXTS), ragged(TEXTS)
    with serving(split, executor, decoder, workers, device="cuda", start="spawn") as (service, admin):
        got = answered(client.drive(service.address, requests, timeout_s=120))
        tally = admin.drain()
    assert got == [tuple(expected[text] for text in request.sentences.texts) for request in requests]
    assert tally["processes"] >= 1


def test_each_process_has_its_gpu_memory(split: Path) -> None:
    """NVML lists every worker of a running pipeline with the memory it holds, where the driver tells per process."""
    import os

    import pynvml

    with serving(split, "pipeline", "static", device="cuda", start="spawn") as (service, _):
        pynvml.nvmlInit()
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
        held = {process.pid: process.usedGpuMemory for process in running}
        workers = service.executor.pids()
    if not held.keys() & {*workers, os.getpid()}:
        pytest.skip("the driver does not list this container's processes")
    assert set(workers) <= set(held)
