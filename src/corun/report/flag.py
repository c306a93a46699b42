"""One reason for doubt about a run: what was measured, the limit, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """A check that failed. `arm` and `who` are empty where the whole run is meant.

    found: what was measured, where, and over which limit. remedy: what to do; empty where nothing can be said.
    """

    check: str
    arm: str
    who: str
    value: float | None
    limit: float | None
    found: str
    remedy: str = ""

    @property
    def sentence(self) -> str:
        """Finding and remedy in one sentence."""
        return f"{self.found}; {self.remedy}" if self.remedy else self.found

    def as_json(self) -> dict[str, Any]:
        """As it stands in validity.json."""
        return {**asdict(self), "sentence": self.sentence}
