"""The shared page: slots, knobs, rings, dead services, and the wake-up across processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.clock import NS_PER_S, now_ns
from corun.errors import InputError
from corun.share.announce import Announcer, parse
from corun.share.page import RING, SIZE, SLOTS, STALE_AFTER_NS, Knobs, Page


class Ticking:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with Page.create(tmp_path) as made:
        yield made


def _announcer(page: Page, slot: int, clock: Ticking) -> Announcer:
    return Announcer(page, slot, clock=clock, beating=False)


def test_a_page_is_joined_by_its_path(page: Page) -> None:
    """What one process writes another one reads, from a fresh mapping."""
    page.set_knobs(Knobs(7, 0.25, 3))
    page.mode = 5
    with Page.open(page.path) as other:
        assert (other.knobs, other.duty, other.mode) == (Knobs(7, 0.25, 3), 0.25, 5)
        other.set_knobs(Knobs(2))
    assert page.knobs == Knobs(2, 1.0, 0)


def test_the_creator_removes_the_file(tmp_path: Path) -> None:
    """Joining and leaving keeps the page; leaving by its creator removes it; closing twice is fine."""
    page = Page.create(tmp_path)
    other = Page.open(page.path)
    other.close()
    assert page.path.exists()
    page.close()
    page.close()
    assert not page.path.exists()


def test_a_page_is_private_to_its_user(page: Page) -> None:
    """Nobody else may write what the trainer obeys."""
    assert page.path.stat().st_mode & 0o777 == 0o600
    assert page.path.stat().st_size == SIZE


@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(SIZE)])
def test_other_files_are_no_pages(tmp_path: Path, content: bytes) -> None:
    """A file of another size or without the mark is refused with its path, as is one that is not there."""
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a shared page"):
        Page.open(path)
    with pytest.raises(InputError, match="cannot open"):
        Page.open(tmp_path / "missing")


@pytest.mark.parametrize("knobs", [(0, 1.0, 0), (1, 0.0, 0), (1, 1.5, 0), (1, 1.0, -1)])
def test_impossible_knobs_are_refused(knobs: tuple[int, float, int]) -> None:
    """Knobs outside their range never reach the page."""
    with pytest.raises(InputError, match="impossible knobs"):
        Knobs(*knobs)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60))
def test_pending_is_what_arrived_and_was_not_answered(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, bool]]
) -> None:
    """Whatever the order, each slot's pending count is its arrivals minus its replies, never below zero."""
    clock = Ticking()
    with Page.create(tmp_path_factory.mktemp("page")) as page:
        announcers = [_announcer(page, slot, clock) for slot in range(4)]
        counts = [0] * 4
        for slot, arrives in steps:
            clock.now += 10
            (announcers[slot].on_request if arrives else announcers[slot].on_reply)()
            counts[slot] = max(0, counts[slot] + (1 if arrives else -1))
            assert [page.pending(index) for index in range(4)] == counts
            assert page.busy == any(counts)
            assert page.waiting_slots(clock.now) == [index for index in range(4) if counts[index]]
        assert page.arrivals == sum(arrives for _, arrives in steps)


def test_latencies_reach_the_ring_in_order(page: Page) -> None:
    """A reader gets what was recorded since it last looked, from every service, given or measured."""
    clock = Ticking()
    first, second = _announcer(page, 0, clock), _announcer(page, 9, clock)
    cursors = page.cursors()
    for latency in (5, 7):
        first.on_request()
        clock.now += latency
        first.on_reply()
    second.on_request()
    second.on_reply(1_000)
    found, cursors = page.latencies_since(cursors)
    assert found == [5, 7, 1_000]
    assert page.latencies_since(cursors)[0] == []


def test_a_full_ring_keeps_the_newest(page: Page) -> None:
    """A reader that comes too late gets the last 1,024 latencies of a slot."""
    cursors = page.cursors()
    for latency in range(RING + 10):
        page.record(3, latency)
    assert page.latencies_since(cursors)[0] == list(range(10, RING + 10))


