"""What processes recorded in a window: sojourns of requests, speed of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun.clock import NS_PER_MS, NS_PER_S
from corun.launch.troupe import Troupe, Window, sojourns_ms
from corun.load.ring import SLOT_DTYPE
from corun.run.records import TRAIN
from corun.run.table import TableWriter
from corun.share.foreign import Reading
from corun.wire import Status


def _window(start_s: float, stop_s: float, number: int = 1) -> Window:
    before = Reading(round(start_s * NS_PER_S), 10.0, {7: 1.0, 8: 1.0})
    after = Reading(round(stop_s * NS_PER_S), 10.0 + 1.5 * (stop_s - start_s), {7: 1.0 + stop_s - start_s, 8: 1.0})
    return Window(number, before.t_ns, after.t_ns, before, after)


def _steps(path: Path, rows: list[tuple[int, float, float, int]]) -> None:
    table = TableWriter(path / "train.csv", TRAIN)
    for segment, begin_s, end_s, samples in rows:
        stamps = {"t_start_ns": round(begin_s * NS_PER_S), "t_end_ns": round(end_s * NS_PER_S)}
        table.row({"segment": segment, "samples": samples, **stamps})
    table.close()


@given(st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from([Status.OK, Status.REJECTED, Status.LOST]))))
def test_a_request_without_an_answer_waited_for_ever(taken: list[tuple[int, Status]]) -> None:
    """Sojourns run from the intended send; only what was answered OK has a finite one."""
    records = np.zeros(len(taken), SLOT_DTYPE)
    records["t_intended"] = NS_PER_S
    records["t_rx"] = [NS_PER_S + ms * NS_PER_MS for ms, _ in taken]
    records["status"] = [status for _, status in taken]
    assert sojourns_ms(records).tolist() == [ms if status == Status.OK else np.inf for ms, status in taken]


def test_a_step_across_the_border_counts_by_the_part_inside(tmp_path: Path) -> None:
    """Half a step inside is half its samples; steps of other windows are not counted; 8 + 16 + 4 in two seconds."""
    _steps(tmp_path, [(1, 9.5, 10.5, 16), (1, 10.5, 11.5, 16), (1, 11.75, 12.25, 8), (2, 10.0, 12.0, 999)])
    assert Troupe(tmp_path, 1.0).samples_per_s(_window(10, 12)) == pytest.approx(14.0)


def test_a_trainer_may_have_a_directory_of_its_own(tmp_path: Path) -> None:
    """Several trainers of one troupe write to different tables."""
    _steps(tmp_path / "passive", [(3, 10.0, 11.0, 32)])
    assert Troupe(tmp_path, 1.0).samples_per_s(_window(10, 12, 3), tmp_path / "passive") == pytest.approx(16.0)


def test_cores_of_a_window() -> None:
    """Of 1.5 busy cores 1.0 is a process of ours: 0.5 were others'."""
    window = _window(10, 12)
    assert window.own_cores([7]) == pytest.approx(1.0)
    assert window.own_cores([8]) == pytest.approx(0.0)
    assert window.foreign_cores == pytest.approx(0.5)


def test_a_client_that_had_nothing_to_send_has_no_records(tmp_path: Path) -> None:
    """No ring file is no record, not an error."""
    assert Troupe(tmp_path, 1.0).records("null", _window(10, 12)) is None
