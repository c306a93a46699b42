"""The edge server: one ChatGLM2 base, an adapter that answers while another one learns.

data   sentences [["hello"], ["hi"]]: turns of a conversation each, the last one is the question
       labels    ["yes", null]: what to answer; null where nothing is known (an error when training)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corun.errors import InputError, RunFault, suggest
from corun.llm import adapters
from corun.llm.base import load_base, share, tree
from corun.llm.continuous import ContinuousEngine
from corun.llm.engine import Engine, StaticEngine, Ticket
from corun.llm.generate import Prompt
from corun.llm.learn import Example, LearnOptions, LearnStep
from corun.llm.sharing import PROCESS, THREAD, Job, LearnerHandle, scratch, start_learner
from corun.serve.batcher import Batcher

ENGINES = ("static", "continuous")
KEYS = ("sentence", "label")
LONGEST_DELAY_NS = 2_000_000


@dataclass(frozen=True)
class Item:
    """One conversation and its label; turns alternate question and answer and end with a question."""

    turns: tuple[str, ...]
    label: str | None = None


DEFAULT_DATA = (Item(("hello",), "yes"), Item(("hi",), "no"))


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


@dataclass(frozen=True)
class EdgeOptions:
    """What the server does. Empty adapter paths start new adapters; glm_path None = random weights of `preset`."""

    glm_path: str | None = None
    preset: str = "tiny"
    train_path: Path | None = None
    inference_path: Path | None = None
    train: bool = True
    infer: bool = True
    bs: int = 2
    epochs: int = 1
    lr: float = 1e-4
    sharing: str = PROCESS
    engine: str = "static"
    new_tokens: int = 32
    precision: str = "fp32"
    device: str = "cpu"
    threads: int = 1
    publish: bool = True


@dataclass(frozen=True)
class Answer:
    """One answer with its times; version: 0 from the adapter of inference_path, 1 from the learner's."""

    index: int
    version: int
    text: str
    tokens: int
    stopped: str
    ttft_ms: float | None
    tpot_ms: float | None


@dataclass(frozen=True)
class EdgeResult:
    """What came of it; label: what must be said beside the times ("" = nothing)."""

    base: str
    answers: tuple[Answer, ...] = ()
    steps: tuple[LearnStep, ...] = ()
    label: str = ""


def check(items: Sequence[Item], options: EdgeOptions) -> None:
    """InputError for what can be known to fail before a network is built."""
    problems = [
        f"label {index} is null: training needs a text for every sentence, or --train_tag 0"
        for index, item in enumerate(items)
        if options.train and item.label is None
    ]
    if not options.train and not options.infer:
        problems.append("neither train_tag nor inference_tag is 1: there is nothing to do")
    if options.bs < 1 or options.epochs < 1 or options.new_tokens < 1:
        problems.append("bs, epochs and new_tokens must be 1 or more")
    if options.engine not in ENGINES:
        problems.append(
            f'engine "{options.engine}" is not one of {", ".join(ENGINES)}{suggest(options.engine, ENGINES)}'
        )
    publishes = options.train and options.infer and options.publish
    if publishes and adapters.scale(options.train_path) != adapters.scale(options.inference_path):
        problems.append("the two adapters differ in alpha / rank, so one cannot replace the other: --no-publish")
    if problems:
        raise InputError("the edge server cannot start", problems[:8])


def serve_and_learn(items: Sequence[Item], options: EdgeOptions, save_to: Path | None = None) -> EdgeResult:
    """Answer every sentence while the learner trains on all of them; then publish its adapter and answer again.

    save_to: directory for the learner's adapter in peft's format. Raises InputError, or RunFault when a side failed.
    """
    check(items, options)
    with scratch() as directory:
        base = load_base(options.glm_path, options.preset, options.precision, options.device)
        shared = None
        if options.train and options.sharing != THREAD:
            shared = share(base, Path(directory), options.glm_path)
            base = shared.open()
        engine = _engine(base, options) if options.infer else None
        learner = start_learner(shared, base, _job(items, base, options), options.sharing) if options.train else None
        try:
            return _run(items, base, options, engine, learner, save_to)
        finally:
            if learner is not None:
                learner.stop()
            if engine is not None:
                engine.close()


def _run(
    items: Sequence[Item],
    base: Any,
    options: EdgeOptions,
    engine: Engine | None,
    learner: LearnerHandle | None,
    save_to: Path | None,
) -> EdgeResult:
    answers: list[Answer] = []
    steps: list[LearnStep] = []
    if learner is not None:
        size = min(options.bs, len(items))
        learner.train(options.epochs * (len(items) // size))
    if engine is not None:
        engine.start()
        answers += _answer_all(items, base, options, engine)
    if learner is not None:
        steps = learner.wait()
        if save_to is not None:
            learner.save_adapter(save_to)
        if engine is not None and options.publish:
            engine.publish(learner.adapter())
            answers += _answer_all(items, base, options, engine)
    return EdgeResult(base.label, tuple(answers), tuple(steps), learner.label if learner is not None else "")


def _engine(base: Any, options: EdgeOptions) -> Engine:
    model = adapters.attach(tree(base), adapters.SERVE, base, options.inference_path)
    if options.engine == "continuous":
        return ContinuousEngine(model, max_batch=options.bs)
    return StaticEngine(model, Batcher(options.bs, LONGEST_DELAY_NS), threads=options.threads)


def _job(items: Sequence[Item], base: Any, options: EdgeOptions) -> Job:
    return Job(
        examples=[_example(item, base.tokenizer) for item in items],
        options=LearnOptions(batch_size=min(options.bs, len(items)), lr=options.lr),
        path=options.train_path,
        threads=options.threads,
    )


def prompt_ids(item: Item, tokenizer: Any) -> list[int]:
    """Ids of a conversation in the chat format."""
    pairs = list(zip(item.turns[:-1:2], item.turns[1::2], strict=True))
    ids: list[int] = tokenizer.prompt(item.turns[-1], pairs)
    return ids


def _example(item: Item, tokenizer: Any) -> Example:
    assert item.label is not None
    return prompt_ids(item, tokenizer), [*tokenizer.encode(item.label, special=False), tokenizer.eos]


def _answer_all(items: Sequence[Item], base: Any, options: EdgeOptions, engine: Engine) -> list[Answer]:
    eos = base.tokenizer.eos if options.glm_path else None
    tickets = [engine.submit(Prompt(prompt_ids(item, base.tokenizer), options.new_tokens, eos)) for item in items]
    return [_answer(index, ticket, base.tokenizer) for index, ticket in enumerate(tickets)]


def _answer(index: int, ticket: Ticket, tokenizer: Any) -> Answer:
    done = ticket.result()
    return Answer(
        index=index,
        version=ticket.version or 0,
        text=tokenizer.decode(done.ids),
        tokens=len(done.ids),
        stopped=done.stopped,
        ttft_ms=done.ttft_ms(ticket.arrived_ns),
        tpot_ms=done.tpot_ms,
    )


def write_answers(answers: Sequence[Answer], path: Path) -> None:
    """One JSON object a line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps(vars(answer), ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8"
        )
    except OSError as error:
        raise RunFault(f"cannot write {path}: {error}") from error
