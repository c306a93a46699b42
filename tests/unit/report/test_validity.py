"""Every reason for doubt is found, names the measured value, the limit and the remedy, and removes no data."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.report.flag import Flag
from corun.report.summary import summarise
from corun.report.validity import check
from corun.testing.runs import T0_NS, FakeRun, FakeService, write_run

S = 10**9
Cell = Callable[[dict[str, str]], object]
Flags = dict[str, list[Flag]]

CALM = FakeRun(duration_s={"alone": 36.0, "train": 6.0, "corun": 36.0})
GPU = FakeRun(duration_s={"alone": 36.0, "train": 6.0, "corun": 36.0}, gpu=True)


def _rewrite(path: Path, columns: dict[str, Cell]) -> None:
    """Set columns of a CSV file row by row."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.update({name: str(cell(row)) for name, cell in columns.items()})
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def _second(row: dict[str, str]) -> float:
    return (int(row["t_ns"]) - T0_NS) / S


def _flags(path: Path) -> Flags:
    found: Flags = {}
    for flag in check(summarise(path)):
        found.setdefault(flag.check, []).append(flag)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run nobody has a doubt about."""
    return write_run(tmp_path / "run", CALM)


@pytest.fixture
def gpu_run(tmp_path: Path) -> Path:
    """The same on a GPU."""
    return write_run(tmp_path / "gpu", GPU)


def test_a_calm_run_is_valid(run: Path, gpu_run: Path) -> None:
    """No flag, and validity.json says so in its three keys."""
    for path in (run, gpu_run):
        assert _flags(path) == {}
        value = json.loads((path / "validity.json").read_text())
        assert (value["valid"], value["reasons"], value["flags"]) == (True, [], [])


def test_every_flag_says_what_limit_and_remedy(run: Path) -> None:
    """validity.json repeats each flag with its sentence; the sentence holds the finding and the remedy."""
    _rewrite(run / "profile.csv", {"cpu_steal_ns": lambda row: round(_second(row) * 0.2 * S)})
    (flag, *_) = _flags(run)["steal"]
    value = json.loads((run / "validity.json").read_text())
    assert value["valid"] is False
    assert value["reasons"] == [entry["sentence"] for entry in value["flags"]]
    assert value["flags"][0] == flag.as_json()
    assert flag.found in flag.sentence
    assert flag.remedy in flag.sentence
    assert flag.remedy
    assert flag.value == pytest.approx(0.05, rel=0.1)
    assert "1%" in flag.found


@settings(max_examples=10, deadline=None)
@given(st.floats(0, 0.05), st.integers(0, 3), st.floats(10, 3000), st.sampled_from(["complete", "interrupted"]))
def test_checks_never_touch_the_data(
    tmp_path_factory: pytest.TempPathFactory, lost: float, faults: int, slip_us: float, status: str
) -> None:
    """Whatever is wrong: the rows of the run stay as they were, and valid means no flag."""
    fake = FakeRun(
        (FakeService(lost_share=lost, slip_us=slip_us),),
        duration_s={"alone": 4.0, "train": 2.0, "corun": 4.0},
        faults=[f"fault {number}" for number in range(faults)],
        status=status,
    )
    path = write_run(tmp_path_factory.mktemp("run"), fake)
    before = {file: file.read_bytes() for file in path.rglob("*.csv")}
    summary = summarise(path)
    flags = check(summary)
    value = json.loads((path / "validity.json").read_text())
    assert value["valid"] == (not flags)
    assert len(value["flags"]) == len(value["reasons"]) == len(flags)
    assert {file: file.read_bytes() for file in before} == before
    assert sum(flag.check == "fault" for flag in flags) == faults
    assert ("status" in {flag.check for flag in flags}) == (status != "complete" and not faults)


def test_late_client(tmp_path: Path) -> None:
    """Slip over max(200 us, 2 % of the median service time) is flagged, by p99 where there are enough requests."""
    late = write_run(tmp_path / "late", FakeRun((FakeService(slip_us=400),), duration_s=CALM.duration_s))
    (flag, *_) = _flags(late)["slip"]
    assert "slip p99" in flag.found
    assert flag.limit == 0.2
    slow = FakeService(rate=20, slip_us=400, service_ms=60, slowdown={}, stall_share=0)
    assert "slip" not in _flags(write_run(tmp_path / "slow", FakeRun((slow,), arms=("alone",))))
    few = FakeRun((FakeService(rate=25, slip_us=400),), duration_s={"alone": 4.0}, arms=("alone",))
    assert "slip p90" in _flags(write_run(tmp_path / "few", few))["slip"][0].found


def test_errors_and_lost_requests(tmp_path: Path) -> None:
    """Requests without an OK are counted in a flag; the percentiles leave them out and say so."""
    fake = FakeRun((FakeService(lost_share=0.02),), duration_s=CALM.duration_s)
    flags = _flags(write_run(tmp_path / "run", fake))
    assert {flag.arm for flag in flags["errors"]} == {"alone", "corun"}
    assert "not answered with OK" in flags["errors"][0].found


def test_overload_is_unstable(tmp_path: Path) -> None:
    """A queue that grows for the whole window is over-saturated."""
    fake = FakeRun((FakeService(rate=30, service_ms=50, slowdown={}),), duration_s={"alone": 40.0}, arms=("alone",))
    (flag, *_) = _flags(write_run(tmp_path / "run", fake))["unstable"]
    assert "over-saturated" in flag.found
    assert "lower the rate" in flag.remedy


def test_a_short_run_cannot_be_judged(tmp_path: Path) -> None:
    """Too few requests for the steady-state checks is a doubt of its own kind."""
    fake = FakeRun(duration_s={"alone": 2.0, "corun": 2.0}, arms=("alone", "corun"))
    flags = _flags(write_run(tmp_path / "run", fake))
    assert set(flags) == {"too_few"}
    assert "lengthen the run" in flags["too_few"][0].remedy


def test_client_cpu_and_backlog(run: Path) -> None:
    """A client over 70 % of a core, and one whose socket was full, name themselves and the window."""

    def change(manifest: dict[str, Any]) -> None:
        for entry in manifest["counts"]:
            entry.update(cpu_s=0.9 * 36, backlog_max=3) if entry["segment"] == 2 else None

    _manifest(run, change)
    flags = _flags(run)
    assert set(flags) == {"client_cpu", "backlog"}
    assert flags["client_cpu"][0].value == pytest.approx(0.9)
    assert flags["client_cpu"][0].arm == "corun"
    assert flags["backlog"][0].value == 3


def test_training_that_did_not_last(run: Path) -> None:
    """A trainer that finished its epochs, or took no step, spoils the window it belongs to."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["counts"] += [
            {"segment": 2, "role": "trainer", "name": "resnet18_16", "steps": 40, "finished": True},
            {"segment": 1, "role": "trainer", "name": "resnet18_16", "steps": 0, "finished": False},
        ]

    _manifest(run, change)
    flags = _flags(run)
    assert set(flags) == {"train_ended", "train_idle"}
    assert (flags["train_ended"][0].arm, flags["train_idle"][0].arm) == ("corun", "train")


