"""The figures of bench.sharing: ratios, intervals and the choice, on made-up cells and in virtual time."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from bench.sharing import Cell, Measured, figures, measure_simulated, page_table, picked, table
from bench.sharing_cpu import cpu_specs
from bench.sharing_sets import gpu_specs, require_gpu, sets_of

from corun.errors import InputError
from corun.share.host import Host
from corun.share.spec import in_one_process, parse


def _cells(scale: float, speed: float | None, repeats: int = 4, count: int = 300) -> list[Cell]:
    """Repeats whose sojourns are `scale` times the same exponential draws."""
    rng = np.random.default_rng(7)
    return [Cell(scale * rng.exponential(10.0, count), speed) for _ in range(repeats)]


def _measured(**policies: tuple[float, float]) -> Measured:
    cells = {"alone": _cells(1.0, None), "train": [Cell(np.empty(0), 100.0)] * 4}
    return Measured(cells | {name: _cells(*made) for name, made in policies.items()}, 0.2, {})


def test_ratios_are_to_the_same_requests_alone() -> None:
    """A policy that stretches every sojourn by a factor has that factor at every percentile, without spread."""
    row = figures(_measured(slow=(1.5, 60.0)))["policies"]["slow"]
    for key in ("p50_x", "p95_x", "p99_x"):
        assert row[key] == 1.5
        assert row["ci"][key] == [1.5, 1.5]
    assert (row["train_x"], row["idle_eff"]) == (0.6, 0.75)
    assert row["ci"]["idle_eff"] == [0.75, 0.75]
    assert (row["requests"], row["below_floor"]) == (1200, [])


def test_the_best_trains_most_among_those_that_keep_the_tail() -> None:
    """Speed does not count above 1.10 of the p99 alone, and nobody is best when nobody keeps it."""
    found = figures(_measured(fast=(1.2, 90.0), good=(1.05, 70.0), timid=(1.0, 30.0)))
    assert found["best_within_10pct"] == "good"
    assert figures(_measured(fast=(1.2, 90.0)))["best_within_10pct"] is None
    assert "most training within 10 % of the p99 alone: good" in table(found)


def test_requests_without_a_reply_are_no_ratio() -> None:
    """When a percentile is a request that was never answered its ratio is missing, not infinite, in the JSON."""
    measured = _measured(lossy=(1.0, 50.0))
    for cell in measured.cells["lossy"]:
        cell.sojourns_ms[:20] = np.inf
    row = json.loads(json.dumps(figures(measured)))["policies"]["lossy"]
    assert row["p99_x"] is None
    assert row["ci"]["p99_x"] is None
    assert row["p50_x"] is not None


def test_few_requests_are_said_to_be_few() -> None:
    """A percentile below its sample floor is listed."""
    measured = Measured(
        {"alone": _cells(1, None, 1, 100), "train": [Cell(np.empty(0), 1.0)], "x": _cells(1, 1.0, 1, 100)}, 0.1, {}
    )
    assert figures(measured)["policies"]["x"]["below_floor"] == ["p95", "p99"]


def test_a_row_that_is_not_in_the_table_is_bad_input() -> None:
    """--policies names rows of the table."""
    specs: dict[str, Any] = {"idle": {}, "nice": {}}
    assert picked(specs, ["nice"]) == {"nice": {}}
    assert picked(specs, []) == specs
    with pytest.raises(InputError, match="no such policy"):
        picked(specs, ["cold"])


def test_the_simulated_table_holds_its_promises() -> None:
    """Non-preemptible device: slack keeps p99 within 1.20 at 0.85 of the idle capacity; with priority within 1.10."""
    measured = measure_simulated(2, ["preempt slack", "preempt 8+priority", "preempt micro 4"])
    found = figures(measured)
    slack, hybrid = found["policies"]["preempt slack"], found["policies"]["preempt 8+priority"]
    assert slack["p99_x"] <= 1.20
    assert slack["idle_eff"] >= 0.85
    assert hybrid["p99_x"] <= 1.10
    assert hybrid["idle_eff"] >= 0.95
    assert found["best_within_10pct"] == "preempt 8+priority"
    assert 0.27 < measured.utilisation < 0.33


def test_policies_that_start_alike_share_their_processes() -> None:
    """What only the gate is told of is switched; caps, MPS, one process and each kind of lane have their own set."""
    sets = sets_of(gpu_specs(10.0))
    assert ["none", "throttle", "slo", "preempt"] in sets
    assert ["stream_priority", "preempt+stream_priority"] in sets
    for name in ("one_process", "green_context", "mps", "memory_cap"):
        assert [name] in sets
    assert sum(map(len, sets)) == len(gpu_specs(10.0))


def test_every_row_of_both_tables_is_a_policy() -> None:
    """Specs parse, and the rows of one process are those that say so or act inside one."""
    for specs in (cpu_specs(10.0), gpu_specs(10.0)):
        for spec in specs.values():
            parse(spec)
        together = {name for name, spec in specs.items() if in_one_process(spec)}
        assert "one_process" in together
        assert together - {"one_process"} == {
            name for name in specs if "stream_priority" in name or "green_context" in name
        }


def test_what_is_refused_is_listed_with_its_reasons() -> None:
    """A policy without a row is not forgotten: the JSON, the table and the page name it."""
    refused = {"mps": ["there is no NVIDIA driver", "it is not installed"], "mig": ["no slice"]}
    details = {"refused": refused, "service": "a", "trainer": "b", "repeats": 4, "seconds": 8, "utilisation": 0.2}
    measured = Measured(_measured(none=(1.5, 60.0)).cells, 0.2, details)
    found = figures(measured)
    assert found["refused"] == refused
    assert "not to be had here: mps: there is no NVIDIA driver; it is not installed" in table(found)
    assert page_table(found, details).endswith("Not to be had there: mps, mig.")


@pytest.mark.skipif(Host().driver_version is not None, reason="there is an NVIDIA driver")
def test_without_a_gpu_the_gpu_table_is_refused() -> None:
    """Before anything is started, with what can be measured instead."""
    with pytest.raises(InputError, match="--device simulated"):
        require_gpu()
