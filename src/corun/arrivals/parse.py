"""Turns names and parameters into arrival processes, and processes back into plain values for a manifest.

Usage::

    parse("poisson", rate=10)
    parse("gamma", rate=10, shape=0.5)
    parse("poisson", rate=10, exact=True)                    # the expected count, exactly: "poisson-exact"
    parse("trace", path="conv.csv", rate=8, fit="thin")
    from_config({"name": "mmpp", "rate": 20, "on_s": 2})     # the same as a config dict
    from_text("gamma:rate=10,shape=0.5")                     # the same on a command line
    of_rate(0)                                               # the original's convention: 0 is the Azure trace
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, cast

from corun.arrivals import schedule as schedules
from corun.arrivals.legacy import Legacy
from corun.arrivals.processes import (
    ClosedLoop,
    Constant,
    ExactCount,
    Gamma,
    Mmpp,
    Modulated,
    Offline,
    Poisson,
    Process,
    Ramp,
    Sine,
    Step,
)
from corun.arrivals.recorded import MinuteCounts, Replay, Trace
from corun.arrivals.traces import azure_default, read
from corun.errors import InputError, suggest

__all__ = ["ALIASES", "PROCESSES", "describe", "from_config", "from_text", "of_rate", "parse"]

Value = float | int | str | bool


def _trace(path: str, format: str = "auto", rate: float = 0.0, fit: str = "compress") -> Process:
    return _fitted(read(Path(path), format), rate, fit)


def _azure(rate: float = 0.0, fit: str = "compress") -> Process:
    return _fitted(azure_default(), rate, fit)


def _replay(path: str, stream: int = 0) -> Process:
    rows = schedules.load(Path(path)).of_stream(stream)
    if not len(rows):
        raise InputError(f"{path}: the schedule has no stream {stream}")
    return Replay.from_ns(rows.intended_ns, label=f"replay of {Path(path).name}, stream {stream}")


def _fitted(trace: Trace | MinuteCounts, rate: float, fit: str) -> Process:
    """A trace at its own rate (0) or changed to a target one by `compress` (time) or `thin` (requests)."""
    if fit not in ("compress", "thin"):
        raise InputError(f'fit must be "compress" or "thin", not "{fit}"{suggest(fit, ["compress", "thin"])}')
    if rate == 0:
        return trace
    return trace.compressed(rate) if fit == "compress" else trace.thinned(rate)


PROCESSES: Final[dict[str, Callable[..., Process]]] = {
    "azure": _azure,
    "closed": ClosedLoop,
    "constant": Constant,
    "gamma": Gamma,
    "legacy": Legacy,
    "mmpp": Mmpp,
    "offline": Offline,
    "poisson": Poisson,
    "ramp": Ramp,
    "replay": _replay,
    "sine": Sine,
    "step": Step,
    "trace": _trace,
}
"""Every process that can be named, with what builds it; its parameters are the builder's."""

ALIASES: Final = {"burst": "mmpp", "on-off": "mmpp", "saturation": "offline", "closed-loop": "closed"}


def parse(name: str, /, **parameters: Value) -> Process:
    """The process of that name with these parameters.

    `exact=True` (or a number) conditions poisson, sine, ramp and step on their count.

    Raises:
        InputError: an unknown name or parameter (with the nearest known one), a missing or impossible value.
    """
    known = [*PROCESSES, *ALIASES]
    builder = PROCESSES.get(ALIASES.get(name, name))
    if builder is None:
        raise InputError(
            f'arrival process "{name}" is not known{suggest(name, known)} (known: {", ".join(sorted(known))})'
        )
    given = dict(parameters)
    exact = given.pop("exact", False)
    process = builder(**_arguments(name, builder, given))
    if exact is False:
        return process
    count = None if exact is True else cast("int", _typed("count", "int", exact, name))
    return ExactCount(cast("Modulated", process), count)


