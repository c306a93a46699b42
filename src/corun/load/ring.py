"""The record of a segment: a memory-mapped file with one fixed-size slot per scheduled request.

    "CORUNRNG" | version u32 | slot size u32 | slots u64 | offset of slot 0 u64 | metadata length u32 | JSON ...
    slot  id u64 | t_intended i64 | stream u32 | payload u32      written when the segment is armed
          t_wake i64 | t_tx_start i64 | t_tx_done i64 | status    written when the request has left
          status u32 | batch u32 | t_rx i64                       written when the reply is here
          | reply_len u32 | answer i32
          | 10 x server stamp i64
          t_first_token i64 | t_last_token i64                    written as tokens arrive, where they do
          | tokens u32 | pad

A slot is written in place by two `pack_into`, 0.4 µs together; the pages belong to the kernel, so a client that
is killed keeps every record it made. UNSENT marks a request that was never begun, LOST one that was sent and
not answered: of a killed client both are true as they stand. A slot with t_intended = 0 was never used.

CSV is made afterwards by `ring_to_csv`, never by the sender while something is measured.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from corun.clock import NS_PER_MS, NS_PER_S, Anchor
from corun.errors import InputError, RunFault
from corun.run.records import INFER_CLIENT, names
from corun.run.table import TableWriter
from corun.wire import STAMPS, Status

MAGIC = b"CORUNRNG"
VERSION = 3
UNSENT = 101
NO_ANSWER = -1
CLASSES_BYTES = 40
METADATA_SPARE = 4096
PAGE = 4096
CSV_CHUNK = 1000

SLOT_DTYPE = np.dtype(
    [
        ("id", "<u8"),
        ("t_intended", "<i8"),
        ("stream", "<u4"),
        ("payload", "<u4"),
        ("t_wake", "<i8"),
        ("t_tx_start", "<i8"),
        ("t_tx_done", "<i8"),
        ("status", "<u4"),
        ("batch", "<u4"),
        ("t_rx", "<i8"),
        ("reply_len", "<u4"),
        ("answer", "<i4"),
        ("stamps", "<i8", (len(STAMPS),)),
        ("t_first_token", "<i8"),
        ("t_last_token", "<i8"),
        ("tokens", "<u4"),
        ("pad", "<u4"),
    ]
)
SLOT_SIZE = SLOT_DTYPE.itemsize
Records = NDArray[np.void]

_HEAD = struct.Struct("<8sIIQQI")
HEAD_SIZE = _HEAD.size
_HEAD_COUNT, _HEAD_COUNT_AT = struct.Struct("<Q"), 16
_DUE = struct.Struct("<QqII")
_WAKE = struct.Struct("<q")
_TX = struct.Struct("<qqqI")
_RX = struct.Struct("<IIqIi10q")
_INSTANT, _COUNT = struct.Struct("<q"), struct.Struct("<I")
_WAKE_AT, _STATUS_AT = SLOT_DTYPE.fields["t_wake"][1], SLOT_DTYPE.fields["status"][1]  # type: ignore[index]
_FIRST_AT, _LAST_AT, _TOKENS_AT = (SLOT_DTYPE.fields[name][1] for name in ("t_first_token", "t_last_token", "tokens"))  # type: ignore[index]


@dataclass(frozen=True)
class Context:
    """What the rows of one segment have in common: whose they are and under which condition they were made."""

    service: str = "service"
    infer_model_name: str = ""
    train_model_name: str = "none"
    image_size: int | None = None
    device: str = ""
    request_rate: float = 0.0
    arm: str = "alone"
    repeat: int = 0
    segment: int = 0


@dataclass(frozen=True)
class Metadata:
    """Everything the converter and the validity checks need to know about a segment.

    labels: true classes of the payloads, empty where none has one. anchor: the same instant on the monotonic and the
    wall clock. clock: server clock minus ours, see
    `clocks.ClockRecord`; empty when both share one clock. timing, counts, server: as the client found them.
    """

    context: Context = field(default_factory=Context)
    payloads: tuple[str, ...] = ()
    anchor: Anchor = field(default_factory=lambda: Anchor(0, 0))
    clock: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    server: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[int | None, ...] = ()

    def encode(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def decode(cls, text: bytes) -> Metadata:
        """Raises ValueError or TypeError on anything `encode` did not write."""
        body = json.loads(text)
        context = Context(**body.pop("context"))
        anchor = Anchor(**body.pop("anchor"))
        payloads, labels = tuple(body.pop("payloads")), tuple(body.pop("labels"))
        return cls(context=context, anchor=anchor, payloads=payloads, labels=labels, **body)


class RingWriter:
    """The slots of one segment, written in place; `buffer` and `offset` are the sender's.

    Raises RunFault when the file cannot be made (full disk, no right): its space is allocated here, not
    while measuring.
    """

    def __init__(self, path: Path | str, count: int, metadata: Metadata) -> None:
        self.path = Path(path)
        self.count = count
        text = metadata.encode()
        self._room = _round_up(_HEAD.size + len(text) + METADATA_SPARE) - _HEAD.size
        self.offset = _HEAD.size + self._room
        size = self.offset + count * SLOT_SIZE
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "w+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
                self.buffer = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise RunFault(f"cannot make the record file {self.path} of {size} bytes: {error.strerror}") from error
        self._write_head(text)

    @property
    def records(self) -> Records:
        """All slots as a structured array over the mapping (drop it before `close`)."""
        return np.ndarray(self.count, SLOT_DTYPE, self.buffer, self.offset)

    def fill(self, ids: Sequence[int], intended_ns: Sequence[int], stream: int, payloads: Sequence[int]) -> None:
        """Write what is known of every request before the segment: id, intended instant, stream, payload index."""
        records = self.records
        records["id"], records["t_intended"] = ids, intended_ns
        records["stream"], records["payload"] = stream, payloads
        records["status"] = UNSENT

    def due(self, index: int, id: int, intended_ns: int, stream: int, payload: int) -> None:
        """Write one slot's first part, for a loop that does not know its instants in advance."""
        at = self.offset + index * SLOT_SIZE
        _DUE.pack_into(self.buffer, at, id, intended_ns, stream, payload)
        _TX.pack_into(self.buffer, at + _WAKE_AT, 0, 0, 0, UNSENT)

    def wake(self, index: int, now_ns: int) -> None:
        """The sender woke up for this request and never got it to the kernel."""
        _WAKE.pack_into(self.buffer, self.offset + index * SLOT_SIZE + _WAKE_AT, now_ns)

    def tx(self, index: int, wake_ns: int, start_ns: int, done_ns: int) -> None:
        """The request has left (done_ns = 0: only a part of it); it is LOST until a reply comes."""
        _TX.pack_into(
            self.buffer, self.offset + index * SLOT_SIZE + _WAKE_AT, wake_ns, start_ns, done_ns, Status.LOST
        )

    def rx(
        self,
        index: int,
        status: int,
        batch: int,
        t_rx_ns: int,
        reply_len: int,
        stamps: Sequence[int],
        answer: int = NO_ANSWER,
    ) -> None:
        """The reply is here."""
        _RX.pack_into(
            self.buffer,
            self.offset + index * SLOT_SIZE + _STATUS_AT,
            status,
            batch,
            t_rx_ns,
            reply_len,
            answer,
            *stamps,
        )

    def token(self, index: int, t_rx_ns: int) -> None:
        """A part of the reply is here: one more token."""
        at = self.offset + index * SLOT_SIZE
        if not _INSTANT.unpack_from(self.buffer, at + _FIRST_AT)[0]:
            _INSTANT.pack_into(self.buffer, at + _FIRST_AT, t_rx_ns)
        _INSTANT.pack_into(self.buffer, at + _LAST_AT, t_rx_ns)

    def tokens(self, index: int, count: int) -> None:
        """How many tokens the whole reply has."""
        _COUNT.pack_into(self.buffer, self.offset + index * SLOT_SIZE + _TOKENS_AT, count)

    def lose_unsent(self, last: int) -> None:
        """Mark every request before position `last` that was never begun as LOST."""
        slots = self.records[:last]
        slots["status"][(slots["status"] == UNSENT) & (slots["t_intended"] != 0)] = Status.LOST

    def update(self, metadata: Metadata) -> None:
        """Replace the metadata; the space for growth is METADATA_SPARE bytes and more."""
        text = metadata.encode()
        if len(text) > self._room:
            raise RunFault(f"the metadata of {self.path} grew past the {self._room} bytes reserved for it")
        self._write_head(text)

    def _write_head(self, text: bytes) -> None:
        self.buffer[_HEAD.size : _HEAD.size + len(text)] = text
        _HEAD.pack_into(self.buffer, 0, MAGIC, VERSION, SLOT_SIZE, self.count, self.offset, len(text))

    def close(self, used: int | None = None) -> None:
        """Let the file be; with `used` the slots behind the first so many are cut off."""
        if used is not None and used < self.count:
            self.count = used
            _HEAD_COUNT.pack_into(self.buffer, _HEAD_COUNT_AT, used)
        self.buffer.close()
        os.truncate(self.path, self.offset + self.count * SLOT_SIZE)


