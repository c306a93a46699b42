"""What src/server.py does once its flags are read: in a process of its own, or in a thread beside a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from corun import registry
from corun.errors import InputError
from corun.registry import ModelOptions
from corun.run.serving import Serving
from corun.serve.engine import ServableEngine, load_engine
from corun.serve.follow import Follower, LoadEngine, followed
from corun.serve.generation import SubmittingEngine
from corun.serve.options import ServerOptions
from corun.serve.server import Observer, Server, StopRequest
from corun.serve.worker import Lane
from corun.wire import Address
from corun.wire.messages import Load


def build(
    serving: Serving,
    observer: Observer | None = None,
    lane: Lane | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Server:
    """The server of a command line, listening and not yet serving.

    lane: what the model thread is inside of from its first instruction to its last. facts: what HELLO says besides.
    Raises InputError: an unknown model, an address that cannot be had, an option that makes no sense.
    """
    initial_load(serving)
    placement = registry.ModelOptions(
        device=serving.device,
        precision=serving.precision,
        channels_last=serving.channels_last,
        compile=serving.compile,
    )
    options = ServerOptions(
        name=serving.label,
        address=Address.parse(serving.address) if serving.address else Address("tcp", serving.host, serving.port),
        queue_limit=serving.queue_limit,
        max_batch=serving.max_batch,
        max_delay_ns=round(serving.max_delay_ms * 1e6),
        deadline_ms=serving.deadline_ms,
        policy=serving.policy,
        warmup=serving.warmup,
        threads=serving.threads,
        out=serving.out,
        placement=placement,
        facts=dict(facts or {}),
    )
    make = followed(load_engine) if serving.follow else load_engine
    make = _in_lane(make) if lane else make
    return Server(
        options, lambda load: make(load, placement, serving.threads), observer=observer, lane=lane or nullcontext
    )


def initial_load(serving: Serving) -> Load | None:
    """The model it begins with; None when it waits for a LOAD."""
    options = serving.model_options
    return Load(registry.model(serving.model).name, options) if serving.model else None


def serve(server: Server, serving: Serving, stop: StopRequest) -> str:
    """Serve in the caller's thread until STOP or `stop`; one sentence about it. Raises as Server.serve does."""
    with Follower(server, serving.follow) if serving.follow else nullcontext():
        final = server.serve(initial_load(serving), stop).counts
    where = f"; rows in {serving.out}/infer_server/{server.options.name}.csv" if serving.out else ""
    return f"{server.options.name} stopped: {final.summary()}{where}"


def _in_lane(load: LoadEngine) -> LoadEngine:
    """The same loader, but InputError for an engine that computes in a thread of its own, outside the lane."""

    def load_in_lane(message: Load, placement: ModelOptions, threads: int) -> ServableEngine:
        engine = load(message, placement, threads)
        if isinstance(engine, SubmittingEngine):
            engine.close()
            raise InputError(
                f"{engine.info.model} computes in a thread of its own (continuous batching), which no lane holds; "
                "serve it without continuous batching or without stream_priority and green_context"
            )
        return engine

    return load_in_lane
