"""profile -> plan -> validate, with the programs that start processes passed in.

Before anything else each model's curve of time against batch size, unless the profile has it; with `auto_batch` every
service gets the bound that corun.plan.batching chooses from it, and is measured, planned and validated with that.

A plan that misses its promise when it is run for real is taken back: it and every larger set are out, and the next best
is planned and validated, `TRIES` times in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from corun.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_SLO_MISSED
from corun.plan.ask import Observe, asker, read_curve
from corun.plan.asked import LADDER, measure_machine, open_profile
from corun.plan.batching import LARGEST, Choice, choose, sizes_to
from corun.plan.cells import Setup, cell, validation_seconds
from corun.plan.measured import Condition, Memory, Profile
from corun.plan.memory import need
from corun.plan.planner import Answer, Planner, best
from corun.plan.question import NONE, Candidate, Question
from corun.plan.table import Result, Validated
from corun.run.config import Pair

TRIES: Final = 3
BETWEEN_S: Final = 1.0
START_S: Final = 12.0
CURVE_S: Final = 15.0


@dataclass(frozen=True)
class Options:
    """out: where profiles and runs go. looks: windows one set may take. longest_s: of a validation's window.

    auto_batch: each service's batch bound is chosen. largest_batch: the curves' largest batch and the largest choice.
    """

    out: Path
    looks: int
    fresh: bool
    validate: bool
    longest_s: float
    auto_batch: bool = False
    largest_batch: int = LARGEST


class Stages(Protocol):
    """launch.stage.Stages: processes that stay for many windows."""

    def observe(
        self, policy: str, everybody: Sequence[str], names: Sequence[str], factor: float, repeat: int, trains: bool
    ) -> Any: ...

    def close(self) -> None: ...


PairOf = Callable[[str, Sequence[str]], Pair]
OpenStages = Callable[[PairOf, Sequence[float], int, float], AbstractContextManager[Stages]]
RunPair = Callable[[Pair], Mapping[str, Any]]
"""Runs a cell for real: the answer of report.conclude with `status`, `run` and `faults`."""
MeasureBatches = Callable[[Pair, Sequence[int]], Any]
"""Batches of each size on the server of a cell's service, as launch.batches gives them, or why it cannot run."""


