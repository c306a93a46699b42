"""The edge server: one ChatGLM2 base, an adapter that answers while another one learns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corun.clock import NS_PER_MS, NS_PER_S
from corun.errors import InputError, RunFault, suggest
from corun.llm import adapters
from corun.llm.base import SharedBase, load_base, share, tree
from corun.llm.continuous import ContinuousEngine
from corun.llm.engine import Engine, StaticEngine, Ticket
from corun.llm.generate import Prompt
from corun.llm.items import Item, example, prompt_ids
from corun.llm.learn import Example, LearnOptions, LearnStep
from corun.llm.sharing import PROCESS, THREAD, Job, LearnerHandle, scratch, start_learner
from corun.run.records import TRAIN
from corun.run.table import TableWriter
from corun.serve.batcher import Batcher

MODEL = "chatglm2"
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
    accumulate: int = 1
    checkpoint: Path | None = None
    resume: Path | None = None


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
    if min(options.bs, options.epochs, options.new_tokens, options.accumulate) < 1:
        problems.append("bs, epochs, accumulate and new_tokens must be 1 or more")
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
        learner = _learner(items, base, shared, options) if options.train else None
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
        learner.train(steps_for(len(items), options))
    if engine is not None:
        engine.start()
        answers += _answer_all(items, base, options, engine)
    if learner is not None:
        steps = learner.wait()
        if save_to is not None:
            learner.save_adapter(save_to)
        if options.checkpoint is not None:
            learner.save(options.checkpoint)
        if engine is not None and options.publish:
            engine.publish(learner.adapter())
            answers += _answer_all(items, base, options, engine)
    return EdgeResult(base.label, tuple(answers), tuple(steps), learner.label if learner is not None else "")


def _engine(base: Any, options: EdgeOptions) -> Engine:
    model = adapters.attach(tree(base), adapters.SERVE, base, options.inference_path)
    if options.engine == "continuous":
        return ContinuousEngine(model, max_batch=options.bs)
    return StaticEngine(model, Batcher(options.bs, LONGEST_DELAY_NS), threads=options.threads)


def _learner(items: Sequence[Item], base: Any, shared: SharedBase | None, options: EdgeOptions) -> LearnerHandle:
    job = job_for([example(item, base.tokenizer) for item in items], options)
    return start_learner(shared, base, job, options.sharing)


def steps_for(examples: int, options: EdgeOptions) -> int:
    """Optimiser steps that pass `epochs` times over so many examples, at least one."""
    batches = options.epochs * (examples // min(options.bs, examples))
    return max(1, batches // options.accumulate)


def job_for(examples: Sequence[Example], options: EdgeOptions) -> Job:
    """What the learner is to do with these examples; batches no larger than there are examples."""
    return Job(
        examples=examples,
        options=LearnOptions(batch_size=min(options.bs, len(examples)), accumulate=options.accumulate, lr=options.lr),
        path=options.train_path,
        resume=options.resume,
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


def write(result: EdgeResult, directory: Path) -> None:
    """answers.jsonl and train.csv, where there is something to put in them."""
    if result.answers:
        write_answers(result.answers, directory / "answers.jsonl")
    if result.steps:
        with TableWriter(directory / "train.csv", TRAIN) as table:
            table.rows([step_row(step) for step in result.steps])


def step_row(step: LearnStep) -> dict[str, Any]:
    """One step as a row of train.csv."""
    taken_ns = step.t_end_ns - step.t_start_ns
    return {
        "train_model_name": MODEL,
        "epoch": step.epoch,
        "step": step.step,
        "t_start_ns": step.t_start_ns,
        "t_end_ns": step.t_end_ns,
        "step_ms": round(taken_ns / NS_PER_MS, 6),
        "samples": step.samples,
        "samples_per_s": round(step.samples * NS_PER_S / max(1, taken_ns), 3),
        "loss": step.loss,
    }


def write_answers(answers: Sequence[Answer], path: Path) -> None:
    """One JSON object a line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps(vars(answer), ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8"
        )
    except OSError as error:
        raise RunFault(f"cannot write {path}: {error}") from error
