"""Schedules: independence of streams, pairing of arms, splitting, hashing, storing, refusing damage."""

from __future__ import annotations

import contextlib
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corun.arrivals.processes import ClosedLoop, Constant, Gamma, Mmpp, Offline, Poisson, Process
from corun.arrivals.recorded import Replay
from corun.arrivals.schedule import ROW, UNPLANNED_NS, Schedule, Stream, join, load, make, merge, save
from corun.arrivals.validator import validate
from corun.errors import InputError

PROCESSES: st.SearchStrategy[Process] = st.one_of(
    st.builds(Poisson, st.floats(0.1, 100)),
    st.builds(Constant, st.floats(0.1, 100)),
    st.builds(Gamma, st.floats(0.1, 100), st.floats(0.1, 5)),
    st.builds(ClosedLoop, st.integers(1, 4)),
    st.builds(Offline, st.integers(1, 20)),
)
STREAMS = st.lists(
    st.builds(Stream, st.integers(0, 2**32 - 1), PROCESSES, st.integers(1, 2**32)),
    max_size=5,
    unique_by=lambda stream: stream.number,
)
SEEDS = st.integers(0, 2**64)
UNTIMED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=60, deadline=None)
@given(STREAMS, st.floats(0.001, 10), SEEDS, st.integers(0, 20))
def test_rows_are_ordered_and_within_bounds(streams: list[Stream], duration_s: float, seed: int, repeat: int) -> None:
    """Rows ascend by due instant, lie in the segment, count ids from 0 per stream, and name existing payloads."""
    schedule = make(streams, duration_s, seed, repeat)
    assert (np.diff(schedule.intended_ns) >= 0).all()
    assert ((schedule.intended_ns == UNPLANNED_NS) | (schedule.intended_ns >= 0)).all()
    assert (schedule.intended_ns < np.ceil(duration_s * 1e9)).all()
    for stream in streams:
        rows = schedule.of_stream(stream.number).rows
        assert rows["id"].tolist() == list(range(len(rows)))
        assert (rows["payload"] < stream.payloads).all()
        assert np.array_equal(
            rows["intended_ns"] == UNPLANNED_NS, [isinstance(stream.process, ClosedLoop)] * len(rows)
        )


@settings(max_examples=60, deadline=None)
@given(STREAMS, st.floats(0.1, 5), SEEDS, st.randoms())
def test_a_stream_does_not_depend_on_the_others(
    streams: list[Stream], duration_s: float, seed: int, random: object
) -> None:
    """B3: adding, removing or reordering other streams leaves a stream's rows unchanged, bit for bit."""
    together = make(streams, duration_s, seed)
    shuffled = list(streams)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert make(shuffled, duration_s, seed) == together
    for stream in streams:
        assert make([stream], duration_s, seed) == together.of_stream(stream.number)


def test_two_streams_never_share_a_gap_sequence() -> None:
    """B3: equal processes in twenty streams and five repeats draw a hundred different gap sequences."""
    streams = [Stream(number, Poisson(20.0)) for number in range(20)]
    gaps = {
        np.diff(part.intended_ns)[:10].tobytes()
        for repeat in range(5)
        for part in make(streams, 10.0, seed=1, repeat=repeat).split().values()
    }
    assert len(gaps) == 100


def test_no_request_is_due_before_the_start() -> None:
    """B2: over 100 starts with several senders each, no due instant is negative or missing."""
    streams = [Stream(0, Poisson(400.0)), Stream(1, Mmpp(400.0))]
    for seed in range(100):
        for part in make(streams, 1.0, seed).thin(4, seed):
            assert part.intended_ns.min(initial=0) >= 0


def test_arms_of_a_repeat_share_their_arrivals_and_repeats_do_not() -> None:
    """The arm is no input: one repeat has one schedule; another repeat or seed has another."""
    streams = [Stream(0, Poisson(50.0), payloads=9)]
    assert make(streams, 5.0, seed=3, repeat=1) == make(streams, 5.0, seed=3, repeat=1)
    hashes = {make(streams, 5.0, seed, repeat).sha256 for seed in range(4) for repeat in range(4)}
    assert len(hashes) == 16


@settings(max_examples=40, deadline=None)
@given(STREAMS, st.floats(0.1, 5), SEEDS, st.integers(1, 12))
def test_parts_make_the_whole_again(streams: list[Stream], duration_s: float, seed: int, parts: int) -> None:
    """Split by stream, dealt in turn or thinned at random over N senders: merging gives the schedule back, hash and all."""
    whole = make(streams, duration_s, seed)
    for pieces in (list(whole.split().values()), whole.deal(parts), whole.thin(parts, seed)):
        assert merge(pieces) == whole
        assert merge(pieces).sha256 == whole.sha256