@dataclass(frozen=True)
class Programs:
    """What starts processes, and how to talk to the user. batches: None = no curve is measured."""

    stages: OpenStages
    run: RunPair
    port: Callable[[int], int]
    say: Callable[[str], None]
    stopped: Callable[[], bool]
    batches: MeasureBatches | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    results: tuple[Result, ...]
    best: Answer | None
    planner: Planner
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0: a plan that was not refuted; 1: a run failed; 3: nothing fits, or the validated plan missed its promise."""
        if self.interrupted:
            return EXIT_INTERRUPTED
        checked = [result.validated for result in self.results if result.validated]
        if any(one.status != "complete" for one in checked):
            return EXIT_FAILED
        chosen = [result.validated for result in self.results if result.answer is self.best and result.validated]
        return EXIT_OK if self.best and all(one.kept for one in chosen) else EXIT_SLO_MISSED


class _Interrupted(Exception):
    pass


def run(question: Question, setup: Setup, options: Options, programs: Programs) -> Outcome:
    """Answer a question; what is measured is kept as it is made, so an interrupted plan goes on where it stopped."""
    planner = _planner(question, setup, options, programs.say)
    results: list[Result] = []
    interrupted = False
    try:
        _measure_curves(planner, setup, options, programs)
        if options.auto_batch:
            choose_batches(planner, options.largest_batch)
        for result in _planned(planner, setup, options, programs):
            results.append(result)
        if options.validate:
            for place, result in enumerate(results):
                results[place] = _validated(result, planner.question, setup, options, programs, planner)
    except _Interrupted:
        interrupted = True
    return Outcome(
        tuple(results),
        best([result.answer for result in results], question),
        planner,
        interrupted or programs.stopped(),
    )


def _planned(planner: Planner, setup: Setup, options: Options, programs: Programs) -> Iterator[Result]:
    """The plan of each policy, from windows of processes that stay as long as the policy does."""
    question = planner.question
    everybody = [one.name for one in question.candidates]
    by_name = {one.name: one for one in question.candidates}

    def pair_of(policy: str, names: Sequence[str]) -> Pair:
        return cell(question, setup, policy, [by_name[name] for name in names], port=programs.port(len(names)))

    with programs.stages(pair_of, planner.machine.ladder, options.looks, setup.seconds) as stages:
        planner.measure = asker(
            question.candidates, question.policies[0], setup.seconds, _observer(stages, everybody, programs)
        )
        for answer in planner.answers():
            yield Result(answer)
            stages.close()


def _measure_curves(planner: Planner, setup: Setup, options: Options, programs: Programs) -> None:
    """Those that the profile has not; a model that cannot run has none, and its windows will say why."""
    if programs.batches is None:
        return
    for candidate in _without_curve(planner.question, planner.profile, setup, options):
        if programs.stopped():
            raise _Interrupted
        sizes = _sizes(setup, options)
        programs.say(f"{candidate.model} in batches of {sizes[0]} to {sizes[-1]}")
        alone = replace(planner.question, job=None)
        pair = cell(alone, setup, NONE, [candidate], port=programs.port(1))
        seen = programs.batches(pair, sizes)
        if isinstance(seen, str):
            programs.say(f"{candidate.model} has no curve: {seen}")
            continue
        planner.profile.add_curve(candidate.model, read_curve(sizes, seen))
        if seen.fault:
            programs.say(f"{candidate.model} has no larger batches: {seen.fault}")


def _without_curve(question: Question, profile: Profile, setup: Setup, options: Options) -> list[Candidate]:
    """One candidate of each model whose curve is not kept, or not for all sizes asked."""
    sizes = _sizes(setup, options)
    models = {one.model: one for one in reversed(question.candidates)}
    kept = profile.curves
    return [one for model, one in reversed(models.items()) if model not in kept or not kept[model].covers(sizes)]


def _sizes(setup: Setup, options: Options) -> tuple[int, ...]:
    return tuple(sorted({*sizes_to(options.largest_batch), setup.max_batch}))


def choose_batches(planner: Planner, largest: int) -> None:
    """Give every candidate the batch bound that its model's curve speaks for; without a curve it is served one by one."""
    question, limits = planner.question, planner.machine.limits

    def fits(memory: Memory) -> bool:
        return need([memory], limits, question.memory_margin).fits

    found: dict[tuple[str, float], Choice] = {}
    for model, rate in dict.fromkeys((one.model, one.rate) for one in question.candidates):
        curve = planner.profile.curves.get(model)
        if curve:
            found[model, rate] = choose(curve, rate, question.slo, largest, fits)
            planner.say(f"{model} at {rate:g}/s: {found[model, rate].why}")
    with_curve = [one for one in question.candidates if (one.model, one.rate) in found]
    planner.choices = {one.name: found[one.model, one.rate] for one in with_curve}
    planner.question = replace(question, candidates=tuple(_batched(one, planner) for one in question.candidates))


def _batched(candidate: Candidate, planner: Planner) -> Candidate:
    choice = planner.choices.get(candidate.name)
    if choice is None:
        return candidate
    return replace(candidate, max_batch=choice.option.max_batch, max_delay_ms=choice.option.max_delay_ms)


