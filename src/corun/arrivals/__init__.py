"""Request arrivals: processes, traces, schedules made before a run, and the validator that judges them."""

from corun.arrivals.legacy import Legacy
from corun.arrivals.parse import describe, from_config, from_text, of_rate, parse
from corun.arrivals.processes import (
    ClosedLoop,
    Constant,
    ExactCount,
    Gamma,
    Mmpp,
    Offline,
    Poisson,
    Process,
    Ramp,
    Sine,
    Step,
)
from corun.arrivals.recorded import MinuteCounts, Replay, Trace
from corun.arrivals.schedule import ROW, UNPLANNED_NS, Schedule, Stream, join, load, make, merge, save
from corun.arrivals.traces import azure_default, read
from corun.arrivals.validator import Check, Report, validate

__all__ = [
    "ROW",
    "UNPLANNED_NS",
    "Check",
    "ClosedLoop",
    "Constant",
    "ExactCount",
    "Gamma",
    "Legacy",
    "MinuteCounts",
    "Mmpp",
    "Offline",
    "Poisson",
    "Process",
    "Ramp",
    "Replay",
    "Report",
    "Schedule",
    "Sine",
    "Step",
    "Stream",
    "Trace",
    "azure_default",
    "describe",
    "from_config",
    "from_text",
    "join",
    "load",
    "make",
    "merge",
    "of_rate",
    "parse",
    "read",
    "save",
    "validate",
]