@pytest.mark.parametrize("senders", [1, 2, 4, 10])
def test_poisson_over_any_number_of_senders_is_poisson(senders: int) -> None:
    """B1: 400/s shared by N senders passes the validator recombined, and each thinned part passes at 400/N."""
    whole = make([Stream(0, Poisson(400.0))], 50.0, seed=11)
    parts = whole.thin(senders, seed=5)
    report = validate(merge(parts).intended_ns, Poisson(400.0), 50.0)
    assert report.passed, report.reasons
    verdicts = [validate(part.intended_ns, Poisson(400.0 / senders), 50.0).verdict for part in parts]
    assert verdicts.count("fail") <= senders // 10


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_sender_processes_read_one_schedule(tmp_path: Path, method: str) -> None:
    """B1: however the senders are started, their parts add up to the one schedule that was made for them."""
    whole = make([Stream(0, Poisson(400.0))], 10.0, seed=2)
    paths = [tmp_path / f"{part}.npy" for part in range(2)]
    for part, path in zip(whole.deal(2), paths, strict=True):
        save(part, path)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert merge(pool.map(load, paths)) == whole


def test_a_replayed_schedule_has_the_same_arrivals() -> None:
    """Replay equality: due instants replayed into a new schedule are the old ones to the nanosecond."""
    whole = make([Stream(4, Mmpp(200.0))], 20.0, seed=8)
    again = make([Stream(4, Replay.from_ns(whole.intended_ns))], 20.0, seed=99)
    assert np.array_equal(again.intended_ns, whole.intended_ns)


def test_a_closed_loop_is_marked() -> None:
    """A closed-loop stream appears as one unplanned row per loop, so the record shows that nothing was due."""
    schedule = make([Stream(0, ClosedLoop(3)), Stream(1, Constant(2.0))], 1.0, seed=0)
    assert schedule.intended_ns.tolist() == [UNPLANNED_NS] * 3 + [0, 500_000_000]
    assert not schedule.is_open_loop
    assert schedule.of_stream(1).is_open_loop


def test_joined_segments_keep_ids_unique() -> None:
    """Segments in a row keep their instants; ids go on per stream and equal the position among the stream's rows."""
    first = make([Stream(0, Constant(3.0)), Stream(7, Constant(2.0))], 1.0, seed=0)
    second = make([Stream(7, Constant(5.0))], 1.0, seed=0)
    whole, ranges = join([first, second, first])
    assert ranges == ({0: range(3), 7: range(2)}, {7: range(2, 7)}, {0: range(3, 6), 7: range(7, 9)})
    assert whole.of_stream(7).rows["id"].tolist() == list(range(9))
    assert whole.of_stream(0).rows["intended_ns"].tolist() == first.of_stream(0).rows["intended_ns"].tolist() * 2
    assert join([]) == (Schedule(np.empty(0, dtype=ROW)), ())


@settings(max_examples=30, deadline=None, suppress_health_check=UNTIMED)
@given(streams=STREAMS, seed=SEEDS)
def test_what_is_saved_is_loaded(tmp_path: Path, streams: list[Stream], seed: int) -> None:
    """A stored schedule loads equal, hashes equal, and is a plain .npy array of the documented columns."""
    schedule = make(streams, 2.0, seed)
    path = tmp_path / "schedule.npy"
    save(schedule, path)
    assert load(path) == schedule
    assert load(path).sha256 == schedule.sha256
    plain = np.load(path, allow_pickle=False)
    assert plain.dtype.names == ("intended_ns", "stream", "id", "payload")
    assert [entry.name for entry in tmp_path.iterdir()] == ["schedule.npy"]


def test_the_hash_is_frozen() -> None:
    """One seed means these bytes, on every machine and in every version: a change here breaks replays."""
    streams = [Stream(0, Poisson(100.0), payloads=16), Stream(1, Gamma(50.0, 0.5), payloads=4)]
    assert make(streams, 10.0, seed=20240816, repeat=2).sha256 == FROZEN


FROZEN = "f00ed78021e335fa2bc540f9ac3efda3bcc15db8c3961663f583b7c7f6370976"


