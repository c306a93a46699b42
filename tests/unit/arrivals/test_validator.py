"""The validator: accepts each process under its own name, rejects the known-bad generators."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from corun.arrivals.legacy import Legacy
from corun.arrivals.processes import (
    ClosedLoop,
    Constant,
    ExactCount,
    Gamma,
    Mmpp,
    Offline,
    Poisson,
    Process,
    Ramp,
    Sine,
    Step,
)
from corun.arrivals.recorded import MinuteCounts, Replay, Trace
from corun.arrivals.validator import KS_EXPONENTIAL, Report, _ks, cv, dispersion, lag1, validate

Seconds = NDArray[np.float64]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def judge(stamps_s: Seconds, process: Process, duration_s: float, jitter_ns: int = 1) -> Report:
    return validate(np.rint(stamps_s * 1e9).astype(np.int64), process, duration_s, jitter_ns)


def failed(report: Report) -> set[str]:
    return {check.name for check in report.checks if check.passed is False}


def same_seed_processes(processes: int, rate: float, duration_s: float, seed: int) -> Seconds:
    """B1: every process owns a generator with one common seed and adds its gaps to one shared offset."""
    own = rng(seed).exponential(1 / rate, int(2 * rate * duration_s / processes))
    stamps = np.cumsum(np.repeat(own, processes))
    return stamps[stamps < duration_s]


def normalised_exponential(rate: float, duration_s: float, seed: int) -> Seconds:
    """B4: a "constant" load of exponential gaps scaled to fill the duration."""
    gaps = rng(seed).exponential(1.0, int(rate * duration_s))
    return np.cumsum(gaps) / gaps.sum() * duration_s * (1 - 1e-9)


def even_seconds(rate: float, duration_s: float, seed: int) -> Seconds:
    """B8: a Poisson count per second, evenly spaced inside the second."""
    counts = rng(seed).poisson(rate, int(duration_s))
    return np.concatenate([second + np.arange(count) / count for second, count in enumerate(counts) if count])


@pytest.mark.parametrize("processes", [2, 4, 10])
@pytest.mark.parametrize("seed", range(5))
def test_same_seed_processes_are_rejected(processes: int, seed: int) -> None:
    """B1: gaps shared by N processes keep CV 1 but are correlated and over-dispersed; the validator says so."""
    report = judge(same_seed_processes(processes, 100.0, 200.0, seed), Poisson(100.0), 200.0)
    assert {"lag1", "dispersion@5", "dispersion@20"} <= failed(report)


@pytest.mark.parametrize("processes", [2, 4, 10])
def test_same_seed_processes_show_the_published_figures(processes: int) -> None:
    """B1 at 100/s: lag-1 .50/.75/.90, dispersion at 50 ms and 1 s as in the reference, CV 1: the generator is right."""
    lag, at_50ms, at_1s = {2: (0.50, 1.69, 2.17), 4: (0.75, 2.73, 4.09), 10: (0.90, 4.43, 9.82)}[processes]
    stamps = same_seed_processes(processes, 100.0, 600.0, seed=1)
    assert cv(np.diff(stamps)) == pytest.approx(1.0, abs=0.05)
    assert lag1(np.diff(stamps)) == pytest.approx(lag, abs=0.03)
    assert dispersion(stamps, 0.05, 600.0) == pytest.approx(at_50ms, rel=0.1)
    assert dispersion(stamps, 1.0, 600.0) == pytest.approx(at_1s, rel=0.25)


@pytest.mark.parametrize("seed", range(5))
def test_a_constant_load_that_is_exponential_is_rejected(seed: int) -> None:
    """B4: what calls itself constant must have CV 0; exponential gaps scaled to the duration have CV 1."""
    report = judge(normalised_exponential(100.0, 100.0, seed), Constant(100.0), 100.0)
    assert {"cv", "gap_error_s"} <= failed(report)
    assert "equal gaps have CV 0" in "; ".join(report.reasons)


@pytest.mark.parametrize("rate", [2.0, 10.0, 100.0])
@pytest.mark.parametrize("seed", range(3))
def test_an_evenly_spaced_poisson_is_rejected(rate: float, seed: int) -> None:
    """B8: at 1 s its dispersion is Poisson's, so the other checks must catch it, at low rates too."""
    duration_s = 20_000 / rate
    stamps = even_seconds(rate, duration_s, seed)
    assert dispersion(stamps, 1.0, duration_s) == pytest.approx(1.0, abs=0.25)
    report = judge(stamps, Poisson(rate), duration_s)
    assert {"cv", "lag1", "dispersion@5", "ks"} <= failed(report)


@pytest.mark.parametrize("duration_s", [30.0, 200.0])
def test_the_legacy_process_fails_its_own_name(duration_s: float) -> None:
    """Legacy calls itself Poisson and is judged as such: rejected even in a run of 30 s at 10/s."""
    process = Legacy(10.0)
    assert judge(process.draw(rng(), duration_s), process, duration_s).verdict == "fail"


