"""What a translation request and its reply carry inside a frame of the wire protocol.

    payload   length of the header u32 | header, JSON | values, little endian, one sentence after another

    partition   values of a request                          lengths      answer
    text        UTF-8                                        bytes        UTF-8
    ids         int32                                        tokens       int32
    embed       float32 or float16, (tokens, width) each     tokens       int32
    encoder     the same: hidden states of the encoder       tokens       int32

The request's id and its deadline are the frame's. A reply goes to the connection its request came from and names
the sentence each of its answers belongs to; an error reply is a status and a JSON body with a sentence about it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from corun.errors import FrameError

TEXT, IDS, EMBED, ENCODER = "text", "ids", "embed", "encoder"
MAX_SENTENCES = 4096
MAX_TOKENS = 1024
MAX_TEXT_BYTES = 32 << 10
MAX_HEADER = 1 << 20
HeadT = TypeVar("HeadT", "RequestHead", "ReplyHead")
_LENGTH = struct.Struct("<I")
_DTYPES = {"int32": "<i4", "float32": "<f4", "float16": "<f2", "utf-8": "u1"}


class RequestHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Header of a request. kind: rt, batch or "" to let the server decide. width: values a token."""

    partition: str
    lengths: list[int]
    dtype: str = "int32"
    width: int = 1
    kind: str = ""


class ReplyHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Header of a reply: answer i belongs to sentence sentences[i] of request id. Stamps in ns, server's clock."""

    id: int
    sentences: list[int]
    lengths: list[int]
    dtype: str = "int32"
    first_dispatch_ns: int = 0
    enc0_ns: int = 0
    enc1_ns: int = 0
    dec0_ns: int = 0
    done_ns: int = 0


@dataclass(frozen=True)
class Sentences:
    """The content of a request: texts, or ids, or one (tokens, width) float32 array a sentence."""

    partition: str
    kind: str = ""
    texts: tuple[str, ...] = ()
    ids: tuple[list[int], ...] = ()
    values: tuple[NDArray[np.float32], ...] = ()

    def __len__(self) -> int:
        return len(self.texts) or len(self.ids) or len(self.values)

    @property
    def tokens(self) -> list[int]:
        """Tokens of each sentence; of a text not known here."""
        return [len(one) for one in self.ids or self.values]


def pack_sentences(sentences: Sentences, dtype: str = "float32") -> bytes:
    """The payload of a request; dtype: of hidden values on the wire, float32 or float16."""
    partition = sentences.partition
    if partition == TEXT:
        parts = [text.encode() for text in sentences.texts]
        return _joined(RequestHead(partition, [len(part) for part in parts], "utf-8", 1, sentences.kind), parts)
    if partition == IDS:
        arrays = [np.asarray(row, "<i4").tobytes() for row in sentences.ids]
        return _joined(
            RequestHead(partition, [len(row) for row in sentences.ids], "int32", 1, sentences.kind), arrays
        )
    width = sentences.values[0].shape[1]
    raw = [np.ascontiguousarray(value, _DTYPES[dtype]).tobytes() for value in sentences.values]
    lengths = [len(value) for value in sentences.values]
    return _joined(RequestHead(partition, lengths, dtype, width, sentences.kind), raw)


def unpack_sentences(payload: bytes | bytearray, width: int = 0, vocabulary: int = 0) -> Sentences:
    """The content of a request; FrameError with a sentence about the first thing that is wrong.

    width: what embeddings and hidden states must have; vocabulary: what ids must stay below; 0 = anything.
    """
    head, raw = _head(payload, RequestHead)
    _check(head, len(raw), width)
    try:
        if head.partition == TEXT:
            return Sentences(TEXT, head.kind, texts=tuple(str(part, "utf-8") for part in _cut(raw, head.lengths, 1)))
        if head.partition == IDS:
            ids = tuple(np.frombuffer(part, "<i4").tolist() for part in _cut(raw, head.lengths, 4))
            if vocabulary and any(not 0 <= i < vocabulary for row in ids for i in row):
                raise FrameError(f"an id is not one of the model's 0 to {vocabulary - 1}")
            return Sentences(IDS, head.kind, ids=ids)
    except UnicodeDecodeError as error:
        raise FrameError(f"a text is not UTF-8: {error}") from None
    form = np.dtype(_DTYPES[head.dtype])
    pieces = _cut(raw, head.lengths, head.width * form.itemsize)
    values = tuple(np.frombuffer(part, form).astype(np.float32).reshape(-1, head.width) for part in pieces)
    if not all(np.isfinite(value).all() for value in values):
        raise FrameError("a hidden value is not a finite number")
    return Sentences(head.partition, head.kind, values=values)


