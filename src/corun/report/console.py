"""The tables a person sees at the end of a run, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corun.report.slo import Verdict
from corun.report.summary import TOKENS, Summary
from corun.report.validity import Flag

WIDTH = 100
_FIGURES = ("p50", "p90", "p95", "p99", "max")
_LOAD_ARMS = ("alone", "corun")
_TRAIN_ARMS = ("train", "corun")

Row = dict[str, Any]


def console_for(stderr: bool = False) -> Console:
    """A console that keeps the tables whole when the output is not a terminal."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=WIDTH)


def show(
    summary: Summary,
    flags: list[Flag],
    console: Console,
    verdicts: Sequence[Verdict] = (),
    calibration: Row | None = None,
) -> None:
    """What to doubt, then latency, load, training and promises by arm, then where the files are."""
    for check in dict.fromkeys(flag.check for flag in flags):
        sentences = [flag.sentence for flag in flags if flag.check == check]
        more = f" (and {len(sentences) - 1} more in validity.json)" if len(sentences) > 1 else ""
        console.print(f"[yellow]not valid:[/] {escape(sentences[0])}{more}", highlight=False)
    for table in (_latency(summary), _tokens(summary), _load(summary), _training(summary), _promises(verdicts)):
        if table.row_count:
            console.print(table)
    if calibration and calibration.get("status") == "complete":
        console.print(f"[dim]{_noise(calibration)}[/]", highlight=False)
    console.print(f"run: {summary.run}", highlight=False, soft_wrap=True)


def _noise(calibration: Row) -> str:
    """What client and null server cost alone."""
    figures = "; ".join(
        f"{name} p50 {_number(calibration[f'{name}_p50_us'], 0)} p99 {_number(calibration[f'{name}_p99_us'], 0)} us"
        for name in ("slip", "response")
    )
    return f"the harness alone, null server at {calibration['rate_per_s']:g}/s: {figures}"


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _services(summary: Summary) -> Iterator[tuple[str, list[Row]]]:
    """Each service with its pooled rows, alone before corun."""
    for service in dict.fromkeys(row["service"] for row in summary.rows if row["role"] == "server"):
        rows = [row for arm in _LOAD_ARMS for row in summary.pooled(arm, "server") if row["service"] == service]
        yield service, rows


def _latency(summary: Summary) -> Table:
    title = "Latency in ms (sojourn: from the intended send time; response: from the actual one)"
    table = _table(title, ("service", "arm", ""), _FIGURES)
    for service, rows in _services(summary):
        for row in rows:
            table.add_row(service, row["arm"], "sojourn", *(_number(row[f"{name}_ms"]) for name in _FIGURES))
        for row in rows:
            cells = (_number(row[f"response_{name}_ms"]) for name in _FIGURES)
            table.add_row(service, row["arm"], "response", *cells, style="dim")
        ratio = summary.ratios.get("services", {}).get(service)
        if ratio:
            table.add_row(
                service, "corun / alone", "sojourn", *(_factor(ratio[f"{name}_x"]) for name in _FIGURES), style="bold"
            )
        table.add_section()
    return table


def _tokens(summary: Summary) -> Table:
    title = "Tokens (ms; TTFT: to the first, from the intended send time; TPOT: per token after it)"
    right = ("tokens/s", "TTFT p50", "TTFT p99", "TPOT p50")
    table = _table(title, ("service", "arm"), right)
    for service, rows in _services(summary):
        rows = [row for row in rows if row.get("tokens_per_s") is not None]
        for row in rows:
            table.add_row(service, row["arm"], *(_number(row[name]) for name in TOKENS))
        ratio = summary.ratios.get("services", {}).get(service, {})
        if rows and "tokens_per_s_x" in ratio:
            factors = (_factor(ratio[f"{name.removesuffix('_ms')}_x"]) for name in TOKENS)
            table.add_row(service, "corun / alone", *factors, style="bold")
    return table


def _load(summary: Summary) -> Table:
    right = ("requests", "errors", "asked/s", "sent/s", "slip p50", "slip p99")
    table = _table("Load (slip in ms: how late the client sent)", ("service", "arm", "weights"), right)
    for service, rows in _services(summary):
        for row in rows:
            table.add_row(
                service,
                row["arm"],
                _weights(row["weights"]),
                str(row["requests"]),
                str(row["errors"]),
                _number(row["intended_rate"]),
                _number(row["sent_rate"]),
                _number(row["slip_p50_ms"], 2),
                _number(row["slip_p99_ms"], 2),
            )
    return table


def _training(summary: Summary) -> Table:
    table = _table("Training", ("job", "arm", "weights"), ("steps", "samples/s", "loss first", "loss last"))
    for arm in _TRAIN_ARMS:
        for row in summary.pooled(arm, "trainer"):
            table.add_row(
                row["service"],
                arm,
                _weights(row["weights"]),
                str(row["train_steps"]),
                _number(row["train_samples_per_s"]),
                _number(row["loss_first"], 3),
                _number(row["loss_last"], 3),
            )
    if summary.ratios.get("train_x") is not None:
        table.add_row("", "corun / train", "", "", _factor(summary.ratios["train_x"]), "", "", style="bold")
    return table


_STYLES = {"met": "green", "missed": "red", "cannot tell": "yellow"}


def _promises(verdicts: Sequence[Verdict]) -> Table:
    table = _table("Promises (over: took longer or were not answered)", ("service", "arm", "promise"), ())
    for name in ("measured ms", "over", "requests"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for verdict in verdicts:
        word = f"[{_STYLES[verdict.word]}]{verdict.word}[/]"
        cells = (_number(verdict.measured_ms), str(verdict.over), str(verdict.requests))
        table.add_row(verdict.service, verdict.arm, f"{verdict.figure} <= {verdict.bound_ms:g} ms", *cells, word)
    return table


def _weights(label: str | None) -> str:
    return (label or "").split(" ")[0]


def _number(value: float | None, digits: int = 1) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _factor(value: float | None) -> str:
    return "n/a" if value is None else f"x{value:.2f}"
