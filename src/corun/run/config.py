"""config.json: what to train, what to serve, and how to measure it, checked before anything starts.

The file of the original research code loads unchanged: `train` and `infer` lists whose entries have `arch`
("None" = without), `workers`, `epochs`, `batch_size`, `image_size`, `device`. Every key of ours is optional.
All problems of a file are reported at once, with the path of the key and the nearest known one.

Only the launcher imports this module: pydantic costs 60 ms and 10 MB in every process that does.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from corun.errors import InputError, suggest
from corun.run import launching

Arm = Literal["alone", "train", "corun"]
ARMS: tuple[Arm, ...] = ("alone", "train", "corun")
Precision = Literal["fp32", "bf16", "fp16"]
NONE = "none"
DEFAULT_DURATION_S = 10.0
START_S = 12.0
LATER = ("publish", "follow", "drift")
BETWEEN_S = 1.5


def _no_arch(value: Any) -> Any:
    return NONE if value is None or (isinstance(value, str) and value.strip().lower() == NONE) else value


Arch = Annotated[str, BeforeValidator(_no_arch)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, le=7 * 86400)]
Bound = Annotated[float, Field(gt=0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Publish(_Model):
    """Learning from labelled requests and publishing to the services of the same model; see docs/drift.md."""

    label_delay_s: Annotated[float, Field(ge=0)] = 1.0
    every_s: Seconds = 2.0
    samples: Positive = 64
    least: Positive = 32
    gain: Annotated[float, Field(ge=0, le=1)] = 0.03
    window: Positive = 512
    fresh_share: Annotated[float, Field(ge=0, le=1)] = 0.75
    directory: str = Field("", description="set by the launcher")
    arrivals: str = Field("", description="set by the launcher")
    stream: Annotated[int, Field(ge=0)] = Field(0, description="set by the launcher")


def _switch(value: Any) -> Any:
    return {} if value is True else None if value is False else value


class Train(_Model):
    """One training job; arch "None" = no training."""

    arch: Arch
    data: str = "digits"
    workers: Annotated[int, Field(ge=0)] = 0
    epochs: Annotated[int, Field(ge=0)] = 0
    batch_size: Positive = 16
    image_size: Positive | None = None
    num_classes: Positive | None = None
    count: Positive = 1024
    lr: Annotated[float, Field(gt=0)] = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    weights: str | None = None
    threads: Positive | None = None
    checkpoint: bool = False
    publish: Annotated[Publish | None, BeforeValidator(_switch)] = Field(
        None, description="true or its settings: learn from labelled requests, publish to the running services"
    )
    extra: dict[str, Any] = {}
    verbose: bool | None = Field(None, description="a key of the original; has no effect")


class Slo(_Model):
    """Promises about a service's latency in ms, from the intended send time; max is that of every request."""

    p50_ms: Bound | None = None
    p90_ms: Bound | None = None
    p95_ms: Bound | None = None
    p99_ms: Bound | None = None
    max_ms: Bound | None = None

    @property
    def bounds(self) -> dict[str, float]:
        """What was promised, `{"p99_ms": 100.0}`."""
        return self.model_dump(exclude_none=True)


class Drift(_Model):
    """A shift of what the services with "data": "drift" are asked, in the middle of the window; see docs/drift.md."""

    shift_at_s: Annotated[float, Field(ge=0)]
    corruption: str = "none"
    severity: Annotated[int, Field(ge=1, le=5)] = 3
    class_mix: dict[Literal["before", "after"], list[float]] = {}

    @property
    def shift(self) -> dict[str, Any]:
        """What changes, as the data set is told; when is said in requests there."""
        return self.model_dump(mode="json", exclude={"shift_at_s"})


