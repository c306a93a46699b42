"""The end of a run: summary, attribution, validity, the table on the console, and the figures for an index and for --json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from corun.report import attribution
from corun.report import console as table
from corun.report.summary import Summary, as_json, summarise
from corun.report.validity import check


def conclude(path: Path, console: Console | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write summary, attribution and validity of a run directory, print the table; returns (index figures, JSON answer)."""
    summary = summarise(path)
    attribution.write(path)
    flags = check(summary)
    if console:
        table.show(summary, flags, console)
    answer = {**as_json(summary), "valid": not flags, "reasons": [flag.sentence for flag in flags]}
    return _figures(summary, not flags), answer


def _figures(summary: Summary, valid: bool) -> dict[str, Any]:
    """One line of a sweep's index: the worst p99 of the services in each arm, and the training speed."""
    figures: dict[str, Any] = {"valid": valid}
    for arm in ("alone", "corun"):
        tails = [row["p99_ms"] for row in summary.pooled(arm, "server") if row["p99_ms"] is not None]
        figures[f"{arm}_worst_p99_ms"] = round(max(tails), 3) if tails else None
    for arm in ("train", "corun"):
        speeds = [row["train_samples_per_s"] for row in summary.pooled(arm, "trainer")]
        figures[f"{arm}_samples_per_s"] = round(speeds[0], 3) if speeds and speeds[0] is not None else None
    return figures