def test_a_service_that_stops_beating_is_not_waited_for(page: Page) -> None:
    """Pending requests of a service whose beat is too old do not count, and are listed as stale."""
    clock = Ticking()
    service = _announcer(page, 2, clock)
    service.on_request()
    assert page.waiting_slots(clock.now + STALE_AFTER_NS) == [2]
    late = clock.now + STALE_AFTER_NS + 1
    assert (page.waiting_slots(late), page.stale_slots(late)) == ([], [2])
    assert page.busy


def test_a_restarted_service_starts_afresh(page: Page) -> None:
    """Claiming a slot clears what a killed predecessor left pending."""
    clock = Ticking()
    _announcer(page, 1, clock).on_request()
    assert page.busy
    _announcer(page, 1, clock)
    assert not page.busy


def test_a_closed_service_leaves_nothing_pending(page: Page) -> None:
    """Closing ends the beat and clears the slot."""
    service = Announcer(page, 0)
    service.on_request()
    service.close()
    assert not page.busy


@pytest.mark.parametrize("slot", [-1, SLOTS])
def test_a_slot_that_does_not_exist_is_refused(page: Page, slot: int) -> None:
    """A page has 64 slots."""
    with pytest.raises(InputError, match="does not exist"):
        Announcer(page, slot)


def test_an_announcer_is_parsed_from_a_command_line(page: Page) -> None:
    """PATH:SLOT joins the page; anything else says what is expected."""
    service = parse(f"{page.path}:5")
    service.on_request()
    assert page.pending(5) == 1
    service.close()
    for text in ("5", f"{page.path}", f"{page.path}:x"):
        with pytest.raises(InputError):
            parse(text)


def test_the_bell_wakes_a_sleeper_in_another_mapping(page: Page) -> None:
    """A trainer asleep for a minute wakes when the last request is answered, and not for the one before."""
    service = Announcer(page, 0)
    service.on_request()
    service.on_request()
    woken = threading.Event()
    asleep = threading.Event()

    def trainer() -> None:
        with Page.open(page.path) as mine, mine.asleep() as bell:
            asleep.set()
            while not mine.rung(bell):
                mine.sleep(bell, 60_000_000_000)
            woken.set()

    thread = threading.Thread(target=trainer)
    thread.start()
    assert asleep.wait(60)
    service.on_reply()
    assert not woken.wait(0.05)
    service.on_reply()
    assert woken.wait(60)
    thread.join()
    service.close()


def test_nobody_is_rung_for_when_nobody_sleeps(page: Page) -> None:
    """The fast path: announcing makes no wake-up while the trainer works."""
    service = _announcer(page, 0, Ticking())
    with page.asleep() as bell:
        pass
    service.on_request()
    service.on_reply()
    assert not page.rung(bell)


def _serve_forever(path: str, ready: object) -> None:
    service = Announcer(Page.open(path), 0)
    service.on_request()
    ready.set()  # type: ignore[attr-defined]
    time.sleep(600)


def test_a_killed_service_stops_counting_while_a_living_one_goes_on(page: Page) -> None:
    """A request that computes for longer than the limit still counts; after kill -9 it stops counting.

    A beat that is late on a busy machine makes it stale until the next one: what is asked is that it counts again.
    """
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_serve_forever, args=(str(page.path), ready), daemon=True)
    process.start()
    assert ready.wait(60)
    time.sleep(1.5 * STALE_AFTER_NS / 1e9)
    _until(lambda: page.waiting_slots(now_ns()) == [0])
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    _until(lambda: not page.waiting_slots(now_ns()))
    assert page.stale_slots(now_ns()) == [0]


def _until(condition: Callable[[], bool]) -> None:
    give_up_ns = now_ns() + 60 * NS_PER_S
    while not condition():
        assert now_ns() < give_up_ns
        time.sleep(0.01)
