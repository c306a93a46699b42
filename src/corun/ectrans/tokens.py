"""Text to token ids and back, by SentencePiece, loaded once a process.

Three layouts of a directory are read: this project's and T5's (one SentencePiece model for both languages, whose
piece numbers are the ids) and Marian's (`source.spm`, `target.spm`, and `vocab.json`, which maps pieces to ids).

The published system opened its SentencePiece file anew for every sentence, which cost 280 times the encoding itself.
`ReloadingTokenizer` does that again, to show what it cost; nothing else should use it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

from corun.errors import InputError

MODEL_FILE = "tokenizer.model"
SHARED_FILES = (MODEL_FILE, "spiece.model")
MARIAN_FILES = ("source.spm", "target.spm", "vocab.json")
TOKENIZER_FILES = (*SHARED_FILES, *MARIAN_FILES)

PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
EOS, PAD, UNKNOWN = "</s>", "<pad>", "<unk>"
SENTENCEPIECE_QUIET = 2


def train_pieces(texts: Iterable[str], vocabulary: int) -> bytes:
    """A SentencePiece BPE model of at most `vocabulary` pieces; ids 0, 1, 2 are padding, end and unknown.

    The same texts give the same bytes. Fewer pieces come out when the texts do not hold so many.
    Raises InputError when there is no text to learn from.
    """
    import sentencepiece

    lines = [line for line in texts if line.strip()]
    if not lines:
        raise InputError("there is no text to train the tokenizer on")
    written = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            vocab_size=vocabulary,
            model_type="bpe",
            character_coverage=1.0,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNKNOWN_ID,
            bos_id=-1,
            num_threads=1,
            hard_vocab_limit=False,
            minloglevel=SENTENCEPIECE_QUIET,
        )
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"a tokenizer of {vocabulary} pieces cannot be trained on these {len(lines)} lines: {error}"
        ) from None
    return written.getvalue()


class Tokenizer:
    """SentencePiece with the ids a network expects. Safe to use from several threads.

    loads: how many SentencePiece files this process has opened so far.
    """

    loads: ClassVar[int] = 0

    def __init__(
        self, source: Any, target: Any, numbers: Mapping[str, int] | None, start_id: int, label: str = ""
    ) -> None:
        self._source, self._target, self._numbers = source, target, numbers
        self._pieces = None if numbers is None else {number: piece for piece, number in numbers.items()}
        self.pad_id = source.pad_id() if numbers is None else numbers[PAD]
        self.eos_id = source.eos_id() if numbers is None else numbers[EOS]
        self.unknown_id = source.unk_id() if numbers is None else numbers[UNKNOWN]
        self.start_id = start_id if start_id >= 0 else self.pad_id
        self.size = source.get_piece_size() if numbers is None else len(numbers)
        self.label = label

    @classmethod
    def load(cls, directory: Path | str) -> Tokenizer:
        """The tokenizer of a model directory or a `parts/` directory; the same object while its files are the same.

        Raises InputError when there is none.
        """
        found = _directory(Path(directory)).resolve()
        return _load(found, tuple(path.stat().st_mtime_ns for path in tokenizer_files(found)))

    @classmethod
    def read(cls, directory: Path) -> Tokenizer:
        """Open the files of `directory` now."""
        start = _start_id(directory)
        for name in SHARED_FILES:
            if (directory / name).is_file():
                pieces = open_pieces((directory / name).read_bytes(), directory / name)
                return cls(pieces, pieces, None, start, name)
        if all((directory / name).is_file() for name in MARIAN_FILES):
            source, target = (
                open_pieces((directory / name).read_bytes(), directory / name) for name in MARIAN_FILES[:2]
            )
            numbers = json.loads((directory / MARIAN_FILES[2]).read_text(encoding="utf-8"))
            return cls(source, target, numbers, start, "marian")
        raise InputError(
            f"{directory} has no tokenizer",
            [f"expected {MODEL_FILE}, or {SHARED_FILES[1]}, or {', '.join(MARIAN_FILES)}"],
        )

    @classmethod
    def from_bytes(cls, model: bytes) -> Tokenizer:
        """The tokenizer of a SentencePiece model in memory."""
        pieces = open_pieces(model, "the tokenizer")
        return cls(pieces, pieces, None, -1, "made")

    def encode(self, text: str) -> list[int]:
        """Ids of one sentence, the end sign included; never empty."""
        if self._numbers is None:
            ids: list[int] = self._source.encode(text)
        else:
            pieces: list[str] = self._source.encode(text, out_type=str)
            ids = [self._numbers.get(piece, self.unknown_id) for piece in pieces]
        return [*ids, self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids up to the first end sign; padding, start and ids without a piece are left out."""
        kept = list(ids[: ids.index(self.eos_id)]) if self.eos_id in ids else list(ids)
        shown = [i for i in kept if i not in (self.pad_id, self.start_id) and 0 <= i < self.size]
        if self._pieces is None:
            return str(self._target.decode(shown))
        return str(self._target.decode([self._pieces[i] for i in shown if i in self._pieces]))


class ReloadingTokenizer:
    """Historical mode: opens the SentencePiece file anew for every sentence, as the published system did."""

    def __init__(self, directory: Path | str) -> None:
        self._directory = _directory(Path(directory))
        known = Tokenizer.read(self._directory)
        self.pad_id, self.eos_id, self.start_id = known.pad_id, known.eos_id, known.start_id

    def encode(self, text: str) -> list[int]:
        """As `Tokenizer.encode`, after loading."""
        return Tokenizer.read(self._directory).encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """As `Tokenizer.decode`, after loading."""
        return Tokenizer.read(self._directory).decode(ids)


def open_pieces(model: bytes, where: Path | str) -> Any:
    """A SentencePiece processor; InputError when the bytes are none."""
    import sentencepiece

    Tokenizer.loads += 1
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
        raise InputError(f"{where} is not a SentencePiece model: {error}") from None


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a directory that its tokenizer consists of."""
    return [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]


@cache
def _load(directory: Path, written_ns: tuple[int, ...]) -> Tokenizer:
    return Tokenizer.read(directory)


def _directory(directory: Path) -> Path:
    """`parts/device` for a parts directory, else the directory itself."""
    return directory / "device" if (directory / "manifest.json").is_file() else directory


def _start_id(directory: Path) -> int:
    """The decoder's first id by the configuration that lies beside or above the tokenizer; -1 = padding."""
    for path in (directory / "config.json", directory.parent / "config.json"):
        if path.is_file():
            try:
                start = json.loads(path.read_text(encoding="utf-8")).get("decoder_start_token_id")
            except (ValueError, AttributeError):
                raise InputError(f"{path} is not a configuration") from None
            return -1 if start is None else int(start)
    return -1
