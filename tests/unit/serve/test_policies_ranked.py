"""The ranking queue policies: published golden values, every item exactly once, ties, starvation."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError
from corun.serve.policies import Edf, Hrrn, HrrnStale, QueuePolicy, Ranking, Sjf, make_policy, policy_names

RANKED = [Sjf, Edf, Hrrn, HrrnStale]
BATCH_S, SENTENCE_S, GAP_S = 0.236, 0.0504, 0.1
H = [256] * 3 + [16] * 2 + [256] * 2 + [128] * 3 + [16] * 3 + [128]
T = [256] * 3 + [16, 256, 128] + [256] * 2 + [16, 128]
U = [128] * 4 + [32] * 8
V = [128] * 4 + [20, 100, 8, 200, 50]


@dataclass(frozen=True)
class Job:
    """A task; times in ns."""

    number: int
    arrival_ns: int
    service_ns: int
    deadline_ns: int = 0


def view(job: Job) -> Ranking:
    return Ranking(job.arrival_ns, job.service_ns, job.deadline_ns)


def service_s(sentences: int, batch: int) -> float:
    full, rest = divmod(sentences, batch)
    return full * (BATCH_S + SENTENCE_S * batch) + (BATCH_S + SENTENCE_S * rest if rest else 0)


def published(mix: list[int], batch: int = 8) -> list[Job]:
    return [Job(i, round(i * GAP_S * 1e9), round(service_s(n, batch) * 1e9)) for i, n in enumerate(mix)]


def run(policy: QueuePolicy[Job], jobs: list[Job]) -> tuple[list[int], list[int]]:
    """One server, whole jobs, non-preemptive: (order of service, end times by job number)."""
    coming, now, order, ends = sorted(jobs, key=lambda job: (job.arrival_ns, job.number)), 0, [], [0] * len(jobs)
    while coming or len(policy):
        if not len(policy):
            now = max(now, coming[0].arrival_ns)
        while coming and coming[0].arrival_ns <= now:
            policy.push(coming.pop(0))
        job = policy.pop(now)
        now += job.service_ns
        order.append(job.number)
        ends[job.number] = now
    return order, ends


def mean_turnaround_s(policy: QueuePolicy[Job], jobs: list[Job]) -> float:
    _, ends = run(policy, jobs)
    return sum(ends[job.number] - job.arrival_ns for job in jobs) / len(jobs) / 1e9


@pytest.mark.parametrize(
    ("mix", "fcfs", "stale", "hrrn", "sjf", "makespan", "hrrn_64"),
    [
        (H, 97.787, 65.735, 58.430, 58.430, 149.573, 40.039),
        (T, 88.654, 72.291, 66.155, 66.155, 145.738, 44.938),
        (U, 42.916, 33.328, 27.575, 27.575, 61.363, 19.079),
        (V, 42.475, 35.493, 31.019, 31.019, 71.524, 21.107),
    ],
    ids=["H", "T", "U", "V"],
)
def test_published_mixes_have_their_golden_turnarounds(
    mix: list[int], fcfs: float, stale: float, hrrn: float, sjf: float, makespan: float, hrrn_64: float
) -> None:
    """Mean turnaround of each mix, tasks 0.1 s apart, batches of 8 (HRRN also of 64), within 1 ms."""
    jobs = published(mix)
    for policy, expected in (
        (make_policy("fifo"), fcfs),
        (HrrnStale(view), stale),
        (Hrrn(view), hrrn),
        (Sjf(view), sjf),
    ):
        assert mean_turnaround_s(policy, jobs) == pytest.approx(expected, abs=1e-3), type(policy).__name__
    assert max(run(Hrrn(view), jobs)[1]) / 1e9 == pytest.approx(makespan, abs=1e-3)
    assert mean_turnaround_s(Hrrn(view), published(mix, 64)) == pytest.approx(hrrn_64, abs=1e-3)


def test_the_order_of_service_on_the_published_mix() -> None:
    """HRRN and SJF serve mix H in one order, the stale variant in another."""
    fresh = [0, 3, 4, 10, 11, 12, 7, 8, 9, 13, 1, 2, 5, 6]
    assert run(Hrrn(view), published(H))[0] == fresh
    assert run(Sjf(view), published(H))[0] == fresh
    assert run(HrrnStale(view), published(H))[0] == [0, 3, 4, 10, 11, 12, 1, 7, 2, 8, 5, 9, 6, 13]


JOBS = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20), st.integers(0, 100)), max_size=40).map(
    lambda rows: [Job(i, *row) for i, row in enumerate(sorted(rows))]
)


@pytest.mark.parametrize("kind", RANKED)
@given(jobs=JOBS)
@settings(max_examples=40, deadline=None)
def test_every_item_comes_out_exactly_once(kind: type[Hrrn[Job]], jobs: list[Job]) -> None:
    """Whatever arrives is served once, and an empty policy raises IndexError."""
    policy = kind(view)
    assert sorted(run(policy, jobs)[0]) == list(range(len(jobs)))
    assert len(policy) == 0
    with pytest.raises(IndexError):
        policy.pop(0)


@pytest.mark.parametrize("kind", RANKED)
@given(arrivals=st.lists(st.integers(0, 30), max_size=30))
@settings(max_examples=30, deadline=None)
def test_equal_items_are_served_first_come_first_served(kind: type[Hrrn[Job]], arrivals: list[int]) -> None:
    """Items that differ in arrival only come out by arrival, and in the order they were added among equals."""
    jobs = [Job(i, at, 7, 99) for i, at in enumerate(sorted(arrivals))]
    assert run(kind(view), jobs)[0] == list(range(len(jobs)))


@given(jobs=JOBS.filter(bool), now=st.integers(50, 200))
@settings(max_examples=40, deadline=None)
def test_each_pick_is_the_best_by_its_rule(jobs: list[Job], now: int) -> None:
    """SJF picks the smallest service, EDF the earliest deadline, HRRN the largest 1 + W / S."""
    picked = {}
    for kind in (Sjf, Edf, Hrrn):
        policy = kind(view)
        for job in jobs:
            policy.push(job)
        picked[kind] = policy.pop(now)
    assert picked[Sjf].service_ns == min(job.service_ns for job in jobs)
    assert picked[Edf].deadline_ns == min(job.deadline_ns for job in jobs)
    ratios = [1 + (now - job.arrival_ns) / job.service_ns for job in jobs]
    best = picked[Hrrn]
    assert 1 + (now - best.arrival_ns) / best.service_ns == max(ratios)


@pytest.mark.parametrize("long", [20, 200, 1000])
def test_a_long_job_starves_under_sjf_but_not_under_hrrn(long: int) -> None:
    """With short jobs arriving as fast as they are served, the long one comes last by SJF and early by HRRN."""
    shorts = [Job(i, i * 10, 10) for i in range(400)]
    jobs = [*shorts, Job(400, 0, long)]
    assert run(Sjf(view), jobs)[0][-1] == 400
    assert run(Hrrn(view), jobs)[0].index(400) <= long // 10 + 1


@given(jobs=JOBS.filter(lambda jobs: len(jobs) > 1))
@settings(max_examples=40, deadline=None)
def test_edf_meets_all_deadlines_that_fifo_meets_when_all_wait(jobs: list[Job]) -> None:
    """For jobs present from the start EDF has the smallest maximum lateness (Jackson 1955)."""
    present = [Job(job.number, 0, job.service_ns, job.deadline_ns) for job in jobs]

    def worst(policy: QueuePolicy[Job]) -> int:
        ends = run(policy, present)[1]
        return max(ends[job.number] - job.deadline_ns for job in present)

    assert worst(Edf(view)) <= min(worst(make_policy("fifo")), worst(Sjf(view)), worst(Hrrn(view)))


def request(arrival_ns: int, payload_len: int, t_intended: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        header=SimpleNamespace(payload_len=payload_len, t_intended=t_intended), stamps=[arrival_ns, arrival_ns]
    )


def test_a_servers_requests_are_ranked_by_bytes_and_intended_time() -> None:
    """By name: sjf takes the smallest payload, edf the earliest intended send, hrrn the best wait per byte."""
    large, small, late = request(0, 1000, 50), request(10, 10, 60), request(20, 20, 5)
    picked = {}
    for name in ("fifo", "sjf", "edf", "hrrn", "hrrn-stale"):
        policy = make_policy(name)
        for item in (large, small, late):
            policy.push(item)
        picked[name] = policy.pop(30)
    assert picked == {"fifo": large, "sjf": small, "edf": late, "hrrn": small, "hrrn-stale": small}


def test_the_policies_are_known_by_name() -> None:
    """All five are registered, and a near miss is suggested."""
    assert {"fifo", "sjf", "edf", "hrrn", "hrrn-stale"} <= set(policy_names())
    with pytest.raises(InputError, match='did you mean "hrrn"'):
        make_policy("hrnn")
