"""What everybody runs: every process starts as many threads as there are cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corun.share.host import Host
from corun.share.policy import Kind, Member, Policy


@dataclass
class StockDefault(Policy):
    """Thread oversubscription dominates everything else on a CPU: kept to be measured, not to be used."""

    name: ClassVar[str] = "default"
    kind: ClassVar[Kind] = "base"
    summary: ClassVar[str] = "every process with all cores, as libraries do by default"

    def threads(self, member: Member, host: Host) -> int | None:
        return len(host.cores) if member.serves or member.trains else None
