"""Who used what: energy rows add up to the meters, work is counted in the covered seconds, missing stays empty."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.report.attribution import FILE, attribute, write
from corun.report.counters import covered, increase
from corun.report.meters import IDLE, TOTAL, UNATTRIBUTED, Meter, apportion, idle_power_mw, split
from corun.report.uses import Span, Use
from corun.run.read import Window, read_any
from corun.testing.runs import T0_NS, FakeRun, FakeService, FakeTrain, write_run

S = 10**9
SHORT = {"alone": 6.0, "train": 4.0, "corun": 6.0}
ENERGY = ("gpu_energy_mj", "cpu_energy_mj")

amounts = st.floats(0, 1e6, allow_nan=False)


def _column(path: Path, name: str, cell: Callable[[dict[str, str]], object]) -> None:
    """Set a column of a CSV file, a new one at the right."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row[name] = str(cell(row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _meter(path: Path, watts: Callable[[float], float]) -> None:
    """RAPL counters in profile.csv that grow with a power by second, the dram domain with a tenth of it."""
    total = {"package": 5e6, "dram": 0.0}

    def grow(domain: str, share: float) -> Callable[[dict[str, str]], int]:
        def cell(row: dict[str, str]) -> int:
            total[domain] += share * 1e6 * watts((int(row["t_ns"]) - T0_NS) / S)
            return round(total[domain])

        return cell

    _column(path / "profile.csv", "rapl_package_0_uj", grow("package", 1.0))
    _column(path / "profile.csv", "rapl_package_0_dram_uj", grow("dram", 0.1))
    _column(path / "profile.csv", "rapl_package_0_core_uj", lambda row: 10**12)


@given(st.lists(amounts, min_size=1, max_size=12))
def test_apportioned_integers_keep_the_sum(parts: list[float]) -> None:
    """Rounding to whole millijoules keeps the sum and moves no part by more than one."""
    whole = apportion(parts, round(math.fsum(parts)))
    assert sum(whole) == round(math.fsum(parts))
    assert all(abs(one - part) <= 1 for one, part in zip(whole, parts, strict=True))


@given(
    st.integers(0, 10**7),
    st.integers(2, 20),
    st.one_of(st.none(), st.floats(0, 5e5)),
    st.lists(st.tuples(amounts, st.one_of(st.none(), st.floats(0, 300))), max_size=6),
    st.one_of(st.none(), amounts),
    st.sampled_from(["gpu", "cpu"]),
)
def test_rows_sum_to_the_device_delta(
    grown_mj: int,
    seconds: int,
    idle_mw: float | None,
    used: list[tuple[float, float | None]],
    other_ns: float | None,
    kind: str,
) -> None:
    """Whatever the shares, idle, processes and unattributed add up to the counter's growth exactly."""
    t_ns = np.arange(seconds + 1, dtype=np.int64) * S
    meter = Meter("m", kind, t_ns, np.linspace(7, 7 + grown_mj, seconds + 1), "0")
    uses = {
        ("server", str(index)): Use(cpu_ns=cpu, sm_on={} if sm is None else {"0": sm})
        for index, (cpu, sm) in enumerate(used)
    }
    span = Span(Window(0, "corun", 0, 0, seconds * S), 0, seconds * S)
    parts = split(meter, idle_mw, span, uses, other_ns)
    assert parts is not None
    assert parts[TOTAL] == grown_mj
    assert sum(value for key, value in parts.items() if key != TOTAL) == grown_mj
    assert min(parts.values()) >= 0
    assert (IDLE in parts) == (idle_mw is not None)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 2), st.booleans(), st.booleans())
