"""The planner against measuring everything: same answer, how many runs, and did a plan ever run out of memory.

    exhaustive   every set of at most 4 services of the 6 models beside the trainer, under each policy: 56 sets a policy
    cases        drawn at random: 4 candidates, a policy, a p90 bound between the easiest and the hardest set measured
    truth        the largest set of a case whose services all kept the bound in its own window
    planner      corun.plan.Planner; what it "measures" is that window of the same set, counted once over all cases

Processes live through all windows (corun.launch.stage): real servers, clients and trainer, a subset asked in each window.
Services that are not asked are resident and asleep. Windows are short, so the promise is a p90, and both sides see the
same noise; what is compared is the search and the model, not the machine's mood.

`violations` counts planned sets that died or did not fit into memory, `slo_missed` those over their bound when measured.

    python -m bench.plan [--quick]
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import typer

from bench.common import fill, last_line, markdown, store
from corun.errors import guard
from corun.launch.calibrate import free_port
from corun.launch.stage import Stages
from corun.plan.ask import asker
from corun.plan.asked import measure_machine, trainer_threads
from corun.plan.cells import Setup, cell
from corun.plan.estimate import percentile_of
from corun.plan.measured import Condition, Profile, Window, sojourns
from corun.plan.planner import Machine, Planner
from corun.plan.question import Candidate, Job, Question, Slo, make_candidates
from corun.registry import home
from corun.share.foreign import DIRTY_CORES

MODELS = ("mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x1_0", "resnet18", "mnasnet0_5", "yolov5n")
QUICK_MODELS = ("mobilenet_v3_small", "squeezenet1_1", "resnet18", "mnasnet0_5")
JOB = Job("resnet18", 16)
LARGEST = 4
PERCENTILE = 90.0
RATE = 24.0
SIZE, TRAIN_SIZE = 96, 32
MEMORY_MARGIN = 0.05
DRAIN_S = 5.0
SHARE_OF_RUNS = 0.25
QUICK_PROBES = 3
SHARE_OF_WINDOW = 0.2
SEED = 20241121

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Case:
    """One question: its candidates, policy and bound."""

    models: tuple[str, ...]
    policy: str
    bound_ms: float


@dataclass(frozen=True)
class Answered:
    """A case with the largest count by measuring all, the planner's, and what its set did when measured."""

    case: Case
    truth: int
    planned: int
    services: tuple[str, ...]
    worst_ms: float | None
    fault: str


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help="4 models, one policy, short windows, few cases")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="length of a window; 0 = 2.5, or 2 with --quick")] = 0.0,
    cases: Annotated[int, typer.Option(min=0, help="0 = 60, or 20 with --quick")] = 0,
) -> None:
    """Measure all sets, let the planner answer, store bench/results/plan.json, print one JSON object last."""
    with guard():
        began = time.monotonic()
        models, policies = (QUICK_MODELS, ("none",)) if quick else (MODELS, ("none", "idle"))
        setup = Setup(
            threads=1,
            trainer_threads=trainer_threads(None, 1),
            seconds=seconds or (2.0 if quick else 2.5),
            image_size=SIZE,
            train_image_size=TRAIN_SIZE,
            data="synthetic",
            seed=SEED,
        )
        candidates = make_candidates(models, RATE)
        machine = measure_machine(setup.trainer_threads, setup.device)
        machine = Machine(machine.cores, machine.threads, machine.limits)
        measured = measure_everything(candidates, policies, setup)
        drawn = list(draw(measured, models, policies, cases or (20 if quick else 60)))
        answered, used = answer_all(drawn, measured, machine, models, policies, QUICK_PROBES if quick else 0)
        figures = summarise(answered, len(used), exhaustive_runs(measured))
        details = {
            "wall_s": round(time.monotonic() - began, 1),
            "setup": setup.identity(),
            "job": JOB.label,
            "rate": RATE,
            "percentile": PERCENTILE,
            "policies": policies,
            "used": sorted(condition.label for condition, _ in used),
            "answers": [asdict(one) for one in answered],
            "windows": [raw(window) for window in measured.windows()],
        }
        disturbed = [window for window in measured.windows() if window.foreign_cores > DIRTY_CORES]
        details["disturbed_windows"] = len(disturbed)
        store("plan_quick" if quick else "plan", figures, details)
        if not quick:
            fill(home() / "docs" / "plan.md", "measured", page(figures, details["answers"]))
        print(table(answered), flush=True)
        if disturbed:
            print(
                f"others used the machine in {len(disturbed)} of {len(measured)} windows: measure again when it is quiet"
            )
        last_line(figures)


