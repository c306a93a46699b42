"""Which services fit beside a training job within a latency promise, per sharing policy: profile, plan, validate."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from corun import registry
from corun.errors import guard
from corun.launch.arguments import spread
from corun.plan.asked import Asked, make_cast, make_question, resolve_device, trainer_threads
from corun.plan.batching import LARGEST
from corun.plan.cells import Setup
from corun.plan.question import Question, parse_batch
from corun.plan.session import Options, Programs, describe, run
from corun.plan.table import as_json, show
from corun.process import StopSignal
from corun.run.config import Pair
from corun.run.directory import RunDirectory, result_root, run_id
from corun.share.host import Host

WIDTH = 116

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    services: Annotated[list[str], typer.Option(help="models to serve (several may follow, or comma-separated)")],
    train: Annotated[str, typer.Option(help="training job, architecture_batch; none = nobody trains")] = "none",
    rate: Annotated[float, typer.Option(help="requests/s of each service")] = 10.0,
    slo: Annotated[str, typer.Option(help="promise of each service, e.g. p99=200ms")] = "p99=200ms",
    policies: Annotated[list[str] | None, typer.Option(help="sharing policies; default: idle and none")] = None,
    maximize: Annotated[str, typer.Option(help="count, goodput or training")] = "count",
    copies: Annotated[int, typer.Option(min=1, help="services of each model")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="of each service")] = 1,
    threads_train: Annotated[
        int | None, typer.Option("--trainer-threads", min=1, help="default: the cores that one service leaves")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="length of one window of the profile")] = 10.0,
    looks: Annotated[int, typer.Option(min=1, max=20, help="windows one set may take until it is decided")] = 6,
    data: Annotated[str, typer.Option(help="data set of the requests")] = "sample",
    image_size: Annotated[int | None, typer.Option(min=1, help="of the services; default: each model's own")] = None,
    train_data: Annotated[str, typer.Option(help="data set of the training job")] = "digits",
    train_image_size: Annotated[int | None, typer.Option(min=1, help="default: the model's own")] = None,
    max_batch: Annotated[str, typer.Option(help="largest batch of a service; auto = chosen for each")] = "1",
    largest_batch: Annotated[int, typer.Option(min=1, help="of the batches measured and of auto's choice")] = LARGEST,
    memory_margin: Annotated[float, typer.Option(min=0, help="share added to measured memory")] = 0.1,
    longest: Annotated[
        float, typer.Option("--validate-seconds", min=1, help="longest window of a validation")
    ] = 120.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure again what the profile has")] = False,
    validate: Annotated[bool, typer.Option("--validate/--no-validate", help="run each plan for real")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be measured, run nothing")] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="one JSON object as the last line, the rest to stderr")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="where profiles and runs go; default result/")] = None,
) -> None:
    """Find the largest set of services that keeps its promise beside a training job, under each sharing policy.

    Exit code 0 when a plan was found (and kept its promise), 1 when a run failed, 2 for bad input, 3 when nothing fits
    or a validated plan missed its promise. Windows are kept per machine under result/profiles and used again.
    """
    with guard():
        resolved = resolve_device(device)
        beside = trainer_threads(threads_train, threads)
        sets = (data, train_data)
        given = Asked(services, train, rate, slo, policies or [], maximize, copies, memory_margin, sets, max_batch)
        cast = make_cast(len(services), threads, beside, resolved)
        question = make_question(given, registry.models(), cast, Host())
        bound = parse_batch(max_batch)
        setup = Setup(resolved, threads, beside, seconds, data, image_size, train_data, train_image_size, bound or 1)
        options = Options(out or result_root(), looks, fresh, validate, longest, bound is None, largest_batch)
        if dry_run:
            print("\n".join(describe(question, setup, options)))
        else:
            raise typer.Exit(_run(question, setup, options, json_))


def _run(question: Question, setup: Setup, options: Options, json_: bool) -> int:
    from corun.launch import batches
    from corun.launch.calibrate import free_port
    from corun.launch.experiment import run_pair
    from corun.launch.stage import Stages
    from corun.report.conclude import conclude
    from corun.report.console import console_for

    console = console_for(stderr=json_)
    console.width = console.width if console.is_terminal else WIDTH
    with StopSignal() as stop:

        def measure(pair: Pair) -> dict[str, Any]:
            run = RunDirectory.create(options.out / run_id(pair.digest()), pair.resolved(), pair.digest())
            outcome = run_pair(pair, run, stop, say)
            _, answer = conclude(run.path, None, pair.promises)
            return {**answer, "status": outcome.status, "faults": list(outcome.reasons)}

        def say(line: str) -> None:
            console.print(f"{time.strftime('%H:%M:%S')} {escape(line)}", style="dim", highlight=False)

        programs = Programs(Stages, measure, free_port, say, lambda: stop.requested, batches.measure)
        outcome = run(question, setup, options, programs)
    if json_:
        print(json.dumps(as_json(question, outcome.results, outcome.best, outcome.planner)), flush=True)
    show(console, question, outcome.results, outcome.best, outcome.planner, outcome.interrupted)
    return outcome.exit_code


if __name__ == "__main__":
    app(spread(sys.argv[1:], "--services", "--policies"))
