"""Who used the machine: CPU, memory, GPU share and energy by role and arm, made from the profiler's raw counters.

Nobody measures what a process uses of a device's energy; the device's counter is shared out (corun.profile.energy),
with what was idle anyway and what nobody of the run used kept apart, so that the rows add up to the counter::

    idle + server ... + trainer + client ... + profiler + launcher + unattributed = total        (mJ, exactly)

Meters: NVML's energy counter of each GPU, shared by SM utilisation; RAPL's package and dram domains of the CPU,
shared by CPU time, where the time of all other processes of the host goes to `unattributed`. Idle power is that of
the least second recorded outside all windows; without one nothing is kept apart and the cell is empty. Where there
is no meter, the cells are empty.

A window is clipped to the profiler's first and last reading; `seconds` says what is left. Requests and samples are
counted in the same seconds.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from corun.clock import NS_PER_S
from corun.profile.energy import marginal_mj_per_request
from corun.report.counters import BUSY, covered, host_increase
from corun.report.meters import IDLE, TOTAL, UNATTRIBUTED, Meter, idle_power_mw, meters_of, split
from corun.report.summary import training
from corun.report.uses import Span, Use, Who
from corun.report.uses import uses as uses_of
from corun.run.directory import read_manifest
from corun.run.read import Table, read_any, read_table, windows
from corun.run.records import INFER_CLIENT, TRAIN, Column, names
from corun.run.table import TableWriter

Row = dict[str, Any]

FILE = "attribution.csv"

ATTRIBUTION = (
    Column("arm", "", "str", "alone, train or corun"),
    Column("repeat", "", "int", "repetition, or empty for all repetitions together"),
    Column("policy", "", "str", "sharing policy in force"),
    Column("role", "", "str", "server, trainer, client, profiler, launcher; idle, unattributed and total of energy"),
    Column("name", "", "str", "which one"),
    Column("seconds", "s", "float", "time the profiler covers of the windows; everything below refers to it"),
    Column(
        "cpu_s", "s", "float", "CPU time of the process and its children; unattributed: of all others on the host"
    ),
    Column("cores", "", "float", "cpu_s / seconds"),
    Column("runq_wait_s", "s", "float", "ready but waiting for a core, all threads"),
    Column("rss_mib", "MiB", "float", "most resident memory at a tick, children included"),
    Column("gpu_share_pct", "%", "float", "mean share of its GPUs' SMs or engines"),
    Column("gpu_mem_mib", "MiB", "float", "most device memory at a tick"),
    Column("gpu_attr", "", "str", "how the share is known: fdinfo, nvml_sm, exclusive"),
    Column("gpu_energy_mj", "mJ", "int", "of the GPUs' energy; the rows above total add up to it exactly"),
    Column("cpu_energy_mj", "mJ", "int", "of the CPU packages' and memories' energy; adds up in the same way"),
    Column("meters", "", "str", "what measured the energy, joined by +"),
    Column("requests", "", "int", "answered with OK in these seconds"),
    Column("samples", "", "float", "trained in these seconds"),
    Column("mj_per_request", "mJ", "float", "energy of the server / its requests, over the meters named"),
    Column("mj_per_sample", "mJ", "float", "energy of the trainer / its samples"),
    Column(
        "marginal_mj_per_request",
        "mJ",
        "float",
        "row total of corun: its energy minus that of the train arm over equal time, / requests of all services",
    ),
)


def write(path: Path) -> list[Row]:
    """Attribute a run directory and write its attribution.csv; without rows of the profiler it has no rows."""
    rows = attribute(path)
    with TableWriter(path / FILE, ATTRIBUTION) as table:
        table.rows([{name: _rounded(row.get(name)) for name in names(ATTRIBUTION)} for row in rows])
    return rows


def attribute(path: Path) -> list[Row]:
    """Rows of every window (ATTRIBUTION), then of every arm with all repeats together (repeat None)."""
    manifest = read_manifest(path)
    profile, gpu, process = (read_any(path / f"{name}.csv") for name in ("profile", "gpu", "process"))
    if not len(profile.get("t_ns", ())) or not len(process.get("t_ns", ())):
        return []
    meters = meters_of(profile, gpu)
    idle_mw = {meter.name: idle_power_mw(meter, profile) for meter in meters}
    work = _Work(path, manifest)
    policy = (manifest.get("sharing") or {}).get("policy")
    single: list[Row] = []
    for window in windows(manifest):
        edges = covered(profile["t_ns"], window)
        if edges is None:
            continue
        span = Span(window, *edges)
        common = {"arm": window.arm, "repeat": window.repeat, "policy": policy, "seconds": span.clipped.seconds}
        single += [common | row for row in _window_rows(span, profile, process, meters, idle_mw, work)]
    rows = [*single, *_pooled(single)]
    return [_figures(row, rows) for row in rows]


# One window


def _window_rows(
    span: Span,
    profile: Table,
    process: Table,
    meters: Sequence[Meter],
    idle_mw: Mapping[str, float | None],
    work: _Work,
) -> list[Row]:
    uses = uses_of(process, span)
    busy = host_increase(profile, BUSY, span.begin_ns, span.end_ns)
    ours = sum(use.cpu_ns for use in uses.values())
    other_ns = None if busy is None else max(0.0, busy - ours)
    energy = {meter.name: split(meter, idle_mw[meter.name], span, uses, other_ns) for meter in meters}
    rows = [_use_row(who, use) | work.done(who, span) for who, use in uses.items()]
    rows.append({"role": IDLE, "name": ""})
    rows.append({"role": UNATTRIBUTED, "name": "", "cpu_ns": other_ns})
    rows.append({"role": TOTAL, "name": "", "cpu_ns": busy, "requests": work.requests(span)})
    for row in rows:
        row.update(_energy_cells(row, meters, energy))
    return rows


def _use_row(who: Who, use: Use) -> Row:
    return {
        "role": who[0],
        "name": who[1],
        "cpu_ns": use.cpu_ns,
        "runq_ns": use.runq_ns,
        "rss_mib": use.rss_mib,
        "gpu_share_pct": use.gpu_share_pct,
        "gpu_mem_mib": use.gpu_mem_mib,
        "gpu_attr": use.gpu_attr,
    }


def _energy_cells(row: Row, meters: Sequence[Meter], energy: Mapping[str, dict[Hashable, int] | None]) -> Row:
    key: Hashable = row["role"] if row["role"] in (IDLE, UNATTRIBUTED, TOTAL) else (row["role"], row["name"])
    cells: Row = {"meters": ""}
    read = []
    for kind, column in (("gpu", "gpu_energy_mj"), ("cpu", "cpu_energy_mj")):
        shares = [(meter, energy[meter.name]) for meter in meters if meter.kind == kind]
        mine = [(meter, share[key]) for meter, share in shares if share is not None and key in share]
        cells[column] = sum(value for _, value in mine) if mine else None
        read += [meter.name for meter, _ in mine]
    cells["meters"] = "+".join(read)
    return cells


# Work done


class _Work:
    """Requests answered and samples trained, by window."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        config = manifest.get("config") or {}
        columns = [column for column in INFER_CLIENT if column.name in ("segment", "status", "t_rx_ns")]
        self._clients = {
            str(service["name"]): read_table(path / "infer_client" / f"{service['name']}.csv", columns)
            for service in config.get("services", [])
        }
        self._steps = read_table(path / "train.csv", TRAIN) if config.get("train") else None

    def done(self, who: Who, span: Span) -> Row:
        """Requests of a server, samples of the trainer."""
        role, name = who
        if role == "server" and name in self._clients and span.window.arm != "train":
            return {"requests": self._answered(name, span)}
        if role == "trainer" and self._steps is not None and span.window.arm != "alone":
            rate = training(self._steps, [span.clipped])["train_samples_per_s"]
            return {"samples": (rate or 0.0) * span.clipped.seconds}
        return {}

    def requests(self, span: Span) -> int | None:
        """Of all services together."""
        if span.window.arm == "train" or not self._clients:
            return None
        return sum(self._answered(name, span) for name in self._clients)

    def _answered(self, name: str, span: Span) -> int:
        table = self._clients[name]
        mine = (table["segment"] == span.window.segment) & (table["status"] == "OK")
        return int((mine & (table["t_rx_ns"] >= span.begin_ns) & (table["t_rx_ns"] < span.end_ns)).sum())


