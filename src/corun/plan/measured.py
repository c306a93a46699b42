"""What was measured: one window of one condition, and where all of them are kept for this machine.

A condition is a set of loads (model, requests/s), whether somebody trains, and under which sharing policy. Windows of
one condition are numbered; the numbers are those of the arrivals' repeats, so a window is never measured twice.
A window that could not be measured because processes died (out of memory) is kept too: it says "does not fit".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from corun.errors import InputError
from corun.run.config import digest
from corun.run.directory import write_json

SCHEMA: Final = 1
LOST: Final = "inf"


@dataclass(frozen=True)
class Condition:
    """Who runs in a window. loads: (model, requests/s), sorted. job: the training job's label, "" = nobody trains.

    policy is "" where nobody trains: it then has nothing to say.
    """

    loads: tuple[tuple[str, float], ...]
    job: str = ""
    policy: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "loads", tuple(sorted((model, float(rate)) for model, rate in self.loads)))
        if not self.job:
            object.__setattr__(self, "policy", "")

    @property
    def label(self) -> str:
        """`resnet18@10 + squeezenet1_1@10 beside resnet50_16 (idle)`."""
        services = " + ".join(f"{model}@{rate:g}" for model, rate in self.loads) or "nothing"
        return f"{services} beside {self.job} ({self.policy})" if self.job else f"{services} alone"


@dataclass(frozen=True)
class Memory:
    """Peak memory of a process in MiB: private to it, shared with others (mapped files), on the GPU."""

    private_mib: float = 0.0
    shared_mib: float = 0.0
    gpu_mib: float = 0.0

    def at_least(self, other: Memory) -> Memory:
        """The larger of both, part by part."""
        return Memory(
            max(self.private_mib, other.private_mib),
            max(self.shared_mib, other.shared_mib),
            max(self.gpu_mib, other.gpu_mib),
        )


@dataclass(frozen=True)
class Sample:
    """One service in one window. sojourns_ms: from the intended send time, inf = no reply. services_ms: picked from
    the queue until the reply was ready, answered requests only.
    """

    model: str
    rate: float
    sojourns_ms: tuple[float, ...]
    services_ms: tuple[float, ...]


@dataclass(frozen=True)
class Window:
    """One measured window; `fault` says why there is nothing in it. memory: by `server <model>` and `trainer <job>`."""

    condition: Condition
    repeat: int
    seconds: float
    samples: tuple[Sample, ...] = ()
    samples_per_s: float | None = None
    memory: Mapping[str, Memory] = field(default_factory=dict)
    foreign_cores: float = 0.0
    fault: str = ""


def sojourns(windows: Iterable[Window], model: str) -> NDArray[np.float64]:
    """All sojourns (ms) of a model's services, window after window."""
    return _joined(sample.sojourns_ms for window in windows for sample in window.samples if sample.model == model)


def service_times(windows: Iterable[Window], model: str) -> NDArray[np.float64]:
    """All service times (ms) of a model's services."""
    return _joined(sample.services_ms for window in windows for sample in window.samples if sample.model == model)


def _joined(parts: Iterable[Sequence[float]]) -> NDArray[np.float64]:
    found = [np.asarray(part, dtype=np.float64) for part in parts]
    return np.concatenate(found) if found else np.empty(0)


class Profile:
    """Every window measured on one kind of machine, in memory and, with a path, on disk after each addition."""

    def __init__(self, path: Path | None = None, machine: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.machine = dict(machine or {})
        self._windows: dict[tuple[Condition, int], Window] = {}

    @classmethod
    def open(cls, path: Path, machine: Mapping[str, Any], fresh: bool = False) -> Profile:
        """The profile of this machine as it was left; empty with `fresh`. InputError when the file is damaged."""
        profile = cls(path, machine)
        if fresh or not path.exists():
            return profile
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            if body["schema"] != SCHEMA:
                return profile
            for entry in body["windows"]:
                profile._put(_window(entry))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no profile ({error}); delete it or measure again with --fresh") from error
        return profile

    def __len__(self) -> int:
        return len(self._windows)

    def add(self, window: Window) -> None:
        """Keep a window."""
        self._put(window)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            entries = [_entry(kept) for kept in self._windows.values()]
            write_json(self.path, {"schema": SCHEMA, "machine": self.machine, "windows": entries})

    def _put(self, window: Window) -> None:
        self._windows[window.condition, window.repeat] = window

    def get(self, condition: Condition, repeat: int) -> Window | None:
        """One window, or None."""
        return self._windows.get((condition, repeat))

    def windows(self, condition: Condition | None = None) -> list[Window]:
        """All windows, or those of one condition by repeat."""
        if condition is None:
            return list(self._windows.values())
        found = [window for (kept, _), window in self._windows.items() if kept == condition]
        return sorted(found, key=lambda window: window.repeat)


def fingerprint(machine: Mapping[str, Any]) -> str:
    """Twelve hex digits of what decides the figures: processor, cores, memory, GPUs, library versions."""
    return digest(machine)[:12]


def _entry(window: Window) -> dict[str, Any]:
    entry = asdict(window)
    for sample in entry["samples"]:
        for name in ("sojourns_ms", "services_ms"):
            sample[name] = [value if np.isfinite(value) else LOST for value in sample[name]]
    return entry


def _window(entry: Mapping[str, Any]) -> Window:
    condition = entry["condition"]
    return Window(
        condition=Condition(
            tuple((model, rate) for model, rate in condition["loads"]), condition["job"], condition["policy"]
        ),
        repeat=int(entry["repeat"]),
        seconds=float(entry["seconds"]),
        samples=tuple(
            Sample(sample["model"], sample["rate"], _floats(sample["sojourns_ms"]), _floats(sample["services_ms"]))
            for sample in entry["samples"]
        ),
        samples_per_s=entry["samples_per_s"],
        memory={name: Memory(**parts) for name, parts in entry["memory"].items()},
        foreign_cores=float(entry["foreign_cores"]),
        fault=str(entry["fault"]),
    )


def _floats(values: Sequence[float | str]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
