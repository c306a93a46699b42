"""Tokenizers: made, read in three layouts, opened once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun import registry
from corun.ectrans import build, tokens
from corun.ectrans.tokens import ReloadingTokenizer, Tokenizer
from corun.errors import InputError

MADE = build.made_tokenizer("tiny", 300)
WORDS = [word for word, _ in registry.load_plugin("datasets", "pairs").lexicon()]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / tokens.MODEL_FILE).write_bytes(MADE)
    return tmp_path


def test_the_same_text_gives_the_same_tokenizer() -> None:
    """Training is deterministic, and has at most the pieces asked for, ids 0, 1, 2 being padding, end, unknown."""
    assert build.made_tokenizer("tiny", 300) == MADE
    tokenizer = Tokenizer.from_bytes(MADE)
    assert tokenizer.size <= build.PRESETS["tiny"].vocabulary
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unknown_id, tokenizer.start_id) == (0, 1, 2, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join))
def test_text_survives_both_ways(text: str) -> None:
    """Words the tokenizer was trained on come back as they were, and every sentence ends with one end sign."""
    tokenizer = Tokenizer.from_bytes(MADE)
    ids = tokenizer.encode(text)
    assert ids.count(tokenizer.eos_id) == 1
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids) == text


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_can_be_encoded(text: str) -> None:
    """No text makes the tokenizer fail, and no sentence is without a token."""
    ids = Tokenizer.from_bytes(MADE).encode(text)
    assert ids
    assert all(0 <= i < build.PRESETS["tiny"].vocabulary for i in ids)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 999), max_size=30))
def test_any_answer_can_be_decoded(ids: list[int]) -> None:
    """A network may answer any id of its table: what has no piece, or comes after the end sign, is left out."""
    tokenizer = Tokenizer.from_bytes(MADE)
    text = tokenizer.decode(ids)
    assert text == tokenizer.decode([*ids, tokenizer.eos_id, 5, 6]) or tokenizer.eos_id in ids


def test_it_is_loaded_once_a_process(directory: Path) -> None:
    """A thousand sentences and any number of asks for it open the file once."""
    before = Tokenizer.loads
    for _ in range(1000):
        Tokenizer.load(directory).encode("ba ruto")
    assert Tokenizer.loads == before + 1
    assert Tokenizer.load(str(directory)) is Tokenizer.load(directory)


def test_the_historical_mode_opens_it_for_every_sentence(directory: Path) -> None:
    """`ReloadingTokenizer` gives the same ids and texts and opens the file each time, as the published system did."""
    historical, cached = ReloadingTokenizer(directory), Tokenizer.load(directory)
    before = Tokenizer.loads
    assert all(historical.encode(word) == cached.encode(word) for word in WORDS[:5])
    assert historical.decode(cached.encode(WORDS[0])) == WORDS[0]
    assert Tokenizer.loads == before + 6


def test_marians_files(tmp_path: Path) -> None:
    """Marian's layout maps pieces to ids by vocab.json, with a start id from the configuration."""
    made = Tokenizer.from_bytes(MADE)
    for name in tokens.MARIAN_FILES[:2]:
        (tmp_path / name).write_bytes(MADE)
    pieces = [made._source.id_to_piece(i) for i in range(made.size)]
    numbers = {"</s>": 0, "<unk>": 1} | {piece: i + 2 for i, piece in enumerate(pieces[3:])}
    numbers["<pad>"] = len(numbers)
    (tmp_path / tokens.MARIAN_FILES[2]).write_text(json.dumps(numbers))
    (tmp_path / "config.json").write_text(json.dumps({"decoder_start_token_id": numbers["<pad>"]}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eos_id, tokenizer.unknown_id, tokenizer.start_id) == (0, 1, numbers["<pad>"])
    assert tokenizer.encode("ba") == [i - 1 for i in made.encode("ba")[:-1]] + [0]
    assert tokenizer.decode(tokenizer.encode("ba ruto")) == "ba ruto"


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    """A directory without tokenizer, a damaged file and training on nothing are bad input."""
    with pytest.raises(InputError, match="has no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / tokens.MODEL_FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="is not a SentencePiece model"):
        Tokenizer.load(tmp_path)
    with pytest.raises(InputError, match="no text"):
        tokens.train_pieces(["", "  "], 100)