BAD_FILES = [
    (b"", "not a schedule"),
    (b"t_intended,stream\n1,2\n", "not a schedule"),
    (b"PK\x03\x04 a zip archive", "not a schedule"),
    (b"\x93NUMPY\x01\x00", "not a schedule"),
    (b"\x93NUMPY\x02\x00" + bytes(100), "not a schedule"),
    (b"\x93NUMPY\x01\x00\x10\x00{'descr': '<i8'\n\n", "not a schedule"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_foreign_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """A file that is no .npy of this version ends in one sentence."""
    path = tmp_path / "schedule.npy"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(path)


def test_other_arrays_are_refused(tmp_path: Path) -> None:
    """Arrays of another type or shape, and pickled objects, are not schedules; nothing is unpickled."""
    path = tmp_path / "array.npy"
    for array in (np.arange(3), np.zeros((2, 2), dtype=ROW), np.array([{}], dtype=object)):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(InputError, match="not a schedule"):
            load(path)


@settings(max_examples=150, deadline=None, suppress_health_check=UNTIMED)
@given(position=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 400))
def test_a_damaged_file_loads_or_is_refused(tmp_path: Path, position: int, value: int, cut: int) -> None:
    """Any byte changed or any tail cut off gives a schedule or an InputError, never another exception."""
    path = tmp_path / "schedule.npy"
    save(make([Stream(0, Constant(10.0))], 1.0, seed=0), path)
    content = bytearray(path.read_bytes())
    if position < len(content):
        content[position] = value
    path.write_bytes(content[: len(content) - cut])
    with contextlib.suppress(InputError):
        load(path)


def test_a_truncated_file_says_so(tmp_path: Path) -> None:
    """A file that lost its last row is refused with what is there and what was promised."""
    path = tmp_path / "schedule.npy"
    save(make([Stream(0, Constant(10.0))], 1.0, seed=0), path)
    path.write_bytes(path.read_bytes()[:-24])
    with pytest.raises(InputError, match="216 bytes of rows, 240 promised"):
        load(path)


def test_an_impossible_instant_is_refused(tmp_path: Path) -> None:
    """Only the marker -1 may be negative."""
    rows = np.zeros(2, dtype=ROW)
    rows["intended_ns"] = [0, -2]
    path = tmp_path / "schedule.npy"
    save(Schedule(rows), path)
    with pytest.raises(InputError, match="row 1 is due before the segment starts"):
        load(path)


def test_missing_folders_are_refused(tmp_path: Path) -> None:
    """Reading or writing where there is nothing is a user error with the path in it."""
    path = tmp_path / "none" / "schedule.npy"
    with pytest.raises(InputError, match="cannot be read"):
        load(path)
    with pytest.raises(InputError, match="cannot be written"):
        save(make([], 1.0, seed=0), path)


def test_every_problem_of_a_request_is_listed() -> None:
    """A bad duration, seed and repeat and a number used twice are one error with four problems."""
    with pytest.raises(InputError) as caught:
        make([Stream(1, Poisson(1.0)), Stream(1, Poisson(2.0))], 0.0, seed=-1, repeat=-1)
    assert len(caught.value.problems) == 4


def test_absurd_loads_are_refused_before_they_fill_the_memory() -> None:
    """A rate typed with too many digits is refused by its expected count."""
    with pytest.raises(InputError, match=r"about 1e\+12 arrivals"):
        make([Stream(0, Poisson(1e9))], 1000.0, seed=0)


@pytest.mark.parametrize(
    ("number", "payloads", "message"),
    [(-1, 1, "number must be"), (2**32, 1, "number must be"), (0, 0, "payloads must")],
)
def test_impossible_streams_are_refused(number: int, payloads: int, message: str) -> None:
    """Stream numbers and payload counts fit the columns that hold them."""
    with pytest.raises(InputError, match=message):
        Stream(number, Poisson(1.0), payloads)


def test_parts_of_different_schedules_are_not_merged() -> None:
    """The same request twice means the parts do not belong together."""
    one = make([Stream(3, Poisson(5.0))], 5.0, seed=1)
    two = make([Stream(3, Poisson(5.0))], 5.0, seed=2)
    with pytest.raises(InputError, match="request 0 of stream 3 occurs twice"):
        merge([one, two])


def test_zero_senders_are_refused() -> None:
    """A schedule is shared by at least one sender."""
    schedule = make([], 1.0, seed=0)
    for share in (schedule.deal, lambda parts: schedule.thin(parts, 0)):
        with pytest.raises(InputError, match="1 or more senders"):
            share(0)


def test_rows_are_read_only() -> None:
    """Nothing can change a schedule after it was hashed."""
    with pytest.raises(ValueError, match="read-only"):
        make([Stream(0, Constant(1.0))], 1.0, seed=0).rows["id"] = 5
