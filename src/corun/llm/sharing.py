"""Where the learner runs beside the server, and what the two share.

    process   a child process over the same base: a mapped file on the CPU, CUDA IPC on a GPU       the default
    thread    a thread of the server's process, on its own CUDA stream                         labelled: see below
    none      a child process with a copy of the base: the control of what sharing saves

In every mode the learner computes the losses it has alone, and the server the tokens it has alone: they share
read-only tensors only. In `thread` mode both sides also share the interpreter's lock, which alone can double the
time per token; numbers of that mode carry the label and say nothing about the hardware.

The learner obeys one request at a time, between two of its steps: train n steps, report, adapter, save, stop.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from corun.errors import CorunError, InputError, RunFault, suggest
from corun.llm.adapters import AdapterOptions
from corun.llm.base import SharedBase, copied
from corun.llm.engine import own_stream
from corun.llm.learn import Example, Learner, LearnOptions, LearnStep, new_learner
from corun.process import die_with_parent

PROCESS, THREAD, NONE = "process", "thread", "none"
MODES = (PROCESS, THREAD, NONE)
THREAD_LABEL = "thread mode: serving and training share one interpreter lock; times per token include waiting for it"
POLL_S = 0.01
JOIN_S = 10.0


@dataclass(frozen=True)
class Job:
    """Everything a learner is made from; travels to a child process."""

    examples: Sequence[Example]
    options: LearnOptions = field(default_factory=LearnOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    path: Path | None = None
    resume: Path | None = None
    threads: int = 1


def make_learner(base: Any, job: Job) -> Learner:
    """The learner of a job on a tree of its own."""
    learner = new_learner(base, job.examples, job.options, job.path, job.adapter, job.threads)
    if job.resume is not None:
        learner.resume(job.resume)
    return learner


class LearnerHandle:
    """A learner that trains in the background; every method may be called while it does.

    label: what has to be said beside numbers measured with it ("" = nothing). pid: of the process it runs in.
    Methods raise RunFault when the learner has failed or died.
    """

    def __init__(
        self, connection: Connection, alive: Callable[[], bool], join: Callable[[], None], label: str = ""
    ) -> None:
        self.label = label
        self._connection = connection
        self._alive = alive
        self._join = join
        self._lock = threading.Lock()
        self.pid: int = self._ask("pid")

    def train(self, steps: int) -> None:
        """Make `steps` more optimiser steps; returns at once."""
        self._ask("train", steps)

    def add(self, examples: Sequence[Example]) -> None:
        """More examples, between two of its steps."""
        self._ask("add", list(examples))

    def report(self) -> list[LearnStep]:
        """Every step made since it started."""
        steps: list[LearnStep] = self._ask("report")
        return steps

    def busy(self) -> bool:
        """Whether it has steps left to make."""
        return bool(self._ask("todo"))

    def wait(self, timeout_s: float = 3600.0) -> list[LearnStep]:
        """Block until it has made every step it was told to; all steps so far."""
        until = time.monotonic() + timeout_s
        while self.busy():
            if time.monotonic() > until:
                raise RunFault(f"the learner did not finish within {timeout_s} s")
            time.sleep(POLL_S)
        return self.report()

    def adapter(self) -> dict[str, Any]:
        """The adapter as it is between two steps, for `Engine.publish`."""
        from safetensors.torch import load

        tensors: dict[str, Any] = load(self._ask("adapter"))
        return tensors

    def save_adapter(self, path: Path) -> None:
        """The adapter in peft's format."""
        self._ask("save_adapter", path)

    def save(self, path: Path) -> None:
        """Checkpoint."""
        self._ask("save", path)

    def stop(self) -> None:
        """End it after the step it is in; does nothing when it has ended."""
        if self._alive():
            try:
                self._ask("stop")
            except RunFault:
                return
        self._join()

    def _ask(self, what: str, *arguments: Any) -> Any:
        with self._lock:
            try:
                self._connection.send((what, *arguments))
                while not self._connection.poll(1.0):
                    if not self._alive() and not self._connection.poll(0):
                        raise RunFault("the learner died")
                answer = self._connection.recv()
            except (EOFError, OSError) as error:
                raise RunFault("the learner died") from error
        if isinstance(answer, CorunError):
            raise answer
        if isinstance(answer, Exception):
            raise RunFault(f"the learner failed: {answer!r}") from answer
        return answer


