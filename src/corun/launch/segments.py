"""Which windows a run has, in which order, and the schedule of all of them."""

from __future__ import annotations

from dataclasses import dataclass

from corun import arrivals
from corun.arrivals import schedule as schedules
from corun.run.config import Arm, Pair, Service

RATELESS = ("closed", "closed-loop", "offline", "saturation")


@dataclass(frozen=True)
class Segment:
    """One window of one arm and repeat."""

    index: int
    arm: Arm
    repeat: int
    duration_s: float

    @property
    def serves(self) -> bool:
        """Clients send in this window."""
        return self.arm != "train"

    @property
    def trains(self) -> bool:
        """The trainer runs in this window."""
        return self.arm != "alone"


def plan(pair: Pair) -> list[Segment]:
    """All windows; odd repeats run the arms backwards (ABBA), so a slow drift hits every arm alike."""
    segments: list[Segment] = []
    for repeat in range(pair.config.repeat):
        arms = pair.arms if repeat % 2 == 0 else pair.arms[::-1]
        for arm in arms:
            segments.append(Segment(len(segments), arm, repeat, pair.config.duration(arm)))
    return segments


@dataclass(frozen=True)
class Planned:
    """The schedule of a whole run; rows[segment, stream] = (first, last) among the rows of that stream."""

    schedule: schedules.Schedule
    rows: dict[tuple[int, int], tuple[int, int]]


def make_schedule(pair: Pair, segments: list[Segment]) -> Planned:
    """Every request of the run. Arms of one repeat share their arrivals, so they are compared pairwise."""
    streams = [
        schedules.Stream(number, process_of(service), service.count) for number, service in enumerate(pair.services)
    ]
    drawn = [
        schedules.make(streams if segment.serves else [], segment.duration_s, pair.config.seed, segment.repeat)
        for segment in segments
    ]
    whole, given = schedules.join([_in_order(schedule, pair) for schedule in drawn])
    rows = {
        (segment.index, stream): (ids.start, ids.stop)
        for segment, by_stream in zip(segments, given, strict=True)
        for stream, ids in by_stream.items()
    }
    return Planned(whole, rows)


def _in_order(schedule: schedules.Schedule, pair: Pair) -> schedules.Schedule:
    """Where requests shift, the k-th request of a stream carries the k-th payload, each of them once."""
    if pair.config.drift is None:
        return schedule
    rows = schedule.rows.copy()
    for number, service in enumerate(pair.services):
        if service.data.partition(":")[0] == "drift":
            mine = rows["stream"] == number
            rows["payload"][mine] = rows["id"][mine]
    return schedules.Schedule(rows)


def process_of(service: Service) -> arrivals.Process:
    """The arrivals a service's client sends: its `process`, at its `rate` unless the process names one itself.

    Raises InputError when the process is unknown or its parameters are impossible.
    """
    if isinstance(service.process, dict):
        return arrivals.from_config(service.process)
    if ":" in service.process:
        return arrivals.from_text(service.process)
    if service.process == "poisson":
        return arrivals.of_rate(service.rate)
    if service.process in RATELESS or service.rate == 0:
        return arrivals.parse(service.process)
    return arrivals.parse(service.process, rate=service.rate)
