"""What is asked: which services beside which training job, how fast, how late at most, shared how."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal, ParamSpec, TypeVar, get_args

from corun.errors import InputError, suggest

P = ParamSpec("P")
T = TypeVar("T")

Goal = Literal["count", "goodput", "training"]
GOALS: Final[tuple[Goal, ...]] = get_args(Goal)
NONE: Final = "none"
DEFAULT_BATCH: Final = 16
PERCENTILES: Final = (50.0, 90.0, 95.0, 99.0)

_SLO = re.compile(r"p(\d+(?:\.\d+)?)\s*(?:<=|=|:)\s*(\d+(?:\.\d+)?)\s*(ms|s)?")
_MS: Final = {"ms": 1.0, "s": 1000.0, None: 1.0}
_KIND: Final = re.compile(r"(.+)\[(\d+)(?:, (\S+) ms)?\]")
AUTO: Final = "auto"


@dataclass(frozen=True)
class Slo:
    """A latency bound at a percentile (0-100) of the sojourn."""

    percentile: float
    bound_ms: float

    @property
    def share(self) -> float:
        """Share of requests that may take longer."""
        return round(1 - self.percentile / 100, 12)

    @property
    def name(self) -> str:
        """`p99`."""
        return f"p{self.percentile:g}"

    def __str__(self) -> str:
        return f"{self.name} <= {self.bound_ms:g} ms"


@dataclass(frozen=True)
class Job:
    """A training job, `resnet50_16` = architecture resnet50, batches of 16."""

    model: str
    batch_size: int

    @property
    def label(self) -> str:
        return f"{self.model}_{self.batch_size}"


@dataclass(frozen=True)
class Kind:
    """A model as it is served: `resnet18`, or in batches of up to 8 held up to 2.5 ms, `resnet18[8, 2.5 ms]`.

    Windows of different kinds are kept apart. max_batch 1 is the model by its plain name, served as the set-up says.
    """

    model: str
    max_batch: int = 1
    max_delay_ms: float = 0.0

    def __str__(self) -> str:
        if self.max_batch == 1:
            return self.model
        held = f", {self.max_delay_ms:g} ms" if self.max_delay_ms else ""
        return f"{self.model}[{self.max_batch}{held}]"

    @classmethod
    def parse(cls, text: str) -> Kind:
        """What `str` wrote."""
        found = _KIND.fullmatch(text)
        return cls(found[1], int(found[2]), float(found[3] or 0)) if found else cls(text)


@dataclass(frozen=True)
class Candidate:
    """One service that should fit; `name` tells copies of one model apart, `rate` is in requests/s.

    max_batch, max_delay_ms: chosen for this service; 1 = nothing was chosen, or serving one by one was.
    """

    name: str
    model: str
    rate: float
    max_batch: int = 1
    max_delay_ms: float = 0.0

    @property
    def kind(self) -> str:
        """What its windows are kept under."""
        return str(Kind(self.model, self.max_batch, self.max_delay_ms))


@dataclass(frozen=True)
class Question:
    """Which of the candidates fit beside the job (None = nobody trains), for each sharing policy."""

    job: Job | None
    candidates: tuple[Candidate, ...]
    slo: Slo
    policies: tuple[str, ...] = (NONE,)
    goal: Goal = "count"
    memory_margin: float = 0.10

    def __post_init__(self) -> None:
        names = [candidate.name for candidate in self.candidates]
        if len(set(names)) != len(names):
            raise ValueError(f"two candidates have one name: {', '.join(names)}")


def parse_slo(text: str) -> Slo:
    """`p99=200ms`, `p95<=0.2s`; InputError says how it is written."""
    found = _SLO.fullmatch(text.strip().lower())
    if not found:
        raise InputError(f'--slo "{text}" is not a promise; write a percentile and a bound, e.g. p99=200ms')
    percentile, bound_ms = float(found[1]), float(found[2]) * _MS[found[3]]
    if percentile not in PERCENTILES or bound_ms <= 0:
        known = ", ".join(f"p{one:g}" for one in PERCENTILES)
        raise InputError(f'--slo "{text}": the percentile is one of {known} and the bound above 0')
    return Slo(percentile, bound_ms)


def parse_job(text: str, known: Collection[str]) -> Job | None:
    """`resnet50_16`, `vit_b_16_8`, `resnet18` (batches of 16) or `none`; `known` are models that can be trained."""
    text = text.strip()
    if text.lower() == NONE:
        return None
    if text in known:
        return Job(text, DEFAULT_BATCH)
    model, _, batch = text.rpartition("_")
    if model in known and batch.isdecimal() and int(batch) > 0:
        return Job(model, int(batch))
    wanted = model if batch.isdecimal() and model else text
    raise InputError(f'--train "{text}" is no model with a batch size, such as resnet50_16{suggest(wanted, known)}')


def parse_batch(text: str) -> int | None:
    """`8`, or None for `auto`; InputError says what may stand there."""
    if text.strip().lower() == AUTO:
        return None
    if text.strip().isdecimal() and int(text) > 0:
        return int(text)
    raise InputError(f'--max-batch "{text}" is neither a number of 1 or more nor {AUTO}')


def split_words(words: Sequence[str]) -> list[str]:
    """`["a,b", "c"]` as `["a", "b", "c"]`."""
    return [word.strip() for text in words for word in text.split(",") if word.strip()]


def make_candidates(models: Sequence[str], rate: float, copies: int = 1) -> tuple[Candidate, ...]:
    """`copies` services of each model; a second resnet18 is called resnet18-2."""
    seen: dict[str, int] = {}
    made = []
    for _ in range(copies):
        for model in models:
            seen[model] = seen.get(model, 0) + 1
            name = model if seen[model] == 1 else f"{model}-{seen[model]}"
            made.append(Candidate(name, model, rate))
    return tuple(made)


class Problems:
    """Collects what is wrong with an input, so that all of it is said at once.

    Usage::

        problems = Problems()
        slo = problems.attempt(parse_slo, text)
        problems.raise_any("the question cannot be answered")
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        self.found.append(problem)

    def attempt(self, parse: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T | None:
        """What `parse` returns, or None after its InputError was noted."""
        try:
            return parse(*arguments, **options)
        except InputError as error:
            self.found += [f"{error.what}: {problem}" for problem in error.problems] or [error.what]
            return None

    def raise_any(self, what: str) -> None:
        """InputError with every problem, if there is one."""
        if self.found:
            raise InputError(what, list(dict.fromkeys(self.found)))