def start_learner(shared: SharedBase | None, base: Any, job: Job, mode: str = PROCESS) -> LearnerHandle:
    """A learner beside the server, in one of MODES; `base` is the server's own opened base.

    shared: how another process gets the base; None will do for `thread`.

    Returns once it is ready to train. Raises InputError for an unknown mode or a job that cannot be trained.
    """
    if mode not in MODES:
        raise InputError(f'sharing mode "{mode}" is not one of {", ".join(MODES)}{suggest(mode, MODES)}')
    if mode == THREAD:
        return _in_thread(base, job)
    if shared is None:
        raise InputError(f"sharing mode {mode} needs a shared base: corun.llm.base.share")
    return _in_process(shared, job, mode == NONE)


def _in_thread(base: Any, job: Job) -> LearnerHandle:
    ours, theirs = Pipe()
    learner = make_learner(base, job)  # before any thread: new weights draw from the process's random state
    thread = threading.Thread(
        target=_obey_in_thread, args=(learner, theirs, job.threads), name="learner", daemon=True
    )
    thread.start()
    return LearnerHandle(ours, thread.is_alive, lambda: thread.join(JOIN_S), THREAD_LABEL)


def _obey_in_thread(learner: Learner, connection: Connection, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    with own_stream(learner.device):
        obey(learner, connection)


def _in_process(shared: SharedBase, job: Job, own_copy: bool) -> LearnerHandle:
    from torch.multiprocessing import get_context

    ours, theirs = Pipe()
    child = get_context("spawn").Process(
        target=_child, args=(shared, job, own_copy, theirs, os.getpid()), name="learner", daemon=True
    )
    child.start()
    theirs.close()
    return LearnerHandle(ours, child.is_alive, lambda: _reap(child))


def _reap(child: Any) -> None:
    child.join(JOIN_S)
    if child.is_alive():
        child.kill()
        child.join()


def _child(shared: SharedBase, job: Job, own_copy: bool, connection: Connection, parent: int) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer: it stops the learner
    try:
        base = shared.open()
        learner = make_learner(copied(base) if own_copy else base, job)
        del base
    except Exception as error:  # noqa: BLE001 - top of the process: the parent gets the reason at its first question
        connection.recv()
        connection.send(_portable(error))
        return
    with own_stream(learner.device):
        obey(learner, connection)


def obey(learner: Learner, connection: Connection) -> None:
    """The learner's loop: train while there are steps to do, answer between two of them; ends on stop or a hang-up."""
    steps: list[LearnStep] = []
    todo = 0
    failure: Exception | None = None
    while True:
        while todo == 0 or connection.poll(0):
            try:
                what, *arguments = connection.recv()
            except EOFError:
                return
            if what == "train":
                todo += arguments[0]
            connection.send(failure or _answer(learner, what, arguments, steps, todo))
            if what == "stop":
                return
        try:
            steps.append(learner.step())
            todo -= 1
        except Exception as error:  # noqa: BLE001 - top of the thread: every later question gets the reason
            failure, todo = _portable(error), 0


def _answer(learner: Learner, what: str, arguments: Sequence[Any], steps: list[LearnStep], todo: int) -> Any:
    from safetensors.torch import save

    try:
        match what:
            case "pid":
                return os.getpid()
            case "todo":
                return todo
            case "report":
                return list(steps)
            case "adapter":
                return save(learner.adapter())
            case "add":
                learner.add(*arguments)
            case "save_adapter":
                learner.save_adapter(*arguments)
            case "save":
                learner.save(*arguments)
    except CorunError as error:
        return _portable(error)
    return None


def _portable(error: Exception) -> Exception:
    """An exception that can be sent: InputError keeps its kind and problems, others their text."""
    if isinstance(error, InputError):
        return InputError(error.what, error.problems)
    return RunFault(f"{type(error).__name__}: {error}")


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A directory for a stored base, in memory where the machine has /dev/shm, else on disk."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="corun-", dir=memory if os.access(memory, os.W_OK) else None)
