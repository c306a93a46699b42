"""Sentence pairs for translation: a made language, or a user's own file.

The made language has a lexicon of a few syllables a word; a sentence is translated word for word and turned round::

    source   ba ruto nimi        lexicon   ba -> zel, ruto -> oku, nimi -> ath
    target   ath oku zel

so both the words and the lengths of answers are real, and a network of 0.2 M parameters learns them in seconds.
`pairs:/path` reads a file: JSON lines with "source" and "target" (or [source, target]), or plain text with one
sentence a line, which gives requests but nothing to train on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corun import torch_tools
from corun.errors import InputError
from corun.registry import DataOptions, Dataset, Payload, load_plugin

common = load_plugin("datasets", "_common")

TASKS = frozenset({"translation"})
WORDS = 48
SHORTEST, LONGEST = 2, 12
SOURCE_LETTERS = ("bdgkmnprt", "aiou")
TARGET_LETTERS = ("cfhjlsvwxz", "aeiy")
SUFFIXES = (".jsonl", ".json", ".txt", ".en")

Pair = tuple[str, str]


def lexicon(words: int = WORDS) -> list[Pair]:
    """`words` different source words, each with a different target word; a longer list begins with the shorter."""
    return list(zip(_words(words, SOURCE_LETTERS), _words(words, TARGET_LETTERS), strict=True))


def _words(count: int, letters: tuple[str, str]) -> list[str]:
    consonants, vowels = letters
    rng = np.random.default_rng(len(consonants))
    made: dict[str, None] = {}
    while len(made) < count:
        drawn = rng.integers(0, (len(consonants), len(vowels)), size=(int(rng.integers(1, 4)), 2))
        made["".join(consonants[c] + vowels[v] for c, v in drawn)] = None
    return list(made)


def made_pairs(
    count: int, seed: int = 0, words: int = WORDS, shortest: int = SHORTEST, longest: int = LONGEST
) -> list[Pair]:
    """`count` (source, target) pairs of shortest..longest words; the lexicon does not depend on the seed, nor a pair on `count`."""
    table = lexicon(words)
    made = []
    for index in range(count):
        rng = np.random.default_rng([seed, 2, index])
        length = rng.integers(shortest, longest + 1)
        chosen = [table[i] for i in rng.integers(0, words, size=int(length))]
        made.append((" ".join(word for word, _ in chosen), " ".join(word for _, word in reversed(chosen))))
    return made


def read_pairs(path: Path) -> list[Pair]:
    """(source, target) of every line of a JSON lines file; InputError names the first bad line."""
    pairs = [pair for pair in _lines(path) if pair is not None]
    if not pairs or any(not target for _, target in pairs):
        raise InputError(f"{path} has no sentence pairs", ['a line is {"source": "...", "target": "..."}'])
    return pairs


def read_texts(path: Path) -> list[str]:
    """The source sentence of every line of a JSON lines or plain text file."""
    return [source for source, _ in _lines(path)]


def read_all(path: Path) -> list[str]:
    """Every sentence of a file, sources and targets: what a shared tokenizer is trained on."""
    return [text for pair in _lines(path) for text in pair if text]


def _lines(path: Path) -> list[Pair]:
    """(source, target or empty) of every line that is not empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as sentences: {error}") from None
    plain = path.suffix not in (".json", ".jsonl")
    found = [(line, "") if plain else _pair(line, path, i) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{path} holds no sentences")
    return found


def _pair(line: str, path: Path, number: int) -> Pair:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if isinstance(row, dict):
        row = [row.get("source"), row.get("target", "")]
    if not isinstance(row, list) or len(row) != 2 or not all(isinstance(text, str) for text in row) or not row[0]:
        raise InputError(f"{path}, line {number} is not a pair", ['a line is {"source": "...", "target": "..."}'])
    return row[0], row[1]


def _file(options: DataOptions) -> Path | None:
    """The file asked for: `root` itself, or the only file of sentences in it; None = the made language."""
    if options.root is None:
        return None
    if options.root.is_dir():
        files = sorted(path for path in options.root.iterdir() if path.suffix in SUFFIXES)
        if len(files) != 1:
            raise InputError(
                f"{options.root} has {len(files)} files of sentences", ["give one: pairs:/path/file.jsonl"]
            )
        return files[0]
    return options.root


def _sizes(options: DataOptions) -> dict[str, int]:
    """The made language's options among `extra`: words, shortest, longest."""
    return {key: int(options.extra[key]) for key in ("words", "shortest", "longest") if key in options.extra}


def requests(options: DataOptions) -> list[Payload]:
    """`count` sentences as UTF-8, drawn by the seed."""
    path = _file(options)
    if path is None:
        texts = [source for source, _ in made_pairs(options.count, options.seed, **_sizes(options))]
    else:
        found = read_texts(path)
        texts = [found[i] for i in common.generator(options).permutation(len(found))[: options.count]]
    return [Payload(f"sentence-{i}", text.encode()) for i, text in enumerate(texts)]


def training(options: DataOptions) -> Any:
    """Items (source, target) as text; a batch is the list of them: the network's own tokenizer makes the ids."""
    common.check_task("pairs", options, TASKS)
    path = _file(options)
    pairs = made_pairs(options.count, options.seed, **_sizes(options)) if path is None else read_pairs(path)
    collate = torch_tools.PluginFunction(load_plugin, "datasets", "pairs", "collate")
    return common.items("pairs", pairs, options, collate=collate)


def read(pair: Pair, options: DataOptions) -> Pair:
    """A pair is its own item."""
    return pair


def collate(items: Sequence[Pair]) -> list[Pair]:
    """A batch of text stays a list."""
    return list(items)


DATASETS = (
    Dataset("pairs", TASKS, "sentence pairs for translation: made, or a JSON lines file", requests, training),
)
