"""A run whose requests shift and whose trainer publishes: what the processes are told, derived from the configuration.

    "drift"           the shift's second ─ schedule ─▶ number of its first request ─▶ drift.json, read by client and trainer
    "publish"         weights/ of the run ◀─ trainer;   ─▶ every service of the same model follows it

The schedule decides the number of requests, and the k-th of them carries the k-th payload: client and trainer agree on
every picture without a word between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from corun import registry
from corun.clock import NS_PER_S
from corun.errors import InputError
from corun.launch.segments import make_schedule, plan
from corun.run.config import Pair, Service, Train
from corun.run.directory import RunDirectory, write_json

DATA = "drift"
SPECIFICATION = "drift.json"
WEIGHTS = "weights"


def shifting(service: Service) -> bool:
    """Whether the service is asked the data set that shifts."""
    return service.data == DATA


def problems(pair: Pair) -> Iterator[str]:
    """Everything that keeps this cell's drift and publication from being run, in sentences."""
    drift, train, config = pair.config.drift, pair.train, pair.config
    if drift is None:
        if train and train.publish:
            yield 'train: publish validates on labelled requests: give "drift" and services with "data": "drift"'
        return
    asked = [service for service in pair.services if shifting(service)]
    if not config.launch.local:
        yield "drift: service, client and trainer share files of the run directory: run them on one machine"
    if len(asked) != 1:
        yield f'drift: one service at a time can be asked "data": "drift", not {len(asked)}'
    if len(pair.arms) != 1 or config.repeat != 1 or pair.arms == ("train",):
        yield 'drift: the distribution shifts once, in one window: "arms": ["corun"] or ["alone"], and "repeat": 1'
    elif drift.shift_at_s >= config.duration(pair.arms[0]):
        yield f"drift: shift_at_s {drift.shift_at_s:g} is not before the window's end, {config.duration(pair.arms[0]):g} s"
    for service in asked:
        if service.mode != "open":
            yield f'drift: {service.label} is asked in mode "{service.mode}"; only "open" has instants to shift at'
    try:
        _drift_of({**drift.shift, "shift_at": 0})
    except InputError as error:
        yield from (f"drift: {problem}" for problem in error.problems)
    if train and train.publish:
        yield from _publish_problems(pair, asked)


def _publish_problems(pair: Pair, asked: list[Service]) -> Iterator[str]:
    train = pair.train
    assert train is not None
    if train.data != DATA:
        yield f'train: publish needs "data": "drift" to learn from labelled requests, not "{train.data}"'
    followers = [service for service in asked if service.arch == train.arch]
    if not followers:
        yield f"train: publish has nobody to publish to: no service of {train.arch} is asked the data set drift"
    for service in followers:
        if (service.image_size or 0) != (train.image_size or 0):
            yield f"train: image_size {train.image_size} differs from that of {service.label}, {service.image_size}"
        if service.weights != train.weights:
            yield f"train: weights {train.weights} differ from those of {service.label}: publish goes on from what serves"


def _drift_of(given: dict[str, Any]) -> Any:
    return registry.load_plugin("datasets", DATA).parse(given)


def prepare(pair: Pair, run: RunDirectory) -> Pair:
    """The pair with its files in the run directory; the same pair when it has neither drift nor publication."""
    if pair.config.drift is None:
        return pair
    classes = registry.load_plugin("datasets", DATA).CLASSES
    specification = _specification(pair)
    write_json(run.file(SPECIFICATION), specification)
    data = f"{DATA}:{run.file(SPECIFICATION)}"
    published = pair.train.arch if pair.train and pair.train.publish else None
    services = tuple(
        service.model_copy(
            update={
                "data": data,
                "num_classes": service.num_classes or classes,
                "follow": str(run.file(WEIGHTS)) if service.arch == published else service.follow,
            }
        )
        if shifting(service)
        else service
        for service in pair.services
    )
    return pair.model_copy(update={"services": services, "train": _trainer(pair, run, data)})


def _trainer(pair: Pair, run: RunDirectory, data: str) -> Train | None:
    train = pair.train
    if train is None or train.data != DATA:
        return train
    changed: dict[str, Any] = {"data": data}
    if train.publish:
        files = {"directory": str(run.file(WEIGHTS)), "arrivals": str(run.file("schedule.npy"))}
        changed["publish"] = train.publish.model_copy(update={**files, "stream": _stream(pair)})
    return train.model_copy(update=changed)


def _stream(pair: Pair) -> int:
    """The stream whose requests shift."""
    return next(number for number, service in enumerate(pair.services) if shifting(service))


def _specification(pair: Pair) -> dict[str, Any]:
    """drift.json: the shift's request number by the schedule of the first shifting service, and how many there are."""
    drift = pair.config.drift
    assert drift is not None
    schedule = make_schedule(pair, plan(pair)).schedule
    due = schedule.of_stream(_stream(pair)).intended_ns
    first = int(np.searchsorted(due, drift.shift_at_s * NS_PER_S))
    return {**drift.shift, "shift_at": first, "count": max(1, len(due)), "seed": pair.config.seed}
