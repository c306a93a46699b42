"""One base, two adapters: memory, time per token beside a learner, static against continuous, and queue policies.

    memory                           PSS of the server's and the learner's process together beyond that of the same
                                     with a network of 3 MiB: one shared base against two copies
    alone, corun_<sharing>           median TTFT and TPOT of prompts answered one at a time, the learner's ms per step
    solo, static, continuous         tokens/s of prompts one after another, and all handed in at once
    fifo, sjf, edf, hrrn             tasks of 16, 128 or 256 sentences that arrive as in the Azure trace at 80 % load,
                                     in virtual time

Conditions take turns, in reversed order every other round; each figure is the median over rounds (of the policies:
over seeds). In `thread` both sides share the interpreter lock: its figure shows that cost, not the hardware's.

    python -m bench.llm [--quick] [--preset small] [--memory-preset mid] [--rounds 3]
"""

from __future__ import annotations

import gc
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from bench.common import last_line, store
from corun.arrivals import traces
from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.errors import guard
from corun.llm import adapters
from corun.llm.base import base_bytes, load_base, share, tree
from corun.llm.continuous import ContinuousEngine
from corun.llm.engine import Engine, StaticEngine
from corun.llm.generate import Prompt, generate
from corun.llm.learn import LearnOptions
from corun.llm.schedule import MODES as POLICIES
from corun.llm.schedule import BatchCost, Rules, Task, outcome, simulate
from corun.llm.sharing import MODES, NONE, PROCESS, THREAD, Job, LearnerHandle, scratch, start_learner
from corun.serve.batcher import Batcher

ALONE = "alone"
CONDITIONS = (ALONE, *MODES)
BATCH = 8
EXAMPLES = [([3 + i % 200, 40, 50] * 5, [10, 11, 120] * 5) for i in range(16)]
MANY_STEPS = 1_000_000
LOAD, TASKS = 0.8, 2000
SIZES, SHARES = (16, 128, 256), (0.6, 0.3, 0.1)
SLACK = (2.0, 20.0)


def prompts(count: int, new_tokens: int) -> list[Prompt]:
    """Prompts of 16 ids and different beginnings."""
    return [Prompt([3 + (7 * i + 3 * j) % 250 for j in range(16)], new_tokens) for i in range(count)]


# Memory


def held_mib(preset: str, mode: str) -> float:
    """PSS in MiB of a server and a learner that have both worked, in processes made for the purpose."""
    from torch.multiprocessing import get_context

    with scratch() as directory:
        shared = share(load_base(preset=preset), Path(directory))
        gc.collect()
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        child = context.Process(target=_hold, args=(shared, mode, theirs))
        child.start()
        try:
            return float(ours.recv())
        finally:
            child.join(60)


def _hold(shared: Any, mode: str, connection: Any) -> None:
    import torch

    torch.set_num_threads(1)
    base = shared.open()
    server = adapters.attach(tree(base), adapters.SERVE, base).eval()
    learner = start_learner(shared, base, Job(EXAMPLES, LearnOptions(batch_size=2)), mode)
    try:
        learner.train(1)
        generate(server, prompts(1, 4))
        learner.wait()
        pids = {os.getpid(), learner.pid}
        connection.send(sum(psutil.Process(pid).memory_full_info().pss for pid in pids) / 2**20)
    finally:
        learner.stop()


# Time


def median_times_ms(base: Any, count: int, new_tokens: int) -> tuple[float, float]:
    """Median (TTFT, TPOT) over prompts answered one after another by a fresh static engine."""
    engine = StaticEngine(adapters.attach(tree(base), adapters.SERVE, base))
    engine.start()
    try:
        tickets = []
        for prompt in prompts(count + 1, new_tokens):
            tickets.append(engine.submit(prompt))
            tickets[-1].result()
    finally:
        engine.close()
    measured = [(ticket.result(), ticket.arrived_ns) for ticket in tickets[1:]]
    ttft = statistics.median(answer.ttft_ms(arrived_ns) or 0.0 for answer, arrived_ns in measured)
    return ttft, statistics.median(answer.tpot_ms or 0.0 for answer, _ in measured)


