"""The translation pipeline against the published baseline and a fair one: same clients, same sentences, in turns.

    overall_vs_multitask           speed-up and memory (PSS) against N processes with their own weights, no key-value
                                   cache, one sentence at a time, the tokenizer loaded once a sentence: as published
    overall_vs_fair_multiprocess   the same against N processes that share weights, cached, batches of 8
    waterfall                      what each improvement contributes, one on top of the other (R5), ratios of totals
    padding_waste                  lengths like the published sentences': file order, packing by count, by cost
    handoff_ms                     64 x 40 x 512 between two processes (R6)
    policies                       mean turnaround in virtual time: mix H, Poisson at 90 % load (R2)

The model is the tiny preset, trained, so that answers end where they should; on so small a network an operation costs
more to start than to compute, which favours large batches. `--parts` takes any other split model. Each figure is the
median over repeats of the ratio within a repeat. Memory is read with each server alone.

    python -m bench.ectrans [--quick] [--repeats 5] [--parts DIR] [--only R1,R3]
    python -m bench.ectrans_plots [bench/results/ectrans.json]
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.common import last_line, store
from corun.ectrans import compare, mixes, simulate
from corun.ectrans.handoff import handoff_ms
from corun.ectrans.scheduler import Rules
from corun.errors import guard
from corun.run.directory import result_root
from corun.serve.packing import Limits, waste

CACHE = result_root() / "ectrans-models"
SPEED_GOALS = {"overall_vs_multitask": 8.4, "overall_vs_fair_multiprocess": 2.0}
MEMORY_GOAL = 0.63


def published_lengths(count: int, seed: int = 0) -> list[int]:
    """Token counts like those of the published sentences: 8 to 54 words, mean about 25.7, and two signs."""
    draw = random.Random(seed)
    return [min(54, max(8, round(draw.gauss(25.7, 11.5)))) + 2 for _ in range(count)]


def padding_waste(clients: int = 125) -> dict[str, float]:
    """Share of padding: 1,000 sentences in batches of 64 in file order, and 125 clients of 8 under both packings."""
    lengths = published_lengths(8 * clients)
    padded = real = 0
    for start in range(0, len(lengths), 64):
        batch = lengths[start : start + 64]
        padded += len(batch) * max(batch)
        real += sum(batch)
    found = {"file": 1 - real / padded, "sorted": waste_sorted(lengths)}
    for packing in ("count", "cost"):
        outcome = simulate.run(
            mixes.mix([8] * clients, 0.0),
            Rules("hrrn", packing, Limits(64), rt_share=0.0, batch_threshold=0),
            (0.05, 0.001),
            lengths=lambda number, size: lengths[8 * number : 8 * number + size],
        )
        found[packing] = outcome.waste
    return {name: round(value, 4) for name, value in found.items()}


def waste_sorted(lengths: list[int]) -> float:
    """What sorting all sentences by length would leave: the floor."""
    ordered = sorted(lengths)
    batches = [ordered[start : start + 64] for start in range(0, len(ordered), 64)]
    padded = sum(len(batch) * max(batch) for batch in batches)
    return sum(waste(batch) * len(batch) * max(batch) for batch in batches) / padded


def policies(seeds: int) -> dict[str, dict[str, float]]:
    """Mean turnaround in s of each policy with and without packing: mix H, and Poisson arrivals at 90 % load."""
    sizes = mixes.parse_sizes(mixes.SIZES)
    start_s, sentence_s = simulate.PUBLISHED_COST
    mean_s = sum(share * (-(-size // 64) * start_s + size * sentence_s) for size, share in sizes.items())
    found: dict[str, dict[str, float]] = {}
    for policy in ("fcfs", "sjf", "hrrn-stale", "hrrn"):
        for packing in ("off", "count"):
            rules = Rules(policy, packing, Limits(64), rt_share=0.0, batch_threshold=0)
            loaded = [simulate.run(mixes.poisson(0.9 / mean_s, sizes, 4000, seed), rules) for seed in range(seeds)]
            found[f"{policy}, {packing}"] = {
                "mix_h_s": round(simulate.run(mixes.mix(mixes.parse_mix("H")), rules).mean_s, 3),
                "poisson_s": round(statistics.fmean(one.mean_s for one in loaded), 3),
                "poisson_worst_256_s": round(max(one.worst_of(256) for one in loaded), 1),
            }
    return found


def trained_parts(directory: Path) -> Path:
    """The tiny model, trained once and kept beside the results, split into `directory`."""
    from corun.ectrans import parts
    from corun.ectrans.training import trained_tiny

    CACHE.mkdir(parents=True, exist_ok=True)
    return parts.split(trained_tiny(CACHE), directory)


def overall(
    found: dict[str, compare.Measured], sizes: dict[str, compare.Figures], baseline: str, best: str
) -> dict[str, Any]:
    """Speed-up and memory of the best condition against a baseline."""
    speed = compare.ratio(found[baseline], found[best], "total_s")
    return {
        "speedup": round(speed.median, 2),
        "speedup_interval": [round(speed.lo, 2), round(speed.hi, 2)],
        "memory_ratio": round(sizes[best]["pss_mib"] / sizes[baseline]["pss_mib"], 3),
        "uss_ratio": round(sizes[best]["uss_mib"] / sizes[baseline]["uss_mib"], 3),
    }


def instances(settings: compare.Settings, counts: Sequence[int]) -> dict[str, dict[str, compare.Figures]]:
    """Memory and time of N instances of each executor, every one alone, the sentences divided among them."""
    requests = compare.requests_for(settings, f"{settings.sentences // 8}x8")
    found: dict[str, dict[str, compare.Figures]] = {}
    for executor in ("multitask", "multiprocess", "pipeline"):
        ways = [
            compare.Condition(
                str(count), executor, max(1, count // 2) if executor == "pipeline" else count, packing="count"
            )
            for count in counts
        ]
        found[executor] = compare.memory(ways, settings, requests)
    found["streams"] = compare.memory([compare.Condition("1", packing="count")], settings, requests)
    return found


def missed(figures: dict[str, Any]) -> list[str]:
    """Goals that were not reached."""
    lines = [
        f"{name}: {figures[name]['speedup']} of {goal}"
        for name, goal in SPEED_GOALS.items()
        if figures[name]["speedup"] < goal
    ]
    ratio = figures["overall_vs_multitask"]["memory_ratio"]
    return lines + [f"memory: {ratio} of at most {MEMORY_GOAL}"] * (ratio > MEMORY_GOAL)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="two repeats of a smaller load")] = False,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    parts: Annotated[Path | None, typer.Option(help="a split model; else the tiny one, trained")] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes of the baselines")] = 2,
    max_new: Annotated[int, typer.Option("--max-new", min=1, help="longest answer, tokens")] = 60,
    only: Annotated[str, typer.Option(help="run these of R1 to R4 too, e.g. R1,R3")] = "",
) -> None:
    """Measure, store and print the figures."""
    with guard(), tempfile.TemporaryDirectory(prefix="corun-ectrans-") as directory:
        from corun.ectrans.training import tiny_sentences

        split = parts or trained_parts(Path(directory) / "parts")
        settings = compare.Settings(
            split,
            2 if quick else repeats,
            workers,
            128 if quick else 256,
            max_new,
            texts=tiny_sentences(1000),
        )
        say = typer.echo
        requests = compare.requests_for(settings, f"{settings.sentences // 8}x8")
        conditions = compare.steps(workers)
        names = [condition.name for condition in conditions]
        fair = next(one.name for one in conditions if one.batch == 8)
        ends = [one for one in conditions if one.name in (names[0], fair, names[-1])]
        sizes = compare.memory(ends, settings, requests)
        found = compare.measure(conditions, settings, {"": requests}, say)
        wanted = only.split(",") if only else ([] if quick else ["R1", "R2"])
        ratios = [one for name in wanted for one in compare.run(name, settings, say)]
        handoff = handoff_ms(3 if quick else 5)
        figures: dict[str, Any] = {
            "overall_vs_multitask": overall(found, sizes, names[0], names[-1]),
            "overall_vs_fair_multiprocess": overall(found, sizes, fair, names[-1]),
            "waterfall": {
                after: round(compare.ratio(found[before], found[after], "total_s").median, 2)
                for before, after in pairwise(names)
            },
            "padding_waste": padding_waste(),
            "handoff_ms": {name: round(statistics.median(values), 2) for name, values in handoff.items()},
            "policies": policies(1 if quick else 5),
        }
        figures["missed"] = missed(figures)
        details = {
            "model": str(parts) if parts else "tiny, trained",
            "sentences": settings.sentences,
            "workers": workers,
            "total_s": {name: [round(run["total_s"], 4) for run in one.runs] for name, one in found.items()},
            "p50_ms": {name: round(one.median("p50_ms"), 2) for name, one in found.items()},
            "waste": {name: round(one.median("waste"), 4) for name, one in found.items()},
            "memory_alone": sizes,
            "ratios": [one.body() for one in ratios],
            "instances": {} if quick else instances(settings, (1, 2, 4)),
        }
        store("ectrans_quick" if quick else "ectrans", figures, details)
        last_line(figures)


if __name__ == "__main__":
    typer.run(main)
