"""The record file: what was written is read back, damage is named, and a kill loses nothing."""

from __future__ import annotations

import csv
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corun.clock import Anchor
from corun.errors import CorunError, InputError, RunFault
from corun.load.ring import (
    SLOT_SIZE,
    UNSENT,
    Context,
    Metadata,
    RingWriter,
    first_class,
    offset_at,
    open_ring,
    read_ring,
    ring_to_csv,
    status_name,
)
from corun.run.records import INFER_CLIENT, names
from corun.wire import STAMPS, Status

I64 = st.integers(1, 2**62)
U32 = st.integers(0, 2**32 - 1)
STAMP_VALUES = tuple(range(1_000, 1_000 + 10 * len(STAMPS), 10))
CONTEXT = Context("svc", "resnet18", "vgg16", 224, "cpu", 12.5, "corun", 2, 7)


def write(path: Path, count: int = 3, metadata: Metadata | None = None) -> RingWriter:
    """A ring of `count` requests due every second from 1 s on, ids from 10."""
    writer = RingWriter(path, count, metadata or Metadata(CONTEXT, ("a.jpg", "b.jpg"), Anchor(0, 10**18)))
    due = [(index + 1) * 10**9 for index in range(count)]
    writer.fill(range(10, 10 + count), due, 4, [index % 2 for index in range(count)])
    return writer


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@given(
    wake=I64, start=I64, done=I64, rx=I64, status=U32, batch=U32, length=U32, answer=st.integers(-(2**31), 2**31 - 1), stamps=st.lists(
        st.integers(-(2**63), 2**63 - 1), min_size=len(STAMPS), max_size=len(STAMPS)
    )
)  # fmt: skip
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_slot_reads_back_as_it_was_written(
    tmp_path: Path,
    wake: int,
    start: int,
    done: int,
    rx: int,
    status: int,
    batch: int,
    length: int,
    answer: int,
    stamps: list[int],
) -> None:
    """Every field of a request keeps its value over the file, and its neighbours stay as they were."""
    path = tmp_path / "a.ring"
    writer = write(path)
    writer.wake(1, wake)
    assert writer.records["t_wake"].tolist() == [0, wake, 0]
    writer.tx(1, wake, start, done)
    writer.rx(1, status, batch, rx, length, stamps, answer)
    writer.close()
    before, slot, after = read_ring(path)
    found = [
        int(slot[key])
        for key in ("id", "t_wake", "t_tx_start", "t_tx_done", "status", "batch", "t_rx", "reply_len", "answer")
    ]
    assert found == [11, wake, start, done, status, batch, rx, length, answer]
    assert slot["stamps"].tolist() == stamps
    assert slot["t_intended"] == 2 * 10**9
    assert before["status"] == after["status"] == UNSENT
    assert before["t_wake"] == after["t_wake"] == 0


def test_a_sent_request_is_lost_until_its_reply_comes(tmp_path: Path) -> None:
    """What a killed client leaves is true as it stands: UNSENT, LOST, or the reply's status."""
    writer = write(tmp_path / "a.ring")
    writer.tx(0, 1, 2, 3)
    writer.tx(1, 1, 2, 3)
    writer.rx(1, Status.OK, 1, 9, 0, STAMP_VALUES)
    assert writer.records["status"].tolist() == [Status.LOST, Status.OK, UNSENT]


def test_only_requests_that_were_due_become_lost(tmp_path: Path) -> None:
    """lose_unsent turns what was never begun into LOST, up to the position where sending ended."""
    writer = write(tmp_path / "a.ring", 4)
    writer.rx(0, Status.OK, 1, 9, 0, STAMP_VALUES)
    writer.lose_unsent(3)
    assert writer.records["status"].tolist() == [Status.OK, Status.LOST, Status.LOST, UNSENT]


def test_unused_slots_are_not_records(tmp_path: Path) -> None:
    """A loop that did not need all its slots leaves only those it used, and the file shrinks to them."""
    path = tmp_path / "a.ring"
    writer = RingWriter(path, 1000, Metadata())
    for index in range(3):
        writer.due(index, index, 5 + index, 0, 0)
    assert len(read_ring(path)) == 3
    writer.close(3)
    assert len(read_ring(path)) == 3
    assert path.stat().st_size < 1000 * SLOT_SIZE