# Everything measured


def measure_everything(candidates: Sequence[Candidate], policies: Sequence[str], setup: Setup) -> Profile:
    """Each service alone, the trainer alone, and every set beside it, in random order within a policy."""
    question = Question(JOB, tuple(candidates), Slo(PERCENTILE, 1.0), tuple(policies))
    by_name = {one.name: one for one in candidates}
    everybody = list(by_name)
    order = random.Random(SEED)
    profile = Profile()

    def pair_of(policy: str, names: Sequence[str]) -> Any:
        return cell(
            question,
            setup,
            policy,
            [by_name[name] for name in names],
            port=free_port(len(names)),
            drain_timeout_s=DRAIN_S,
        )

    with Stages(pair_of, (), 1, setup.seconds) as stages:

        def observe(policy: str, names: Sequence[str], factor: float, repeat: int, trains: bool) -> Any:
            return stages.observe(policy, everybody, names, factor, repeat, trains)

        measure = asker(candidates, policies[0], setup.seconds, observe)
        for policy in policies:
            wanted = list(conditions(candidates, policy, alone=policy == policies[0]))
            order.shuffle(wanted)
            for number, condition in enumerate(wanted, 1):
                profile.add(measure(condition, 0))
                print(f"{policy} {number}/{len(wanted)}: {condition.label}", flush=True)
            stages.close()
    return profile


def conditions(candidates: Sequence[Candidate], policy: str, alone: bool) -> Iterator[Condition]:
    """All windows of a policy."""
    if alone:
        yield from (Condition(((one.model, one.rate),)) for one in candidates)
    yield Condition((), JOB.label, policy)
    for size in range(1, LARGEST + 1):
        for chosen in itertools.combinations(candidates, size):
            yield Condition(tuple((one.model, one.rate) for one in chosen), JOB.label, policy)


def exhaustive_runs(measured: Profile) -> int:
    """Windows that somebody without a model has to measure: every set beside the trainer, and the trainer alone."""
    return sum(bool(window.condition.job) for window in measured.windows())


def worst_ms(window: Window) -> float:
    """The percentile of the service that is worst off; inf for a window that could not be measured."""
    if window.fault:
        return float("inf")
    tails = [percentile_of(sojourns([window], model), PERCENTILE) for model, _ in window.condition.loads]
    return max(tails, default=0.0)


# Cases


def draw(measured: Profile, models: Sequence[str], policies: Sequence[str], count: int) -> Iterator[Case]:
    """Random questions; the bound lies log-uniformly between what 5 % and 95 % of a policy's sets would keep.

    No bound is longer than SHARE_OF_WINDOW of a window: a queue that only grows could not miss it in so short a time.
    """
    rng = np.random.default_rng(SEED)
    for number in range(count):
        policy = policies[number % len(policies)]
        windows = [one for one in measured.windows() if one.condition.policy == policy and one.condition.loads]
        longest_ms = 1000 * windows[0].seconds * SHARE_OF_WINDOW
        tails = [min(longest_ms, worst_ms(window)) for window in windows]
        low, high = np.log(np.quantile(tails, [0.05, 0.95]))
        chosen = sorted(rng.choice(len(models), min(LARGEST, len(models)), replace=False).tolist())
        yield Case(tuple(models[index] for index in chosen), policy, round(float(np.exp(rng.uniform(low, high))), 3))


def answer_all(
    cases: Sequence[Case],
    measured: Profile,
    machine: Machine,
    models: Sequence[str],
    policies: Sequence[str],
    probes: int,
) -> tuple[list[Answered], set[tuple[Condition, int]]]:
    """The planner's answers. One profile for all cases, as on a machine where it is kept; its windows are the runs.

    The search may measure until a quarter of the exhaustive runs is spent, at least `probes`; then the model decides.
    """
    profile, used = Profile(), set[tuple[Condition, int]]()

    def look_up(condition: Condition, repeat: int) -> Window:
        used.add((condition, repeat))
        window = measured.get(condition, repeat)
        assert window is not None, condition.label
        return window

    def planner_of(models: Sequence[str], policy: str, bound_ms: float, budget: float) -> Planner:
        question = Question(
            JOB, make_candidates(models, RATE), Slo(PERCENTILE, bound_ms), (policy,), memory_margin=MEMORY_MARGIN
        )
        return Planner(question, profile, machine, look_up, looks=1, budget=budget)

    for policy in policies:
        for group in (models[:LARGEST], models[-LARGEST:]):
            planner = planner_of(group, policy, 1.0, 0)
            planner.profile_alone()
            planner.profile_policy(policy)
    budget = max(int(SHARE_OF_RUNS * exhaustive_runs(measured)), len(used) + probes)
    answered = []
    for case in cases:
        question = Question(
            JOB,
            make_candidates(case.models, RATE),
            Slo(PERCENTILE, case.bound_ms),
            (case.policy,),
            memory_margin=0.05,
        )
        left = max(0, budget - len(used))
        planner = Planner(question, profile, machine, look_up, looks=1, budget=left)
        (answer,) = planner.answers()
        window = measured.get(
            Condition(tuple((one.model, one.rate) for one in answer.services), JOB.label, case.policy), 0
        )
        assert window is not None
        tail = worst_ms(window)
        answered.append(
            Answered(
                case,
                truth(case, measured),
                len(answer.services),
                tuple(one.name for one in answer.services),
                round(tail, 3) if np.isfinite(tail) else None,
                window.fault,
            )
        )
    return answered, used


