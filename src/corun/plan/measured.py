"""What was measured: windows of conditions, a curve of each model, and where all of it is kept for this machine.

A condition is a set of loads (model, requests/s), whether somebody trains, and under which sharing policy. Windows of
one condition are numbered; the numbers are those of the arrivals' repeats, so a window is never measured twice.
A window that could not be measured because processes died (out of memory) is kept too: it says "does not fit".

A curve is what a model's server took for batches of each size, alone on the machine. Profiles from before there were
curves load as they are; what is missing is measured when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from corun.errors import InputError
from corun.run.config import digest
from corun.run.directory import write_json
from corun.stats.intervals import order_statistic_interval

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
    the queue until the reply was ready, answered requests only. batches: how many were in the batch of each of
    those; () where the service's model does not ask.
    """

    model: str
    rate: float
    sojourns_ms: tuple[float, ...]
    services_ms: tuple[float, ...]
    batches: tuple[int, ...] = ()


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


@dataclass(frozen=True)
class Point:
    """Batches of one size. times_ms: from the closing of a batch to its last reply, one for each batch.

    memory: peak of the server so far, smaller sizes included. rss_mib, pss_mib: resident after these batches, whole
    and with shared pages divided among their users; None where the kernel does not say.
    """

    size: int
    times_ms: tuple[float, ...]
    memory: Memory = Memory()
    rss_mib: float | None = None
    pss_mib: float | None = None

    @cached_property
    def ms(self) -> float:
        """Median time of a batch."""
        return float(np.quantile(self.times_ms, 0.5, method="higher"))

    @property
    def per_s(self) -> float:
        """Requests/s when one such batch follows the other."""
        return 1000 * self.size / self.ms

    @property
    def interval_ms(self) -> tuple[float, float] | None:
        """The median's interval by order statistics; None below its floor of 11 batches."""
        found = order_statistic_interval(self.times_ms, 50).interval
        return (found.low, found.high) if found else None


@dataclass(frozen=True)
class Curve:
    """Time against batch size, by increasing size, at least one point.

    asked: the sizes that were to be measured; the larger ones are missing where they would have taken too long.
    overhead_ms: what a request takes on the way to the server and back.
    """

    asked: tuple[int, ...]
    points: tuple[Point, ...]
    overhead_ms: float = 0.0
    foreign_cores: float = 0.0

    def covers(self, sizes: Iterable[int]) -> bool:
        """Whether all these sizes were asked for."""
        return set(sizes) <= set(self.asked)

    def times_ms(self, max_batch: int) -> tuple[float, ...]:
        """Times of batches of 1 .. max_batch, straight lines between the sizes measured and beyond the last two."""
        sizes, times = [one.size for one in self.points], [one.ms for one in self.points]
        found = np.interp(np.arange(1, max_batch + 1), sizes, times)
        if max_batch > sizes[-1]:
            rise = max(0.0, (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])) if len(sizes) > 1 else times[-1]
            found[sizes[-1] :] = times[-1] + rise * np.arange(1, max_batch - sizes[-1] + 1)
        return tuple(found.tolist())

    @cached_property
    def shape(self) -> tuple[float, ...]:
        """All times over the median of their size."""
        return tuple(time / point.ms for point in self.points for time in point.times_ms)


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
    """All windows and curves measured on one kind of machine, in memory and, with a path, on disk after each addition."""

    def __init__(self, path: Path | None = None, machine: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.machine = dict(machine or {})
        self._windows: dict[tuple[Condition, int], Window] = {}
        self._curves: dict[str, Curve] = {}

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
            profile._curves = {model: _curve(entry) for model, entry in body.get("curves", {}).items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no profile ({error}); delete it or measure again with --fresh") from error
        return profile

    def __len__(self) -> int:
        return len(self._windows)

    def add(self, window: Window) -> None:
        """Keep a window."""
        self._put(window)
        self._save()

    def add_curve(self, model: str, curve: Curve) -> None:
        """Keep a model's curve in place of the one before."""
        self._curves[model] = curve
        self._save()

    def _save(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            entries = [_entry(kept) for kept in self._windows.values()]
            curves = {model: asdict(curve) for model, curve in self._curves.items()}
            body = {"schema": SCHEMA, "machine": self.machine, "curves": curves, "windows": entries}
            write_json(self.path, body)

    def _put(self, window: Window) -> None:
        self._windows[window.condition, window.repeat] = window

    @property
    def curves(self) -> Mapping[str, Curve]:
        """By model."""
        return self._curves

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
        if not sample["batches"]:
            del sample["batches"]
    return entry


def _window(entry: Mapping[str, Any]) -> Window:
    condition = entry["condition"]
    return Window(
        condition=Condition(
            tuple((model, rate) for model, rate in condition["loads"]), condition["job"], condition["policy"]
        ),
        repeat=int(entry["repeat"]),
        seconds=float(entry["seconds"]),
        samples=tuple(_sample(sample) for sample in entry["samples"]),
        samples_per_s=entry["samples_per_s"],
        memory={name: Memory(**parts) for name, parts in entry["memory"].items()},
        foreign_cores=float(entry["foreign_cores"]),
        fault=str(entry["fault"]),
    )


def _sample(entry: Mapping[str, Any]) -> Sample:
    return Sample(
        entry["model"],
        entry["rate"],
        _floats(entry["sojourns_ms"]),
        _floats(entry["services_ms"]),
        tuple(int(size) for size in entry.get("batches", ())),
    )


def _curve(entry: Mapping[str, Any]) -> Curve:
    points = tuple(
        Point(
            int(point["size"]),
            _floats(point["times_ms"]),
            Memory(**point["memory"]),
            point["rss_mib"],
            point["pss_mib"],
        )
        for point in entry["points"]
    )
    if not points:
        raise ValueError("a curve without a point")
    return Curve(tuple(entry["asked"]), points, float(entry["overhead_ms"]), float(entry["foreign_cores"]))


def _floats(values: Sequence[float | str]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
