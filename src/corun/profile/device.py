"""Readings of device.json on this machine: discovery once, then one pread each per tick."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from corun.errors import InputError
from corun.profile.device_file import Condition, DeviceFile, Reading
from corun.profile.kept import KeptFile, read_text, under
from corun.profile.patterns import Match, expand, fill, slug, tidy
from corun.profile.source import READ_ERRORS, Cell, Faults, Row, Status, Unavailable, describe
from corun.run.records import Column


def value_of(text: str, reading: Reading) -> Cell:
    """The cell of a file's text: regex, then number, then scale; ValueError when it does not fit."""
    if reading.regex:
        found = re.search(reading.regex, text)
        if not found:
            raise ValueError(f'"{text[:40]}" does not match {reading.regex}')
        text = found[1]
    if reading.kind == "text":
        return text
    try:
        number: int | float = int(text)
    except ValueError:
        number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    scaled = number * reading.scale
    return int(scaled) if isinstance(scaled, float) and scaled.is_integer() else scaled


@dataclass
class OpenReading:
    """One file of one reading, with its own column."""

    column: str
    reading: Reading
    file: KeptFile
    label: str

    def value(self) -> Cell:
        return value_of(self.file.read().decode(errors="replace").strip("\x00\n\r\t "), self.reading)

    def describe(self) -> dict[str, object]:
        """What profiler.json says about the column."""
        facts = {"path": str(self.file.path), "unit": self.reading.unit, "type": self.label, "doc": self.reading.doc}
        return {key: value for key, value in facts.items() if value}


class Device:
    """All readings of a device file that exist here. A reading that fails later leaves its own cell empty."""

    name = "device"

    def __init__(self, device: DeviceFile, root: Path, faults: Faults) -> None:
        self._faults = faults
        self._open: list[OpenReading] = []
        self._absent: dict[str, str] = {}
        self._label = device.name
        for reading in device.readings:
            self._discover(reading, root)
        for item in self._open:
            self._absent.pop(item.reading.column, None)
        missing = [
            f"{r.column}: nothing at {r.path}" for r in device.readings if r.required and r.column in self._absent
        ]
        if missing:
            raise InputError("required readings of the device file are not on this machine", missing)
        if not self._open:
            raise Unavailable(f"none of the {len(device.readings)} readings of the device file is on this machine")
        self.columns = tuple(
            Column(
                item.column,
                item.reading.unit,
                "str" if item.reading.kind == "text" else "float",
                item.reading.doc or item.reading.path,
            )
            for item in self._open
        )

    def _discover(self, reading: Reading, root: Path) -> None:
        taken = len(self._open)
        reason = f"no {reading.path}"
        for match in expand(root, reading.path):
            if reading.only_if and not _holds(reading.only_if, match, root):
                reason = f"{reading.only_if.path} is not {reading.only_if.matches}"
                continue
            try:
                self._open.append(self._opened(reading, match, root))
            except READ_ERRORS as error:
                reason = describe(error)
        if len(self._open) == taken:
            self._absent[reading.column] = reason

    def _opened(self, reading: Reading, match: Match, root: Path) -> OpenReading:
        label = ""
        if reading.label:
            label = read_text(under(root, fill(reading.label, match.values))) or ""
        values = {key: slug(value) for key, value in match.values.items()} | {"label": slug(label)}
        column = self._unused(tidy(fill(reading.column, values)))
        opened = OpenReading(column, reading, KeptFile(match.path), label)
        try:
            opened.value()
        except READ_ERRORS:
            opened.file.close()
            raise
        return opened

    def _unused(self, column: str) -> str:
        """The column's name, numbered when an earlier file has it already."""
        used = {item.column for item in self._open}
        candidates = [column, *(f"{column}_{number}" for number in range(2, len(used) + 2))]
        return next(name for name in candidates if name not in used)

    def read(self, row: Row) -> None:
        for item in self._open:
            try:
                row[item.column] = item.value()
            except READ_ERRORS as error:
                self._faults.record(f"{self.name} {item.column}", error)

    def status(self) -> Status:
        details: dict[str, object] = {item.column: item.describe() for item in self._open}
        return Status(f"{self.name} {self._label}".strip(), details=details, absent=self._absent)

    def close(self) -> None:
        for item in self._open:
            item.file.close()


def _holds(condition: Condition, match: Match, root: Path) -> bool:
    text = read_text(under(root, fill(condition.path, match.values)))
    return text is not None and re.fullmatch(condition.matches, text) is not None
