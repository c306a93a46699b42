"""The translation scheduler in virtual time: published golden values, orderings under Poisson load, properties."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.ectrans.mixes import PUBLISHED, SIZES, Arrival, mix, parse_mix, parse_sizes, poisson
from corun.ectrans.scheduler import BATCH, POLICIES, RT, Job, Rules, Scheduler
from corun.ectrans.simulate import PUBLISHED_COST, Outcome, linear, run, simulate, table
from corun.errors import InputError
from corun.serve.estimate import KnownCost
from corun.serve.packing import RULES, Limits
from corun.wire import Status

SECOND = 1_000_000_000
COLUMNS = {
    "FCFS B=8": ("fcfs", "off", 8),
    "stale B=8": ("hrrn-stale", "off", 8),
    "HRRN B=8": ("hrrn", "off", 8),
    "SJF B=8": ("sjf", "off", 8),
    "HRRN B=64": ("hrrn", "off", 64),
    "pack-FCFS": ("fcfs", "count", 64),
    "pack-HRRN": ("hrrn", "count", 64),
}
GOLDEN = {
    "H": (97.787, 65.735, 58.430, 58.430, 40.039, 67.173, 37.008),
    "T": (88.654, 72.291, 66.155, 66.155, 44.938, 61.351, 43.697),
    "U": (42.916, 33.328, 27.575, 27.575, 19.079, 29.451, 17.912),
    "V": (42.475, 35.493, 31.019, 31.019, 21.107, 29.149, 21.490),
}
MAKESPAN = {
    "H": (149.573, 102.137, 101.429),
    "T": (145.738, 99.010, 98.774),
    "U": (61.363, 42.483, 41.539),
    "V": (71.524, 48.868, 48.160),
}


def plain(policy: str, packing: str, batch: int) -> Rules:
    """The published set-up: one pool, no classes, no window."""
    return Rules(policy, packing, Limits(max_items=batch), rt_share=0.0, batch_threshold=0)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_mixes_have_their_golden_values(name: str, column: str) -> None:
    """Mixes H, T, U, V, 0.1 s apart, on one server: mean turnaround and makespan to the millisecond."""
    policy, packing, batch = COLUMNS[column]
    outcome = run(mix(parse_mix(name)), plain(policy, packing, batch))
    assert outcome.mean_s == pytest.approx(GOLDEN[name][list(COLUMNS).index(column)], abs=1e-3)
    whole, batch_64, packed = MAKESPAN[name]
    expected = whole if batch == 8 else packed if packing == "count" else batch_64
    assert outcome.makespan_s == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("column", "of_16s"),
    [
        ("FCFS B=8", 107.353),
        ("stale B=8", 23.490),
        ("SJF B=8", 23.490),
        ("HRRN B=64", 16.174),
        ("pack-FCFS", 73.971),
        ("pack-HRRN", 6.816),
    ],
)
def test_small_tasks_of_mix_h_have_their_golden_turnaround(column: str, of_16s: float) -> None:
    """What each policy is for: the mean turnaround of the 16-sentence tasks."""
    assert run(mix(parse_mix("H")), plain(*COLUMNS[column])).mean_of(16) == pytest.approx(of_16s, abs=1e-3)


def test_service_order_on_mix_h() -> None:
    """Fresh and stale HRRN begin the tasks in their published orders."""
    fresh = run(mix(parse_mix("H")), plain("hrrn", "off", 8)).order
    stale = run(mix(parse_mix("H")), plain("hrrn-stale", "off", 8)).order
    assert fresh == [0, 3, 4, 10, 11, 12, 7, 8, 9, 13, 1, 2, 5, 6]
    assert stale == [0, 3, 4, 10, 11, 12, 1, 7, 2, 8, 5, 9, 6, 13]


@pytest.mark.parametrize(("count", "whole", "packed"), [(16, 10.227, 6.923), (128, 81.818, 55.386)])
def test_packing_of_small_requests_has_its_golden_makespan(count: int, whole: float, packed: float) -> None:
    """N requests of 8, all present: batches of 8 against packages of 64."""
    load = mix([8] * count, gap_ms=0)
    assert run(load, plain("fcfs", "off", 8)).makespan_s == pytest.approx(whole, abs=1e-3)
    assert run(load, plain("fcfs", "count", 64)).makespan_s == pytest.approx(packed, abs=1e-3)
    assert run(load, plain("fcfs", "off", 1)).makespan_s == pytest.approx(5.295 * packed, rel=1e-3)


@lru_cache
def under_poisson(policy: str, packing: str) -> Outcome:
    """4,000 requests at 90 % utilisation, one seed."""
    sizes = parse_sizes(SIZES)
    start_s, sentence_s = PUBLISHED_COST
    mean_s = sum(share * (-(-size // 64) * start_s + size * sentence_s) for size, share in sizes.items())
    return run(poisson(0.9 / mean_s, sizes, 4000, seed=1), plain(policy, packing, 64))


def test_poisson_load_tells_the_policies_apart() -> None:
    """At 90 % load: mean SJF < HRRN < FCFS, the worst 256 waits less under HRRN than SJF, packing helps both."""
    fcfs, sjf, hrrn = (under_poisson(policy, "off") for policy in ("fcfs", "sjf", "hrrn"))
    assert sjf.mean_s < hrrn.mean_s < fcfs.mean_s
    assert hrrn.worst_of(256) < sjf.worst_of(256)
    assert under_poisson("hrrn", "count").mean_s <= hrrn.mean_s
    assert under_poisson("fcfs", "count").mean_s <= fcfs.mean_s


LOADS = st.lists(
    st.tuples(st.integers(0, 5 * SECOND), st.lists(st.integers(1, 40), min_size=1, max_size=12)),
    min_size=1,
    max_size=12,
)


@given(
    load=LOADS,
    policy=st.sampled_from(sorted(POLICIES)),
    packing=st.sampled_from(sorted(RULES)),
    lanes=st.sampled_from(["shared", "pinned"]),
    rt_share=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    servers=st.integers(1, 3),
)
@settings(max_examples=120, deadline=None)
def test_every_item_goes_exactly_once_and_nothing_hangs(
    load: list[tuple[int, list[int]]], policy: str, packing: str, lanes: str, rt_share: float, servers: int
) -> None:
    """Whatever the rules, lanes without slots included: each item is in one package, each request ends OK."""
    limits = Limits(max_items=5, max_padded_tokens=120, hold_ns=SECOND)
    rules = Rules(policy, packing, limits, 0, lanes, rt_share, servers, batch_threshold=6)
    jobs = [Job(key, at_ns, lengths) for key, (at_ns, lengths) in enumerate(load)]
    sizes = {job.key: job.size for job in jobs}
    scheduler = Scheduler(rules, KnownCost(0.1, 0.01))
    packages = simulate(jobs, scheduler, linear(0.1, 0.01), servers)
    sent = [(item.owner.key, item.index) for package in packages for item in package.items]
    assert sorted(sent) == sorted((key, index) for key, size in sizes.items() for index in range(size))
    assert all(len(package.items) <= 5 and package.padded <= 120 for package in packages)
    assert all(job.status == Status.OK and (job.first_ns or 0) >= job.arrival_ns for job in jobs)
    assert scheduler.waiting_items == 0
    assert len(scheduler) == 0
    assert not scheduler.in_flight


@given(lengths=st.lists(st.integers(1, 50), min_size=2, max_size=40), theta=st.sampled_from([0.0, 0.25]))
@settings(max_examples=60, deadline=None)
def test_a_held_item_waits_for_no_more_than_the_items_held_before_it(lengths: list[int], theta: float) -> None:
    """Once overdue, an item leaves within as many packages as its elders fill, however well others would fit."""
    limits = Limits(max_items=4, max_padded_tokens=200, theta=theta, hold_ns=0, passes=2)
    scheduler = Scheduler(Rules("sjf", "cost", limits, 0, rt_share=0.0), KnownCost(0.0, 1.0))
    for key, length in enumerate(lengths):
        scheduler.offer(Job(key, 0, [length]))
    overdue_since: dict[int, int] = {}
    for turn in range(1, 10 * len(lengths)):
        package = scheduler.next(turn)
        if package is None:
            break
        for item in package.items:
            elders = sum(1 for since in overdue_since.values() if since <= overdue_since.get(item.owner.key, turn))
            assert turn - overdue_since.get(item.owner.key, turn) <= 1 + elders
        waiting = [job.items[0] for job in scheduler._jobs.values() if job.items]
        for item in waiting:
            if item.overdue(limits, turn + 1):
                overdue_since.setdefault(item.owner.key, turn)
        scheduler.done(package, turn)
    assert not len(scheduler)


def test_the_response_ratio_grows_with_the_wait_and_is_made_anew() -> None:
    """A large request overtakes fresh small ones once it has waited long enough; its rest counts, not its whole."""
    scheduler = Scheduler(plain("hrrn", "count", 4), KnownCost(0.0, 1.0))
    scheduler.offer(Job(0, 0, [1] * 8))
    scheduler.offer(Job(1, 9 * SECOND, [1]))
    first = scheduler.next(9 * SECOND)
    assert first is not None
    assert [item.owner.key for item in first.items] == [0, 0, 0, 0]
    scheduler.offer(Job(2, 5 * SECOND, [1]))
    second = scheduler.next(10 * SECOND)
    assert second is not None
    assert [item.owner.key for item in second.items] == [2, 0, 0, 0]


def test_a_package_waits_for_the_window_only_while_the_executor_is_busy() -> None:
    """Idle: sent at once. Busy: sent when it is full or the oldest item has waited for the window."""
    rules = Rules("fcfs", "count", Limits(max_items=4), window_ns=100)
    scheduler = Scheduler(rules)
    scheduler.offer(Job(0, 0, [1]))
    assert scheduler.next(50, idle=False) is None
    assert scheduler.due_ns() == 100
    assert scheduler.next(100, idle=False) is not None
    scheduler.offer(Job(1, 100, [1] * 4))
    assert scheduler.next(101, idle=False) is not None
    scheduler.offer(Job(2, 102, [1]))
    assert scheduler.next(102, idle=True) is not None
    assert scheduler.due_ns() is None


def test_rt_leads_its_share_of_packages_and_lends_the_rest() -> None:
    """While both classes wait rt leads at least rt_share of the packages; alone, either class has all of them."""
    scheduler = Scheduler(Rules("fcfs", "off", Limits(max_items=1), 0, rt_share=0.5, batch_threshold=0))
    scheduler.offer(Job(0, 0, [1] * 20, BATCH))
    for key in range(1, 6):
        scheduler.offer(Job(key, key, [1], RT))
    packages = [scheduler.next(10 + turn) for turn in range(25)]
    kinds = [package.items[0].owner.kind for package in packages if package]
    assert len(kinds) == 25
    assert kinds[1:12].count(RT) <= 5
    packed = Scheduler(Rules("fcfs", "count", Limits(max_items=1), 0, rt_share=0.5, batch_threshold=0))
    packed.offer(Job(0, 0, [1] * 20, BATCH))
    for key in range(1, 6):
        packed.offer(Job(key, key, [1], RT))
    led = [package.items[0].owner.kind for turn in range(10) if (package := packed.next(10 + turn))]
    assert led.count(RT) == 5


def test_pinned_lanes_serve_their_class_only() -> None:
    """With slots of both kinds each serves its own class and leaves the other's requests waiting."""
    rules = Rules("fcfs", "count", Limits(max_items=8), 0, "pinned", 0.5, slots=2, batch_threshold=0)
    scheduler = Scheduler(rules)
    scheduler.offer(Job(0, 0, [1], RT))
    assert scheduler.next(1, slot=1) is None
    assert scheduler.next(1, slot=0) is not None
    scheduler.offer(Job(1, 2, [1], BATCH))
    assert scheduler.next(3, slot=0) is None
    assert scheduler.next(3, slot=1) is not None


