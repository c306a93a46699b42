"""Prompts and their labels for language models: made ones, a user's own, or lengths from a recorded trace.

    text                    made questions, "Is 37 larger than 12?", with the label yes or no: learnable, and each
                            request asks for 8 to 32 new tokens
    text:/path/talk.jsonl   sentences and labels as `src/edge_server.py --data` takes them
    text:/path/azure.csv    requests of a trace with the columns ContextTokens and GeneratedTokens (Azure LLM traces):
                            prompts of made ids and answers of so many tokens, at most 1024 and 256

A request is {"prompt": ..., "max_new_tokens": n}, or {"ids": [...], ...} where a length in tokens is asked for.
"""

from __future__ import annotations

import csv
import json
from typing import Any

import numpy as np

from corun.errors import InputError
from corun.llm import items as texts
from corun.llm.items import Item
from corun.registry import DataOptions, Dataset, Payload, load_plugin

common = load_plugin("datasets", "_common")

TASKS = frozenset({"generation"})
NEW_TOKENS = (8, 32)
NUMBERS = 100
LONGEST_PROMPT, LONGEST_ANSWER = 1024, 256
CONTEXT, GENERATED = "ContextTokens", "GeneratedTokens"
FIRST_ID, IDS = 3, 200


def made(options: DataOptions, index: int) -> Item:
    """One made question with its label."""
    a, b = (int(n) for n in common.generator(options, index).choice(NUMBERS, size=2, replace=False))
    return Item((f"Is {a} larger than {b}?",), "yes" if a > b else "no")


def conversations(options: DataOptions) -> list[Item]:
    """`count` items, made or (over and over) from the file."""
    if options.root is None:
        return [made(options, index) for index in range(options.count)]
    given = texts.read_items(options.root)
    return [given[index % len(given)] for index in range(options.count)]


def requests(options: DataOptions) -> list[Payload]:
    """`count` requests; how many new tokens each asks for is drawn from the seed, or stands in the trace."""
    if options.root is not None and options.root.suffix == ".csv":
        return [_sized(options, index, *lengths) for index, lengths in enumerate(trace_lengths(options))]
    return [_asked(options, index, item) for index, item in enumerate(conversations(options))]


def _asked(options: DataOptions, index: int, item: Item) -> Payload:
    tokens = int(np.random.default_rng([options.seed, index, 1]).integers(NEW_TOKENS[0], NEW_TOKENS[1] + 1))
    prompt = item.turns[0] if len(item.turns) == 1 else list(item.turns)
    return _payload(f"text{index}", {"prompt": prompt, "max_new_tokens": tokens})


def _sized(options: DataOptions, index: int, into: int, out: int) -> Payload:
    ids = common.generator(options, index).integers(FIRST_ID, FIRST_ID + IDS, size=into)
    return _payload(f"tokens{into}-{out}-{index}", {"ids": ids.tolist(), "max_new_tokens": out})


def _payload(name: str, request: dict[str, Any]) -> Payload:
    return Payload(name, json.dumps(request, ensure_ascii=False).encode())


def trace_lengths(options: DataOptions) -> list[tuple[int, int]]:
    """(prompt, answer) tokens of the first `count` rows of a trace, its rows over and over if it is shorter."""
    path = options.root
    assert path is not None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        pairs = [(int(row[CONTEXT]), int(row[GENERATED])) for row in rows[: options.count]]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"{path} is no trace of token counts: it needs whole numbers in {CONTEXT} and {GENERATED}"
        ) from error
    if not pairs:
        raise InputError(f"{path} has no rows")
    clipped = [(min(max(into, 1), LONGEST_PROMPT), min(max(out, 1), LONGEST_ANSWER)) for into, out in pairs]
    return [clipped[index % len(clipped)] for index in range(options.count)]


def training(options: DataOptions) -> Any:
    """Items (turns, label); a user's sentence without a label is an error that names it."""
    common.check_task("text", options, TASKS)
    entries = conversations(options)
    unlabelled = [f"label {index} is null" for index, item in enumerate(entries) if item.label is None]
    if unlabelled:
        raise InputError(f"{options.root} cannot be trained on: every sentence needs a label", unlabelled[:6])
    return common.items("text", entries, options, collate=texts.collate)


def read(entry: Item, options: DataOptions) -> Item:
    """One item as it is."""
    return entry


DATASETS = (
    Dataset(
        "text",
        TASKS,
        "made questions with labels, a JSON file of sentences, or a trace's token counts",
        requests,
        training,
    ),
)