GOOD = [
    Constant(100.0),
    Constant(33.3, 0.5),
    Poisson(100.0),
    Gamma(100.0, 0.25),
    Gamma(100.0, 4.0),
    Mmpp(100.0, 0.2, 0.6),
    Mmpp(100.0, 0.2, 0.2, 0.3),
    Sine(100.0, 0.9, 30.0),
    Ramp(0.0, 200.0),
    Step(50.0, 150.0, 60.0, 120.0),
    ExactCount(Poisson(100.0)),
    ExactCount(Ramp(10.0, 100.0)),
    Offline(50),
    Replay(np.array([0.1, 0.5, 3.0])),
    Trace(np.arange(5) / 5, 1.0),
    MinuteCounts((600, 60)),
]


@pytest.mark.parametrize("process", GOOD, ids=lambda process: process.name)
@pytest.mark.parametrize("seed", [1, 2])
def test_each_process_passes_under_its_own_name(process: Process, seed: int) -> None:
    """S3: every process the package ships, drawn honestly, is accepted as what it is called."""
    report = judge(process.draw(rng(seed), 200.0), process, 200.0)
    assert report.passed, report.reasons
    assert report.process == process.name


SHAPED = [process for process in GOOD if isinstance(process, (Constant, Poisson, Gamma, Mmpp, Ramp))]


@pytest.mark.parametrize("claimed", SHAPED, ids=lambda process: process.name)
@pytest.mark.parametrize("drawn", SHAPED, ids=lambda process: process.name)
def test_no_process_passes_under_another_name(drawn: Process, claimed: Process) -> None:
    """S3: arrivals of one process offered as another of the same rate are rejected."""
    if drawn is claimed:
        return
    assert judge(drawn.draw(rng(7), 200.0), claimed, 200.0).verdict == "fail"


def test_true_poisson_is_rarely_rejected() -> None:
    """Of 100 true Poisson schedules of 5,000 arrivals at most 5 are rejected (about 1.5 expected)."""
    verdicts = [judge(Poisson(50.0).draw(rng(seed), 100.0), Poisson(50.0), 100.0).verdict for seed in range(100)]
    assert verdicts.count("fail") <= 5


def test_a_wrong_rate_is_rejected() -> None:
    """A load that delivers 97% of its rate fails the count, and only that, at 40,000 arrivals."""
    report = judge(Poisson(97.0).draw(rng(1), 400.0), Poisson(100.0), 400.0)
    assert failed(report) == {"count"}


def test_lost_arrivals_of_a_constant_load_are_rejected() -> None:
    """One request missing in a thousand is a wrong count and a double gap."""
    stamps = np.delete(Constant(100.0).draw(rng(), 10.0), 500)
    assert failed(judge(stamps, Constant(100.0), 10.0)) == {"count", "cv", "gap_error_s"}


def test_achieved_stamps_may_lie_within_the_jitter() -> None:
    """Sends up to 50 µs late pass when 50 µs are allowed and fail where 1 ns is."""
    for process in (Constant(1000.0), Poisson(1000.0), Replay(Poisson(1000.0).draw(rng(1), 20.0))):
        stamps = process.draw(rng(1), 20.0) + rng(2).uniform(0, 50e-6, process.draw(rng(1), 20.0).size)
        report = judge(stamps, process, 20.0, jitter_ns=50_000)
        assert report.passed, report.reasons
    assert judge(stamps, process, 20.0).verdict == "fail"


def test_a_replay_must_be_met_stamp_by_stamp() -> None:
    """A replay with another count, or one late request, is rejected and named."""
    replay = Replay(np.array([0.1, 0.5, 3.0]), "run A")
    assert failed(judge(np.array([0.1, 0.5]), replay, 10.0)) == {"count"}
    report = judge(np.array([0.1, 0.5, 3.2]), replay, 10.0)
    assert failed(report) == {"stamp_error_s"}
    assert "run A" in report.reasons[0]


def test_offline_requests_must_all_be_due_at_once() -> None:
    """A request due later, or a missing one, is rejected."""
    assert failed(judge(np.array([0.0, 0.0, 0.4]), Offline(4), 1.0)) == {"count", "latest_s"}


def test_minute_counts_must_be_uniform_inside_the_minute() -> None:
    """Arrivals piled up at the start of each minute are rejected."""
    stamps = np.sort(np.repeat(np.arange(5) * 60.0, 40) + rng(0).uniform(0, 10, 200))
    assert failed(judge(stamps, MinuteCounts((40,)), 300.0)) == {"ks"}


