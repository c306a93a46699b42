"""One base, two adapters: time per token alone and beside a learner, by sharing mode; static against continuous.

    alone, process, thread, none     median TPOT of prompts answered one at a time, and the learner's ms per step
    static, continuous               tokens/s of prompts that are all handed in at once

Conditions take turns, in reversed order every other round; each figure is the median over rounds. In `thread` both
sides share the interpreter lock: its figure shows that cost, not the hardware's.

    python -m bench.llm [--preset small] [--rounds 5]
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.common import last_line, store
from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.errors import guard
from corun.llm import adapters
from corun.llm.base import base_bytes, load_base, share, tree
from corun.llm.continuous import ContinuousEngine
from corun.llm.engine import Engine, StaticEngine
from corun.llm.generate import Prompt
from corun.llm.learn import LearnOptions
from corun.llm.sharing import MODES, Job, LearnerHandle, scratch, start_learner
from corun.serve.batcher import Batcher

ALONE = "alone"
BATCH = 8
EXAMPLES = [([3 + i % 200, 40, 50] * 5, [10, 11, 120] * 5) for i in range(16)]
MANY_STEPS = 1_000_000


def prompts(count: int, new_tokens: int) -> list[Prompt]:
    """Prompts of 16 ids and different beginnings."""
    return [Prompt([3 + (7 * i + 3 * j) % 250 for j in range(16)], new_tokens) for i in range(count)]


def median_tpot_ms(base: Any, count: int, new_tokens: int) -> float:
    """Median time per token over prompts answered one after another by a fresh static engine."""
    engine = StaticEngine(adapters.attach(tree(base), adapters.SERVE, base))
    engine.start()
    try:
        done = [engine.submit(prompt).result() for prompt in prompts(count + 1, new_tokens)]
    finally:
        engine.close()
    return statistics.median(one.tpot_ms or 0.0 for one in done[1:])


def beside(base: Any, shared: Any, mode: str, count: int, new_tokens: int) -> tuple[float, float | None]:
    """(TPOT ms, learner's ms per step) with a learner in `mode` that trains throughout, or without one."""
    if mode == ALONE:
        return median_tpot_ms(base, count, new_tokens), None
    learner: LearnerHandle = start_learner(shared, base, Job(EXAMPLES, LearnOptions(batch_size=2)), mode)
    try:
        learner.train(MANY_STEPS)
        tpot = median_tpot_ms(base, count, new_tokens)
        steps = learner.report()[1:]
    finally:
        learner.stop()
    taken = [(step.t_end_ns - step.t_start_ns) / NS_PER_MS for step in steps]
    return tpot, statistics.median(taken) if taken else None


def tokens_per_s(engine: Engine, new_tokens: int) -> float:
    """Throughput of BATCH prompts handed in at once, after one warm-up."""
    engine.start()
    try:
        engine.submit(prompts(1, 4)[0]).result()
        start = now_ns()
        for ticket in [engine.submit(prompt) for prompt in prompts(BATCH, new_tokens)]:
            ticket.result()
        return BATCH * new_tokens * NS_PER_S / (now_ns() - start)
    finally:
        engine.close()


def throughputs(base: Any, new_tokens: int) -> dict[str, float]:
    """Tokens/s of both engines."""
    static, continuous = (adapters.attach(tree(base), adapters.SERVE, base) for _ in range(2))
    return {
        "static": tokens_per_s(StaticEngine(static, Batcher(BATCH, 5_000_000)), new_tokens),
        "continuous": tokens_per_s(ContinuousEngine(continuous, max_batch=BATCH), new_tokens),
    }


def main(
    preset: Annotated[str, typer.Option(help="tiny, small, mid or 6b")] = "tiny",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    count: Annotated[int, typer.Option(min=1, help="prompts a measurement")] = 5,
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
) -> None:
    """Measure, store and print the figures."""
    with guard(), scratch() as directory:
        import torch

        torch.set_num_threads(1)
        shared = share(load_base(preset=preset), Path(directory))
        base = shared.open()
        tpots: dict[str, list[float]] = {mode: [] for mode in (ALONE, *MODES)}
        steps: dict[str, list[float]] = {mode: [] for mode in MODES}
        speeds: dict[str, list[float]] = {"static": [], "continuous": []}
        for turn in range(rounds):
            order = list(tpots) if turn % 2 == 0 else list(tpots)[::-1]
            for mode in order:
                tpot, step = beside(base, shared, mode, count, new_tokens)
                tpots[mode].append(tpot)
                if step is not None:
                    steps[mode].append(step)
            for name, speed in throughputs(base, new_tokens).items():
                speeds[name].append(speed)
        figures = {
            "preset": preset,
            "base_mib": round(base_bytes(base) / 2**20, 1),
            **{f"tpot_ms_{mode}": round(statistics.median(values), 3) for mode, values in tpots.items()},
            **{f"step_ms_{mode}": round(statistics.median(values), 1) for mode, values in steps.items() if values},
            **{f"tokens_per_s_{name}": round(statistics.median(values), 1) for name, values in speeds.items()},
        }
        store("llm", figures, {"tpot_ms": tpots, "step_ms": steps, "tokens_per_s": speeds})
        last_line(figures)


if __name__ == "__main__":
    typer.run(main)