def test_admission_says_why_not() -> None:
    """Empty requests, sentences over the token limit and items over the queue's limit are refused with a reason."""
    scheduler = Scheduler(Rules(limits=Limits(max_padded_tokens=50), queue_limit=3))
    assert "no sentences" in scheduler.offer(Job(0, 0, []))
    assert "51 tokens" in scheduler.offer(Job(1, 0, [51]))
    assert scheduler.offer(Job(2, 0, [1, 1])) == ""
    assert "queue is full" in scheduler.offer(Job(3, 0, [1, 1]))
    assert len(scheduler) == 1


def test_deadlines_and_cancellation_end_requests_that_wait_or_are_out() -> None:
    """An expired or cancelled request ends at once; what comes back of it later is ignored."""
    scheduler = Scheduler(Rules("fcfs", "count", Limits(max_items=1), 0))
    late, gone = Job(0, 0, [1, 1], deadline_ns=100), Job(1, 0, [1])
    scheduler.offer(late)
    scheduler.offer(gone)
    package = scheduler.next(10)
    assert package is not None
    assert scheduler.expire(99) == []
    assert scheduler.expire(100) == [late]
    assert scheduler.cancel(1, 100) is gone
    assert scheduler.cancel(7, 100) is None
    assert (late.status, gone.status) == (Status.EXPIRED, Status.CANCELLED)
    assert scheduler.done(package, 110, 0.1) == []
    assert scheduler.waiting_items == 0
    assert scheduler.next(120) is None