def truth(case: Case, measured: Profile) -> int:
    """The largest set that kept the bound."""
    for size in range(len(case.models), 0, -1):
        for chosen in itertools.combinations(case.models, size):
            condition = Condition(tuple((model, RATE) for model in chosen), JOB.label, case.policy)
            window = measured.get(condition, 0)
            if window and worst_ms(window) <= case.bound_ms:
                return size
    return 0


# Figures


def summarise(answered: Sequence[Answered], used: int, exhaustive: int) -> dict[str, Any]:
    """Counts as printed."""
    missed = [one for one in answered if one.services and not _kept(one)]
    return {
        "cases": len(answered),
        "exact": sum(one.planned == one.truth for one in answered),
        "within_one": sum(abs(one.planned - one.truth) <= 1 for one in answered),
        "runs_used": used,
        "runs_exhaustive": exhaustive,
        "violations": sum(bool(one.fault) for one in answered),
        "slo_missed": len(missed),
    }


def _kept(one: Answered) -> bool:
    return one.worst_ms is not None and one.worst_ms <= one.case.bound_ms


def raw(window: Window) -> dict[str, Any]:
    """A window with the figures behind every answer, without its thousands of samples."""
    return {
        "set": window.condition.label,
        "policy": window.condition.policy,
        "p90_ms": {one.model: _rounded(percentile_of(one.sojourns_ms, PERCENTILE)) for one in window.samples},
        "service_ms": {
            one.model: _rounded(float(np.mean(one.services_ms))) for one in window.samples if one.services_ms
        },
        "requests": {one.model: len(one.sojourns_ms) for one in window.samples},
        "samples_per_s": _rounded(window.samples_per_s),
        "private_mib": {name: round(part.private_mib, 1) for name, part in window.memory.items()},
        "foreign_cores": round(window.foreign_cores, 3),
        "fault": window.fault,
    }


def _rounded(value: float | None) -> float | None:
    return round(value, 3) if value is not None and np.isfinite(value) else None


def page(figures: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> str:
    """The figures as a table, with what one fixed answer to all questions would have got: the easy way to be close."""
    largest = [int(one["truth"]) for one in answers]
    fixed = max(range(LARGEST + 1), key=largest.count)
    rows = [
        ("planner", figures["exact"], figures["within_one"], figures["runs_used"]),
        (f"always {fixed}", largest.count(fixed), sum(abs(one - fixed) <= 1 for one in largest), 0),
        ("measuring everything", figures["cases"], figures["cases"], figures["runs_exhaustive"]),
    ]
    seen = ", ".join(f"{largest.count(size)} times {size}" for size in sorted(set(largest)))
    return "\n".join(
        [
            f"{figures['cases']} questions; the largest set that kept the bound had {seen} services. Planned sets that died or",
            f"did not fit into memory: {figures['violations']}; over their bound in their own window: {figures['slo_missed']}.",
            "",
            markdown(("answers", "exact", "exact or one away", "windows measured"), rows),
        ]
    )


def table(answered: Sequence[Answered]) -> str:
    """The answers for people."""
    lines = [f"{'policy':8} {'p90 <= ms':>10} {'all':>4} {'plan':>5} {'measured':>9}  candidates"]
    for one in answered:
        tail = "n/a" if one.worst_ms is None else f"{one.worst_ms:.1f}"
        lines.append(
            f"{one.case.policy:8} {one.case.bound_ms:10.1f} {one.truth:4d} {one.planned:5d} {tail:>9}  {', '.join(one.case.models)}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    app()
