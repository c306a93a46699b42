"""Sentence pairs: the made language and users' files."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun import registry
from corun.errors import InputError
from corun.registry import DataOptions

pairs = registry.load_plugin("datasets", "pairs")
ROOT = Path(__file__).resolve().parents[3]
OPTIONS = DataOptions(count=5, task="translation")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(0, 9), st.integers(1, 60), st.integers(1, 5), st.integers(0, 9))
def test_the_made_language(count: int, seed: int, words: int, shortest: int, more: int) -> None:
    """A target is its source word for word and turned round; pair i depends on nothing but seed and sizes."""
    made = pairs.made_pairs(count, seed, words, shortest, shortest + more)
    table = dict(pairs.lexicon(words))
    assert len(table) == len(set(table.values())) == words
    for source, target in made:
        assert [table[word] for word in source.split()][::-1] == target.split()
        assert shortest <= len(source.split()) <= shortest + more
    assert pairs.made_pairs(count + 3, seed, words, shortest, shortest + more)[:count] == made


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 60))
def test_a_longer_lexicon_begins_with_the_shorter(words: int, more: int) -> None:
    """A tokenizer trained on many words knows all sentences of few."""
    assert pairs.lexicon(words + more)[:words] == pairs.lexicon(words)


def test_requests_are_text_and_need_no_torch() -> None:
    """Clients get UTF-8 sentences, the same from the same seed, without importing torch."""
    payloads = registry.request_payloads("pairs", OPTIONS)
    assert [payload.data.decode() for payload in payloads] == [source for source, _ in pairs.made_pairs(5)]
    code = (
        "import sys; sys.path.insert(0, 'src')\n"
        "from corun.registry import DataOptions, request_payloads\n"
        "assert request_payloads('pairs', DataOptions(count=2))\n"
        "sys.exit(str({'torch', 'transformers', 'sentencepiece'} & set(sys.modules) or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_training_items_travel_to_workers() -> None:
    """Items and their collate function can be pickled, as a data loader's workers need."""
    data = registry.dataset("pairs").training(OPTIONS)
    items = pickle.loads(pickle.dumps(data))
    assert items.collate([items[0], items[1]]) == pairs.made_pairs(5)[:2]
    assert len(items) == 5


def test_a_users_files(tmp_path: Path) -> None:
    """JSON lines of objects or lists, and plain text, given by path or as the only file of a folder."""
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"source": "guten Tag", "target": "good day"}) + "\n\n" + json.dumps(["ja", "yes"]))
    assert pairs.read_pairs(path) == [("guten Tag", "good day"), ("ja", "yes")]
    assert pairs.read_all(path) == ["guten Tag", "good day", "ja", "yes"]
    for spec in (f"pairs:{path}", f"pairs:{tmp_path}"):
        payloads = registry.request_payloads(spec, OPTIONS)
        assert sorted(payload.data for payload in payloads) == [b"guten Tag", b"ja"]
    text = tmp_path / "lines.txt"
    text.write_text("eins\nzwei\n")
    assert pairs.read_texts(text) == ["eins", "zwei"]


def test_bad_files_are_named(tmp_path: Path) -> None:
    """A missing file, a bad line with its number, text without targets and a folder of many files are refused."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('["a", "b"]\n["a"]\n')
    with pytest.raises(InputError, match="line 2"):
        pairs.read_pairs(bad)
    text = tmp_path / "lines.txt"
    text.write_text("eins\n")
    with pytest.raises(InputError, match="no sentence pairs"):
        pairs.read_pairs(text)
    with pytest.raises(InputError, match="cannot be read"):
        pairs.read_texts(tmp_path / "none.txt")
    with pytest.raises(InputError, match="2 files"):
        registry.request_payloads(f"pairs:{tmp_path}", OPTIONS)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="no sentences"):
        pairs.read_texts(tmp_path / "empty.txt")
    with pytest.raises(InputError, match="cannot train"):
        registry.dataset("pairs").training(DataOptions(task="classification"))
