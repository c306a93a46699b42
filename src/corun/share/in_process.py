"""Trainer and services in one process on a GPU: a lane of streams for each side.

    thread          enters                    current stream from then on
    model thread    lanes.service()  (each)   one of its own, of high priority or on the service's SMs
    trainer         lanes.trainer()           one of priority 0, or on the trainer's SMs

A lane is entered in the thread that issues the work and left at its end: torch's current stream belongs to the
thread, and what is loaded, copied and computed in the lane is ordered on that one stream. torch's streams do not wait
for the default stream (they are made with cudaStreamNonBlocking), so nothing of a lane may be made outside of it.
The trainer bounds its own work in flight (`--run-ahead`), or its gate would be fiction.

The torch module is a parameter: nothing here is imported on a machine without a GPU, and tests pass a fake.
Source: CUDA C++ programming guide, "Stream priorities" and "Green contexts"; torch.cuda.green_contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from corun.errors import InputError, RunFault

KINDS = {"priority": "service_priority", "green": "service_sms"}

Lane = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Lanes:
    """Context managers under which each side issues its work, a stream of its own each time one is entered.

    in_force: what CUDA made of what was asked, read back.
    """

    service: Lane
    trainer: Lane
    in_force: dict[str, Any] = field(default_factory=dict)


NO_LANES = Lanes(nullcontext, nullcontext)


def check_lanes(asked: Mapping[str, Any]) -> None:
    """InputError when `asked` is no description of lanes: {"kind": "priority", "service_priority": -5} or the like."""
    if not asked:
        return
    option = KINDS.get(str(asked.get("kind")))
    if option is None or set(asked) != {"kind", option} or type(asked[option]) is not int:
        forms = " or ".join(f'{{"kind": "{kind}", "{name}": NUMBER}}' for kind, name in KINDS.items())
        raise InputError(f"lanes are {forms}, not {dict(asked)}")


def make_lanes(torch: Any, device: str, asked: Mapping[str, Any]) -> Lanes:
    """The lanes a policy asks for (Policy.lanes), on one CUDA device; none for {}.

    Raises InputError as check_lanes, RunFault when the device does not offer them.
    """
    check_lanes(asked)
    if not asked:
        return NO_LANES
    if asked["kind"] == "priority":
        return priority_lanes(torch, device, asked["service_priority"])
    return green_lanes(torch, torch.device(device).index or 0, asked["service_sms"])


def priority_lanes(torch: Any, device: str, service_priority: int) -> Lanes:
    """Streams of two priorities; CUDA clips priorities to its range, so they are read back."""

    def stream(priority: int) -> Any:
        return torch.cuda.Stream(device, priority=priority)

    in_force = {"service_priority": stream(service_priority).priority, "trainer_priority": stream(0).priority}
    return Lanes(lambda: torch.cuda.stream(stream(service_priority)), lambda: torch.cuda.stream(stream(0)), in_force)


def green_lanes(torch: Any, device_id: int, service_sms: int) -> Lanes:
    """Disjoint SMs for service and trainer; RunFault when torch, the driver or the device does not offer it.

    The device is synchronised first, which makes the primary context that green contexts are made beside.
    """
    contexts = getattr(torch.cuda, "green_contexts", None)
    maker = getattr(contexts, "GreenContext", None)
    if not hasattr(maker, "Stream") or getattr(contexts, "SUPPORTED", True) is False:
        raise RunFault("this torch has no green contexts with streams of their own (2.12 has)")
    total = torch.cuda.get_device_properties(device_id).multi_processor_count
    if not 0 < service_sms < total:
        raise RunFault(f"service_sms is {service_sms}, but the device has {total} SMs to divide")
    torch.cuda.synchronize(device_id)
    try:
        service, trainer = _split(maker, device_id, service_sms, total)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RunFault(f"the device cannot be split into green contexts: {error}") from error
    in_force = {
        "service_sms": getattr(service, "sm_count", service_sms),
        "trainer_sms": getattr(trainer, "sm_count", total - service_sms),
    }
    return Lanes(lambda: torch.cuda.stream(service.Stream()), lambda: torch.cuda.stream(trainer.Stream()), in_force)


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