# Repeats together, and figures


_SUMMED = ("seconds", "cpu_ns", "runq_ns", "gpu_energy_mj", "cpu_energy_mj", "requests", "samples")
_LARGEST = ("rss_mib", "gpu_mem_mib")


def _pooled(rows: list[Row]) -> list[Row]:
    """All repeats of an arm together: sums, and means over time."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["role"], row["name"]), []).append(row)
    return [_together(group) for group in groups.values()]


def _together(group: list[Row]) -> Row:
    row = {**group[0], "repeat": None}
    for column in (*_SUMMED, *_LARGEST):
        known = [one[column] for one in group if one.get(column) is not None]
        merged = sum(known) if column in _SUMMED else max(known, default=None)
        row[column] = merged if known else None
    shared = [(one["gpu_share_pct"], one["seconds"]) for one in group if one.get("gpu_share_pct") is not None]
    seconds = sum(part for _, part in shared)
    row["gpu_share_pct"] = sum(share * part for share, part in shared) / seconds if seconds else None
    row["meters"] = "+".join(dict.fromkeys(name for one in group for name in one["meters"].split("+") if name))
    return row


def _figures(row: Row, rows: list[Row]) -> Row:
    """Seconds, cores and energy per piece of work."""
    cpu_s = None if row.get("cpu_ns") is None else row["cpu_ns"] / NS_PER_S
    energy = _energy_of(row)
    return {
        **row,
        "cpu_s": cpu_s,
        "cores": cpu_s / row["seconds"] if cpu_s is not None and row["seconds"] else None,
        "runq_wait_s": None if row.get("runq_ns") is None else row["runq_ns"] / NS_PER_S,
        "mj_per_request": _per(energy, row.get("requests")) if row["role"] == "server" else None,
        "mj_per_sample": _per(energy, row.get("samples")) if row["role"] == "trainer" else None,
        "marginal_mj_per_request": _marginal(row, rows),
    }


def _energy_of(row: Row) -> int | None:
    known = [row[name] for name in ("gpu_energy_mj", "cpu_energy_mj") if row.get(name) is not None]
    return sum(known) if known else None


def _per(energy: int | None, work: float | None) -> float | None:
    return None if energy is None or not work else energy / work


def _marginal(row: Row, rows: list[Row]) -> float | None:
    """Against the train arm of the same repeat and the same meters, scaled to equal time."""
    if row["role"] != TOTAL or row["arm"] != "corun" or not row.get("requests"):
        return None
    for base in rows:
        same = base["role"] == TOTAL and base["arm"] == "train" and base["repeat"] == row["repeat"]
        energy, alone = _energy_of(row), _energy_of(base)
        if same and energy is not None and alone is not None and base["meters"] == row["meters"] and base["seconds"]:
            return marginal_mj_per_request(energy, alone * row["seconds"] / base["seconds"], row["requests"])
    return None


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


__all__ = ["ATTRIBUTION", "FILE", "attribute", "write"]
