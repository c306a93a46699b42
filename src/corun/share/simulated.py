"""Policies on the simulated device: the same specs, gates and controllers, an arm in milliseconds of real time.

What each policy means there:

    none, default     two processes: the device takes turns of 2 ms
    stream_priority   one process: the service's kernels go first at kernel borders
    mps               side by side: the service may have all SMs, the trainer its percentage
    mig, green_context  side by side with fixed shares that nobody borrows
    everything else   one in-order queue: a request waits for all training kernels queued before it

The last line is the hard case on purpose: on a device that cannot preempt, only the gate bounds the wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from corun.clock import NS_PER_MS
from corun.share.announce import Announcer
from corun.share.brakes import Mode
from corun.share.gates import GateOptions, PageGate, make_steerings
from corun.share.page import Knobs, Page
from corun.share.policies.green_context import GreenContext
from corun.share.policies.mig import Mig
from corun.share.policies.mps import Mps
from corun.share.policies.stream_priority import StreamPriority
from corun.share.policy import Policy, Rule, finest
from corun.share.sharing import merge_rules
from corun.share.simulation import (
    Device,
    How,
    Load,
    SimulatedService,
    SimulatedTrainer,
    Timeline,
    TrainingCost,
    sleep_on,
)

SMS = 132
MIG_SLICES = 7


@dataclass(frozen=True)
class Arrangement:
    """How the device is shared and what the trainer's gate does."""

    how: How = "kernels"
    service_share: float = 1.0
    trainer_share: float = 1.0
    service_priority: int = 0
    rule: Rule = field(default_factory=Rule)
    run_ahead: int = 1


def arrange(policies: Sequence[Policy]) -> Arrangement:
    """What a set of policies means on the simulated device."""
    rule = merge_rules(policy.rule() for policy in policies) or Rule()
    for policy in policies:
        match policy:
            case Mps():
                return Arrangement("shares", 1.0, policy.trainer_percent / 100, rule=rule)
            case GreenContext():
                return Arrangement("shares", policy.service_sms / SMS, 1 - policy.service_sms / SMS, rule=rule)
            case Mig():
                service = int((policy.service_profile or "3g").split("g")[0])
                return Arrangement("shares", service / MIG_SLICES, 1 - service / MIG_SLICES, rule=rule)
            case StreamPriority():
                return Arrangement("kernels", service_priority=policy.service_priority, rule=rule)
    return Arrangement("slices" if all(policy.kind == "base" for policy in policies) else "kernels", rule=rule)


@dataclass(frozen=True)
class Outcome:
    """Sojourns in order of reply with their instants (ns), and the trainer's speed."""

    sojourns_ns: tuple[int, ...]
    ends_ns: tuple[int, ...]
    samples_per_s: float | None
    trainer: SimulatedTrainer | None
    knobs: Knobs

    def sojourns_between(self, begin_ns: int, end_ns: int) -> list[int]:
        """Sojourns of replies in [begin, end)."""
        pairs = zip(self.ends_ns, self.sojourns_ns, strict=True)
        return [sojourn for end, sojourn in pairs if begin_ns <= end < end_ns]


def simulate(
    arrangement: Arrangement,
    loads: Sequence[Load],
    until_ns: int,
    trains: bool = True,
    batch: int = 64,
    cost: TrainingCost | None = None,
) -> Outcome:
    """One arm: the services of `loads` (none = no load) and, if asked, a trainer, for `until_ns` of virtual time.

    Requests that arrived before the end are answered after it, with training stopped. In one queue without priorities
    the borders between kernels decide nothing, so kernels are simulated as one.
    """
    timeline, rule = Timeline(), arrangement.rule
    device = Device(timeline, arrangement.how)
    cost = cost or TrainingCost()
    if arrangement.how == "kernels" and not arrangement.service_priority:
        loads = [replace(load, kernels=1) for load in loads]
        cost = replace(cost, kernels=1)
    with Page.create() as page:
        services = [
            SimulatedService(
                timeline,
                device.stream(f"service {slot}", arrangement.service_priority, arrangement.service_share),
                load,
                Announcer(page, slot, clock=timeline.clock, beating=False),
            )
            for slot, load in enumerate(loads)
        ]
        page.set_knobs(Knobs(rule.micro, rule.duty))
        page.mode = rule.mode
        trainer = None
        if trains:
            stream = device.stream("trainer", 0, arrangement.trainer_share)
            gate = _gate(page, rule, timeline)
            trainer = SimulatedTrainer(timeline, stream, gate, batch, cost, arrangement.run_ahead)
            trainer.run(until_ns)
        timeline.advance(until_ns)
        total = sum(len(load.arrivals_ns) for load in loads)
        timeline.advance(10 * until_ns, lambda: sum(len(service.ends_ns) for service in services) == total)
        replies = sorted(
            (end, s) for service in services for end, s in zip(service.ends_ns, service.sojourns_ns, strict=True)
        )
        return Outcome(
            tuple(sojourn for _, sojourn in replies),
            tuple(end for end, _ in replies),
            trainer.rate(0, until_ns) if trainer else None,
            trainer,
            page.knobs,
        )


def _gate(page: Page, rule: Rule, timeline: Timeline) -> PageGate:
    known = GateOptions.__dataclass_fields__
    options = GateOptions(page=str(page.path), **{key: value for key, value in rule.options.items() if key in known})
    steerings = make_steerings(options) if rule.mode & ~Mode.PREEMPT else {}
    return PageGate(
        page,
        steerings,
        micro_max=finest(rule, preempts=False),
        max_wait_ns=round(options.max_wait_ms * NS_PER_MS),
        clock=timeline.clock,
        sleep=sleep_on(timeline, page),
    )