@pytest.mark.parametrize(
    ("clock", "flagged"),
    [
        ({}, False),
        ({"before": {"bound_ns": 20_000}, "after": {"bound_ns": 30_000}}, False),
        ({"before": {"bound_ns": 20_000}, "after": {"bound_ns": 2_000_000}}, True),
        ({"before": {"bound_ns": 20_000}, "after_failed": "gone"}, True),
    ],
)
def test_clock_bound_of_remote_hosts(run: Path, clock: dict[str, Any], flagged: bool) -> None:
    """Stages over a network whose clocks agree only loosely are doubted; one host has no second clock."""
    _manifest(run, lambda manifest: [entry.update(clock=clock) for entry in manifest["counts"]])
    assert set(_flags(run)) == ({"clock"} if flagged else set())


def test_missed_ticks_count_only_in_windows(run: Path) -> None:
    """Ticks missed while processes were starting are no doubt; a gap that overlaps a window is."""
    _rewrite(run / "profile.csv", {"missed": lambda row: 2 if _second(row) == 3 else 0})
    assert _flags(run) == {}
    _rewrite(run / "profile.csv", {"missed": lambda row: 2 if _second(row) == 20 else 0})
    (flag,) = _flags(run)["missed_ticks"]
    assert (flag.value, flag.arm) == (2, "alone")


