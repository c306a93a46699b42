"""Published weights taken up while serving: no request waits for a load, none is refused, none sees half a model.

    follower thread   look at the pointer (4 times a second) ─ read ─ sha256 ─ names, shapes ─ copies in place ─┐
    model thread      batch ─ batch ─ batch ─ batch ─ batch ─ batch ─ batch ─ batch ─ swap (pointers only) ─ batch

Whatever is wrong with a version (cut short, damaged, of another model, of other shapes) is an event `refused` with
the reason, and the weights in service stay. A pointer that was refused is tried again only once it changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from corun.clock import NS_PER_MS, now_ns
from corun.errors import InputError
from corun.registry import ModelOptions
from corun.serve.engine import ServableEngine
from corun.serve.queue import Task
from corun.serve.worker import Worker
from corun.weights import PUBLISH, ROLLBACK, Card, Pointer, Versions
from corun.wire.messages import Load

PERIOD_S = 0.25
EVENT_OF = {PUBLISH: "swap", ROLLBACK: "rollback"}

LoadEngine = Callable[[Load, ModelOptions, int], ServableEngine]


class Posts(Protocol):
    """Where work for the model thread goes: corun.serve.queue.RequestQueue."""

    def post(self, task: Task) -> None: ...


class Followed(Protocol):
    """The server as its follower sees it."""

    @property
    def queue(self) -> Posts: ...
    @property
    def worker(self) -> Worker: ...

    def event(self, kind: str, detail: str) -> None: ...

    def say(self, line: str) -> None: ...


def followed(load: LoadEngine) -> LoadEngine:
    """The same loader, but InputError for a model whose weights cannot be replaced."""

    def load_followed(message: Load, placement: ModelOptions, threads: int) -> ServableEngine:
        engine = load(message, placement, threads)
        engine.module()
        return engine

    return load_followed


class Follower:
    """Follows the pointer of one directory while a server serves; a context manager around `serve`."""

    def __init__(self, server: Followed, directory: Path, period_s: float = PERIOD_S) -> None:
        self._server = server
        self._versions = Versions(directory)
        self._period_s = period_s
        self._seen: object = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._ended.wait(self._period_s):
            engine = self._server.worker.engine
            state = (self._pointer_state(), id(engine))
            if isinstance(engine, ServableEngine) and state[0] and state != self._seen:
                self._seen = state
                self._look(engine)

    def _pointer_state(self) -> tuple[int, int] | None:
        """What changes when the pointer is replaced; None while there is none."""
        try:
            found = self._versions.pointer_path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _look(self, engine: ServableEngine) -> None:
        """Take up what the pointer names, or refuse it."""
        try:
            pointer = self._versions.current()
        except InputError as error:
            self._refuse("a pointer", error)
            return
        if pointer is None or pointer.version == engine.info.version:
            return
        try:
            self._take_up(engine, pointer)
        except InputError as error:
            self._refuse(f"version {pointer.version}", error)
        except (RuntimeError, MemoryError) as error:
            self._refuse(f"version {pointer.version}", InputError(f"there is no room for it: {error}"))

    def _take_up(self, engine: ServableEngine, pointer: Pointer) -> None:
        began = now_ns()
        card, state = self._versions.read(pointer.version)
        if card.model != engine.info.model:
            raise InputError(f"it is of {card.model}, this service has {engine.info.model}")
        read = now_ns()
        swap = engine.successor(state, f"sha256:{card.sha256[:12]} v{card.version:04d}", card.version)
        ready = now_ns()
        before = engine.info.version
        placed = self._between_batches(engine, swap)
        if placed is None:
            return
        detail = (
            f"version {card.version} after {'the loaded weights' if before is None else before}, {_quality(card)}: "
            f"read in {_ms(read - began)} ms, made ready in {_ms(ready - read)} ms, "
            f"waited {_ms(placed[0] - ready)} ms for a gap, in place in {_ms(placed[1] - placed[0])} ms"
        )
        self._server.event(EVENT_OF.get(pointer.why, "swap"), detail)

    def _between_batches(self, engine: ServableEngine, swap: Callable[[], None]) -> tuple[int, int] | None:
        """Run the swap on the model thread: (begun, done) in ns, None when the engine was replaced or all ends."""
        stamps: list[int] = []
        done = threading.Event()

        def task() -> None:
            if self._server.worker.engine is engine:
                stamps.append(now_ns())
                swap()
                stamps.append(now_ns())
            done.set()

        self._server.queue.post(task)
        while not done.wait(self._period_s):
            if self._ended.is_set():
                return None
        return (stamps[0], stamps[1]) if stamps else None

    def _refuse(self, what: str, error: InputError) -> None:
        reason = "; ".join([error.what, *error.problems])
        self._server.say(f"refused {what} of the published weights: {reason}")
        self._server.event("refused", f"{what}: {reason}")


def _quality(card: Card) -> str:
    if card.accuracy is None:
        return "accuracy not measured"
    return f"accuracy {card.accuracy:.3f} on {card.samples} labelled arrivals"


def _ms(ns: int) -> str:
    return f"{ns / NS_PER_MS:.2f}"
