"""The timeline reduces a run without inventing or hiding anything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corun.clock import NS_PER_S
from corun.report import timeline
from corun.report.shares import cpu_shares, gpu_shares, power
from corun.run.read import Run


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=400), st.integers(5, 50))
@example([1.0] * 100 + [2.0], 5)
def test_thinning_keeps_the_tail(values: list[float], most: int) -> None:
    """Whatever is thinned, every request at or above p99 keeps its dot, and nothing is thinned below the limit."""
    ms = np.array(values)
    keep = timeline.thin(ms, most)
    assert keep[ms >= np.quantile(ms, 0.99)].all()
    if len(ms) <= most:
        assert keep.all()
    else:
        assert keep.sum() <= most + (ms >= np.quantile(ms, 0.99)).sum()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3 * NS_PER_S), min_size=1, max_size=30), st.integers(1, 12))
def test_steps_are_shared_between_bins(lengths: list[int], bins: int) -> None:
    """Bins that cover every step hold exactly as many steps as there were, however steps lie over their edges."""
    ends = np.cumsum(lengths)
    train = {"t_start_ns": np.concatenate([[0], ends[:-1]]), "t_end_ns": ends}
    edges = np.linspace(0, float(ends[-1]), bins + 1)
    rates = timeline.binned_steps(train, edges)
    assert (rates * np.diff(edges) / NS_PER_S).sum() == pytest.approx(len(lengths))


def test_rolling_line_stays_in_its_window(run: Run) -> None:
    """The rolling p99 never uses requests of another window, and is one of the samples."""
    made = timeline.make(run)
    spans = {window.arm: made.span(window) for window in run.windows}
    (service,) = [service for service in made.services if service.service == "resnet18"]
    assert service.rolling_s
    for arm, seconds, tail in service.rolling:
        begin, end = spans[arm]
        assert begin + service.rolling_s / 2 <= seconds.min() <= seconds.max() <= end - service.rolling_s / 2 + 1e-9
        table = run.infer_client["resnet18"]
        assert np.isin(tail[~np.isnan(tail)], table["sojourn_ms"][table["arm"] == arm]).all()


def test_every_request_is_a_dot_or_a_cross(run: Run) -> None:
    """Requests with an answer are dots, the others crosses; none is missing."""
    for service in timeline.make(run).services:
        table = run.infer_client[service.service]
        assert len(service.ms) + service.thinned + len(service.unanswered) == len(table["id"])
        assert len(service.unanswered) == (table["status"] != "OK").sum()


def test_shares_come_from_counters(run: Run) -> None:
    """Cores by role are the counters' increase over time: the trainer's 1.35 cores while it trains, and none before."""
    (alone,), (train,) = run.select("alone"), run.select("train")
    shares = cpu_shares(run, alone.start_ns, run.windows[-1].stop_ns)
    assert shares is not None
    trainer = dict(shares.stacked)["trainer"]
    ends = shares.seconds
    begin = (train.start_ns - alone.start_ns) / NS_PER_S
    assert trainer[ends < begin].max() < 0.01
    assert trainer[(ends > begin + 1) & (ends <= begin + train.seconds)].max() == pytest.approx(1.35, rel=0.05)


def test_gpu_and_power_need_their_rows(run: Run, repeated_path: object) -> None:
    """With a GPU there are shares by role, its utilisation and its power; without one there is nothing, not zeros."""
    ends = run.windows[0].start_ns, run.windows[-1].stop_ns
    gpu, watts = gpu_shares(run, *ends), power(run, *ends)
    assert gpu is not None
    assert watts is not None
    assert {name for name, _ in gpu.stacked} == {"server", "trainer"}
    assert [name for name, _ in gpu.lines] == ["GPU 0 busy"]
    assert np.nanmax(watts.lines[0][1]) > 50
    from corun.run.read import read

    bare = read(str(repeated_path))
    assert gpu_shares(bare, *ends) is None
    assert power(bare, *ends) is None


def test_data_has_every_second(run: Run) -> None:
    """The figure's table covers the whole run and counts every answer once."""
    data = timeline.exhibit(run).data
    assert data is not None
    place = data.columns.index("resnet18 answers")
    assert sum(row[place] for row in data.rows) == (run.infer_client["resnet18"]["status"] == "OK").sum()
    assert data.rows[-1][0] >= timeline.make(run).end_s - 1


def test_most_services(run: Run) -> None:
    """More services than fit are named as left out, those with the longest tails stay."""
    many = {f"s{number}": run.infer_client["resnet18"] for number in range(9)}
    made = timeline.make(Run(run.path, run.manifest, run.windows, many, train=run.train, events=run.events))
    assert len(made.services) == timeline.SERVICES
    assert len(made.left_out) == 3
