"""The pure parts: a segment's work from its rows, what is left of a send, the summary line, arrivals by name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.load.harness import rows

from corun.arrivals import describe
from corun.errors import InputError
from corun.load.closed import _after
from corun.load.door import arrival_process
from corun.load.ring import SLOT_DTYPE, UNSENT
from corun.load.summary import line
from corun.load.work import Work, count
from corun.wire import MAX_PAYLOAD, Status


@given(
    offsets=st.lists(st.integers(0, 10**12), max_size=30),
    start=st.integers(0, 10**15),
    payloads=st.lists(st.binary(max_size=4), min_size=1, max_size=5),
)
def test_work_is_the_rows_in_order_of_their_instants(offsets: list[int], start: int, payloads: list[bytes]) -> None:
    """Instants become absolute, ids stay with them, and payload indices wrap around what the client has."""
    made = rows([0.0] * len(offsets))
    made["intended_ns"] = offsets
    made["payload"] = np.arange(len(offsets)) * 7
    work = Work.of_rows(made, start, 3, payloads)
    assert list(work.intended_ns) == sorted(start + offset for offset in offsets)
    assert sorted(work.ids) == list(range(len(offsets)))
    for id, due, payload in zip(work.ids, work.intended_ns, work.payload_of, strict=True):
        assert due == start + offsets[id]
        assert payload == id * 7 % len(payloads)


def test_work_needs_payloads_within_the_protocols_limit() -> None:
    """No payload, or one too large for any frame, is refused before anything is sent."""
    with pytest.raises(InputError, match="no payload"):
        Work.of_rows(rows([0.0]), 0, 0, [])
    with pytest.raises(InputError, match="over the protocol's limit"):
        Work.of_rows(rows([0.0]), 0, 0, [bytes(MAX_PAYLOAD + 1)])


@given(header=st.binary(max_size=8), payload=st.binary(max_size=8), data=st.data())
def test_what_is_left_of_a_send_is_what_was_not_taken(header: bytes, payload: bytes, data: st.DataObject) -> None:
    """Taking any number of bytes off the front leaves the others in order, and no empty part."""
    taken = data.draw(st.integers(0, len(header) + len(payload)))
    left = _after([memoryview(header), memoryview(payload)], taken)
    assert b"".join(left) == (header + payload)[taken:]
    assert all(len(part) for part in left)


@given(
    statuses=st.lists(st.sampled_from([Status.OK, Status.REJECTED, Status.FAILED, Status.LOST, UNSENT]), max_size=40)
)
def test_every_request_is_counted_exactly_once(statuses: list[int]) -> None:
    """ok + errors + lost + unsent = scheduled, whatever happened; unused slots are nothing."""
    records = np.zeros(len(statuses) + 3, SLOT_DTYPE)
    records["t_intended"][: len(statuses)] = 1
    records["status"][: len(statuses)] = statuses
    counts = count(records, 0, 0, 0.0, "")
    assert counts.scheduled == len(statuses)
    assert counts.ok + counts.errors + counts.lost + counts.unsent == counts.scheduled
    assert counts.lost == statuses.count(Status.LOST)


def test_the_summary_line_says_na_below_the_floor() -> None:
    """With 100 requests a p99 is not quoted; medians, counts and the rate are."""
    records = np.zeros(100, SLOT_DTYPE)
    records["t_intended"] = np.arange(1, 101) * 10_000_000
    records["t_tx_start"] = records["t_intended"] + 1_000_000
    records["t_tx_done"] = records["t_tx_start"]
    records["t_rx"] = records["t_intended"] + 5_000_000
    text = line(count(records, 0, 0, 0.0, ""), records, "asked 100/s", 1.0)
    assert text == (
        "100 of 100 sent, 100/s (asked 100/s); sojourn p50 5 ms, p99 n/a; response p50 4 ms, p99 n/a; "
        "slip p50 1 ms, p99 n/a; 0 errors, 0 lost"
    )


@pytest.mark.parametrize(
    ("text", "rate", "expected"),
    [
        ("poisson", 20.0, {"name": "poisson", "rate": 20.0}),
        ("constant", 5.0, {"name": "constant", "rate": 5.0}),
        ("gamma:rate=10,shape=0.5", 99.0, {"name": "gamma", "rate": 10.0, "shape": 0.5}),
        ("closed", 10.0, {"name": "closed"}),
        ("offline:count=9", 10.0, {"name": "offline", "count": 9}),
        ("poisson", 0.0, {"name": "trace"}),
    ],
)
def test_arrivals_take_the_rate_unless_they_name_their_own(
    text: str, rate: float, expected: dict[str, object]
) -> None:
    """--process with parameters stands for itself; a bare name takes --rate; rate 0 is the recorded trace."""
    described = describe(arrival_process(text, rate))
    if rate == 0:
        assert described["name"] != "poisson"
    else:
        assert expected.items() <= described.items()
