"""What is registered: one task, what it is asked, how fast it must answer, and which models may do it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal, get_args

from corun import registry
from corun.errors import InputError, suggest
from corun.run.config import Slo
from corun.tasks.runtime import Limits
from corun.tasks.variant import Variant

Resource = Literal["cpu", "gpu"]
RuntimeName = Literal["process", "docker"]

RESOURCES: Final = get_args(Resource)
RUNTIMES: Final = get_args(RuntimeName)
RANDOM: Final = "random"
DEFAULT_WEIGHTS: Final = "default"
MAX_REPLICAS: Final = 64

INPUTS: Final[Mapping[str, str]] = {"generation": "text", "null": "bytes"}
"""Kinds whose request is not an image."""

_ID = re.compile(r"[a-z0-9]([a-z0-9_-]{0,62}[a-z0-9])?")
_BOUND = re.compile(r"\s*(p50|p90|p95|p99|max)(?:_ms)?\s*(?:<=|<|=|:)\s*([0-9.]+(?:e[0-9]+)?)\s*(ms|s)?\s*")


@dataclass(frozen=True)
class Task:
    """One registered task; `make` checks everything and reports every problem.

    kind: what the model table calls a model's task (classification, detection, ...); it fixes the kind of input.
    priority: the higher one is served first when not everything fits. rate: expected requests/s. slo: bounds on
    the sojourn. min_quality: least acceptable quality in the unit of the quality table (top-1 %, mAP %, mIoU %).
    models: allowed models as text, with options where wanted ("resnet18:precision=bf16"); empty = all of the kind.
    weights: "default" (released), "random", or a state dict file; an option of a model comes before it.
    cpu_limit, memory_limit_mib: cores and memory of each replica, None = no limit.
    """

    id: str
    description: str = ""
    kind: str = "classification"
    priority: int = 0
    resource: Resource = "cpu"
    rate: float = 10.0
    slo: Slo = field(default_factory=Slo)
    min_quality: float = 0.0
    models: tuple[str, ...] = ()
    min_replicas: int = 1
    max_replicas: int = 1
    runtime: RuntimeName = "process"
    weights: str = DEFAULT_WEIGHTS
    cpu_limit: float | None = None
    memory_limit_mib: float | None = None

    @property
    def limits(self) -> Limits:
        """What one of its replicas may use."""
        return Limits(self.cpu_limit, self.memory_limit_mib)

    @property
    def input(self) -> str:
        """What a request carries: image, text or bytes."""
        return INPUTS.get(self.kind, "image")

    def to_json(self) -> str:
        """As stored."""
        return json.dumps({**asdict(self), "slo": self.slo.bounds})

    @classmethod
    def from_json(cls, text: str) -> Task:
        """The task of a stored text; it was checked when it was registered."""
        value = json.loads(text)
        return cls(**{**value, "slo": Slo(**value["slo"]), "models": tuple(value["models"])})


def make(**values: Any) -> Task:
    """A checked task; `slo` may be text ("p99<=100"), a mapping or an Slo. InputError lists every problem."""
    problems: list[str] = []
    known = [item.name for item in fields(Task)]
    problems += [f'unknown key "{name}"{suggest(name, known)}' for name in values if name not in known]
    values = {name: value for name, value in values.items() if name in known}
    try:
        values["slo"] = parse_slo(values.get("slo", ""))
    except InputError as error:
        problems += [f"slo: {problem}" for problem in error.problems or (str(error),)]
        values["slo"] = Slo()
    if "id" not in values:
        problems.append("id: give the task a name")
    wrong = _wrong_types(values)
    problems += wrong
    if "id" in values and not wrong:
        values["models"] = tuple(values.get("models", ()))
        if values.get("weights", RANDOM) not in (RANDOM, DEFAULT_WEIGHTS):
            values["weights"] = os.path.abspath(os.path.expanduser(values["weights"]))
        task = Task(**values)
        problems += check(task)
        if not problems:
            return task
    name = f' "{values["id"]}"' if isinstance(values.get("id"), str) else ""
    raise InputError(f"the task{name} has {len(problems)} problem{'s' * (len(problems) > 1)}", problems)


def _wrong_types(values: Mapping[str, Any]) -> list[str]:
    wanted: dict[str, tuple[type, ...]] = dict.fromkeys(("priority", "min_replicas", "max_replicas"), (int,))
    wanted |= dict.fromkeys(("rate", "min_quality"), (int, float))
    wanted |= dict.fromkeys(("cpu_limit", "memory_limit_mib"), (int, float, type(None)))
    wanted |= dict.fromkeys(("id", "description", "kind", "resource", "runtime", "weights"), (str,))
    wanted |= {"models": (list, tuple)}
    names = {int: "a whole number", float: "a number", str: "text", list: "a list of names"}
    problems = []
    for name, value in values.items():
        types = wanted.get(name)
        if types and (not isinstance(value, types) or isinstance(value, bool)):
            kind = names[float if float in types else types[0]]
            problems.append(f"{name}: give {kind} (got {json.dumps(value, default=str)})")
        elif name == "models" and not all(isinstance(model, str) for model in value):
            problems.append("models: give a list of names")
    return problems


def check(task: Task) -> list[str]:
    """Every problem of a task, each as `key: sentence`."""
    problems = []
    if not _ID.fullmatch(task.id):
        problems.append(f'id: "{task.id}" is not 1 to 64 of a-z 0-9 - _, beginning and ending with a letter or digit')
    for name, value in (("rate", task.rate), ("min_quality", task.min_quality)):
        if not (math.isfinite(value) and value >= 0):
            problems.append(f"{name}: give a number of 0 or more (got {value})")
    for name, limit in (("cpu_limit", task.cpu_limit), ("memory_limit_mib", task.memory_limit_mib)):
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            problems.append(f"{name}: give a number above 0 (got {limit})")
    problems += [
        f'{name}: "{value}" is none of {", ".join(known)}{suggest(value, known)}'
        for name, value, known in (
            ("resource", task.resource, RESOURCES),
            ("runtime", task.runtime, RUNTIMES),
            ("kind", task.kind, kinds()),
        )
        if value not in known
    ]
    if task.weights not in (RANDOM, DEFAULT_WEIGHTS) and not os.path.isfile(task.weights):
        problems.append(f"weights: there is no file {task.weights}; give default, random or a state dict file")
    if not 0 <= task.min_replicas <= task.max_replicas <= MAX_REPLICAS or task.max_replicas < 1:
        given = f"{task.min_replicas} to {task.max_replicas}"
        problems.append(f"replicas: {given} is no range; give 0 <= least <= most <= {MAX_REPLICAS}, most 1 or more")
    return problems + _check_models(task)


def _check_models(task: Task) -> list[str]:
    problems = []
    for text in task.models:
        try:
            model = Variant.parse(text).row
        except InputError as error:
            problems += [f"models: {error.what}", *(f"models: {problem}" for problem in error.problems)]
            continue
        if model.task != task.kind and task.kind in kinds():
            problems.append(f"models: {text} does {model.task}, the task is {task.kind}")
    if len(set(task.models)) != len(task.models):
        problems.append("models: a model stands twice")
    return problems


def kinds() -> tuple[str, ...]:
    """Every kind of task the model table has a model for."""
    return tuple(sorted({model.task for model in registry.models().values()}))


def parse_slo(value: object) -> Slo:
    """`p99<=100, max<=1s` (ms unless it says s), `{"p99_ms": 100}`, or an Slo; InputError lists every problem."""
    if isinstance(value, Slo):
        return value
    problems: list[str] = []
    bounds: dict[str, Any] = {}
    if isinstance(value, str):
        for part in filter(str.strip, value.split(",")):
            found = _BOUND.fullmatch(part)
            if not found:
                problems.append(f'"{part.strip()}" is no bound; write p99<=100 (p50, p90, p95, p99 or max, in ms)')
                continue
            bounds[f"{found[1]}_ms"] = float(found[2]) * (1000 if found[3] == "s" else 1)
    elif isinstance(value, Mapping):
        bounds = dict(value)
    else:
        problems.append(f'write "p99<=100" or {{"p99_ms": 100}} (got {json.dumps(value, default=str)})')
    known = tuple(Slo.model_fields)
    for name, bound in bounds.items():
        if name not in known:
            problems.append(f'unknown bound "{name}"{suggest(str(name), known)}; bounds are {", ".join(known)}')
        elif not isinstance(bound, int | float) or isinstance(bound, bool) or not (0 < bound < math.inf):
            problems.append(f"{name}: give milliseconds above 0 (got {json.dumps(bound, default=str)})")
    if problems:
        raise InputError("the SLO is wrong", problems)
    return Slo(**bounds)
