"""The answer for people (a rich table) and for programs (plain JSON values)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corun.plan.batching import Choice, Option
from corun.plan.measured import Curve
from corun.plan.planner import Answer, Planner
from corun.plan.question import Candidate, Question
from corun.share.foreign import DIRTY_CORES


@dataclass(frozen=True)
class Validated:
    """One real run of a plan: status of the run, percentile by service (None: too few requests), verdicts, training."""

    status: str
    measured_ms: Mapping[str, float | None]
    words: Mapping[str, str]
    training: float | None
    run: str
    reason: str = ""

    @property
    def kept(self) -> bool:
        """Whether the run was complete and no promise was missed."""
        return self.status == "complete" and "missed" not in self.words.values()


@dataclass(frozen=True)
class Result:
    """One row group of the table: a policy's plan and, unless it was not asked for, its validation."""

    answer: Answer
    validated: Validated | None = None


def show(
    console: Console,
    question: Question,
    results: Sequence[Result],
    best: Answer | None,
    planner: Planner,
    interrupted: bool = False,
) -> None:
    """Print the table, what it rests on, and the plan that serves the goal."""
    slo = question.slo
    job = question.job.label if question.job else "no training"
    table = Table(title=f"{job} + services, {slo} each", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("policy", "service"):
        table.add_column(name, overflow="fold")
    numbers = ("batch", "rate /s") if planner.choices else ("rate /s",)
    for name in (*numbers, "can take", f"predicted {slo.name} ms", "validated", "training x", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        _rows(table, result, bool(planner.choices))
        table.add_section()
    console.print(table)
    for result in results:
        _notes(console, result, planner)
    _curves(console, question, planner)
    measured = f"{planner.measured} windows measured, {planner.reused} reused"
    where = f" in {planner.profile.path}" if planner.profile.path else ""
    console.print(f"{measured}{where}", highlight=False, soft_wrap=True)
    disturbed = planner.disturbed()
    if disturbed:
        count, cores = disturbed
        told = f"others used up to {cores:.1f} cores in {count} of the windows; --fresh measures again"
        console.print(f"[yellow]{told}[/]", highlight=False)
    if interrupted:
        console.print("[bold]interrupted[/]; started again it goes on where it stopped", highlight=False)
    elif best:
        names = ", ".join(place.candidate.name for place in best.places)
        console.print(f"[bold]best for {question.goal}:[/] {best.policy} with {names}", highlight=False)
    else:
        console.print("[bold]nothing fits[/] under any of these policies", highlight=False)


def _rows(table: Table, result: Result, batched: bool) -> None:
    answer, validated = result.answer, result.validated
    need = f"{answer.need.host_mib:.0f}" + (f" + GPU {answer.need.gpu_mib:.0f}" if answer.need.gpu_mib else "")
    speed = _ratio(answer.training) + (f" / {_ratio(validated.training)}" if validated else "")
    if not answer.places:
        table.add_row(answer.policy, "none fits")
    for index, place in enumerate(answer.places):
        tail, name = place.tail, place.candidate.name
        shown = f"{_ms(tail.predicted_ms)} [{_ms(tail.low_ms)}, {_ms(tail.high_ms)}]"
        found = f"{_ms(validated.measured_ms.get(name))} {validated.words.get(name, '')}".strip() if validated else ""
        cells = (place.candidate.rate, place.can_take)
        batch = [_batch(place.candidate)] if batched else []
        first = index == 0
        table.add_row(
            answer.policy if first else "",
            escape(name),
            *batch,
            *(f"{cell:.3g}" for cell in cells),
            escape(shown),
            found,
            speed if first else "",
            need if first else "",
        )


def _notes(console: Console, result: Result, planner: Planner) -> None:
    answer, validated = result.answer, result.validated
    finding = answer.finding
    sure = f"{finding.word} ({finding.source}{', ' + finding.detail if finding.detail else ''})"
    trust = f"model from {answer.runs} windows, its error x{math.exp(answer.spread):.2f} (1 sigma)"
    host = f"needs {answer.need.host_mib:.0f} of {planner.machine.limits.host_mib:.0f} MiB with margin"
    console.print(escape(f"{answer.policy}: {sure}; {trust}; {host}"), highlight=False, soft_wrap=True)
    if answer.blocked:
        console.print(escape(f"  one more: {answer.blocked}"), highlight=False, soft_wrap=True)
    if validated and answer.training is not None:
        console.print(
            f"  training x: predicted / validated; validation: {validated.run}", highlight=False, soft_wrap=True
        )
    if validated and validated.reason:
        console.print(escape(f"  validation {validated.status}: {validated.reason}"), highlight=False, soft_wrap=True)


def _curves(console: Console, question: Question, planner: Planner) -> None:
    """Each model's curve on a line, and for each of its services why it gets the batches it gets."""
    for model in dict.fromkeys(one.model for one in question.candidates):
        curve = planner.profile.curves.get(model)
        if curve is None:
            continue
        points = "  ".join(f"{one.size}: {_ms(one.ms)} ms {one.per_s:.3g}/s" for one in curve.points)
        dirty = curve.foreign_cores > DIRTY_CORES
        others = f" (others used {curve.foreign_cores:.1f} cores; --fresh measures again)" if dirty else ""
        console.print(escape(f"{model} alone in batches of {points}{others}"), highlight=False, soft_wrap=True)
        whys = [planner.choices[one.name].why for one in question.candidates if _chosen_for(one, model, planner)]
        for why in dict.fromkeys(whys):
            console.print(escape(f"  {why}"), highlight=False, soft_wrap=True)


def _chosen_for(candidate: Candidate, model: str, planner: Planner) -> bool:
    return candidate.model == model and candidate.name in planner.choices


def _batch(candidate: Candidate) -> str:
    """`8`, or held for a time `8, 2.5 ms`."""
    held = f", {candidate.max_delay_ms:g} ms" if candidate.max_delay_ms else ""
    return f"{candidate.max_batch}{held}"


def as_json(question: Question, results: Sequence[Result], best: Answer | None, planner: Planner) -> dict[str, Any]:
    """Everything the table says; infinite values are null."""
    return {
        "train": question.job.label if question.job else None,
        "slo": {"percentile": question.slo.percentile, "bound_ms": question.slo.bound_ms},
        "maximize": question.goal,
        "policies": {result.answer.policy: _plan(result, planner) for result in results},
        "best": best.policy if best else None,
        "curves": {
            model: _curve(planner.profile.curves[model])
            for model in dict.fromkeys(one.model for one in question.candidates)
            if model in planner.profile.curves
        },
        "batches": {name: _choice(choice) for name, choice in planner.choices.items()},
        "windows": {"measured": planner.measured, "reused": planner.reused},
        "profile": str(planner.profile.path) if planner.profile.path else None,
    }


def _plan(result: Result, planner: Planner) -> dict[str, Any]:
    answer, validated = result.answer, result.validated
    services = [
        {
            "name": place.candidate.name,
            "model": place.candidate.model,
            "rate": place.candidate.rate,
            "can_take": round(place.can_take, 3),
            "predicted_ms": _number(place.tail.predicted_ms),
            "interval_ms": [_number(place.tail.low_ms), _number(place.tail.high_ms)],
            "kept": round(place.tail.kept, 4),
            "batch": _taken(place.candidate, planner),
            "curve": _short(planner.profile.curves.get(place.candidate.model)),
            "validated_ms": validated.measured_ms.get(place.candidate.name) if validated else None,
            "validated": validated.words.get(place.candidate.name) if validated else None,
        }
        for place in answer.places
    ]
    return {
        "count": len(services),
        "services": services,
        "training_x": _number(answer.training),
        "memory_mib": round(answer.need.host_mib, 1),
        "memory_limit_mib": round(planner.machine.limits.host_mib, 1),
        "gpu_memory_mib": round(answer.need.gpu_mib, 1),
        "known": {"word": answer.finding.word, "source": answer.finding.source, "detail": answer.finding.detail},
        "windows": answer.runs,
        "sigma": round(answer.spread, 4),
        "one_more": answer.blocked,
        "validation": {
            "status": validated.status,
            "training_x": _number(validated.training),
            "run": validated.run,
            "reason": validated.reason,
        }
        if validated
        else None,
    }


def _taken(candidate: Candidate, planner: Planner) -> dict[str, Any] | None:
    """The batches chosen for a service; None where nothing was chosen."""
    choice = planner.choices.get(candidate.name)
    if choice is None:
        return None
    return {key: value for key, value in _choice(choice).items() if key != "options"}


def _choice(choice: Choice) -> dict[str, Any]:
    return {
        **_option(choice.option),
        "keeps": choice.keeps,
        "why": choice.why,
        "options": [_option(one) for one in choice.options],
    }


def _option(option: Option) -> dict[str, Any]:
    return {
        "max_batch": option.max_batch,
        "max_delay_ms": option.max_delay_ms,
        "predicted_alone_ms": _number(option.predicted_ms),
        "capacity": round(option.capacity, 3),
    }


def _short(curve: Curve | None) -> list[dict[str, Any]]:
    points = curve.points if curve else ()
    return [{"batch": one.size, "ms": round(one.ms, 4), "requests_s": round(one.per_s, 3)} for one in points]


def _curve(curve: Curve) -> dict[str, Any]:
    points = [
        {
            **short,
            "interval_ms": [_number(bound) for bound in one.interval_ms] if one.interval_ms else None,
            "batches": len(one.times_ms),
            "private_mib": round(one.memory.private_mib, 1),
            "shared_mib": round(one.memory.shared_mib, 1),
            "gpu_mib": round(one.memory.gpu_mib, 1),
            "rss_mib": one.rss_mib and round(one.rss_mib, 1),
            "pss_mib": one.pss_mib and round(one.pss_mib, 1),
        }
        for short, one in zip(_short(curve), curve.points, strict=True)
    ]
    return {
        "asked": list(curve.asked),
        "overhead_ms": round(curve.overhead_ms, 4),
        "foreign_cores": round(curve.foreign_cores, 3),
        "points": points,
    }


def _ms(value: float | None) -> str:
    return "n/a" if value is None else "∞" if not math.isfinite(value) else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def _number(value: float | None) -> float | None:
    return round(value, 4) if value is not None and math.isfinite(value) else None
