"""A training job beside the pipeline: the trainer of the harness, let run and held in turns.

Held with SIGSTOP and let go with SIGCONT, so that loads with and without training alternate on the same processes; a
GPU's queue would still empty itself after SIGSTOP, which the wait in `held` is for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from corun import registry
from corun.clock import NS_PER_S, now_ns
from corun.errors import InputError, RunFault
from corun.process import die_with_parent, thread_environment
from corun.run.read import read_table
from corun.run.records import TRAIN

MADE = ("synthetic", "pairs", "text", "sample")
START_S = 180.0
SETTLE_S = 0.2


def _data(model: str) -> str:
    """The first made data set the model can learn from; InputError when there is none."""
    task = registry.model(model).task
    fitting = [name for name in MADE if task in registry.dataset(name).tasks]
    if not fitting:
        raise InputError(f"no made data set trains {model} ({task}); measure it with src/main.py instead")
    return fitting[0]


class Trainer:
    """`python -m corun.train` of one model on made data, held until `running`; close() ends it."""

    def __init__(self, model: str, batch_size: int, threads: int = 1) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="corun-beside-")
        self._rows = Path(self._folder.name) / "train.csv"
        self._log = open(Path(self._folder.name) / "log.txt", "w+")  # noqa: SIM115 - closed by close()
        argv = [sys.executable, "-m", "corun.train", "--model", model, "--data", _data(model), "--epochs", "0"]
        argv += ["--batch-size", str(batch_size), "--threads", str(threads), "--out", self._folder.name]
        self._process = subprocess.Popen(
            argv,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **thread_environment(threads), "PYTHONPATH": str(Path(__file__).parents[2])},
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
        self._wait_for_first_step()
        self._process.send_signal(signal.SIGSTOP)

    def _wait_for_first_step(self) -> None:
        give_up = time.monotonic() + START_S
        while not (self._rows.exists() and len(read_table(self._rows, TRAIN)["step"])):
            if self._process.poll() is not None or time.monotonic() > give_up:
                said = Path(self._log.name).read_text(encoding="utf-8", errors="replace").strip()
                self.close()
                raise RunFault(f"the training job made no step: {said[-300:] or f'waited {START_S:g} s'}")
            time.sleep(0.05)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let it train inside the block."""
        self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGSTOP)
            time.sleep(SETTLE_S)

    def steps_per_s(self, start_ns: int, stop_ns: int) -> float:
        """Optimiser steps a second between two instants; a step across a border counts by the part inside."""
        rows = read_table(self._rows, TRAIN)
        begin, end = rows["t_start_ns"], rows["t_end_ns"]
        inside = (end.clip(start_ns, stop_ns) - begin.clip(start_ns, stop_ns)) / (end - begin).clip(1)
        return float(inside.sum()) * NS_PER_S / max(1, stop_ns - start_ns)

    def alone(self, seconds: float) -> float:
        """Steps a second with nothing beside it."""
        with self.running():
            start_ns = now_ns()
            time.sleep(seconds)
            stop_ns = now_ns()
        return self.steps_per_s(start_ns, stop_ns)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
