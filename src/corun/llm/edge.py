"""The edge server: one ChatGLM2 base, an adapter that answers while another one learns."""

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
from corun.llm.items import Item, example, prompt_ids
from corun.llm.learn import LearnOptions, LearnStep
from corun.llm.sharing import PROCESS, THREAD, Job, LearnerHandle, scratch, start_learner
from corun.serve.batcher import Batcher

ENGINES = ("static", "continuous")
LONGEST_DELAY_NS = 2_000_000


DEFAULT_DATA = (Item(("hello",), "yes"), Item(("hi",), "no"))


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
        examples=[example(item, base.tokenizer) for item in items],
        options=LearnOptions(batch_size=min(options.bs, len(items)), lr=options.lr),
        path=options.train_path,
        threads=options.threads,
    )


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
