"""The end of a run: summary, attribution, validity and promises on disk, the tables on the console, and the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from corun.errors import CorunError
from corun.report import accuracy, attribution, slo
from corun.report import console as table
from corun.report.slo import Promises, Verdict
from corun.report.summary import Summary, as_json, summarise
from corun.report.validity import check, read_calibration


def conclude(
    path: Path, console: Console | None, promises: Promises | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write what a run directory says about itself and print it; returns (figures for an index, answer for --json).

    promises: SLO bounds by service, `{"resnet18": {"p99_ms": 100.0}}`.
    """
    summary = summarise(path)
    attribution.write(path)
    flags = check(summary)
    verdicts = slo.write(path, promises or {})
    right = accuracy.overall(accuracy.write(path))
    calibration = read_calibration(path)
    if console:
        table.show(summary, flags, console, verdicts, calibration)
        for service, found in right.items():
            console.print(
                f"accuracy of {service}: {found['accuracy']:.1%} of {found['requests']:,.0f} labelled requests"
            )
    answer = {
        **as_json(summary),
        "valid": not flags,
        "reasons": [flag.sentence for flag in flags],
        "calibration": calibration,
        **({"accuracy": right} if right else {}),
        **(slo.as_json(verdicts) if verdicts else {}),
    }
    return _figures(summary, not flags, verdicts), answer


def _figures(summary: Summary, valid: bool, verdicts: list[Verdict]) -> dict[str, Any]:
    """One line of a sweep's index: the worst p99 of the services in each arm, the training speed, the worst verdict."""
    figures: dict[str, Any] = {"valid": valid}
    if verdicts:
        figures["slo"] = slo.overall(verdicts)
    for arm in ("alone", "corun"):
        tails = [row["p99_ms"] for row in summary.pooled(arm, "server") if row["p99_ms"] is not None]
        figures[f"{arm}_worst_p99_ms"] = round(max(tails), 3) if tails else None
    for arm in ("train", "corun"):
        speeds = [row["train_samples_per_s"] for row in summary.pooled(arm, "trainer")]
        figures[f"{arm}_samples_per_s"] = round(speeds[0], 3) if speeds and speeds[0] is not None else None
    return figures


def write_page(path: Path, console: Console) -> None:
    """report.html of a run or a sweep; what cannot be drawn is said, the rows are safe by now."""
    from corun.report import page, sweep_page

    try:
        written = sweep_page.write(path) if sweep_page.is_sweep(path) else page.write(path)
    except CorunError as error:
        console.print(f"[yellow]no report:[/] {escape(str(error))}", highlight=False)
        return
    console.print(f"report: {written}", highlight=False, soft_wrap=True)
