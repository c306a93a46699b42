"""The summary of a run: one row per arm, repeat and service or trainer, and the ratios between arms.

Latency percentiles are exact, over requests answered with OK, from the intended send time; requests that were
rejected, failed or lost are counted beside them, never folded in. Training speed is the samples of the steps
that lie in the window (a step over its edge counts by its share) divided by the window.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corun.run.directory import read_manifest, write_json
from corun.run.read import Table, Window, read_table, select
from corun.run.read import windows as windows_of
from corun.run.records import INFER_CLIENT, SUMMARY, TRAIN, names
from corun.run.table import TableWriter
from corun.stats import percentile_of

Floats = NDArray[np.float64]
Row = dict[str, Any]

TOKENS = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms")
_QUANTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Summary:
    """Rows of summary.csv (pooled rows have repeat None) and the ratios of the arms."""

    run: Path
    manifest: dict[str, Any]
    rows: list[Row]
    ratios: dict[str, Any]

    def pooled(self, arm: str, role: str) -> list[Row]:
        """The rows of one arm and role with all repeats together."""
        return [row for row in self.rows if row["arm"] == arm and row["role"] == role and row["repeat"] is None]


def summarise(path: Path) -> Summary:
    """Read a run directory, whatever state it is in, and write its summary.csv and summary.json."""
    manifest = read_manifest(path)
    windows = list(windows_of(manifest))
    rows = [*_service_rows(path, manifest, windows), *_trainer_rows(path, manifest, windows)]
    summary = Summary(path, manifest, rows, ratios(rows))
    with TableWriter(path / "summary.csv", SUMMARY) as table:
        table.rows([{name: _rounded(row.get(name)) for name in names(SUMMARY)} for row in rows])
    write_json(path / "summary.json", as_json(summary))
    return summary


def as_json(summary: Summary) -> dict[str, Any]:
    """Arms, services, training speed and ratios as plain JSON values."""
    arms: dict[str, Any] = {}
    for arm in dict.fromkeys(row["arm"] for row in summary.rows):
        entry: dict[str, Any] = {}
        services = summary.pooled(arm, "server")
        if services:
            entry["services"] = {row["service"]: _service_json(row) for row in services}
        for row in summary.pooled(arm, "trainer"):
            for name in ("train_samples_per_s", "train_steps", "loss_first", "loss_last"):
                entry[name] = _rounded(row[name])
        arms[arm] = entry
    return {"run": str(summary.run), "status": summary.manifest.get("status"), "arms": arms, "ratios": summary.ratios}


def _service_json(row: Row) -> Row:
    kept = ("requests", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "max_ms", "response_p50_ms", "response_p99_ms")
    rest = ("sent_rate", "intended_rate", "slip_p50_ms", "slip_p99_ms", "errors", "weights")
    made = TOKENS if row.get("tokens_per_s") is not None else ()
    return {name: _rounded(row[name]) for name in (*kept, *rest, *made)}


def _service_rows(path: Path, manifest: dict[str, Any], windows: list[Window]) -> list[Row]:
    rows: list[Row] = []
    for service in manifest["config"].get("services", []):
        table = read_table(path / "infer_client" / f"{service['name']}.csv", INFER_CLIENT)
        fixed = {
            "service": service["name"],
            "role": "server",
            "model": service["arch"],
            "weights": _weights(manifest, "server", service["name"]),
        }
        for arm, repeat, group in _groups([window for window in windows if window.arm != "train"]):
            rows.append({"arm": arm, "repeat": repeat, **fixed, **_latency(table, group)})
    return rows


def _groups(windows: list[Window]) -> Iterable[tuple[str, int | None, list[Window]]]:
    """Every window alone, then all repeats of each arm together."""
    for window in windows:
        yield window.arm, window.repeat, [window]
    for arm in dict.fromkeys(window.arm for window in windows):
        yield arm, None, [window for window in windows if window.arm == arm]


def _latency(table: Table, windows: list[Window]) -> Row:
    rows = select(table, np.isin(table["segment"], [window.segment for window in windows]))
    ok = select(rows, rows["status"] == "OK")
    sent = rows["t_tx_start_ns"] > 0
    stops = {window.segment: window.stop_ns for window in windows}
    limit = np.array([stops[int(segment)] for segment in rows["segment"]], dtype=np.int64)
    seconds = sum(window.seconds for window in windows)
    row: Row = {
        "requests": len(rows["id"]),
        "ok": len(ok["id"]),
        "errors": len(rows["id"]) - len(ok["id"]),
        "intended_rate": len(rows["id"]) / seconds if seconds else None,
        "sent_rate": int((sent & (rows["t_tx_start_ns"] <= limit)).sum()) / seconds if seconds else None,
        "max_ms": _max(ok["sojourn_ms"]),
        "mean_ms": float(ok["sojourn_ms"].mean()) if len(ok["id"]) else None,
        "response_max_ms": _max(ok["response_ms"]),
    }
    slip = rows["slip_ms"][sent & ~np.isnan(rows["slip_ms"])]
    for quantile in _QUANTILES:
        row[f"p{quantile}_ms"] = percentile_of(ok["sojourn_ms"], quantile)
        row[f"response_p{quantile}_ms"] = percentile_of(ok["response_ms"], quantile)
    row.update(_tokens(ok, seconds))
    for quantile in (50, 99):
        row[f"slip_p{quantile}_ms"] = percentile_of(slip, quantile)
    return row


def _tokens(ok: Table, seconds: float) -> Row:
    """Tokens of the answers and their times; nothing for a model that makes none."""
    counts = ok["tokens_out"][~np.isnan(ok["tokens_out"])]
    if not len(counts):
        return {}
    first, rest = (ok[name][~np.isnan(ok[name])] for name in ("ttft_ms", "tpot_ms"))
    return {
        "tokens_per_s": float(counts.sum()) / seconds if seconds else None,
        "ttft_p50_ms": percentile_of(first, 50),
        "ttft_p99_ms": percentile_of(first, 99),
        "tpot_p50_ms": percentile_of(rest, 50),
    }


def _trainer_rows(path: Path, manifest: dict[str, Any], windows: list[Window]) -> list[Row]:
    job = manifest["config"].get("train")
    if not job:
        return []
    steps = read_table(path / "train.csv", TRAIN)
    name = f"{job['arch']}_{job['batch_size']}"
    fixed = {
        "service": name,
        "role": "trainer",
        "model": job["arch"],
        "weights": _weights(manifest, "trainer", name),
    }
    return [
        {"arm": arm, "repeat": repeat, **fixed, **training(steps, group)}
        for arm, repeat, group in _groups([window for window in windows if window.arm != "alone"])
    ]


def training(steps: Table, windows: list[Window]) -> Row:
    """Training speed inside the windows and the loss at both ends."""
    samples, ended, losses = 0.0, 0, []
    for window in windows:
        begin, end = steps["t_start_ns"], steps["t_end_ns"]
        overlap = np.minimum(end, window.stop_ns) - np.maximum(begin, window.start_ns)
        share = np.clip(overlap / np.maximum(1, end - begin), 0.0, 1.0)
        samples += float((steps["samples"] * share).sum())
        ended += int(((end >= window.start_ns) & (end <= window.stop_ns)).sum())
        losses.append(steps["loss"][share > 0])
    loss = np.concatenate(losses) if losses else np.array([])
    tenth = max(1, len(loss) // 10)
    seconds = sum(window.seconds for window in windows)
    return {
        "train_samples_per_s": samples / seconds if seconds else None,
        "train_steps": ended,
        "loss_first": float(loss[:tenth].mean()) if len(loss) else None,
        "loss_last": float(loss[-tenth:].mean()) if len(loss) else None,
    }


def ratios(rows: list[Row]) -> dict[str, Any]:
    """corun/alone of each service's latencies and rate, corun/train of the training speed; pooled rows."""
    pooled = {(row["arm"], row["service"]): row for row in rows if row["repeat"] is None}
    found: dict[str, Any] = {}
    for (arm, name), row in pooled.items():
        if arm != "corun":
            continue
        base = pooled.get(("alone" if row["role"] == "server" else "train", name))
        if base is None:
            continue
        if row["role"] == "trainer":
            found["train_x"] = _ratio(row["train_samples_per_s"], base["train_samples_per_s"])
        else:
            tokens = TOKENS if base.get("tokens_per_s") is not None else ()
            figures = ("p50_ms", "p90_ms", "p95_ms", "p99_ms", "max_ms", "sent_rate", *tokens)
            services = found.setdefault("services", {})
            services[name] = {
                f"{figure.removesuffix('_ms')}_x": _ratio(row.get(figure), base[figure]) for figure in figures
            }
    return found


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else round(value / base, 4)


def _weights(manifest: dict[str, Any], role: str, name: str) -> str | None:
    for process in manifest.get("processes", []):
        if process["role"] == role and process["name"] == name:
            hello = process.get("hello") or {}
            return hello.get("weights_label") or hello.get("info", {}).get("weights")
    return None


def _max(values: Floats) -> float | None:
    return float(values.max()) if len(values) else None


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