def _check(head: RequestHead, size: int, width: int) -> None:
    """Raise FrameError when a header contradicts itself, the limits or the size of its values."""
    floats = head.partition in (EMBED, ENCODER)
    allowed = {TEXT: ("utf-8",), IDS: ("int32",), EMBED: ("float32", "float16"), ENCODER: ("float32", "float16")}
    if head.partition not in allowed:
        raise FrameError(f'partition "{head.partition}" is not one of {", ".join(allowed)}')
    if head.dtype not in allowed[head.partition]:
        raise FrameError(f'{head.partition} comes as {" or ".join(allowed[head.partition])}, not as "{head.dtype}"')
    if head.kind not in ("", "rt", "batch"):
        raise FrameError(f'kind "{head.kind}" is neither rt nor batch')
    if not 1 <= len(head.lengths) <= MAX_SENTENCES:
        raise FrameError(f"{len(head.lengths)} sentences; a request holds 1 to {MAX_SENTENCES}")
    most = MAX_TEXT_BYTES if head.partition == TEXT else MAX_TOKENS
    if not 0 < min(head.lengths) <= max(head.lengths) <= most:
        raise FrameError(f"lengths from {min(head.lengths)} to {max(head.lengths)}: 1 to {most} are allowed")
    if (head.width != 1 and not floats) or head.width < 1 or (floats and width and head.width != width):
        raise FrameError(f"width {head.width}; the model has {width or 1}")
    wanted = sum(head.lengths) * head.width * np.dtype(_DTYPES[head.dtype]).itemsize
    if size != wanted:
        raise FrameError(f"{size} bytes of values where the header announces {wanted}")


def pack_answers(head: ReplyHead, ids: Sequence[Sequence[int]]) -> bytes:
    """A reply of ids."""
    return _joined(head, [np.asarray(row, "<i4").tobytes() for row in ids])


def pack_texts(head: ReplyHead, texts: Sequence[str]) -> bytes:
    """A reply of texts; head.lengths and head.dtype are filled in."""
    parts = [text.encode() for text in texts]
    return _joined(msgspec.structs.replace(head, lengths=[len(part) for part in parts], dtype="utf-8"), parts)


def unpack_answers(payload: bytes | bytearray) -> tuple[ReplyHead, list[list[int]] | list[str]]:
    """Header and answers, ids or texts, in the order of the request's sentences."""
    head, raw = _head(payload, ReplyHead)
    size = np.dtype(_DTYPES[head.dtype]).itemsize
    if len(raw) != sum(head.lengths) * size or sorted(head.sentences) != list(range(len(head.lengths))):
        raise FrameError("a reply whose header does not describe its answers")
    parts = _cut(raw, head.lengths, size)
    ordered = [part for _, part in sorted(zip(head.sentences, parts, strict=True), key=lambda one: one[0])]
    if head.dtype == "utf-8":
        return head, [str(part, "utf-8") for part in ordered]
    return head, [np.frombuffer(part, "<i4").tolist() for part in ordered]


def _joined(head: RequestHead | ReplyHead, parts: Sequence[bytes]) -> bytes:
    header = msgspec.json.encode(head)
    return b"".join([_LENGTH.pack(len(header)), header, *parts])


def _head(payload: bytes | bytearray, form: type[HeadT]) -> tuple[HeadT, memoryview]:
    view = memoryview(payload)
    if len(view) < _LENGTH.size:
        raise FrameError("a payload without a header")
    size = _LENGTH.unpack_from(view)[0]
    end = _LENGTH.size + size
    if size > MAX_HEADER or end > len(view):
        raise FrameError(f"a header of {size} bytes in a payload of {len(view)}; at most {MAX_HEADER} are allowed")
    try:
        return msgspec.json.decode(view[_LENGTH.size : end], type=form), view[end:]
    except msgspec.MsgspecError as error:
        raise FrameError(f"the header is wrong: {error}") from None


def _cut(raw: memoryview, lengths: Sequence[int], size: int) -> list[memoryview]:
    ends = np.cumsum(lengths) * size
    return [raw[end - length * size : end] for end, length in zip(ends.tolist(), lengths, strict=True)]