class Service(_Model):
    """One service and the load its client sends; arch "None" = no inference."""

    arch: Arch
    name: str | None = None
    rate: Annotated[float, Field(ge=0)] = Field(10.0, description="requests/s; 0 = the Azure trace")
    process: str | dict[str, Any] = "poisson"
    mode: Literal["open", "closed", "paced"] = Field(
        "open",
        description="open: sent on schedule whatever happens; paced: on schedule, one request in flight; closed: the "
        "schedule's gaps are rested after each reply, as the original did",
    )
    data: str = "sample"
    count: Positive = 64
    image_size: Positive | None = None
    num_classes: Positive | None = None
    device: str = "auto"
    precision: Precision = "fp32"
    channels_last: bool = False
    compile: bool = False
    weights: str | None = None
    threads: Positive = 1
    queue_limit: Positive = 1024
    max_batch: Positive = 1
    max_delay_ms: Annotated[float, Field(ge=0)] = 0.0
    policy: str = "fifo"
    deadline_ms: Annotated[int, Field(ge=0, lt=1 << 23)] = Field(
        0, description="a request is ended so long after its due instant; 0 = never"
    )
    cancel_after_ms: Annotated[int, Field(ge=0)] = Field(
        0, description="the client takes a request back so long after it was sent; 0 = never"
    )
    whole: bool = Field(False, description="generated answers come in one piece, not token by token")
    follow: str | None = Field(None, description="directory of published weights to take up as they come")
    slo: Slo = Field(Slo(), description="promises of this service; they replace the same ones of the whole file")
    extra: dict[str, Any] = {}
    batch_size: int | None = Field(None, description="a key of the original; has no effect: see max_batch")
    workers: int | None = Field(None, description="a key of the original; has no effect")
    epochs: int | None = Field(None, description="a key of the original; has no effect")
    verbose: bool | None = Field(None, description="a key of the original; has no effect")

    @property
    def label(self) -> str:
        """Name of the service in files and tables."""
        return self.name or self.arch


