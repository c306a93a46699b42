"""Plans as cells of a run: how a set of candidates is started, for the profile's windows and for the validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from corun.plan.question import NONE, Candidate, Question, Slo
from corun.run import config as configs
from corun.run.config import Pair
from corun.stats.percentiles import sample_floor

WARM_UP_SHARE: Final = 1.1
SHORTEST_S: Final = 10.0


@dataclass(frozen=True)
class Setup:
    """How everything is run; part of a profile's identity. threads: of each service. seconds: of one window.

    Devices are named, never "auto", and the trainer's threads do not depend on how many services run beside it.
    """

    device: str = "cpu"
    threads: int = 1
    trainer_threads: int = 1
    seconds: float = 10.0
    data: str = "sample"
    image_size: int | None = None
    train_data: str = "digits"
    train_image_size: int | None = None
    max_batch: int = 1
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """Everything that would change a window."""
        return asdict(self)


def cell(question: Question, setup: Setup, policy: str, chosen: Sequence[Candidate], **overrides: Any) -> Pair:
    """The cell that serves `chosen` beside the question's job under a policy; InputError as corun.run.config.

    overrides: keys of config.json, such as arms, duration_s, port.
    """
    settings = {
        "train": [_train(question, setup)],
        "infer": [[_service(one, setup) for one in chosen]],
        "duration_s": setup.seconds,
        "seed": setup.seed,
        "sharing": policy,
        "slo": {f"{question.slo.name}_ms": question.slo.bound_ms},
        **overrides,
    }
    (found,) = configs.pairs(configs.parse(settings, "the plan"))
    return found


def validation_seconds(slo: Slo, chosen: Sequence[Candidate], longest_s: float) -> float:
    """Seconds in which the slowest stream sends enough requests to quote the percentile, at most `longest_s`."""
    slowest = min((one.rate for one in chosen), default=math.inf)
    return min(longest_s, max(SHORTEST_S, WARM_UP_SHARE * sample_floor(slo.percentile) / slowest))


def _train(question: Question, setup: Setup) -> Mapping[str, Any]:
    if question.job is None:
        return {"arch": NONE}
    return {
        "arch": question.job.model,
        "batch_size": question.job.batch_size,
        "data": setup.train_data,
        "image_size": setup.train_image_size,
        "threads": setup.trainer_threads,
        "device": setup.device,
    }


def _service(one: Candidate, setup: Setup) -> dict[str, Any]:
    return {
        "arch": one.model,
        "name": one.name,
        "rate": one.rate,
        "data": setup.data,
        "image_size": setup.image_size,
        "threads": setup.threads,
        "max_batch": one.max_batch if one.max_batch > 1 else setup.max_batch,
        "max_delay_ms": one.max_delay_ms,
        "device": setup.device,
    }