def test_every_window_of_a_run_adds_up(
    tmp_path_factory: pytest.TempPathFactory, seed: int, repeat: int, gpu: bool, rapl: bool
) -> None:
    """In the file too: per window and per arm, energy rows sum to the total, and without a meter all are empty."""
    fake = FakeRun((FakeService("a"), FakeService("b", rate=7)), seed=seed, repeat=repeat, gpu=gpu, duration_s=SHORT)
    path = write_run(tmp_path_factory.mktemp("run"), fake)
    if rapl:
        _meter(path, lambda second: 20 + 10 * math.sin(second))
    write(path)
    with open(path / FILE, newline="") as file:
        rows = list(csv.DictReader(file))
    windows = dict.fromkeys((row["arm"], row["repeat"]) for row in rows)
    assert len(windows) == 3 * repeat + 3
    for column, there in zip(ENERGY, (gpu, rapl), strict=True):
        for window in windows:
            mine = {(row["role"], row["name"]): row[column] for row in rows if (row["arm"], row["repeat"]) == window}
            if not there:
                assert set(mine.values()) == {""}
                continue
            total = int(mine.pop((TOTAL, "")))
            assert total > 0
            assert sum(int(cell) for cell in mine.values() if cell) == total


def test_energy_follows_use(tmp_path: Path) -> None:
    """The trainer of a corun window has the larger part; idle power is that outside the windows."""
    path = write_run(tmp_path / "run", FakeRun(duration_s=SHORT))
    profile = read_any(path / "profile.csv")
    idle = set(profile["t_ns"][profile["arm"] == "idle"].tolist())
    _meter(path, lambda second: 10 if T0_NS + round(second * S) in idle else 40)
    rows = {(row["arm"], row["role"]): row for row in attribute(path) if row["repeat"] == 0}
    assert rows["corun", IDLE]["cpu_energy_mj"] == pytest.approx(1.1 * 10e3 * 6, rel=0.01)
    assert rows["corun", "trainer"]["cpu_energy_mj"] > 3 * rows["corun", "server"]["cpu_energy_mj"]
    assert rows["alone", "trainer"]["cpu_energy_mj"] == 0
    assert rows["corun", UNATTRIBUTED]["cpu_energy_mj"] > 0
    assert rows["corun", TOTAL]["meters"] == "rapl_package_0+rapl_package_0_dram"
    server = rows["corun", "server"]
    assert server["mj_per_request"] == server["cpu_energy_mj"] / server["requests"]
    trainer = rows["corun", "trainer"]
    assert trainer["mj_per_sample"] == pytest.approx(trainer["cpu_energy_mj"] / trainer["samples"])


def test_marginal_energy_is_against_training_alone(tmp_path: Path) -> None:
    """Energy of corun minus energy of train over equal time, per request; empty without a train arm."""
    path = write_run(tmp_path / "run", FakeRun(duration_s=SHORT))
    _meter(path, lambda second: 30)
    rows = {(row["arm"], row["role"]): row for row in attribute(path) if row["repeat"] is None}
    assert rows["corun", TOTAL]["marginal_mj_per_request"] == pytest.approx(0, abs=0.1)
    assert rows["train", TOTAL]["marginal_mj_per_request"] is None
    path = write_run(tmp_path / "two", FakeRun(duration_s=SHORT, arms=("alone", "corun")))
    _meter(path, lambda second: 30)
    assert all(row["marginal_mj_per_request"] is None for row in attribute(path))


def test_cpu_and_work(tmp_path: Path) -> None:
    """Processes and the rest of the host make up its busy time; requests and samples are those of the window."""
    path = write_run(tmp_path / "run", FakeRun(duration_s=SHORT, train=FakeTrain(step_ms=100, slowdown=1)))
    rows = [row for row in attribute(path) if row["repeat"] == 0 and row["arm"] == "corun"]
    by_role = {row["role"]: row for row in rows}
    parts = [row["cpu_s"] for row in rows if row["role"] != TOTAL and row["cpu_s"] is not None]
    assert sum(parts) == pytest.approx(by_role[TOTAL]["cpu_s"], abs=1e-6)
    assert by_role["trainer"]["cores"] == pytest.approx(1.35, rel=0.05)
    assert by_role["trainer"]["samples"] == pytest.approx(6 * 16 / 0.1, rel=0.1)
    assert by_role["server"]["requests"] == by_role[TOTAL]["requests"] > 60
    assert by_role["server"]["policy"] == "none"
    assert by_role["client"].get("requests") is None