def test_metadata_survives_and_can_grow_within_its_space(tmp_path: Path) -> None:
    """Counts and the second clock handshake are added after the segment, in place."""
    path = tmp_path / "a.ring"
    writer = write(path)
    metadata = Metadata(CONTEXT, ("a.jpg",), Anchor(1, 2), clock={"after": {"t_ns": 1}}, counts={"sent": 3})
    writer.update(metadata)
    assert open_ring(path).metadata == metadata
    with pytest.raises(RunFault, match="grew past"):
        writer.update(Metadata(counts={"text": "x" * 20_000}))


@pytest.mark.parametrize("keep", [0, 4, 30, 200, 4097])
def test_a_file_cut_short_is_named_not_read(tmp_path: Path, keep: int) -> None:
    """A truncated record file gives one sentence with its path."""
    path = tmp_path / "a.ring"
    write(path).close()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"a\.ring"):
        read_ring(path)


@given(place=st.integers(0, 600), value=st.integers(0, 255))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_damaged_head_is_an_error_or_harmless(tmp_path: Path, place: int, value: int) -> None:
    """Any byte of the head may be wrong: reading gives records or an InputError, never another exception."""
    path = tmp_path / "a.ring"
    write(path).close()
    content = bytearray(path.read_bytes())
    content[place] = value
    path.write_bytes(content)
    try:
        recording = open_ring(path)
        ring_to_csv(path, tmp_path / "a.csv", append=False)
    except CorunError:
        return
    assert len(recording.records) <= 3


def test_other_files_and_missing_ones_are_named(tmp_path: Path) -> None:
    """A CSV given for a ring, and a path that does not exist, are input errors."""
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n" * 100)
    with pytest.raises(InputError, match="not a record file"):
        read_ring(other)
    with pytest.raises(InputError, match="cannot read"):
        read_ring(tmp_path / "missing.ring")


def test_a_ring_that_cannot_be_made_is_a_fault_before_the_run(tmp_path: Path) -> None:
    """The space is taken when the ring is made, so a full disk shows before anything is measured."""
    with pytest.raises(RunFault, match="cannot make the record file"):
        RingWriter(tmp_path / "a.ring", 10**13, Metadata())


def test_labels_and_answers_stand_in_the_rows_of_labelled_payloads(tmp_path: Path) -> None:
    """A payload's true class and the reply's first class become columns; without a label both are empty."""
    path, table = tmp_path / "a.ring", tmp_path / "svc.csv"
    ring = RingWriter(path, 3, Metadata(payloads=("a", "b", "c"), labels=(4, None, 2)))
    ring.fill(range(3), [1, 2, 3], 0, range(3))
    reply = struct.pack("<if", 3, 0.9) + bytes(32)
    for index in range(2):
        ring.tx(index, 5, 6, 7)
        ring.rx(index, Status.OK, 1, 9, 40, STAMP_VALUES, first_class(reply))
    ring.tx(2, 5, 6, 7)
    ring.close()
    assert ring_to_csv(path, table) == 3
    assert [(row["label"], row["answer"]) for row in rows_of(table)] == [("4", "3"), ("", ""), ("2", "")]


@given(st.binary(max_size=64))
def test_only_a_classifiers_reply_has_a_first_class(reply: bytes) -> None:
    """40 bytes are five classes, the first one first; anything else has none."""
    expected = struct.unpack_from("<i", reply)[0] if len(reply) == 40 else -1
    assert first_class(reply) == first_class(memoryview(reply)) == expected