@pytest.mark.parametrize(
    "process",
    [ClosedLoop(2), Trace(np.arange(5) / 5, 1.0, keep=0.5), Trace(np.arange(5) / 5, 1.0, spread_s=1.0)],
    ids=["closed loop", "thinned trace", "spread trace"],
)
def test_what_cannot_be_judged_is_not_passed(process: Process) -> None:
    """Without a known due instant the verdict is "cannot tell" with the reason, neither pass nor fail."""
    report = judge(np.arange(100) / 10, process, 10.0)
    assert (report.verdict, report.passed) == ("cannot tell", False)
    assert report.reasons


def test_few_arrivals_are_not_judged() -> None:
    """Too few arrivals to judge a shape: the verdict is "cannot tell", not pass, and says how many are needed."""
    for process in (Poisson(1.0), Gamma(1.0, 0.5), Mmpp(1.0), MinuteCounts((5,))):
        report = judge(process.draw(rng(3), 20.0), process, 20.0)
        assert report.verdict == "cannot tell"
        assert any("needed" in check.reason for check in report.checks if check.passed is None)


def test_scales_with_too_few_windows_are_left_out() -> None:
    """300 arrivals have 60 windows of 5 but 3 of 100: the long scales are undecided, not passed."""
    report = judge(Poisson(10.0).draw(rng(1), 30.0), Poisson(10.0), 30.0)
    decided = {check.name: check.passed for check in report.checks}
    assert decided["dispersion@5"] is True
    assert decided["dispersion@100"] is None
    assert decided["dispersion@500"] is None


def test_bands_are_those_of_the_specification() -> None:
    """S3: at 20,000 arrivals CV and lag-1 may be off by 0.03, dispersion by 3 sqrt(2/m)."""
    stamps = ExactCount(Poisson(100.0), 20_000).draw(rng(4), 200.0)
    checks = {check.name: check for check in judge(stamps, ExactCount(Poisson(100.0), 20_000), 200.0).checks}
    assert checks["cv"].high == pytest.approx(1.03, abs=1e-4)
    assert checks["lag1"].low == pytest.approx(-0.03, abs=1e-4)
    assert checks["dispersion@20"].high == pytest.approx(1 + 3 * np.sqrt(2 / 1000))


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=200))
@settings(max_examples=50, deadline=None)
def test_ks_distance_is_scipys(values: list[float]) -> None:
    """The distance equals scipy.stats.kstest's against an exponential."""
    sample = np.array(values)
    expected = scipy.stats.kstest(sample, "expon", args=(0, 7.0)).statistic
    assert _ks(sample / 7.0, lambda gap: -np.expm1(-gap)) == pytest.approx(expected, abs=1e-12)


def test_the_ks_threshold_is_its_one_in_a_thousand_point() -> None:
    """Stephens' modified distance of 10,000 exponential samples exceeds the threshold in about one of a thousand."""
    n = 200
    gaps = np.sort(rng(5).standard_exponential((10_000, n)), axis=1)
    below = -np.expm1(-gaps / gaps.mean(axis=1, keepdims=True))
    ranks = np.arange(1, n + 1) / n
    distance = np.maximum((ranks - below).max(axis=1), (below - ranks + 1 / n).max(axis=1))
    modified = (distance - 0.2 / n) * (np.sqrt(n) + 0.26 + 0.5 / np.sqrt(n))
    assert 2 <= (modified > KS_EXPONENTIAL).sum() <= 22


@given(st.lists(st.integers(0, 10**10), max_size=80), st.sampled_from(GOOD), st.floats(0.5, 20))
@settings(max_examples=150, deadline=None)
def test_any_stamps_get_a_verdict(stamps: list[int], process: Process, duration_s: float) -> None:
    """Whatever stamps come in, unsorted, equal, empty or late, a report comes out and failures carry reasons."""
    report = validate(np.array(stamps, dtype=np.int64), process, duration_s)
    assert report.verdict in ("pass", "fail", "cannot tell")
    assert report.passed or report.reasons


def sojourn_p99_ms(stamps: Seconds, service_s: float = 0.008) -> float:
    """p99 sojourn through one FIFO server with constant service (Lindley's recursion in closed form)."""
    turn = np.arange(stamps.size) * service_s
    done = np.maximum.accumulate(stamps - turn) + turn + service_s
    return float(np.quantile(done - stamps, 0.99)) * 1e3


def test_arrival_faults_move_the_tail_as_published() -> None:
    """At utilisation 0.8: Poisson 92 ms, evenly spaced and constant 8 ms, ten same-seed processes 864 ms (within noise)."""
    poisson = sojourn_p99_ms(Poisson(100.0).draw(rng(1), 600.0))
    assert 70 < poisson < 130
    assert sojourn_p99_ms(Constant(100.0).draw(rng(), 600.0)) == pytest.approx(8.0)
    assert sojourn_p99_ms(even_seconds(100.0, 600.0, seed=1)) < 30
    assert 500 < sojourn_p99_ms(same_seed_processes(10, 100.0, 600.0, seed=1)) < 1500