def test_gpu_shares(tmp_path: Path) -> None:
    """SM shares are means over the ticks; a process on two GPUs counts half on each."""
    path = write_run(tmp_path / "run", FakeRun(duration_s=SHORT, gpu=True))
    rows = {row["role"]: row for row in attribute(path) if row["repeat"] == 0 and row["arm"] == "train"}
    assert rows["server"]["gpu_share_pct"] == 0
    assert 30 < rows["trainer"]["gpu_share_pct"] <= 61
    assert rows["trainer"]["gpu_attr"] == "nvml_sm"
    assert rows["profiler"]["gpu_share_pct"] is None
    _column(path / "process.csv", "gpu", lambda row: "0+1" if row["role"] == "trainer" else row["gpu"])
    assert {row["role"]: row for row in attribute(path)}["trainer"]["gpu_mem_mib"] == 900


def test_a_clipped_window_says_so(tmp_path: Path) -> None:
    """A profiler that ended early shortens `seconds`, and requests and energy with it."""
    path = write_run(tmp_path / "run", FakeRun(duration_s=SHORT, arms=("alone",)))
    full = next(row for row in attribute(path) if row["role"] == TOTAL)
    for name in ("profile", "process"):
        lines = (path / f"{name}.csv").read_text().splitlines(keepends=True)
        keep = [line for line in lines[1:] if int(line.split(",")[4]) <= T0_NS + 9 * S]
        (path / f"{name}.csv").write_text(lines[0] + "".join(keep))
    cut = next(row for row in attribute(path) if row["role"] == TOTAL)
    assert (full["seconds"], cut["seconds"]) == (6.0, 3.0)
    assert 0 < cut["requests"] < full["requests"]


def test_without_a_profiler_there_are_no_rows(tmp_path: Path) -> None:
    """A run without profiler rows has the header only; nothing is guessed."""
    path = write_run(tmp_path / "run", FakeRun(duration_s=SHORT, profiler=False))
    assert write(path) == []
    assert (path / FILE).read_text().startswith("arm,repeat,policy,role")


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=30), st.integers(0, 29), st.integers(1, 29))
def test_increase_is_additive(steps: list[int], cut: int, length: int) -> None:
    """A counter's growth over two adjoining times is the growth over both; missing readings are skipped."""
    t_ns = np.arange(len(steps), dtype=np.int64) * S
    counter = np.cumsum(steps).astype(np.float64)
    a, b, c = 0, cut * S // 2, (cut + length) * S
    parts = [increase(t_ns, counter, *edges) for edges in ((a, b), (b, c))]
    assert sum(part or 0 for part in parts) == pytest.approx(increase(t_ns, counter, a, c))
    assert increase(t_ns[:1], counter[:1], a, c) is None
    counter[1:-1] = np.nan
    assert increase(t_ns, counter, 0, int(t_ns[-1])) == pytest.approx(sum(steps[1:]))


def test_covered_is_never_extrapolated() -> None:
    """A window is cut to the readings around it; outside them nothing is left."""
    window = Window(0, "alone", 0, 10, 20)
    assert covered([0, 15], window) == (10, 15)
    assert covered([12, 30], window) == (12, 20)
    assert covered([0, 10], window) is None
    assert covered([15], window) is None


def test_idle_power_is_the_least_second() -> None:
    """Only seconds between two idle ticks count; without one there is no idle power."""
    t_ns = np.arange(5, dtype=np.int64) * S
    meter = Meter("m", "cpu", t_ns, np.array([0, 9_000, 12_000, 20_000, 25_000], dtype=np.float64))
    profile = {"t_ns": t_ns, "arm": np.array(["idle", "idle", "idle", "corun", "idle"], dtype=object)}
    assert idle_power_mw(meter, profile) == 3_000
    profile["arm"][:] = "corun"
    assert idle_power_mw(meter, profile) is None