def test_no_profiler(tmp_path: Path) -> None:
    """A run without rows of the profiler cannot show that it was undisturbed."""
    path = write_run(tmp_path / "run", FakeRun(duration_s=CALM.duration_s, profiler=False))
    assert set(_flags(path)) == {"profiler"}


def test_strangers_on_the_cpu(run: Path) -> None:
    """CPU time of the host that no process of the run used is flagged above a tenth of all cores."""
    used = lambda row: int(row["cpu_user_ns"]) + round(0.2 * 4 * S * _second(row))  # noqa: E731
    idle = lambda row: int(row["cpu_idle_ns"]) - round(0.2 * 4 * S * _second(row))  # noqa: E731
    _rewrite(run / "profile.csv", {"cpu_user_ns": used, "cpu_idle_ns": idle})
    flags = _flags(run)["foreign_cpu"]
    assert [flag.arm for flag in flags] == ["alone", "train", "corun"]
    assert flags[0].value == pytest.approx(0.2, abs=0.03)


def test_strangers_on_the_gpu(gpu_run: Path) -> None:
    """More processes on a GPU than the run has there are flagged; an MPS server is none."""
    _rewrite(gpu_run / "gpu.csv", {"processes": lambda row: 3 if row["arm"] == "corun" else 2})
    (flag,) = _flags(gpu_run)["foreign_gpu"]
    assert (flag.arm, flag.value) == ("corun", 1)
    _manifest(gpu_run, lambda manifest: manifest.update(sharing={"policy": "mps"}))
    assert _flags(gpu_run) == {}


def test_throttling_by_counter_and_by_reason(gpu_run: Path) -> None:
    """Clocks held down for more than 1 % of a window: by the driver's counter, or by the ticks' reason bits."""
    _rewrite(gpu_run / "gpu.csv", {"throttle_hw_thermal_ns": lambda row: round(_second(row) * 0.3 * S)})
    flags = _flags(gpu_run)["throttling"]
    assert flags[0].value == pytest.approx(0.3, abs=0.02)
    assert "hardware" in flags[0].found
    _rewrite(
        gpu_run / "gpu.csv",
        {
            "throttle_hw_thermal_ns": lambda row: "",
            "throttle_reasons": lambda row: 4 if row["arm"] == "corun" else 1,
        },
    )
    (flag,) = _flags(gpu_run)["throttling"]
    assert (flag.arm, flag.value) == ("corun", 1.0)
    assert "power cap" in flag.found


@pytest.mark.parametrize(
    ("calibration", "checks"),
    [
        ({"status": "complete", "slip_p99_us": 80.0}, set()),
        ({"status": "complete", "slip_p99_us": None}, set()),
        ({"status": "complete", "slip_p99_us": 900.0}, {"calibration"}),
        ({"status": "failed", "reason": "port in use"}, {"calibration"}),
    ],
)
def test_the_harness_own_noise(run: Path, calibration: dict[str, Any], checks: set[str]) -> None:
    """What client and null server did alone stands beside the flags, and is one when it was late by itself."""
    (run / "calibration.json").write_text(json.dumps(calibration))
    assert set(_flags(run)) == checks
    assert json.loads((run / "validity.json").read_text())["calibration"] == calibration
