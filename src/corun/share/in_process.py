"""Trainer and service in one process on a GPU: two lanes of streams, one for each side.

A lane is where one side's kernels go. `priority_lanes` gives the service a stream of higher priority; `green_lanes`
gives each side its own SMs. The trainer bounds its own work in flight (`--run-ahead`), or its gate would be fiction.

The torch module is a parameter: nothing here is imported on a machine without a GPU, and tests pass a fake.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from corun.errors import RunFault

Lane = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Lanes:
    """Context managers under which each side issues its work, and what is really in force."""

    service: Lane
    trainer: Lane
    in_force: dict[str, Any] = field(default_factory=dict)


def priority_lanes(torch: Any, device: str, service_priority: int) -> Lanes:
    """Two streams of one device; CUDA clips priorities to its range, so they are read back."""
    service = torch.cuda.Stream(device, priority=service_priority)
    trainer = torch.cuda.Stream(device, priority=0)
    return Lanes(
        lambda: torch.cuda.stream(service),
        lambda: torch.cuda.stream(trainer),
        {"service_priority": service.priority, "trainer_priority": trainer.priority},
    )


def green_lanes(torch: Any, device_id: int, service_sms: int) -> Lanes:
    """Disjoint SMs for service and trainer; RunFault when torch, the driver or the device does not offer it."""
    contexts = getattr(torch.cuda, "green_contexts", None)
    maker = getattr(contexts, "GreenContext", None)
    if maker is None or getattr(contexts, "SUPPORTED", True) is False:
        raise RunFault("this torch has no green contexts")
    total = torch.cuda.get_device_properties(device_id).multi_processor_count
    if not 0 < service_sms < total:
        raise RunFault(f"service_sms is {service_sms}, but the device has {total} SMs to divide")
    try:
        service, trainer = _split(maker, device_id, service_sms, total)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RunFault(f"the device cannot be split into green contexts: {error}") from error
    in_force = {
        "service_sms": getattr(service, "sm_count", service_sms),
        "trainer_sms": getattr(trainer, "sm_count", total - service_sms),
    }
    return Lanes(_lane(torch, service), _lane(torch, trainer), in_force)


def _split(maker: Any, device_id: int, service_sms: int, total: int) -> tuple[Any, Any]:
    """Two contexts: disjoint by construction where torch can split (2.15), else two creations of their sizes.

    `create` selects SMs from the whole device each time, so before 2.15 the driver alone decides whether the two
    sets overlap; `in_force` then has no sm_count to prove that they do not.
    """
    if hasattr(maker, "split"):
        return maker.split(num_sms=(service_sms, 0), backfill=(False, True), device_id=device_id)
    return (
        maker.create(num_sms=service_sms, device_id=device_id),
        maker.create(num_sms=total - service_sms, device_id=device_id),
    )


def _lane(torch: Any, context: Any) -> Lane:
    """Streams of the context where it makes them (2.12 on), else the context made current for the while."""
    if hasattr(context, "Stream"):
        stream = context.Stream()
        return lambda: torch.cuda.stream(stream)
    return lambda: _Current(context)


class _Current(AbstractContextManager[None]):
    def __init__(self, context: Any) -> None:
        self._context = context

    def __enter__(self) -> None:
        self._context.set_context()

    def __exit__(self, *exc: object) -> None:
        self._context.pop_context()


class TrainingThread:
    """Runs `step` again and again in a thread, in the trainer's lane, until stopped.

    error: what ended it early; `stop` raises it again.
    """

    def __init__(self, step: Callable[[], object], lane: Lane) -> None:
        self._step = step
        self._lane = lane
        self._ended = threading.Event()
        self.error: BaseException | None = None
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="trainer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """Let the current step end; RunFault when it does not within timeout_s, or with what ended training."""
        self._ended.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise RunFault(f"the training thread did not end its step within {timeout_s:g} s")
        if self.error:
            raise RunFault(f"the training thread ended: {self.error!r}") from self.error

    def _run(self) -> None:
        try:
            with self._lane():
                while not self._ended.is_set():
                    self._step()
                    self.steps += 1
        except BaseException as error:  # noqa: BLE001 - top of the thread: stop() raises it
            self.error = error
