"""What is read off measured points, and how live figures correct it."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.clock import NS_PER_MS, NS_PER_S
from corun.errors import InputError
from corun.tasks.profile import Point, Profile, faded, from_json, live_factor, to_json
from corun.tasks.profiles import Profiles, Settings, confirmed, point_of


def profile(*points: Point, **values: object) -> Profile:
    """A profile of resnet18 with these points."""
    settings = {"model": "resnet18", "machine": "m", "device": "cpu", "threads": 1, "points": points}
    return Profile(**{**settings, **values})  # type: ignore[arg-type]


def point(rate: float, ms: float, **values: object) -> Point:
    """A point whose every latency is `ms`."""
    settings = {"rate": rate, "n": 1000, "mean_ms": ms, "max_ms": ms, **dict.fromkeys(("p50_ms", "p99_ms"), ms)}
    return Point(**{**settings, **values})  # type: ignore[arg-type]


POINTS = st.lists(
    st.tuples(st.floats(0.1, 100), st.floats(0.1, 1000)), min_size=1, max_size=6, unique_by=lambda pair: pair[0]
)


@settings(max_examples=80, deadline=None)
@given(POINTS, st.floats(0, 120), st.floats(0, 120))
def test_latency_never_falls_with_the_rate(pairs: list[tuple[float, float]], one: float, other: float) -> None:
    """A higher rate never reads a lower latency, a measured one never less than was measured, none above the last."""
    known = profile(*(point(rate, ms) for rate, ms in pairs))
    low, high = sorted((one, other))
    at_low, at_high = known.latency_ms("p99_ms", low), known.latency_ms("p99_ms", high)
    top = max(rate for rate, _ in pairs)
    assert (at_high is None) == (high > top * (1 + 1e-9))
    if at_low is not None and at_high is not None:
        assert at_low <= at_high + 1e-9
    for rate, ms in pairs:
        read = known.latency_ms("p99_ms", rate)
        assert read is not None
        assert read >= ms - 1e-9


def test_a_percentile_that_was_not_measured_reads_the_next_larger_thing() -> None:
    """With too few requests for a p99 the maximum stands in for it: on the safe side, never interpolated."""
    short = Point(rate=10, n=100, mean_ms=5, max_ms=40, p50_ms=4, p90_ms=9)
    assert short.bound_ms("p50_ms") == 4
    assert short.bound_ms("p95_ms") == 40
    assert short.bound_ms("max_ms") == 40
    assert not short.supports("p99_ms")
    assert short.supports("p90_ms")
    assert Point(rate=10, n=200, mean_ms=5, max_ms=40, p95_ms=20).bound_ms("p90_ms") == 20


def test_curves_are_kept_apart() -> None:
    """Batch limits and training have curves of their own; the top rate leaves out rates with losses."""
    known = profile(
        point(10, 5), point(20, 9), point(30, 99, lost=4), point(10, 50, training=True), point(40, 8, max_batch=4)
    )
    assert known.latency_ms("p99_ms", 10) == 5
    assert known.latency_ms("p99_ms", 10, training=True) == 50
    assert known.latency_ms("p99_ms", 40, max_batch=4) == 8
    assert known.max_batches() == (1, 4)
    assert known.top_rate(1, training=False) == 20
    assert known.top_rate(4, training=True) is None


def test_a_window_without_a_request_is_no_evidence() -> None:
    """Nothing asked says nothing; asked and nothing answered is the worst latency there is."""
    silent = profile(Point(rate=1, n=0, mean_ms=0, max_ms=0))
    assert silent.latency_ms("p99_ms", 1) is None
    assert silent.top_rate(1, training=False) is None
    dead = profile(Point(rate=1, n=0, mean_ms=0, max_ms=0, lost=5))
    assert dead.latency_ms("p99_ms", 1) == math.inf


def test_the_cost_to_training_is_read_by_the_rate() -> None:
    """Between rates it is interpolated, above the highest it is read there; alone it is unknown."""
    known = profile(*(point(rate, 5, training=True, slowdown=rate / 10) for rate in (10.0, 20.0)), point(20, 5))
    assert known.slowdown(15) == pytest.approx(1.5)
    assert known.slowdown(500) == 2.0
    assert profile(point(10, 5)).slowdown(10) is None


def test_live_figures_move_a_profile_the_more_the_more_requests_there_were() -> None:
    """A service twice as slow as profiled doubles the profile in the end, hardly moves it at first."""
    known = profile(point(10, 8), point(20, 16))
    few, many = (live_factor(known, 16.0, requests, 10, 1, False) for requests in (40, 10_000))
    assert few is not None
    assert many is not None
    assert 1 < few < 1.3
    assert many == pytest.approx(2, rel=0.02)
    assert known.slower(many).latency_ms("p99_ms", 20) == pytest.approx(32, rel=0.02)
    assert known.slower(many).latency_ms("p50_ms", 10) == pytest.approx(16, rel=0.02)


@pytest.mark.parametrize(("live", "requests", "rate"), [(16.0, 5, 10), (16.0, 1000, 99), (0.0, 1000, 10)])
def test_live_figures_that_say_nothing_change_nothing(live: float, requests: int, rate: float) -> None:
    """Too few requests, a rate never measured, no latency: there is no factor."""
    assert live_factor(profile(point(10, 8)), live, requests, rate, 1, False) is None


def test_live_figures_are_believed_within_limits() -> None:
    """A disturbance of a thousand times is taken for eight."""
    assert live_factor(profile(point(10, 1)), 1000.0, 10**9, 10, 1, False) == pytest.approx(8, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.25, 8), st.floats(-10, 1e6), st.floats(0, 1e6))
def test_a_factor_fades_towards_one(factor: float, age_s: float, later_s: float) -> None:
    """An old factor says less than a young one, never the opposite; after an hour its root is left."""
    young, old = faded(factor, age_s), faded(factor, max(age_s, 0) + later_s)
    assert abs(math.log(old)) <= abs(math.log(young)) + 1e-12
    assert math.log(old) * math.log(factor) >= 0
    assert faded(factor, 3600) == pytest.approx(math.sqrt(factor))


def test_a_profile_survives_its_file(tmp_path: pytest.TempPathFactory) -> None:
    """What is kept of a profile gives the same profile back; another machine's is not found."""
    known = profile(point(10, 8), batch_ms={1: 5.0, 8: 30.0}, measured="2026-01-01")
    assert from_json(json.loads(json.dumps(to_json(known)))) == known
    profiles = Profiles(tmp_path, "m")  # type: ignore[arg-type]
    profiles.put(known)
    assert profiles.find("resnet18", "cpu") == known
    assert profiles.find("resnet18", "gpu") is None
    assert profiles.find("resnet50", "cpu") is None
    assert Profiles(tmp_path, "other").all() == []  # type: ignore[arg-type]


