"""The numbers of a run as a page shows them: large figures on top, then tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from corun.report import html
from corun.report.exhibit import shown
from corun.report.loops import LoopSummary
from corun.report.slowdown import Slowdown
from corun.report.summary import TOKENS, Row, Summary
from corun.stats.percentiles import PERCENTILES, sample_floor

Words = tuple[Any, ...]

LATENCIES = ("p50_ms", "p90_ms", "p95_ms", "p99_ms")
MJ_PER_J = 1e3


def cards(summary: Summary, intervals: Mapping[tuple[str, str], Slowdown]) -> str:
    """The answer in large figures: each service's slowdown, and what training keeps.

    intervals: slowdowns with an interval over repeats, by service and percentile (`p99`).
    """
    found = [*_service_cards(summary, intervals), *_training_card(summary)]
    items = "".join(
        f'<li><span class="who">{escape(who)}</span><span class="figure">{escape(value)}</span>'
        f'<span class="how">{escape(how)}</span></li>'
        for who, value, how in found
    )
    return f'<ul class="cards" aria-label="In short">{items}</ul>' if items else ""


def _service_cards(summary: Summary, intervals: Mapping[tuple[str, str], Slowdown]) -> Iterator[tuple[str, str, str]]:
    alone = {row["service"]: row for row in summary.pooled("alone", "server")}
    corun = {row["service"]: row for row in summary.pooled("corun", "server")}
    for service in dict.fromkeys([*alone, *corun]):
        rows = [side[service] for side in (alone, corun) if service in side]
        known = [name for name in reversed(LATENCIES) if all(row[name] is not None for row in rows)]
        if not known:
            yield service, "n/a", f"{sum(row['ok'] for row in rows)} answers are too few for a percentile"
            continue
        name, words = known[0], known[0].removesuffix("_ms")
        if len(rows) == 2:
            before, after = rows[0][name], rows[1][name]
            how = f"{words} beside training, {shown(before)} → {shown(after)} ms".replace(" → ", "\u00a0→\u00a0")
            ratio = intervals.get((service, words))
            if ratio and ratio.low and ratio.high:
                yield service, f"×{ratio.ratio:.2f}", f"{how} (95 % interval ×{ratio.low:.2f} to ×{ratio.high:.2f})"
            else:
                yield service, f"×{after / before:.2f}", how
        else:
            yield service, f"{shown(rows[0][name])} ms", f"{words} ({rows[0]['arm']})"


def _training_card(summary: Summary) -> Iterator[tuple[str, str, str]]:
    rows = {arm: summary.pooled(arm, "trainer") for arm in ("train", "corun")}
    speeds = {arm: found[0]["train_samples_per_s"] for arm, found in rows.items() if found}
    name = f"training {next((found[0]['service'] for found in rows.values() if found), '')}"
    if speeds.get("train") and speeds.get("corun") is not None:
        how = f"of its own speed, {shown(speeds['train'])}\u00a0→\u00a0{shown(speeds['corun'])} samples/s"
        yield name, f"{speeds['corun'] / speeds['train']:.0%}", how
    else:
        for arm, value in speeds.items():
            if value is not None:
                yield name, shown(value), f"samples/s ({arm})"


def latency(summary: Summary) -> str:
    """Latency by service and arm, and the ratios."""
    if not any(row["role"] == "server" for row in summary.rows):
        return html.paragraph("No request was measured: no service was part of a complete window.")
    columns = ("service", "arm", "p50", "p90", "p95", "p99", "max", "response p99", "slip p99", "requests", "not OK")
    rows, strong = _latency_rows(summary)
    note = (
        "Milliseconds from the intended send time to the reply (sojourn); response counts from the actual send. "
        f"Percentiles are exact, over answers with status OK. {floors()} “n/a”: there were fewer."
    )
    return html.table((*columns, "sent/s"), rows, "Latency by service and arm", strong=strong) + html.paragraph(
        note, "caption"
    )


def tokens(summary: Summary) -> str:
    """Speed and times of generated tokens by service and arm, and the ratios; nothing where none were made."""
    rows: list[Words] = []
    strong: list[int] = []
    for service in dict.fromkeys(row["service"] for row in summary.rows if row.get("tokens_per_s") is not None):
        for arm in ("alone", "corun"):
            mine = (row for row in summary.pooled(arm, "server") if row["service"] == service)
            rows += [(service, arm, *(_or_na(row.get(name)) for name in TOKENS)) for row in mine]
        ratios = summary.ratios.get("services", {}).get(service, {})
        if "tokens_per_s_x" in ratios:
            strong.append(len(rows))
            factors = (_times(ratios[f"{name.removesuffix('_ms')}_x"]) for name in TOKENS)
            rows.append((None, "corun / alone", *factors))
    if not rows:
        return ""
    note = "Milliseconds to the first token, from the intended send time (TTFT), and per token after it (TPOT)."
    columns = ("service", "arm", "tokens/s", "TTFT p50", "TTFT p99", "TPOT p50")
    return html.table(columns, rows, "Tokens by service and arm", strong=strong) + html.paragraph(note, "caption")


def _latency_rows(summary: Summary) -> tuple[list[Words], list[int]]:
    rows: list[Words] = []
    strong: list[int] = []
    for service in dict.fromkeys(row["service"] for row in summary.rows if row["role"] == "server"):
        for arm in ("alone", "corun"):
            mine = (row for row in summary.pooled(arm, "server") if row["service"] == service)
            rows += [(service, arm, *_cells(row)) for row in mine]
        ratios = summary.ratios.get("services", {}).get(service)
        if ratios:
            strong.append(len(rows))
            factors = [_times(ratios.get(f"{name}_x")) for name in ("p50", "p90", "p95", "p99", "max", "sent_rate")]
            rows.append((None, "corun / alone", *factors[:5], None, None, None, None, factors[5]))
    return rows, strong


def _cells(row: Row) -> Words:
    latencies = (_or_na(row[name]) for name in (*LATENCIES, "max_ms", "response_p99_ms", "slip_p99_ms"))
    return *latencies, row["requests"], row["errors"], row["sent_rate"]


def _or_na(value: float | None) -> float | str:
    return "n/a" if value is None else value


def _times(value: float | None) -> str:
    return "n/a" if value is None else f"×{value:.2f}"


def training(summary: Summary) -> str:
    """Training by arm, and the ratio."""
    rows: list[Words] = []
    for arm in ("train", "corun"):
        for row in summary.pooled(arm, "trainer"):
            loss = tuple(_or_na(row[name]) for name in ("loss_first", "loss_last"))
            rows.append((row["service"], arm, row["train_steps"], _or_na(row["train_samples_per_s"]), *loss))
    if not rows:
        return html.paragraph("No training was measured in this run.")
    strong = []
    if summary.ratios.get("train_x") is not None:
        strong.append(len(rows))
        rows.append((rows[0][0], "corun / train", None, _times(summary.ratios["train_x"]), None, None))
    columns = ("job", "arm", "steps", "samples/s", "loss, first tenth", "loss, last tenth")
    return html.table(columns, rows, "Training by arm", strong=strong)


def floors() -> str:
    """The sample counts below which a percentile is not quoted, as a sentence."""
    needed = ", ".join(f"p{percentile:g} from {sample_floor(percentile):,}" for percentile in PERCENTILES)
    return f"A percentile needs enough answers: {needed}."


def usage(rows: Sequence[Row]) -> str:
    """CPU, memory, GPU and energy by role and arm, all repeats together; columns nobody could fill are left out."""
    pooled = [row for row in rows if row["repeat"] is None]
    if not pooled:
        return html.paragraph("The profiler left no rows, so nobody knows who used the machine.")
    columns = ("arm", "who", *(title for title, _, _ in USED))
    table = [
        (row["arm"], f"{row['role']} {row['name']}".strip(), *(_used(row, *figure) for figure in USED))
        for row in pooled
    ]
    kept = [place for place in range(len(columns)) if place < 2 or any(line[place] is not None for line in table)]
    strong = [index for index, row in enumerate(pooled) if row["role"] == "total"]
    note = "Unattributed is everybody else on the machine." + _energy_note(pooled)
    shown_columns = [columns[place] for place in kept]
    shown_rows = [[line[place] for place in kept] for line in table]
    return html.table(shown_columns, shown_rows, "Use of the machine", True, strong) + html.paragraph(note, "caption")


USED = (
    ("cores", "cores", 1.0),
    ("waited for cores, s", "runq_wait_s", 1.0),
    ("memory, MiB", "rss_mib", 1.0),
    ("GPU, %", "gpu_share_pct", 1.0),
    ("GPU memory, MiB", "gpu_mem_mib", 1.0),
    ("GPU energy, J", "gpu_energy_mj", MJ_PER_J),
    ("CPU energy, J", "cpu_energy_mj", MJ_PER_J),
    ("mJ/request", "mj_per_request", 1.0),
    ("mJ/sample", "mj_per_sample", 1.0),
    ("marginal mJ/request", "marginal_mj_per_request", 1.0),
)


def _used(row: Row, title: str, column: str, scale: float) -> float | None:
    value = row.get(column)
    return None if value is None else value / scale


def _energy_note(rows: Sequence[Row]) -> str:
    meters = "+".join(dict.fromkeys(row["meters"] for row in rows if row.get("meters")))
    if not meters:
        return " No energy meter could be read here."
    return (
        f" Energy is shared out of the device's own counter ({meters}): the rows add up to the total, what was idle "
        "anyway stands apart. Marginal: beyond what training alone takes in the same time."
    )


def loops(summary: LoopSummary) -> str:
    """Inference loops: rate and time of one inference."""
    columns = ("loop", "model", "weights", "per s", "p50", "p90", "p95", "p99", "max", "inferences", "failed")
    rows = [
        (
            row.loop,
            row.model,
            row.weights,
            *map(_or_na, (row.per_s, row.p50_ms, row.p90_ms, row.p95_ms, row.p99_ms, row.max_ms)),
            row.inferences,
            row.failed,
        )
        for row in summary.loops
    ]
    note = html.paragraph("Milliseconds of one inference, back to back and without sockets.", "caption")
    return html.table(columns, rows, "Inference loops") + note if rows else html.paragraph("No loop was measured.")
