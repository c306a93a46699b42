"""One file per policy; `POLICIES` is the table of them all."""

from __future__ import annotations

from corun.share.policies.cgroup import Cgroup
from corun.share.policies.default import StockDefault
from corun.share.policies.elastic import Elastic
from corun.share.policies.green_context import GreenContext
from corun.share.policies.idle import Idle
from corun.share.policies.memory_cap import MemoryCap
from corun.share.policies.mig import Mig
from corun.share.policies.mps import Mps
from corun.share.policies.nice import Nice
from corun.share.policies.none import Nothing
from corun.share.policies.partition import Partition
from corun.share.policies.predictive import Predictive
from corun.share.policies.preempt import Preempt
from corun.share.policies.slo import Slo
from corun.share.policies.stream_priority import StreamPriority
from corun.share.policies.throttle import Throttle
from corun.share.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Nothing,
        StockDefault,
        Nice,
        Idle,
        Cgroup,
        Partition,
        StreamPriority,
        Mps,
        Mig,
        MemoryCap,
        GreenContext,
        Throttle,
        Slo,
        Preempt,
        Elastic,
        Predictive,
    )
}

__all__ = ["POLICIES", "Policy"]