def _round_up(size: int) -> int:
    return -(-size // PAGE) * PAGE


@dataclass(frozen=True)
class Recording:
    """A ring file read back: used slots only, in schedule order."""

    records: Records
    metadata: Metadata


def open_ring(path: Path | str) -> Recording:
    """Read a ring file; InputError says what is wrong with one that is damaged or something else."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the record file {path}: {error.strerror or error}") from error
    count, offset, text = _check_head(path, content)
    try:
        metadata = Metadata.decode(text)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: the record file's metadata is damaged: {error}") from error
    records = np.frombuffer(content, SLOT_DTYPE, count, offset)
    return Recording(records[records["t_intended"] != 0], metadata)


def read_ring(path: Path | str) -> Records:
    """The used slots of a ring file, dtype SLOT_DTYPE, in schedule order; InputError as `open_ring`."""
    return open_ring(path).records


def _check_head(path: Path, content: bytes) -> tuple[int, int, bytes]:
    if len(content) < _HEAD.size or content[: len(MAGIC)] != MAGIC:
        raise InputError(f"{path} is not a record file of a client")
    _, version, slot_size, count, offset, length = _HEAD.unpack_from(content)
    if version != VERSION or slot_size != SLOT_SIZE:
        raise InputError(
            f"{path} has record version {version} with {slot_size}-byte slots; this corun reads version {VERSION} "
            f"with {SLOT_SIZE}"
        )
    if offset < _HEAD.size + length or offset + count * SLOT_SIZE > len(content):
        raise InputError(
            f"{path} is cut short: {len(content)} bytes, {offset + count * SLOT_SIZE} expected for {count} slots"
        )
    return count, offset, content[_HEAD.size : _HEAD.size + length]


def layout(head: bytes) -> tuple[int, int]:
    """(slots, offset of slot 0) by the first HEAD_SIZE bytes of a ring that may still be in use; (0, 0) if it is none."""
    if len(head) < HEAD_SIZE:
        return 0, 0
    magic, version, slot_size, count, offset, _ = _HEAD.unpack_from(head)
    known = magic == MAGIC and version == VERSION and slot_size == SLOT_SIZE
    return (count, offset) if known else (0, 0)


def status_name(code: int) -> str:
    """The name of a status code for a table."""
    try:
        return Status(code).name
    except ValueError:
        return f"STATUS_{code}"


def ring_to_csv(ring: Path | str, csv: Path | str, context: Context | None = None, append: bool = True) -> int:
    """Write the rows of one segment to an INFER_CLIENT table, by default below those that are there; how many.

    context: replaces the one the client stored. Requests never begun have no row. Server stamps are on the
    client's clock in the table: the ring has them raw, the offset found before and after the segment is
    subtracted here, interpolated in between (its bound is in the ring's metadata).
    """
    recording = open_ring(ring)
    written = 0
    with TableWriter(csv, INFER_CLIENT, append) as table:
        rows = client_rows(recording, context)
        while chunk := list(itertools.islice(rows, CSV_CHUNK)):
            table.rows(chunk)
            written += len(chunk)
    return written


def first_class(reply: bytes | bytearray | memoryview) -> int:
    """The first class of a classifier's reply (five pairs of int32 class and float32 probability), else NO_ANSWER."""
    return int.from_bytes(reply[:4], "little", signed=True) if len(reply) == CLASSES_BYTES else NO_ANSWER


class _Slot(NamedTuple):
    """One slot as plain integers, in the order of SLOT_DTYPE."""

    id: int
    t_intended: int
    stream: int
    payload: int
    t_wake: int
    t_tx_start: int
    t_tx_done: int
    status: int
    batch: int
    t_rx: int
    reply_len: int
    answer: int
    stamps: NDArray[np.int64]
    t_first_token: int
    t_last_token: int
    tokens: int
    pad: int


def client_rows(recording: Recording, context: Context | None = None) -> Iterator[list[Any]]:
    """The INFER_CLIENT row of every request that was begun or lost, in schedule order."""
    metadata = recording.metadata
    common = asdict(context or metadata.context)
    columns = names(INFER_CLIENT)
    for item in recording.records[recording.records["status"] != UNSENT].tolist():
        values = {**common, **_measured(_Slot(*item), metadata)}
        yield [values.get(column) for column in columns]


def _measured(slot: _Slot, metadata: Metadata) -> dict[str, Any]:
    intended, start, rx, files = slot.t_intended, slot.t_tx_start, slot.t_rx, metadata.payloads
    sojourn = (rx - intended) / NS_PER_MS if rx else None
    label = metadata.labels[slot.payload] if slot.payload < len(metadata.labels) else None
    answered = rx and label is not None and slot.answer != NO_ANSWER
    return {
        "work_start": f"{metadata.anchor.wall_at(intended) / NS_PER_S:.6f}",
        "file_name": files[slot.payload] if slot.payload < len(files) else str(slot.payload),
        "latency": sojourn,
        "stream": slot.stream,
        "id": slot.id,
        "status": status_name(slot.status),
        "t_intended_ns": intended,
        "t_wake_ns": slot.t_wake or None,
        "t_tx_start_ns": start or None,
        "t_tx_done_ns": slot.t_tx_done or None,
        "t_rx_ns": rx or None,
        "sojourn_ms": sojourn,
        "response_ms": (rx - start) / NS_PER_MS if rx else None,
        "slip_ms": (start - intended) / NS_PER_MS if start else None,
        "reply_bytes": slot.reply_len if rx else None,
        "batch": slot.batch if rx else None,
        **_local_stamps(slot, metadata.clock),
        "label": label,
        "answer": slot.answer if answered else None,
        **_tokens(slot),
    }


def _tokens(slot: _Slot) -> dict[str, Any]:
    """Tokens and their times; nothing for a reply without any."""
    first, last, count = slot.t_first_token, slot.t_last_token, slot.tokens
    return {
        "tokens_out": count or None,
        "ttft_ms": (first - slot.t_intended) / NS_PER_MS if first else None,
        "tpot_ms": (last - first) / NS_PER_MS / (count - 1) if first and count > 1 else None,
    }


def _local_stamps(slot: _Slot, clock: Mapping[str, Any]) -> dict[str, int | None]:
    offset = offset_at(clock, slot.t_tx_start)
    stamps = zip(STAMPS, slot.stamps.tolist(), strict=True)
    return {f"s_{name}_ns": stamp - offset if stamp else None for name, stamp in stamps}


def offset_at(clock: Mapping[str, Any], t_ns: int) -> int:
    """Server clock minus ours at t_ns, linear between the handshakes before and after; 0 without any.

    clock: {"before": {"t_ns", "offset_ns", "bound_ns"}, "after": {...}}, either may be missing.
    """
    before, after = clock.get("before") or clock.get("after"), clock.get("after") or clock.get("before")
    if not before or not after:
        return 0
    span = int(after["t_ns"]) - int(before["t_ns"])
    share = min(1.0, max(0.0, (t_ns - int(before["t_ns"])) / span)) if span > 0 else 0.0
    return int(before["offset_ns"]) + round(share * (int(after["offset_ns"]) - int(before["offset_ns"])))
