"""What translates packages in one process: an encoder half, and a decoder half that works step by step.

    Work ─▶ Encoding.encode ─▶ (hidden, mask) ─▶ Decoding.admit, .step ─▶ Answers

`static` decodes one package at a time, to its end. `continuous` keeps up to `slots` rows running: rows that end leave
at once, waiting rows take their places. `no-cache` is static without a key-value cache: the published system's way,
kept to show what it cost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from corun.clock import now_ns
from corun.errors import InputError, suggest

if TYPE_CHECKING:
    import torch

    from corun.ectrans.decode import ContinuousDecoder, Decoder, StaticDecoder
    from corun.ectrans.encode import Encoder

STATIC, CONTINUOUS, NO_CACHE = "static", "continuous", "no-cache"
DECODERS = (STATIC, CONTINUOUS, NO_CACHE)
IDS = "ids"


class Work(msgspec.Struct, array_like=True):
    """One package for an executor: ids, or float32 values (n, L, width) padded to the longest, row after row.

    texts: only to be tokenised again at the worker, in the historical mode that reloads the tokenizer.
    """

    number: int
    lengths: list[int]
    partition: str = IDS
    ids: list[list[int]] = []
    values: bytes = b""
    texts: list[str] = []


class Answers(msgspec.Struct, array_like=True, tag=True):
    """Rows of a package that are done: (place in the package, ids). last: none is missing now.

    Stamps in ns of CLOCK_MONOTONIC: encoder began, ended; decoder began, ended. error: the package failed.
    """

    number: int
    rows: list[tuple[int, list[int]]]
    last: bool
    enc0_ns: int = 0
    enc1_ns: int = 0
    dec0_ns: int = 0
    dec1_ns: int = 0
    error: str = ""


@dataclass(frozen=True)
class Model:
    """Which model runs how. slots: rows of the continuous decoder. own: weights copied into this process."""

    parts: Path
    decoder: str = STATIC
    partition: str = IDS
    beam: int = 1
    max_new: int = 60
    slots: int = 64
    device: str = "cpu"
    dtype: str = "fp32"
    threads: int = 1
    own: bool = False
    reload: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.decoder not in DECODERS:
            problems.append(
                f'decoder "{self.decoder}" is not one of {", ".join(DECODERS)}{suggest(self.decoder, DECODERS)}'
            )
        if self.beam > 1 and self.decoder == CONTINUOUS:
            problems.append("the continuous decoder is greedy: use --decoder static with --beam")
        if min(self.beam, self.max_new, self.slots, self.threads) < 1:
            problems.append("beam, max_new, slots and threads must be 1 or more")
        if problems:
            raise InputError("the model cannot run like this", problems)


@dataclass
class Encoded:
    """A package between the halves. release: to be called when hidden is no longer needed."""

    number: int
    hidden: torch.Tensor
    mask: torch.Tensor
    enc0_ns: int
    enc1_ns: int
    release: Callable[[], None] | None = None
    dec0_ns: int = 0
    left: int = field(default=0)


class Encoding:
    """The encoder half in one process; without a model where clients send its output."""

    def __init__(self, model: Model) -> None:
        from corun.ectrans.tokens import ReloadingTokenizer

        self._encoder: Encoder | None = None
        if model.partition != "encoder":
            from corun.ectrans.parts import load_encoder

            partition = "embed" if model.partition == "embed" else IDS
            self._encoder = load_encoder(model.parts, model.device, model.dtype, partition)
            if model.own:
                _copy_weights(self._encoder.module)
        self._device = model.device
        self._tokenizer = ReloadingTokenizer(model.parts) if model.reload else None

    def encode(self, work: Work) -> Encoded:
        """Hidden states of a package."""
        began = now_ns()
        ids = [self._tokenizer.encode(text) for text in work.texts] if self._tokenizer and work.texts else work.ids
        if work.partition in ("embed", "encoder"):
            hidden, mask = self._values(work)
            if work.partition == "embed":
                assert self._encoder is not None
                hidden, mask = self._encoder.encode_embedded(hidden, mask)
        else:
            assert self._encoder is not None
            hidden, mask = self._encoder.encode(ids)
        return Encoded(work.number, hidden, mask, began, now_ns(), left=len(work.lengths))

    def _values(self, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        mask = mask_of(work.lengths)
        values = torch.frombuffer(bytearray(work.values), dtype=torch.float32)
        hidden = values.view(len(work.lengths), max(work.lengths), -1)
        return hidden.to(self._device), mask.to(self._device)


def mask_of(lengths: list[int]) -> torch.Tensor:
    """int64 (n, L): 1 where a row has a token."""
    import torch

    return (torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]).long()


class Static:
    """Whole packages, one after another."""

    def __init__(self, decoder: StaticDecoder) -> None:
        self._decoder = decoder
        self._waiting: deque[Encoded] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def admit(self, package: Encoded) -> None:
        self._waiting.append(package)

    def step(self) -> list[Answers]:
        """Decode the oldest package to its end."""
        package = self._waiting.popleft()
        began = now_ns()
        rows = self._decoder.decode(package.hidden, package.mask)
        if package.release:
            package.release()
        return [_answers(replace(package, dec0_ns=began), list(enumerate(rows)), last=True)]


class Continuous:
    """Rows of several packages side by side; waiting rows join when an eighth of the slots is free."""

    def __init__(self, decoder: ContinuousDecoder) -> None:
        self._decoder = decoder
        self._waiting: deque[tuple[Encoded, int]] = deque()
        self._running: dict[int, Encoded] = {}

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def admit(self, package: Encoded) -> None:
        self._waiting.append((package, 0))

    def step(self) -> list[Answers]:
        """Let rows join, make one step, return the rows that ended."""
        if self._waiting and (not self._decoder.active or self._decoder.free >= max(1, self._decoder.slots // 8)):
            self._join()
        ended: dict[int, list[tuple[int, list[int]]]] = {}
        for key, ids in self._decoder.step():
            number, place = cast("tuple[int, int]", key)
            ended.setdefault(number, []).append((place, ids))
        answers = []
        for number, rows in ended.items():
            package = self._running[number]
            package.left -= len(rows)
            if not package.left:
                del self._running[number]
            answers.append(_answers(package, rows, last=not package.left))
        return answers

    def _join(self) -> None:
        while self._waiting and self._decoder.free:
            package, first = self._waiting.popleft()
            last = min(first + self._decoder.free, len(package.hidden))
            mask = package.mask[first:last]
            width = int(mask.sum(dim=1).max())
            keys = [(package.number, place) for place in range(first, last)]
            self._decoder.admit(package.hidden[first:last, :width], mask[:, :width], keys)
            if not package.dec0_ns:
                package.dec0_ns = now_ns()
                self._running[package.number] = package
            if last < len(package.hidden):
                self._waiting.appendleft((package, last))
            elif package.release:
                package.release()


def _answers(package: Encoded, rows: list[tuple[int, list[int]]], last: bool) -> Answers:
    return Answers(package.number, rows, last, package.enc0_ns, package.enc1_ns, package.dec0_ns, now_ns())


Decoding = Static | Continuous


def make_decoding(model: Model) -> Decoding:
    """The decoder half in one process."""
    from corun.ectrans.decode import ContinuousDecoder, StaticDecoder
    from corun.ectrans.parts import load_decoder

    decoder: Decoder = load_decoder(model.parts, model.device, model.dtype)
    if model.own:
        _copy_weights(decoder.module)
    if model.decoder == CONTINUOUS:
        return Continuous(ContinuousDecoder(decoder, model.slots, model.max_new))
    return Static(StaticDecoder(decoder, model.max_new, model.beam, cache=model.decoder == STATIC))


def warm_up(
    encoding: Encoding | None, decoding: Decoding | None, width: int, partition: str, rounds: int = 3
) -> None:
    """Run a few made packages through what there is."""
    import numpy as np
    import torch

    for number in range(-rounds, 0):
        lengths = [3, 2]
        values = np.zeros((2, 3, width), np.float32).tobytes() if partition in ("embed", "encoder") else b""
        work = Work(number, lengths, partition if values else IDS, [[5, 6, 1], [7, 1]], values)
        mask = mask_of(lengths)
        encoded = (
            Encoded(number, torch.zeros(2, 3, width), mask, 0, 0, left=2)
            if encoding is None
            else encoding.encode(work)
        )
        if decoding is not None:
            decoding.admit(encoded)
            while decoding.busy:
                decoding.step()


def _copy_weights(module: Any) -> None:
    """Give a module memory of its own instead of pages of the file."""
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.clone()


def width_of(parts: Path) -> int:
    """The model's width, without loading it."""
    import json

    return int(json.loads((parts / "config.json").read_text(encoding="utf-8"))["d_model"])
