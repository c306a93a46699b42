"""The trainer computes with a thread less for every core that a pending request takes, and takes it back afterwards.

Threads of one operator wait for each other, so a trainer that loses one of its two cores to a request loses the
other one as well: the kernel sees it busy, spinning or asleep at the barrier. Between layers the number of threads can
follow the queue::

    core 0   ▮▮▮▮ ▮▮▮▮ ██ request ██ ▮▮▮▮        under `idle`: core 1 waits for the half that core 0 does not compute
    core 1   ▮▮▮▮ ▮▮▮▮ ▮▮▮▮▮▮ ▮▮▮▮▮▮ ▮▮▮▮        elastic: one thread goes on alone, at its own full speed

Malleable threads, as in HPC schedulers (Feitelson & Rudolph 1996), decided layer by layer. It says nothing of who
gets a core, so it belongs beside a priority (`idle+elastic`). Sums over threads are added up in another order: weights
are those of other thread counts, equal to rounding, not bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corun.errors import InputError
from corun.share.brakes import Mode
from corun.share.host import Host
from corun.share.policy import Cast, Kind, Member, Policy, Rule, no_process_of_its_own


@dataclass
class Elastic(Policy):
    """trainer_threads: of the trainer while nothing is pending, 0 = all cores, whatever the job says: they are lent.

    layers: threads follow the queue between layers (no torch.compile), else between steps only.
    """

    trainer_threads: int = 0
    layers: bool = True

    name: ClassVar[str] = "elastic"
    kind: ClassVar[Kind] = "stops"
    summary: ClassVar[str] = "the trainer gives up a thread for each core that pending requests take"
    live: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.trainer_threads < 0 or self.trainer_threads == 1:
            raise InputError(f"trainer_threads is {self.trainer_threads}; give 2 or more, or 0 for all cores")

    def threads(self, member: Member, host: Host) -> int | None:
        return (self.trainer_threads or len(host.cores)) if member.trains else None

    def refusals(self, host: Host, cast: Cast) -> list[str]:
        problems = no_process_of_its_own(cast)
        if cast.on_gpu:
            problems.append("it is about cores, and the trainer or a service computes on a GPU")
        if len(host.cores) < 2:
            problems.append("this process may use one core only; the trainer has no second one to give up")
        return problems

    def rule(self) -> Rule | None:
        return Rule(mode=Mode.ELASTIC, layers=self.layers)
