"""What travels in a frame, and the ring between two processes."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.ectrans import wire
from corun.ectrans.ring import FreeList, Ring, give_back
from corun.errors import FrameError, RunFault

TEXTS = st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5).filter(lambda texts: all(texts))
IDS = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=9), min_size=1, max_size=5)


@given(texts=TEXTS, ids=IDS)
@settings(max_examples=80, deadline=None)
def test_requests_come_out_as_they_went_in(texts: list[str], ids: list[list[int]]) -> None:
    """Texts and ids of any number and length survive the wire, in their order."""
    sent = wire.Sentences("text", "rt", texts=tuple(texts))
    assert wire.unpack_sentences(wire.pack_sentences(sent)) == sent
    sent = wire.Sentences("ids", "batch", ids=tuple(ids))
    assert wire.unpack_sentences(wire.pack_sentences(sent), vocabulary=1000) == sent


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 1e-3)])
def test_hidden_values_come_out_as_they_went_in(dtype: str, tolerance: float) -> None:
    """Rows of different lengths keep their shape; fp16 costs precision only."""
    rows = tuple(np.random.default_rng(0).random((length, 8), np.float32) for length in (3, 1, 5))
    payload = wire.pack_sentences(wire.Sentences("encoder", values=rows), dtype)
    back = wire.unpack_sentences(payload, width=8)
    assert back.tokens == [3, 1, 5]
    for row, own in zip(back.values, rows, strict=True):
        np.testing.assert_allclose(row, own, atol=tolerance)


def test_answers_are_put_in_the_order_of_their_sentences() -> None:
    """A reply may list its sentences in any order; ids and texts come back in the request's."""
    head = wire.ReplyHead(7, [2, 0, 1], [1, 2, 3])
    got, answers = wire.unpack_answers(wire.pack_answers(head, [[9], [1, 2], [3, 4, 5]]))
    assert (got.id, answers) == (7, [[1, 2], [3, 4, 5], [9]])
    head = wire.ReplyHead(7, [1, 0], [])
    assert wire.unpack_answers(wire.pack_texts(head, ["zwei", "eins ü"]))[1] == ["eins ü", "zwei"]
    with pytest.raises(FrameError, match="does not describe"):
        wire.unpack_answers(wire.pack_answers(wire.ReplyHead(7, [0, 0], [1, 1]), [[1], [1]]))


@pytest.mark.parametrize(
    ("head", "raw", "reason"),
    [
        (wire.RequestHead("ids", [2]), bytes(4), "4 bytes of values"),
        (wire.RequestHead("ids", []), b"", "0 sentences"),
        (wire.RequestHead("ids", [1] * 5000), b"", "5000 sentences"),
        (wire.RequestHead("ids", [0]), b"", "lengths from 0"),
        (wire.RequestHead("ids", [-1]), b"", "lengths from -1"),
        (wire.RequestHead("ids", [10**9]), b"", "1000000000"),
        (wire.RequestHead("ids", [1]), np.int32(1000).tobytes(), "an id is not"),
        (wire.RequestHead("ids", [1]), np.int32(-1).tobytes(), "an id is not"),
        (wire.RequestHead("ids", [1], "float32"), bytes(4), "not as"),
        (wire.RequestHead("words", [1]), bytes(4), "partition"),
        (wire.RequestHead("ids", [1], kind="soon"), bytes(4), "kind"),
        (wire.RequestHead("text", [1], "utf-8"), b"\xff", "not UTF-8"),
        (wire.RequestHead("encoder", [1], "float32", 4), bytes(16), "width 4"),
        (wire.RequestHead("encoder", [1], "float32", 8), np.full(8, np.nan, "<f4").tobytes(), "finite"),
    ],
)
def test_a_wrong_request_is_refused_with_its_reason(head: wire.RequestHead, raw: bytes, reason: str) -> None:
    """Every contradiction between header, limits and values is named; nothing is allocated for a lie."""
    payload = wire._joined(head, [raw])
    with pytest.raises(FrameError, match=reason):
        wire.unpack_sentences(payload, width=8, vocabulary=1000)


@given(payload=st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_garbage_is_a_frame_error(payload: bytes) -> None:
    """Whatever bytes come, the answer is a FrameError or a request, never another exception."""
    for wrapped in (payload, len(payload).to_bytes(4, "little") + payload):
        try:
            wire.unpack_sentences(wrapped)
        except FrameError:
            continue


def test_the_ring_loses_no_slot_over_a_thousand_packages() -> None:
    """Slots are written, read where they lie and given back; after 1,000 packages of any shape all are free."""
    ring = Ring(3, 64, 16)
    reader = Ring(3, 64, 16, ring.name)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    free = FreeList(3, ours)
    random = np.random.default_rng(0)
    try:
        for number in range(1000):
            count = int(random.integers(1, 9))
            hidden = torch.full((count, 64 // count, 16), float(number))
            slot = free.take()
            ring.write(slot, hidden)
            assert torch.equal(reader.view(slot, count, 64 // count), hidden)
            give_back(slot, theirs)
        assert {free.take() for _ in range(3)} == {0, 1, 2}
    finally:
        reader.close()
        ring.close()


def test_the_ring_holds_back_a_writer_that_is_ahead() -> None:
    """With every slot out, the next `take` needs one given back: at most K packages are between the two."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    free = FreeList(2, ours)
    assert {free.take(), free.take()} == {0, 1}
    assert not ours.poll(0)
    give_back(1, theirs)
    assert free.take() == 1
    theirs.close()
    with pytest.raises(EOFError):
        free.take()


def test_the_ring_refuses_what_does_not_fit() -> None:
    """A package over the slot's rows, a slot that does not exist and an impossible ring are errors."""
    ring = Ring(1, 10, 4)
    try:
        for slot, count, length in ((0, 3, 4), (1, 1, 1)):
            with pytest.raises(RunFault, match="do not fit"):
                ring.view(slot, count, length)
    finally:
        ring.close()
    with pytest.raises(ValueError, match="slots"):
        Ring(0, 1, 1)
