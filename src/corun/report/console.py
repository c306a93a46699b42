"""The table a person sees at the end of a run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from corun.report.summary import Summary
from corun.report.validity import Flag

_FIGURES = ("p50_ms", "p90_ms", "p95_ms", "p99_ms", "max_ms")


def show(summary: Summary, flags: list[Flag], console: Console) -> None:
    """Latency and training speed by arm, the ratios, and what to doubt."""
    console.print(_services(summary))
    trainer = _trainer(summary)
    if trainer.row_count:
        console.print(trainer)
    for flag in flags:
        console.print(f"[yellow]not valid:[/] {flag.sentence}", highlight=False)
    console.print(f"run: {summary.run}", highlight=False, soft_wrap=True)


def _services(summary: Summary) -> Table:
    table = Table(title="Latency from the intended send time (sojourn), ms", title_justify="left")
    for name in (
        "service",
        "weights",
        "arm",
        "requests",
        "errors",
        "rate/s",
        "sent/s",
        "p50",
        "p90",
        "p95",
        "p99",
        "max",
    ):
        table.add_column(name, justify="left" if name in ("service", "weights", "arm") else "right")
    table.add_column("response p50/p99", justify="right")
    table.add_column("slip p99", justify="right")
    for service in dict.fromkeys(row["service"] for row in summary.rows if row["role"] == "server"):
        for arm in ("alone", "corun"):
            for row in (row for row in summary.pooled(arm, "server") if row["service"] == service):
                table.add_row(*_service_cells(row))
        ratio = summary.ratios.get("services", {}).get(service)
        if ratio:
            table.add_row(*_ratio_cells(ratio), style="bold")
        table.add_section()
    return table


def _service_cells(row: dict[str, Any]) -> list[str]:
    return [
        row["service"],
        _weights(row["weights"]),
        row["arm"],
        str(row["requests"]),
        str(row["errors"]),
        _number(row["intended_rate"]),
        _number(row["sent_rate"]),
        *(_number(row[figure]) for figure in _FIGURES),
        f"{_number(row['response_p50_ms'])} / {_number(row['response_p99_ms'])}",
        _number(row["slip_p99_ms"], 2),
    ]


def _ratio_cells(ratio: dict[str, float | None]) -> list[str]:
    factors = [_factor(ratio[f"{figure.removesuffix('_ms')}_x"]) for figure in _FIGURES]
    return ["", "", "corun / alone", "", "", "", _factor(ratio["sent_rate_x"]), *factors, "", ""]


def _trainer(summary: Summary) -> Table:
    table = Table(title="Training", title_justify="left")
    for name in ("job", "weights", "arm", "steps", "samples/s", "loss first → last"):
        table.add_column(name, justify="left" if name in ("job", "weights", "arm") else "right")
    for arm in ("train", "corun"):
        for row in summary.pooled(arm, "trainer"):
            table.add_row(
                row["service"],
                _weights(row["weights"]),
                arm,
                str(row["train_steps"]),
                _number(row["train_samples_per_s"]),
                f"{_number(row['loss_first'], 3)} → {_number(row['loss_last'], 3)}",
            )
    if summary.ratios.get("train_x") is not None:
        table.add_row("", "", "corun / train", "", _factor(summary.ratios["train_x"]), "", style="bold")
    return table


def _weights(label: str | None) -> str:
    return (label or "").split(" ")[0]


def _number(value: float | None, digits: int = 1) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _factor(value: float | None) -> str:
    return "n/a" if value is None else f"x{value:.2f}"