def _group(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _per_arm(value: Any) -> Any:
    return dict.fromkeys(ARMS, value) if isinstance(value, int | float | str) else value


Group = Annotated[tuple[Service, ...], BeforeValidator(_group)]
Durations = Annotated[dict[Arm, Seconds], BeforeValidator(_per_arm)]


class Config(_Model):
    """A grid: every training job against every set of services, in the arms asked for.

    `infer` entries are one service or a list of services that are served together.
    """

    train: tuple[Train, ...] = (Train(arch=NONE),)
    infer: tuple[Group, ...] = ((Service(arch=NONE),),)
    comb: tuple[Positive, ...] = Field(
        (), description="serve every combination of so many of the services named in infer"
    )
    rates: tuple[Rate, ...] = Field((), description="measure every set of services at each of these rates")
    arms: tuple[Arm, ...] = ARMS
    duration_s: Durations = Field({}, description="seconds of a window: one number, or one per arm; default 10")
    repeat: Positive = 1
    seed: Annotated[int, Field(ge=0)] = 0
    drift: Drift | None = Field(None, description="the requests' distribution shifts within the window")
    sharing: str | dict[str, Any] = Field(
        "none",
        description='how trainer and services share the hardware, e.g. "idle" or {"policy": "idle+slo", ...}; '
        '"one_process": true makes them threads of one process, as stream_priority and green_context do by themselves',
    )
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 54100
    period_s: Annotated[float, Field(gt=0)] = 1.0
    drain_timeout_s: Seconds = 10.0
    start_timeout_s: Seconds = 180.0
    slo: Slo = Field(Slo(), description='promises of every service, e.g. {"p99_ms": 100}; exit code 3 when not kept')
    calibrate: bool = Field(True, description="measure client and null server alone for 2 s before the first run")
    launch: launching.Launch = launching.Launch()

    @field_validator("arms")
    @classmethod
    def _arms_once(cls, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        if not arms:
            raise ValueError("name at least one of alone, train, corun")
        if len(set(arms)) != len(arms):
            raise ValueError("an arm stands twice")
        return arms

    @field_validator("train", "infer", mode="before")
    @classmethod
    def _empty_is_none(cls, entries: Any) -> Any:
        return [{"arch": NONE}] if entries == [] else entries

    def duration(self, arm: Arm) -> float:
        """Seconds of one window of an arm."""
        return self.duration_s.get(arm, DEFAULT_DURATION_S)


class Pair(_Model):
    """One cell of the grid, fully resolved: one training job beside one set of services."""

    train: Train | None
    services: tuple[Service, ...]
    arms: tuple[Arm, ...]
    config: Config
    beside: str | None = Field(None, description="services run elsewhere, beside this job (a label for the log)")
    legacy: bool = Field(False, description="under the original's load: even seconds, rests after each reply")

    @property
    def expected_s(self) -> float:
        """Expected wall time in seconds: all windows, and what starting and draining usually take."""
        windows = [self.config.duration(arm) for arm in self.arms]
        return START_S + self.config.repeat * sum(window + BETWEEN_S for window in windows)

    @property
    def train_label(self) -> str:
        """The original's training label, e.g. resnet50_16, or none."""
        return self.beside or (f"{self.train.arch}_{self.train.batch_size}" if self.train else NONE)

    @property
    def label(self) -> str:
        """`resnet50_16 + yolov5n, resnet18` for tables and logs."""
        load = " (the original's load)" if self.legacy else ""
        return f"{self.train_label} + {', '.join(service.label for service in self.services) or NONE}{load}"

    def digest(self) -> str:
        """sha256 of the resolved cell: the name of its directory in a sweep."""
        return digest(self.resolved())

    @property
    def promises(self) -> dict[str, dict[str, float]]:
        """SLO bounds by service and percentile: `{"resnet18": {"p99_ms": 100.0}}`; services without any are left out."""
        shared = self.config.slo.bounds
        found = {service.label: {**shared, **service.slo.bounds} for service in self.services}
        return {name: bounds for name, bounds in found.items() if bounds}

    def resolved(self) -> dict[str, Any]:
        """Everything that determines the measurement, as plain JSON values; promises judge it, they do not change it."""
        rest = self.config.model_dump(
            mode="json", exclude={"train", "infer", "comb", "rates", "arms", "slo", "calibrate", "launch"}
        )
        return {
            "train": _used(self.train.model_dump(mode="json")) if self.train else None,
            "services": [_used(service.model_dump(mode="json", exclude={"slo"})) for service in self.services],
            "arms": list(self.arms),
            **({"beside": self.beside} if self.beside else {}),
            **({"legacy": True} if self.legacy else {}),
            **({} if self.config.launch.local else {"launch": self.config.launch.resolved()}),
            **_used(rest),
        }


def _used(values: dict[str, Any]) -> dict[str, Any]:
    """Without what continuous training adds and this cell does not use: such cells keep the digest they had."""
    return {key: value for key, value in values.items() if value is not None or key not in LATER}


def digest(value: Any) -> str:
    """sha256 hex of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def load(path: Path) -> Config:
    """Read config.json; InputError lists every problem with the key's path."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    return parse(value, str(path))


def parse(value: Any, where: str = "config") -> Config:
    """Check a config that is already in memory."""
    if not isinstance(value, dict):
        raise InputError(f'{where} must be a JSON object with "train" and "infer" lists')
    try:
        return Config.model_validate(value)
    except ValidationError as error:
        problems = sorted({_sentence(problem, value) for problem in error.errors()})
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise InputError(f"{where} has {count}", problems) from error


def overridden(config: Config, ticks: int | None = None, policy: str | None = None) -> Config:
    """A config with windows of so many profiler periods, and with another sharing policy that keeps the options."""
    update: dict[str, Any] = {}
    if ticks is not None:
        update["duration_s"] = dict.fromkeys(ARMS, ticks * config.period_s)
    if policy is not None:
        given = config.sharing if isinstance(config.sharing, dict) else {}
        update["sharing"] = {**given, "policy": policy}
    return config.model_copy(update=update)


def pairs(config: Config) -> list[Pair]:
    """Every (train, infer) cell with the arms that make sense for it, infer lists in the outer loop."""
    cells = []
    for entry in _sets(config):
        services = _named(tuple(service for service in entry if service.arch != NONE))
        for job in config.train:
            train = None if job.arch == NONE else job
            possible = {"alone": bool(services), "train": train is not None, "corun": bool(services and train)}
            arms = tuple(arm for arm in config.arms if possible[arm])
            if arms:
                cells.append(Pair(train=train, services=services, arms=arms, config=config))
    return cells


def with_legacy(cells: list[Pair]) -> list[Pair]:
    """Every cell that serves, followed by its twin under the original's load (see corun.arrivals.legacy)."""
    return [twin for cell in cells for twin in ([cell, _legacy(cell)] if cell.services else [cell])]


def _legacy(cell: Pair) -> Pair:
    def as_original(service: Service) -> Service:
        process = {"name": "legacy", "rate": service.rate} if service.rate else "poisson"
        return service.model_copy(update={"mode": "closed", "process": process})

    services = tuple(as_original(service) for service in cell.services)
    arms = tuple(arm for arm in cell.arms if arm != "train")
    return cell.model_copy(update={"services": services, "arms": arms or cell.arms, "legacy": True})


def _sets(config: Config) -> Iterator[tuple[Service, ...]]:
    """The sets of services to measure: as listed, or every combination of them, each at every rate."""
    groups: list[tuple[Service, ...]] = list(config.infer)
    if config.comb:
        each = [service for group in config.infer for service in group if service.arch != NONE]
        groups = [chosen for size in config.comb for chosen in itertools.combinations(each, size)]
    for group in groups:
        for rate in config.rates or (None,):
            yield group if rate is None else tuple(service.model_copy(update={"rate": rate}) for service in group)


def _named(services: tuple[Service, ...]) -> tuple[Service, ...]:
    """Distinct names: a second resnet18 becomes resnet18-2."""
    seen: dict[str, int] = {}
    named = []
    for service in services:
        label = service.label
        seen[label] = seen.get(label, 0) + 1
        name = label if seen[label] == 1 else f"{label}-{seen[label]}"
        named.append(service.model_copy(update={"name": name}))
    return tuple(named)


def _sentence(problem: Any, value: dict[str, Any]) -> str:
    location = _location(problem["loc"], value)
    path = ".".join(str(part) for part in location) or "(top)"
    if problem["type"] == "extra_forbidden":
        model = _model_at(location)
        return f"{path}: unknown key{suggest(str(location[-1]), model.model_fields)}"
    got = problem.get("input")
    shown = f" (got {json.dumps(got)})" if isinstance(got, str | int | float | bool) else ""
    return f"{path}: {problem['msg'].removeprefix('Value error, ')}{shown}"


def _model_at(location: list[Any]) -> type[BaseModel]:
    """The model whose keys stand beside the last part of a path."""
    if location[0] == "launch" and len(location) > 1:
        return launching.model_of(location)
    inside: dict[Any, type[BaseModel]] = {"slo": Slo, "publish": Publish, "drift": Drift}
    nested = next((inside[part] for part in location[:-1] if part in inside), None)
    if nested is not None:
        return nested
    return Config if len(location) == 1 else Train if location[0] == "train" else Service


def _location(loc: tuple[Any, ...], value: dict[str, Any]) -> list[Any]:
    """The path as the user wrote it: a service that stands alone has no index inside its group."""
    parts = [part for part in loc if part != "[key]"]
    alone = parts[:1] == ["infer"] and len(parts) > 2 and not isinstance(value["infer"][parts[1]], list)
    return parts[:2] + parts[3:] if alone else parts


def schema() -> dict[str, Any]:
    """JSON schema of config.json, for editors."""
    return Config.model_json_schema()
