"""The original's latencies, rebuilt from stamps: what each of them contains, and what its load does to a stream."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun import arrivals
from corun.clock import NS_PER_S
from corun.report.legacy import (
    DROPPED,
    between_acks_ms,
    dispersion,
    original_percentile,
    rows,
    write,
)
from corun.run.read import Window, read
from corun.testing.runs import FakeRun, FakeService, write_run

WINDOW = Window(0, "alone", 0, 0, 60 * NS_PER_S)


def _sent(seconds: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "t_tx_start_ns": (seconds * NS_PER_S).astype(np.int64) + 1,
        "segment": np.zeros(len(seconds)),
    }


@given(st.lists(st.floats(0, 1e6), min_size=DROPPED + 1, max_size=200), st.floats(1, 100))
def test_the_originals_percentile_is_a_sample_at_a_truncated_place(values: list[float], percent: float) -> None:
    """The first three rows do not count, and the answer is the element at int(p n) or the last one."""
    kept = sorted(values[DROPPED:])
    found = original_percentile(np.array(values), percent)
    assert found == kept[min(int(percent / 100 * len(kept)), len(kept) - 1)]


def test_three_rows_have_no_original_percentile() -> None:
    """Nothing is left when the first three rows are dropped."""
    assert original_percentile(np.ones(DROPPED)) is None


def test_between_acks_never_crosses_a_window() -> None:
    """The pause between two windows is not a period of the client."""
    table = {
        "t_tx_start_ns": np.array([10, 20, 1_000_000_000_000], dtype=np.int64),
        "segment": np.array([0, 0, 1]),
    }
    windows = [WINDOW, Window(1, "alone", 1, 900_000_000_000, 1_100_000_000_000)]
    assert between_acks_ms(table, windows) == pytest.approx([1e-5])


def test_dispersion_tells_the_originals_load_from_poisson() -> None:
    """A count drawn a second and spaced evenly over it keeps Poisson's dispersion; constant gaps have none at all."""
    rng = np.random.default_rng(0)
    poisson = arrivals.parse("poisson", rate=50).draw(rng, 60)
    even = arrivals.parse("constant", rate=50).draw(rng, 60)
    assert 0.6 < (dispersion(_sent(poisson), [WINDOW]) or 0) < 1.6
    assert (dispersion(_sent(even), [WINDOW]) or 0) < 0.1


def test_no_requests_have_no_dispersion() -> None:
    """Nothing sent is missing, not zero."""
    assert dispersion(_sent(np.empty(0)), [WINDOW]) is None


def test_rows_of_a_run_leave_out_the_queue_where_the_original_did(tmp_path: Path) -> None:
    """handshake and device latency are parts of the sojourn; the period is about 1 / rate whatever the service does."""
    run = read(write_run(tmp_path / "run", FakeRun(services=(FakeService(rate=40.0),))))
    found = rows(run)
    assert {row.arm for row in found} == {"alone", "corun"}
    for row in found:
        assert row.sojourn_p95_ms is not None
        assert row.handshake_p95_ms is not None
        assert row.device_p95_ms is not None
        assert row.handshake_p95_ms + row.device_p95_ms < row.sojourn_p95_ms * 1.5
        assert row.load == "open loop"
        assert row.asked_per_s == pytest.approx(40.0)


def test_the_file_has_a_line_for_every_service_and_arm_of_every_run(tmp_path: Path) -> None:
    """Missing figures are empty cells, never zero."""
    paths = [write_run(tmp_path / name, FakeRun(seed=seed)) for seed, name in enumerate("ab")]
    found = write(paths, tmp_path / "legacy.csv")
    with (tmp_path / "legacy.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(found)
    assert all(
        line["sojourn_p99_ms"] == "" for line, row in zip(lines, found, strict=True) if row.sojourn_p99_ms is None
    )
