"""How a server runs: everything but the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corun.registry import ModelOptions
from corun.serve.connection import BACKLOG_LIMIT
from corun.wire import Address

SWITCH_INTERVAL_S = 0.0005


@dataclass(frozen=True)
class ServerOptions:
    """How a server runs.

    queue_limit: requests that may wait; more are answered REJECTED. max_batch, max_delay_ns: see Batcher.
    warmup: examples run after each load. out: directory for infer_server/<name>.csv and events.csv, None = no
    files. placement: device, precision and layout of models whose LOAD does not say. threads: intra-op threads.
    switch_interval_s: how long one of the two threads may keep the interpreter from the other.
    deadline_ms: for requests that bring none of their own, from their intended send time; 0 = none.
    finish_s: how long a stopping server waits for what is being computed and for clients to take their replies.
    facts: what HELLO says besides, e.g. with whom it shares its process.
    """

    name: str = "server"
    address: Address = field(default_factory=lambda: Address("tcp", "127.0.0.1", 54100))
    queue_limit: int = 1024
    max_batch: int = 1
    max_delay_ns: int = 0
    policy: str = "fifo"
    warmup: int = 3
    threads: int = 1
    out: Path | None = None
    placement: ModelOptions = field(default_factory=ModelOptions)
    backlog_limit: int = BACKLOG_LIMIT
    switch_interval_s: float = SWITCH_INTERVAL_S
    finish_s: float = 10.0
    deadline_ms: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