def describe(question: Question, setup: Setup, options: Options) -> Iterator[str]:
    """What would be measured before the search starts, and how long that takes."""
    planner = _planner(question, setup, options, lambda line: None)
    curves = _without_curve(question, planner.profile, setup, options)
    for candidate in curves:
        yield f"curve   {candidate.model} in batches of {', '.join(map(str, _sizes(setup, options)))}"
    if options.auto_batch and curves:
        yield "windows below are those of services one by one; which batches they get follows from the curves"
    elif options.auto_batch:
        choose_batches(planner, options.largest_batch)
    wanted = planner.conditions()
    missing = [condition for condition in wanted if planner.profile.get(condition, 0) is None]
    for condition in wanted:
        yield f"{'measure' if condition in missing else 'reuse  '} {condition.label}"
    seconds = len(missing) * (setup.seconds + BETWEEN_S) + START_S * len(question.policies) * bool(missing)
    seconds += CURVE_S * len(curves)
    yield f"{len(missing)} windows of {setup.seconds:g} s, {len(wanted) - len(missing)} reused: about {seconds / 60:.1f} minutes"
    yield f"then at most {options.looks} windows for each set that decides; profile: {planner.profile.path}"


def _planner(question: Question, setup: Setup, options: Options, say: Callable[[str], None]) -> Planner:
    profile = open_profile(options.out, setup.identity(), options.fresh)
    machine = measure_machine(setup.trainer_threads, setup.device)
    return Planner(question, profile, replace(machine, ladder=LADDER), _nothing, say, options.looks)


def _nothing(condition: Condition, repeat: int) -> Any:
    raise AssertionError(f"{condition.label}, window {repeat}: nobody was asked to measure")


def _observer(stages: Stages, everybody: Sequence[str], programs: Programs) -> Observe:
    def observe(policy: str, names: Sequence[str], factor: float, repeat: int, trains: bool) -> Any:
        if programs.stopped():
            raise _Interrupted
        return stages.observe(policy, everybody, names, factor, repeat, trains)

    return observe


def _validated(
    result: Result, question: Question, setup: Setup, options: Options, programs: Programs, planner: Planner
) -> Result:
    """Run the plan; as long as it misses its promise, the next smaller or other one."""
    for _ in range(TRIES):
        if programs.stopped():
            raise _Interrupted
        if not result.answer.places:
            return result
        found = _run_plan(result.answer, question, setup, options, programs)
        result = Result(result.answer, found)
        if found.kept or found.status == "interrupted":
            return result
        names = ", ".join(one.name for one in result.answer.services)
        why = found.reason or "missed its promise when it was run"
        programs.say(f"{result.answer.policy}: {names}: {why}; planning again")
        planner.refute(result.answer.policy, result.answer.services)
        again = planner.answer(result.answer.policy, may_measure=False)
        if not again.places:
            return Result(again, found)
        result = Result(again, found)
    return result


def _run_plan(answer: Answer, question: Question, setup: Setup, options: Options, programs: Programs) -> Validated:
    chosen = answer.services
    seconds = validation_seconds(question.slo, chosen, options.longest_s)
    arms = ["train", "corun"] if question.job else ["alone"]
    durations = {"train": min(seconds, 2 * setup.seconds), "corun": seconds, "alone": seconds}
    programs.say(f"validating {answer.policy}: {', '.join(one.name for one in chosen)}, {seconds:.0f} s")
    pair = cell(
        question,
        setup,
        answer.policy,
        chosen,
        arms=arms,
        duration_s={arm: durations[arm] for arm in arms},
        port=programs.port(len(chosen)),
    )
    return read_validation(programs.run(pair), question, arms[-1])


def read_validation(seen: Mapping[str, Any], question: Question, arm: str) -> Validated:
    """The validation from what the run says of itself. arm: the one that was promised something."""
    arms = seen.get("arms", {})
    services = arms.get(arm, {}).get("services", {})
    speeds = [arms.get(name, {}).get("train_samples_per_s") for name in ("corun", "train")]
    promised = [one for one in seen.get("promises", []) if one["arm"] == arm]
    return Validated(
        str(seen["status"]),
        {name: one.get(f"{question.slo.name}_ms") for name, one in services.items()},
        {one["service"]: str(one["word"]) for one in promised},
        speeds[0] / speeds[1] if speeds[0] is not None and speeds[1] else None,
        str(seen.get("run", "")),
        "; ".join(seen.get("faults", [])),
    )