def from_config(config: Mapping[str, object]) -> Process:
    """The process that a config dict describes: `name` and that process's parameters."""
    name = config.get("name")
    if not isinstance(name, str):
        raise InputError(f'an arrival process needs a "name" (one of {", ".join(sorted(PROCESSES))})')
    parameters = {key: value for key, value in config.items() if key != "name"}
    wrong = [f"{key}: {value!r} is not a number, text or true/false" for key, value in parameters.items()
             if not isinstance(value, (bool, int, float, str))]  # fmt: skip
    if wrong:
        raise InputError(f"{name}: bad parameters", wrong)
    return parse(name, **cast("dict[str, Value]", parameters))


def from_text(text: str) -> Process:
    """The process of `name` or `name:key=value,...`; a first value without a key is the rate (`poisson:20`)."""
    name, _, rest = text.strip().partition(":")
    parameters: dict[str, Value] = {}
    for place, item in enumerate(part for part in rest.split(",") if part.strip()):
        key, found, value = item.partition("=")
        if not found and place == 0:
            key, value = "rate", item
        elif not found:
            raise InputError(f'arrivals "{text}": "{item}" is not key=value')
        parameters[key.strip()] = _literal(value.strip())
    return parse(name.strip(), **parameters)


def of_rate(rate: float) -> Process:
    """Poisson at `rate` requests/s; rate 0 is the Azure trace, as on the original's command line."""
    return azure_default() if rate == 0 else Poisson(rate)


def describe(process: Process) -> dict[str, Value | None]:
    """Plain values that say what a process is, for a manifest; recorded arrivals appear by label, number and span."""
    words: dict[str, Value | None] = {"name": process.name}
    match process:
        case ExactCount():
            return {**describe(process.process), "name": process.name, "count": process.count}
        case Trace():
            return words | {"label": process.label, "arrivals": process.offsets_s.size, "span_s": process.span_s,
                            "rate": process.rate, "keep": process.keep, "spread_s": process.spread_s}  # fmt: skip
        case MinuteCounts():
            return words | {"label": process.label, "bins": len(process.counts), "bin_s": process.bin_s,
                            "rate": process.rate, "keep": process.keep}  # fmt: skip
        case Replay():
            return words | {"label": process.label, "arrivals": process.stamps_s.size}
        case _ if dataclasses.is_dataclass(process) and not isinstance(process, type):
            return words | dataclasses.asdict(process)
        case _:
            return words | {"rate": process.rate}


def _arguments(name: str, builder: Callable[..., Process], given: Mapping[str, Value]) -> dict[str, Value]:
    """The given parameters as the builder's types; every problem in one error."""
    expected = inspect.signature(builder).parameters
    problems = [f'no parameter "{key}"{suggest(key, expected)}' for key in given if key not in expected]
    problems += [
        f"{key} is missing" for key, what in expected.items() if what.default is what.empty and key not in given
    ]
    arguments: dict[str, Value] = {}
    for key, value in given.items():
        if key in expected:
            try:
                arguments[key] = _typed(key, str(expected[key].annotation), value, name)
            except InputError as error:
                problems += error.problems
    if problems:
        raise InputError(f"{name}: bad parameters (it takes {', '.join(expected)})", problems)
    return arguments


def _typed(key: str, wanted: str, value: Value, name: str) -> Value:
    """`value` as a `wanted` ("float", "int" or "str") without loss."""
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if wanted == "float" and number is not None and (isinstance(number, float) or abs(number) <= sys.float_info.max):
        return float(number)
    if wanted == "int" and number is not None and (isinstance(number, int) or number.is_integer()):
        return int(number)
    if wanted == "str" and isinstance(value, str) and "\0" not in value:
        return value
    words = {"float": "a number", "int": "a whole number", "str": "text"}[wanted]
    raise InputError(f"{name}: bad parameters", [f"{key} must be {words}, not {value!r}"])


def _literal(text: str) -> Value:
    """Text of a command line as a number or true/false where it is one."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