def beside(base: Any, shared: Any, mode: str, count: int, new_tokens: int) -> tuple[float, float, float | None]:
    """(TTFT, TPOT, learner's ms per step) with a learner in `mode` that trains throughout, or without one."""
    if mode == ALONE:
        return *median_times_ms(base, count, new_tokens), None
    learner: LearnerHandle = start_learner(shared, base, Job(EXAMPLES, LearnOptions(batch_size=2)), mode)
    try:
        learner.train(MANY_STEPS)
        ttft, tpot = median_times_ms(base, count, new_tokens)
        steps = learner.report()[1:]
    finally:
        learner.stop()
    taken = [(step.t_end_ns - step.t_start_ns) / NS_PER_MS for step in steps]
    return ttft, tpot, statistics.median(taken) if taken else None


def tokens_per_s(engine: Engine, new_tokens: int, together: bool = True) -> float:
    """Throughput of BATCH prompts, handed in at once or one after another, after one warm-up."""
    engine.start()
    try:
        engine.submit(prompts(1, 4)[0]).result()
        start = now_ns()
        if together:
            for ticket in [engine.submit(prompt) for prompt in prompts(BATCH, new_tokens)]:
                ticket.result()
        else:
            for prompt in prompts(BATCH, new_tokens):
                engine.submit(prompt).result()
        return BATCH * new_tokens * NS_PER_S / (now_ns() - start)
    finally:
        engine.close()


def throughputs(base: Any, new_tokens: int) -> dict[str, float]:
    """Tokens/s one after another, and of both engines."""
    solo, static, continuous = (adapters.attach(tree(base), adapters.SERVE, base) for _ in range(3))
    return {
        "solo": tokens_per_s(StaticEngine(solo), new_tokens, together=False),
        "static": tokens_per_s(StaticEngine(static, Batcher(BATCH, 5_000_000)), new_tokens),
        "continuous": tokens_per_s(ContinuousEngine(continuous, max_batch=BATCH), new_tokens),
    }


# Policies


def policies(seed: int) -> dict[str, float]:
    """Each policy's figures on one draw of tasks, and what the comparison of two comes to."""
    rng, cost = np.random.default_rng(seed), BatchCost()
    sizes = rng.choice(SIZES, p=SHARES, size=TASKS)
    service_s = np.array([cost.task_s(int(size), 16) for size in sizes])
    trace = traces.azure_default().compressed(LOAD / float(service_s.mean()))
    arrivals_s = trace.draw(rng, 2 * TASKS / trace.rate)[:TASKS]
    limits_s = 1 + service_s * rng.uniform(*SLACK, TASKS)
    tasks = [
        Task(i, ("",) * int(size), float(size), round(at * NS_PER_S), round((at + limit) * NS_PER_S))
        for i, (size, at, limit) in enumerate(zip(sizes, arrivals_s, limits_s, strict=False))
    ]
    found = {mode: outcome(mode, simulate(tasks, Rules(mode, 1, 16), cost)) for mode in POLICIES}
    return {
        **{f"mean_s_{mode}": row.mean_s for mode, row in found.items()},
        **{f"p99_s_{mode}": row.p99_s or 0.0 for mode, row in found.items()},
        **{f"missed_{mode}": row.misses / row.deadlines for mode, row in found.items()},
        "sjf_vs_fifo_mean": found["sjf"].mean_s / found["fifo"].mean_s,
        "edf_vs_fifo_missed": found["edf"].misses / found["fifo"].misses,
        "hrrn_vs_sjf_p99": (found["hrrn"].p99_s or 0.0) / (found["sjf"].p99_s or 1.0),
    }


def medians(rows: list[dict[str, float]], digits: int) -> dict[str, float]:
    """The median of each figure over rows."""
    return {name: round(statistics.median(row[name] for row in rows), digits) for name in rows[0]}


# The whole


@dataclass(frozen=True)
class Sizes:
    """How large everything is that is measured."""

    preset: str
    memory_preset: str
    rounds: int
    count: int
    new_tokens: int
    quick: bool = False


@dataclass
class Rounds:
    """What the rounds showed: a list of a condition's medians, a row of speeds a round."""

    ttfts: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in CONDITIONS})
    tpots: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in CONDITIONS})
    steps: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    speeds: list[dict[str, float]] = field(default_factory=list)


def measure_memory(sizes: Sizes) -> dict[str, dict[str, float]]:
    """PSS by preset and way of sharing: of the network in question and of one that weighs nothing."""
    compared = (PROCESS, NONE) if sizes.quick else (PROCESS, THREAD, NONE)
    return {preset: {mode: held_mib(preset, mode) for mode in compared} for preset in ("tiny", sizes.memory_preset)}