def test_a_newer_profile_takes_the_place_of_an_older_one(tmp_path: pytest.TempPathFactory) -> None:
    """The newest is found; beside training only one that was measured so."""
    profiles = Profiles(tmp_path, "m")  # type: ignore[arg-type]
    old = profile(point(10, 8), measured="2026-01-01")
    new = dataclasses.replace(old, threads=2, measured="2026-02-01")
    beside = dataclasses.replace(
        old, points=(*old.points, point(10, 80, training=True)), trainer="resnet50_16", measured="2026-01-15"
    )
    for one in (new, old, beside):
        profiles.put(one)
    assert profiles.find("resnet18", "cpu") == new
    assert profiles.find("resnet18", "cpu", training=True) == beside
    profiles.put(dataclasses.replace(new, rss_mib=5.0))
    assert len(profiles.all()) == 3


def test_a_broken_profile_is_named(tmp_path: pytest.TempPathFactory) -> None:
    """A file that is no profile is bad input with its path; one of another schema is ignored."""
    profiles = Profiles(tmp_path, "m")  # type: ignore[arg-type]
    path = profiles.put(profile(point(10, 8)))
    path.write_text('{"schema": 99}')
    assert profiles.all() == []
    path.write_text("{")
    with pytest.raises(InputError, match="cannot be read as a profile"):
        profiles.all()
    path.write_text('{"schema": 1, "points": []}')
    with pytest.raises(InputError, match="is no profile"):
        profiles.all()


@pytest.mark.parametrize("given", [{"seconds": 0}, {"max_batches": ()}, {"loads": (-1.0,)}, {"rounds": 0}])
def test_settings_that_cannot_measure_are_refused(given: dict[str, object]) -> None:
    """A measurement that could only fail does not begin."""
    with pytest.raises(InputError, match="cannot be measured like this"):
        Settings(**given)  # type: ignore[arg-type]


def _rows(latencies_ms: list[float], rate: float, statuses: list[str] | None = None) -> dict[str, np.ndarray]:
    intended = (np.arange(len(latencies_ms)) / rate * NS_PER_S).astype(np.int64) + NS_PER_S
    latency = np.array(latencies_ms)
    return {
        "status": np.array(statuses or ["OK"] * len(latencies_ms), dtype=object),
        "t_intended_ns": intended,
        "t_rx_ns": intended + (latency * NS_PER_MS).astype(np.int64),
        "sojourn_ms": latency,
    }


def test_a_point_counts_what_was_not_answered() -> None:
    """Percentiles are of the answered requests; every other one is lost."""
    rows = _rows([10.0] * 99 + [20.0], 100.0, ["OK"] * 98 + ["REJECTED", "OK"])
    found = point_of(rows, 100.0, 1.0, 1, False)
    assert (found.n, found.lost, found.max_ms) == (99, 1, 20.0)
    assert found.p50_ms == 10.0
    assert found.p99_ms is None


def test_a_server_that_falls_behind_does_not_keep_up() -> None:
    """Replies long after the window's end count as lost: the rate is more than the server can take."""
    behind = _rows([5.0 + 5.0 * place for place in range(200)], 200.0)
    assert point_of(behind, 200.0, 1.0, 1, False).lost > 0
    steady = _rows([50.0] * 200, 200.0)
    assert point_of(steady, 200.0, 1.0, 1, False).lost == 0


@pytest.mark.parametrize(("lost", "windows", "found"), [([0, 9], 1, 0), ([3, 0], 2, 0), ([3, 5], 2, 5)])
def test_a_server_falls_behind_when_it_does_so_twice(lost: list[int], windows: int, found: int) -> None:
    """A window that lost requests is measured again, once, and the second one counts."""
    points = [point(10.0, 1.0, lost=count) for count in lost]
    left = iter(points)
    assert confirmed(lambda: next(left)).lost == found
    assert len(list(left)) == len(points) - windows


def test_nothing_answered_is_a_point_without_latency() -> None:
    """A window in which every request failed has no percentiles and is all lost."""
    found = point_of(_rows([1.0, 1.0], 2.0, ["FAILED", "FAILED"]), 2.0, 1.0, 1, True)
    assert (found.n, found.lost, found.p50_ms) == (0, 2, None)
