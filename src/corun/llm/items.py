"""Sentences and labels: what people give a language model to answer and to learn.

sentences [["hello"], ["hi"]]: turns of a conversation each, the last one is the question
labels    ["yes", null]: what to answer; null where nothing is known (an error when training)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corun.errors import InputError, suggest

KEYS = ("sentence", "label")


@dataclass(frozen=True)
class Item:
    """One conversation and its label; turns alternate question and answer and end with a question."""

    turns: tuple[str, ...]
    label: str | None = None


def make_items(sentences: Sequence[Any], labels: Sequence[Any] | None = None) -> list[Item]:
    """Items from parallel lists of sentences (a text or a list of turns) and labels (a text or None)."""
    given = [None] * len(sentences) if labels is None else list(labels)
    problems = []
    if len(given) != len(sentences):
        problems.append(f"{len(sentences)} sentences and {len(given)} labels")
    if not sentences:
        problems.append("there is no sentence")
    items = []
    for index, (sentence, label) in enumerate(zip(sentences, given, strict=False)):
        turns = (sentence,) if isinstance(sentence, str) else sentence
        if not isinstance(turns, list | tuple) or len(turns) % 2 == 0 or not all(isinstance(t, str) for t in turns):
            problems.append(f'sentence {index} is neither a text nor an odd number of turns, e.g. ["hello"]')
        elif label is not None and not isinstance(label, str):
            problems.append(f"label {index} is neither a text nor null")
        else:
            items.append(Item(tuple(turns), label))
    if problems:
        raise InputError("the data are wrong", problems[:8])
    return items


def read_items(path: Path) -> list[Item]:
    """Items from JSON ([sentences, labels], {"sentence": [...], "label": [...]} or a list of objects) or JSON lines."""
    try:
        text = path.read_text(encoding="utf-8")
        value = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if isinstance(value, dict):
        _check_keys(value, path)
        return make_items(_list(value.get("sentence"), path), value.get("label"))
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        for row in value:
            _check_keys(row, path)
        return make_items([row.get("sentence") for row in value], [row.get("label") for row in value])
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, list) for part in value):
        return make_items(value[0], value[1])
    raise InputError(
        f"{path} holds no data", ['write [[["hello"], ["hi"]], ["yes", null]] or {"sentence": ..., "label": ...}']
    )


def _check_keys(row: dict[str, Any], path: Path) -> None:
    unknown = [f'key "{key}" is unknown{suggest(key, KEYS)}' for key in row if key not in KEYS]
    if unknown:
        raise InputError(f"{path} has unknown keys", unknown)


def _list(value: Any, path: Path) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f'{path}: "sentence" is not a list')
    return value


def collate(items: Sequence[Item]) -> dict[str, list[Any]]:
    """A batch for a trainer, as texts: the model's own tokenizer comes later."""
    return {"turns": [list(item.turns) for item in items], "label": [item.label for item in items]}


def prompt_ids(item: Item, tokenizer: Any) -> list[int]:
    """Ids of a conversation in the chat format."""
    pairs = list(zip(item.turns[:-1:2], item.turns[1::2], strict=True))
    ids: list[int] = tokenizer.prompt(item.turns[-1], pairs)
    return ids


def example(item: Item, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(prompt ids, label ids with eos) of an item that has a label."""
    assert item.label is not None
    return prompt_ids(item, tokenizer), [*tokenizer.encode(item.label, special=False), tokenizer.eos]