def measure_times(base: Any, shared: Any, sizes: Sizes) -> Rounds:
    """All conditions in turn, in reversed order every other round."""
    found = Rounds()
    for turn in range(sizes.rounds):
        for mode in CONDITIONS if turn % 2 == 0 else CONDITIONS[::-1]:
            ttft, tpot, step = beside(base, shared, mode, sizes.count, sizes.new_tokens)
            found.ttfts[mode].append(ttft)
            found.tpots[mode].append(tpot)
            found.steps.get(mode, []).extend([] if step is None else [step])
        found.speeds.append(throughputs(base, sizes.new_tokens))
    return found


def memory_figures(pss: dict[str, dict[str, float]], sizes: Sizes) -> dict[str, Any]:
    """One base against two copies, beyond what the processes hold anyway, and with it."""
    whole, nothing = pss[sizes.memory_preset], pss["tiny"]
    memory = {mode: whole[mode] - nothing[mode] for mode in whole}
    return {
        "memory_ratio_shared_vs_two": round(memory[PROCESS] / memory[NONE], 3),
        **({} if sizes.quick else {"memory_ratio_thread_vs_two": round(memory[THREAD] / memory[NONE], 3)}),
        "pss_ratio_shared_vs_two": round(whole[PROCESS] / whole[NONE], 3),
        **{f"memory_mib_{mode}": round(mib, 1) for mode, mib in memory.items()},
    }


def time_figures(found: Rounds) -> dict[str, Any]:
    """Medians over rounds."""
    speed = medians(found.speeds, 1)
    return {
        "continuous_vs_solo_tokens_per_s": round(speed["continuous"] / speed["solo"], 2),
        "static_vs_solo": round(speed["static"] / speed["solo"], 2),
        "tokens_per_s": speed,
        "ttft_ms": _by_condition(found.ttfts, 3),
        "tpot_ms": _by_condition(found.tpots, 3),
        "step_ms": _by_condition(found.steps, 1),
    }


def _by_condition(values: dict[str, list[float]], digits: int) -> dict[str, float]:
    return {
        mode if mode == ALONE else f"corun_{mode}": round(statistics.median(taken), digits)
        for mode, taken in values.items()
        if taken
    }


def policy_figures(drawn: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over seeds, policy by policy, and what two of them come to against each other."""
    policy = medians(drawn, 4)
    return {
        "policies": {
            mode: {name: policy[f"{name}_{mode}"] for name in ("mean_s", "p99_s", "missed")} for mode in POLICIES
        },
        **{name: policy[name] for name in ("sjf_vs_fifo_mean", "edf_vs_fifo_missed", "hrrn_vs_sjf_p99")},
    }


def main(
    preset: Annotated[str, typer.Option(help="of the times: tiny, small, mid or 6b")] = "small",
    memory_preset: Annotated[str, typer.Option(help="of the memory")] = "mid",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    count: Annotated[int, typer.Option(min=1, help="prompts a measurement")] = 4,
    new_tokens: Annotated[int, typer.Option(min=2)] = 24,
    quick: Annotated[bool, typer.Option("--quick", help="small sizes, one round: does it work?")] = False,
) -> None:
    """Measure, store and print the figures."""
    sizes = Sizes(preset, memory_preset, rounds, count, new_tokens)
    if quick:
        sizes = Sizes("tiny", "small", 1, 2, 8, quick=True)
    with guard(), scratch() as directory:
        import torch

        torch.set_num_threads(1)
        pss = measure_memory(sizes)
        shared = share(load_base(preset=sizes.preset), Path(directory))
        base = shared.open()
        found = measure_times(base, shared, sizes)
        drawn = [policies(seed) for seed in range(1 if quick else 5)]
        figures = {
            "preset": sizes.preset,
            "memory_preset": sizes.memory_preset,
            **memory_figures(pss, sizes),
            "base_mib": round(base_bytes(base) / 2**20, 1),
            **time_figures(found),
            **policy_figures(drawn),
        }
        details = {
            "ttft_ms": found.ttfts,
            "tpot_ms": found.tpots,
            "step_ms": found.steps,
            "tokens_per_s": found.speeds,
            "policies": drawn,
            "pss_mib": pss,
        }
        store("llm_quick" if quick else "llm", figures, details)
        last_line(figures)


if __name__ == "__main__":
    typer.run(main)