def test_csv_rows_carry_context_derived_latencies_and_names(tmp_path: Path) -> None:
    """Columns are INFER_CLIENT's; missing is empty; sojourn, response and slip follow from the stamps."""
    path, table = tmp_path / "a.ring", tmp_path / "svc.csv"
    writer = write(path)
    writer.tx(0, 1_000_500_000, 1_001_000_000, 1_001_100_000)
    writer.rx(0, Status.OK, 2, 1_006_000_000, 40, STAMP_VALUES)
    writer.tx(1, 2_000_000_001, 2_000_000_002, 2_000_000_003)
    writer.close()
    assert ring_to_csv(path, table) == 2
    answered, lost = rows_of(table)
    assert tuple(answered) == names(INFER_CLIENT)
    assert (answered["infer_model_name"], answered["train_model_name"], answered["device"]) == (
        "resnet18",
        "vgg16",
        "cpu",
    )
    assert (answered["arm"], answered["repeat"], answered["segment"], answered["service"]) == (
        "corun",
        "2",
        "7",
        "svc",
    )
    assert (answered["file_name"], answered["id"], answered["stream"], answered["status"]) == (
        "a.jpg",
        "10",
        "4",
        "OK",
    )
    assert (answered["sojourn_ms"], answered["response_ms"], answered["slip_ms"]) == ("6.0", "5.0", "1.0")
    assert answered["latency"] == answered["sojourn_ms"]
    assert answered["work_start"] == "1000000001.000000"
    assert (answered["s_rx_first_ns"], answered["s_tx_ns"]) == ("1000", "1090")
    assert (lost["status"], lost["sojourn_ms"], lost["t_rx_ns"], lost["reply_bytes"]) == ("LOST", "", "", "")
    assert lost["slip_ms"] != ""
    assert lost["s_tx_ns"] == ""


def test_segments_go_into_one_table(tmp_path: Path) -> None:
    """Converting several rings appends; with append=False the table begins anew."""
    table = tmp_path / "svc.csv"
    for segment in range(3):
        path = tmp_path / f"{segment}.ring"
        writer = write(path, metadata=Metadata(Context(segment=segment)))
        writer.tx(0, 1, 2, 3)
        writer.close()
        ring_to_csv(path, table)
    assert [row["segment"] for row in rows_of(table)] == ["0", "1", "2"]
    ring_to_csv(tmp_path / "0.ring", table, append=False)
    assert len(rows_of(table)) == 1


@given(
    first=st.integers(-(10**12), 10**12),
    second=st.integers(-(10**12), 10**12),
    t=st.integers(0, 10**12),
    begin=st.integers(0, 10**11),
    span=st.integers(1, 10**11),
)
@settings(max_examples=100)
def test_the_offset_lies_between_its_two_measurements(first: int, second: int, t: int, begin: int, span: int) -> None:
    """Between the handshakes the offset is linear, outside it is the nearer one, with one of them it is that."""
    before, after = {"t_ns": begin, "offset_ns": first}, {"t_ns": begin + span, "offset_ns": second}
    offset = offset_at({"before": before, "after": after}, t)
    assert min(first, second) <= offset <= max(first, second)
    assert offset_at({"before": before}, t) == first
    assert offset_at({}, t) == 0


def test_server_stamps_are_moved_to_the_clients_clock(tmp_path: Path) -> None:
    """A server whose clock is ahead by a second and a half gets its stamps corrected by that much."""
    clock = {"before": {"t_ns": 0, "offset_ns": 1_000_000}, "after": {"t_ns": 2_000_000, "offset_ns": 2_000_000}}
    path, table = tmp_path / "a.ring", tmp_path / "a.csv"
    writer = write(path, metadata=Metadata(clock=clock))
    writer.tx(0, 1, 1_000_000, 1_000_001)
    writer.rx(0, Status.OK, 1, 3_000_000, 0, [9_500_000] * len(STAMPS))
    writer.close()
    ring_to_csv(path, table)
    assert rows_of(table)[0]["s_tx_ns"] == "8000000"


def test_an_unknown_status_keeps_its_number() -> None:
    """A status of a later protocol is written as it came."""
    assert status_name(0) == "OK"
    assert status_name(77) == "STATUS_77"


def test_a_killed_writer_leaves_every_record(tmp_path: Path) -> None:
    """SIGKILL between two records: all that were made are in the file."""
    path = tmp_path / "a.ring"
    program = (
        "import os, signal, sys; from pathlib import Path; from corun.load.ring import *\n"
        f"w = RingWriter(Path({str(path)!r}), 100, Metadata())\n"
        "w.fill(range(100), range(1, 101), 0, [0] * 100)\n"
        "[w.tx(i, 1, 2, 3) for i in range(60)]\n"
        "[w.rx(i, 0, 1, 9, 0, [0] * 10) for i in range(50)]\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3] / "src")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    status = read_ring(path)["status"]
    assert [(status == code).sum() for code in (Status.OK, Status.LOST, UNSENT)] == [50, 10, 40]
    assert np.array_equal(read_ring(path)["id"], np.arange(100))