def test_a_lost_package_is_sent_once_more_and_then_given_up() -> None:
    """The items of a dead worker's package wait again; a request that loses one twice fails with the reason."""
    scheduler = Scheduler(Rules("fcfs", "count", Limits(max_items=4), 0))
    scheduler.offer(Job(0, 0, [1, 1]))
    first = scheduler.next(1)
    assert first is not None
    assert scheduler.failed(first, 2, "worker died") == []
    scheduler.offer(Job(1, 2, [1]))
    second = scheduler.next(3)
    assert second is not None
    assert len(second.items) == 3
    ended = scheduler.failed(second, 4, "worker died")
    assert [(job.key, job.status, job.detail) for job in ended] == [(0, Status.FAILED, "worker died")]
    third = scheduler.next(5)
    assert third is not None
    assert [job.key for job in scheduler.done(third, 6, 0.1)] == [1]
    assert not len(scheduler)


def test_bad_rules_and_loads_are_explained() -> None:
    """Every problem is listed; near misses get a suggestion; a load that cannot be parsed says which part."""
    with pytest.raises(InputError, match='did you mean "hrrn"') as error:
        Rules(policy="hrn", lanes="both", rt_share=2, slots=0)
    assert len(error.value.problems) == 4
    for text in ("3x", "x", "0x3", "3y4", ""):
        with pytest.raises(InputError):
            parse_mix(text)
    for text in ("8:.5", "8:a", "0:1"):
        with pytest.raises(InputError):
            parse_sizes(text)
    with pytest.raises(InputError):
        poisson(0, {1: 1.0}, 5, 0)
    assert parse_mix("2x3,5") == [3, 3, 5]
    assert poisson(2.0, {8: 1.0}, 3, 7) == poisson(2.0, {8: 1.0}, 3, 7)


def test_a_simulation_shows_its_outcome() -> None:
    """The JSON body and the table name means, tails only where enough requests support them, packages and waste."""
    outcome = run([Arrival(0, 2), Arrival(0, 1)], plain("fcfs", "count", 8), (1.0, 0.5), lengths=lambda _, n: [4] * n)
    body = outcome.body()
    assert body["p99_s"] is None
    assert body["packages"] == 1
    assert body["makespan_s"] == pytest.approx(1.0 + 0.5 * 12)
    assert "n/a" in table({"one": outcome})
    with pytest.raises(InputError, match="not admitted"):
        run([Arrival(0, 9)], Rules(queue_limit=5))
