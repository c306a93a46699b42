"""Paths with placeholders, expanded by looking which files exist.

`{n}` and `{m}` stand for a number, any other `{word}` for a part of one path component::

    /sys/class/hwmon/hwmon{n}/temp{m}_input   ->  hwmon2/temp1_input with n=2, m=1
    /sys/class/devfreq/{name}.gpu/load        ->  fb000000.gpu/load with name=fb000000

A placeholder used twice must stand for the same text both times.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
NUMERIC = frozenset({"n", "m"})


@dataclass(frozen=True)
class Match:
    """One existing file and what its placeholders stand for."""

    path: Path
    values: Mapping[str, str]


def placeholders(pattern: str) -> set[str]:
    """Names of the placeholders of a pattern."""
    return set(PLACEHOLDER.findall(pattern))


def fill(pattern: str, values: Mapping[str, str]) -> str:
    """The pattern with its known placeholders filled in; unknown ones stay."""
    return PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), pattern)


def slug(text: str) -> str:
    """A text as part of a column name: lower case, digits and underscores (`x86_pkg_temp`, `acpitz_0`)."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def tidy(column: str) -> str:
    """A column name without the gaps that an empty placeholder leaves."""
    return re.sub(r"_{2,}", "_", column).strip("_")


def expand(root: Path, pattern: str) -> list[Match]:
    """Every existing path below `root` that fits the absolute `pattern`, in the order of its numbers."""
    parts = PurePosixPath(pattern).parts[1:]
    return sorted(_walk(root, parts, {}), key=lambda match: _natural(str(match.path)))


def _walk(directory: Path, parts: tuple[str, ...], values: dict[str, str]) -> Iterator[Match]:
    if not parts:
        if directory.exists():
            yield Match(directory, values)
        return
    part = fill(parts[0], values)
    if not placeholders(part):
        yield from _walk(directory / part, parts[1:], values)
        return
    shape = _regex(part)
    for name in _names(directory):
        found = shape.fullmatch(name)
        if found:
            yield from _walk(directory / name, parts[1:], values | found.groupdict())


def _names(directory: Path) -> list[str]:
    try:
        return [entry.name for entry in directory.iterdir()]
    except OSError:
        return []


def _regex(part: str) -> re.Pattern[str]:
    """One path component as a regular expression with a named group for each placeholder."""
    pieces: list[str] = []
    seen: set[str] = set()
    position = 0
    for found in PLACEHOLDER.finditer(part):
        name = found[1]
        pieces.append(re.escape(part[position : found.start()]))
        body = r"[0-9]+" if name in NUMERIC else r"[^/]+?"
        pieces.append(f"(?P={name})" if name in seen else f"(?P<{name}>{body})")
        seen.add(name)
        position = found.end()
    pieces.append(re.escape(part[position:]))
    return re.compile("".join(pieces))


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key with numbers by value: cpu2 before cpu10."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", text)]
