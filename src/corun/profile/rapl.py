"""CPU energy from RAPL: /sys/class/powercap/intel-rapl:*, Intel's name for what AMD offers there as well.

The kernel's counter wraps at max_energy_range_uj. At 1 Hz no wrap can be missed (262 kJ at 300 W take 14
minutes), so each difference is taken modulo the range and the column only ever grows::

    energy(t) = energy(t - 1) + (raw(t) - raw(t - 1)) mod (range + 1)

The files belong to root since the PLATYPUS attack (CVE-2020-8694).
"""

from __future__ import annotations

import re
from pathlib import Path

from corun.profile.kept import KeptFile, read_text, under
from corun.profile.patterns import slug
from corun.profile.source import READ_ERRORS, Row, Status, Unavailable, describe
from corun.run.records import Column

_DOMAIN = re.compile(r"intel-rapl:(\d+)(:\d+)?")


class Unwrapped:
    """A counter that wraps at `limit` made to grow for ever; it starts at its first raw value."""

    def __init__(self, limit: int) -> None:
        self._modulus = limit + 1
        self._raw: int | None = None
        self._total = 0

    def add(self, raw: int) -> int:
        """The total after this raw reading."""
        self._total += raw if self._raw is None else (raw - self._raw) % self._modulus
        self._raw = raw
        return self._total


class Domain:
    """One RAPL domain: a package, or its core, uncore or dram part."""

    def __init__(self, directory: Path, column: str) -> None:
        self.column = column
        self.range_uj = int((directory / "max_energy_range_uj").read_text())
        self.file = KeptFile(directory / "energy_uj")
        self._counter = Unwrapped(self.range_uj)
        self.read()

    def read(self) -> int:
        return self._counter.add(int(self.file.read()))


class Rapl:
    """Every domain that may be read, one column each: rapl_package_0_uj, rapl_package_0_dram_uj ..."""

    name = "rapl"

    def __init__(self, root: Path) -> None:
        base = under(root, "/sys/class/powercap")
        self._domains: list[Domain] = []
        self._absent: dict[str, str] = {}
        for directory in sorted(base.glob("intel-rapl:*")):
            if _DOMAIN.fullmatch(directory.name):
                self._open(directory)
        if not self._domains:
            raise Unavailable(next(iter(self._absent.values()), f"no {base}/intel-rapl:*"))
        self.columns = tuple(
            Column(
                domain.column, "uJ", "int", "CPU energy since the profiler's start plus the first reading (counter)"
            )
            for domain in self._domains
        )

    def _open(self, directory: Path) -> None:
        column = _column_of(directory)
        try:
            self._domains.append(Domain(directory, column))
        except READ_ERRORS as error:
            hint = "; root may read it" if isinstance(error, PermissionError) else ""
            self._absent[column] = describe(error) + hint

    def read(self, row: Row) -> None:
        for domain in self._domains:
            row[domain.column] = domain.read()

    def status(self) -> Status:
        ranges: dict[str, object] = {
            domain.column: {"max_energy_range_uj": domain.range_uj} for domain in self._domains
        }
        return Status(self.name, details=ranges, absent=self._absent)

    def close(self) -> None:
        for domain in self._domains:
            domain.file.close()


def _column_of(directory: Path) -> str:
    """`intel-rapl:0` named package-0 is rapl_package_0_uj; `intel-rapl:0:1` named dram is rapl_package_0_dram_uj."""
    own = read_text(directory / "name") or directory.name
    parent = directory.name.count(":") > 1 and read_text(
        directory.parent / directory.name.rpartition(":")[0] / "name"
    )
    return "_".join(["rapl", *([slug(parent)] if parent else []), slug(own), "uj"])
