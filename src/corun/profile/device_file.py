"""device.json: which files of this device to read, in the pattern form or in the original's nested form.

Pattern form::

    {"name": "rock 5b", "root": "/", "readings": [
      {"column": "cpu{n}_khz", "path": "/sys/devices/system/cpu/cpu{n}/cpufreq/scaling_cur_freq", "unit": "kHz"},
      {"column": "gpu_load_pct", "path": "/sys/class/devfreq/{name}.gpu/load", "regex": "(\\d+)@", "unit": "%"}]}

The nested form is the published research code's (`cpu.cpu0.freq_now`, `gpu.usage`, `thermal.thermal_zone0`);
empty strings are absent, settings (`setfreq`, `governor` ...) are known and skipped. Validation is plain code:
the profiler is a measured process and does not load a validation library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corun.errors import InputError, suggest
from corun.profile.patterns import placeholders
from corun.profile.tables import PROFILE
from corun.run.records import names

KINDS = ("number", "text")
_TOP = ("name", "root", "readings")
_READING = ("column", "path", "scale", "unit", "required", "regex", "kind", "label", "only_if", "doc")
_ONLY_IF = ("path", "matches")
_COLUMN = re.compile(r"(?:[a-z0-9_]|\{[a-z_]+\})+")

_CPU_KEYS = (
    "freq_min",
    "freq_now",
    "freq_max",
    "available_freq",
    "temp",
    "governor",
    "setspeed",
    "available_governor",
)
_GPU_KEYS = ("freq", "temp", "usage", "setfreq", "governor", "available_freq", "available_governor")
_BATTERY_KEYS = ("cap", "cur", "vol", "temp")
_OTHER_KEYS = ("net_info", "mem_info")
_SECTIONS = ("cpu", "gpu", "battery", "thermal", "other")
_FIRST_NUMBER = r"(-?\d+(?:\.\d+)?)"


@dataclass(frozen=True)
class Condition:
    """Read only where the file at `path` holds a text that matches."""

    path: str
    matches: str


@dataclass(frozen=True)
class Reading:
    """One line of the device file; `path` and `column` may hold placeholders.

    scale multiplies the number; regex takes its first group out of the text (`47@200000000Hz`); label is a
    file whose text replaces `{label}` in the column (a thermal zone's type: zone numbers move).
    """

    column: str
    path: str
    scale: float = 1
    unit: str = ""
    required: bool = False
    regex: str = ""
    kind: str = "number"
    label: str = ""
    only_if: Condition | None = None
    doc: str = ""


@dataclass(frozen=True)
class DeviceFile:
    """A device's name, the directory all paths lie below, and its readings."""

    name: str = ""
    root: str = "/"
    readings: tuple[Reading, ...] = field(default=())


def load(path: Path) -> DeviceFile:
    """Read and check a device file; InputError lists everything that is wrong with it at once."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the device file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    return parse(content, str(path))


def parse(content: object, where: str = "device.json") -> DeviceFile:
    """A device file from its JSON value, in either form."""
    problems: list[str] = []
    if not isinstance(content, dict):
        raise InputError(f"{where} must hold a JSON object, not {type(content).__name__}")
    nested = "readings" not in content and any(section in content for section in _SECTIONS)
    device = _nested(content, problems) if nested else _patterns(content, problems)
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError(f"{where} has {count}", problems)
    return device


def _patterns(content: Mapping[str, Any], problems: list[str]) -> DeviceFile:
    _unknown(content, _TOP, "", problems)
    name = _text(content, "name", "", "", problems)
    root = _text(content, "root", "/", "", problems)
    if not root.startswith("/"):
        problems.append(f'root: must be an absolute directory, not "{root}"')
    rows = content.get("readings")
    if not isinstance(rows, list):
        problems.append("readings: must be a list of objects with column and path")
        rows = []
    readings = [_reading(row, f"readings[{index}]", problems) for index, row in enumerate(rows)]
    found = tuple(reading for reading in readings if reading is not None)
    _duplicates(found, problems)
    return DeviceFile(name, root, found)


def _reading(row: object, where: str, problems: list[str]) -> Reading | None:
    if not isinstance(row, dict):
        problems.append(f"{where}: must be an object, not {type(row).__name__}")
        return None
    _unknown(row, _READING, f"{where}.", problems)
    known_problems = len(problems)
    reading = Reading(
        column=_column(row, f"{where}.", problems),
        path=_path(row, "path", f"{where}.", problems, needed=True),
        scale=_number(row, "scale", 1, f"{where}.", problems),
        unit=_text(row, "unit", "", f"{where}.", problems),
        required=_flag(row, "required", f"{where}.", problems),
        regex=_regex(row, "regex", f"{where}.", problems),
        kind=_choice(row, "kind", KINDS, f"{where}.", problems),
        label=_path(row, "label", f"{where}.", problems),
        only_if=_condition(row.get("only_if"), f"{where}.only_if", problems),
        doc=_text(row, "doc", "", f"{where}.", problems),
    )
    if len(problems) > known_problems:
        return None
    _check_placeholders(reading, where, problems)
    return reading


def _check_placeholders(reading: Reading, where: str, problems: list[str]) -> None:
    """Every placeholder of the column, the label and the condition must come from the path."""
    known = placeholders(reading.path)
    unfilled = placeholders(reading.column) - known - ({"label"} if reading.label else set())
    unfilled |= placeholders(reading.label) - known
    unfilled |= placeholders(reading.only_if.path if reading.only_if else "") - known
    problems.extend(
        f"{where}: {{{name}}} does not stand in path" + ("; give a label file" if name == "label" else "")
        for name in sorted(unfilled)
    )


def _duplicates(readings: tuple[Reading, ...], problems: list[str]) -> None:
    """Two readings may share a column only when a condition or a discovery decides between them."""
    seen: dict[tuple[str, str], int] = {}
    for index, reading in enumerate(readings):
        key = (reading.column, reading.path)
        if key in seen and reading.only_if is None:
            problems.append(f"readings[{index}]: the same column and path as readings[{seen[key]}]")
        seen.setdefault(key, index)


def _condition(value: object, where: str, problems: list[str]) -> Condition | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        problems.append(f"{where}: must be an object with path and matches")
        return None
    _unknown(value, _ONLY_IF, f"{where}.", problems)
    path = _path(value, "path", f"{where}.", problems, needed=True)
    matches = _regex(value, "matches", f"{where}.", problems, groups=False)
    if not matches:
        problems.append(f"{where}.matches: is missing; give a regular expression")
    return Condition(path, matches)


def _nested(content: Mapping[str, Any], problems: list[str]) -> DeviceFile:
    """The original's form as readings, in the order of its sections."""
    _unknown(content, _SECTIONS, "", problems)
    readings: list[Reading] = []
    readings += _nested_cpus(_section(content, "cpu", problems), problems)
    gpu = _section(content, "gpu", problems)
    _unknown(gpu, _GPU_KEYS, "gpu.", problems)
    readings += _named(gpu, "gpu", {"freq": ("gpu_freq", ""), "usage": ("gpu_usage_pct", "%")}, problems)
    readings += _named(gpu, "gpu", {"temp": ("gpu_temp", "")}, problems)
    battery = _section(content, "battery", problems)
    _unknown(battery, _BATTERY_KEYS, "battery.", problems)
    units = {
        "cap": ("battery_pct", "%"),
        "cur": ("battery_current_ua", "uA"),
        "vol": ("battery_voltage_uv", "uV"),
        "temp": ("battery_temp_dc", "0.1 °C"),
    }
    readings += _named(battery, "battery", units, problems)
    readings += _nested_thermal(_section(content, "thermal", problems), problems)
    _unknown(_section(content, "other", problems), _OTHER_KEYS, "other.", problems)
    return DeviceFile("", "/", tuple(readings))


def _nested_cpus(cpus: Mapping[str, Any], problems: list[str]) -> Iterator[Reading]:
    for core in cpus:
        number = re.fullmatch(r"cpu(\d+)", core)
        if not number:
            problems.append(f"cpu.{core}: unknown key; cores are called cpu0, cpu1 ...")
            continue
        keys = _section(cpus, core, problems, prefix="cpu.")
        _unknown(keys, _CPU_KEYS, f"cpu.{core}.", problems)
        columns = {"freq_now": (f"{core}_khz", "kHz"), "temp": (f"{core}_temp", "")}
        yield from _named(keys, f"cpu.{core}", columns, problems)


def _nested_thermal(zones: Mapping[str, Any], problems: list[str]) -> Iterator[Reading]:
    for zone in zones:
        number = re.fullmatch(r"thermal_zone(\d+)", zone)
        if not number:
            problems.append(f"thermal.{zone}: unknown key; zones are called thermal_zone0, thermal_zone1 ...")
            continue
        path = _nested_path(zones, zone, "thermal", problems)
        if path:
            label = path.removesuffix("temp") + "type" if path.endswith("/temp") else ""
            column = f"thermal_{number[1]}_{{label}}_mc" if label else f"thermal_{number[1]}_mc"
            yield Reading(column, path, unit="m°C", regex=_FIRST_NUMBER, label=label)


def _named(
    section: Mapping[str, Any], where: str, columns: Mapping[str, tuple[str, str]], problems: list[str]
) -> list[Reading]:
    paths = {key: _nested_path(section, key, where, problems) for key in columns}
    return [
        Reading(columns[key][0], path, unit=columns[key][1], regex=_FIRST_NUMBER)
        for key, path in paths.items()
        if path
    ]


def _nested_path(section: Mapping[str, Any], key: str, where: str, problems: list[str]) -> str:
    value = section.get(key, "")
    if not isinstance(value, str) or (value and not value.startswith("/")):
        problems.append(f"{where}.{key}: must be an absolute path or an empty string, not {json.dumps(value)}")
        return ""
    return value


def _section(content: Mapping[str, Any], key: str, problems: list[str], prefix: str = "") -> Mapping[str, Any]:
    value = content.get(key, {})
    if not isinstance(value, dict):
        problems.append(f"{prefix}{key}: must be an object, not {type(value).__name__}")
        return {}
    return value


def _unknown(section: Mapping[str, Any], known: tuple[str, ...], prefix: str, problems: list[str]) -> None:
    for key in section:
        if key not in known:
            problems.append(f"{prefix}{key}: unknown key{suggest(key, known)}")


def _column(row: Mapping[str, Any], prefix: str, problems: list[str]) -> str:
    column = _text(row, "column", "", prefix, problems)
    if not _COLUMN.fullmatch(column):
        problems.append(f'{prefix}column: must be lower case letters, digits, _ and {{placeholders}}, not "{column}"')
    if column in names(PROFILE):
        problems.append(f'{prefix}column: "{column}" is a column of the profiler itself; choose another name')
    return column


def _path(row: Mapping[str, Any], key: str, prefix: str, problems: list[str], needed: bool = False) -> str:
    path = _text(row, key, "", prefix, problems)
    if path and not path.startswith("/"):
        problems.append(f'{prefix}{key}: must be an absolute path, not "{path}"')
    if needed and not path:
        problems.append(f"{prefix}{key}: is missing")
    return path


def _text(row: Mapping[str, Any], key: str, default: str, prefix: str, problems: list[str]) -> str:
    value = row.get(key, default)
    if not isinstance(value, str):
        problems.append(f"{prefix}{key}: must be a text, not {json.dumps(value)}")
        return default
    return value


def _number(row: Mapping[str, Any], key: str, default: float, prefix: str, problems: list[str]) -> float:
    value = row.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        problems.append(f"{prefix}{key}: must be a number, not {json.dumps(value)}")
        return default
    return value


def _flag(row: Mapping[str, Any], key: str, prefix: str, problems: list[str]) -> bool:
    value = row.get(key, False)
    if not isinstance(value, bool):
        problems.append(f"{prefix}{key}: must be true or false, not {json.dumps(value)}")
        return False
    return value


def _choice(row: Mapping[str, Any], key: str, known: tuple[str, ...], prefix: str, problems: list[str]) -> str:
    value = _text(row, key, known[0], prefix, problems)
    if value not in known:
        problems.append(f'{prefix}{key}: must be {" or ".join(known)}, not "{value}"{suggest(value, known)}')
    return value


def _regex(row: Mapping[str, Any], key: str, prefix: str, problems: list[str], groups: bool = True) -> str:
    """A regular expression; with `groups` it must have one that takes the value out."""
    text = _text(row, key, "", prefix, problems)
    try:
        compiled = re.compile(text)
    except re.error as error:
        problems.append(f'{prefix}{key}: "{text}" is not a regular expression: {error}')
        return ""
    if text and groups and compiled.groups < 1:
        problems.append(f'{prefix}{key}: "{text}" needs a group in parentheses around the value')
    return text
