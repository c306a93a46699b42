"""A translation server in a thread of the test, and what its answers must be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from corun.ectrans import client, mixes, translate, wire
from corun.ectrans.engines import Model
from corun.ectrans.executors import Shape
from corun.ectrans.scheduler import Rules
from corun.ectrans.service import Service, ServiceOptions
from corun.serve.packing import Limits
from corun.wire import Address, Status

RULES = Rules("hrrn", "cost", Limits(max_items=8), batch_threshold=16)
READY_S = 100.0


@contextmanager
def serving(
    parts: Path, executor: str = "streams", decoder: str = "static", workers: int = 1, **changes: Any
) -> Iterator[tuple[Service, client.Admin]]:
    """A server that has loaded; `changes` are fields of Model, Rules, Shape or ServiceOptions."""
    sent = changes.get("partition", wire.TEXT)

    def taken(default: Any) -> Any:
        names = [name for name in changes if name in default.__dataclass_fields__]
        return replace(default, **{name: changes.pop(name) for name in names})

    model = taken(Model(parts, decoder, slots=8))
    rules, shape = taken(RULES), taken(Shape(executor, workers, max_items=8, start="forkserver"))
    options = ServiceOptions(model, shape, rules, Address("tcp", "127.0.0.1", 0), sent, **changes)
    service = Service(options, lambda line: None)
    thread = threading.Thread(target=service.serve)
    thread.start()
    admin = client.Admin(service.address, READY_S)
    try:
        admin.drain(READY_S)
        yield service, admin
    finally:
        admin.stop()
        thread.join(READY_S)


def ragged(
    texts: Sequence[str], make: Callable[[Sequence[str]], wire.Sentences] | None = None
) -> list[client.Request]:
    """Seven clients at once with requests of different sizes, one of several packages."""
    arrivals = mixes.mix([3, 20, 1, 8, 5, 2, 7], gap_ms=1.0)
    return client.requests_of(arrivals, texts, make or client.maker("text", None))


def reference(parts: Path, texts: Sequence[str]) -> dict[str, str]:
    """Every sentence translated by itself."""
    translator = translate.load(parts)
    return {text: translator.translate([text])[0] for text in set(texts)}


def answered(replies: Sequence[client.Reply]) -> list[tuple[str, ...]]:
    """The answers of replies that are all OK."""
    assert [(reply.status, reply.detail) for reply in replies] == [(Status.OK, "")] * len(replies)
    return [reply.answers for reply in replies]


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for something that must come."""
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.01)
