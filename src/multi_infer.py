"""Runs N models back to back in processes of their own, without sockets, beside a training job or alone.

python src/multi_infer.py --models resnet18 mobilenet_v3_small --seconds 30 --with-train resnet18
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from corun import registry
from corun.errors import InputError, guard
from corun.launch.arguments import spread
from corun.launch.loops import Loop, LoopPlan, named, run_loops
from corun.launch.telling import exit_code, sayer, tell_reasons
from corun.process import StopSignal
from corun.run.config import Train
from corun.run.directory import RunDirectory, result_root, run_id

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    models: Annotated[list[str], typer.Option(help="models to run, one process each (several names may follow)")],
    seconds: Annotated[float, typer.Option(min=0.1, help="how long")] = 30.0,
    with_train: Annotated[str | None, typer.Option(help="model to train beside them")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures per inference")] = 1,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="side of the input; default: each model's own")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="intra-op threads of each loop")] = 1,
    data: Annotated[str, typer.Option(help="data set, name:/root or folder of images")] = "sample",
    count: Annotated[int, typer.Option(min=1, help="different payloads of each loop")] = 64,
    precision: Annotated[str, typer.Option(help=", ".join(registry.PRECISIONS))] = "fp32",
    weights: Annotated[str | None, typer.Option(help="default or a state dict file; else random")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    train_data: Annotated[str | None, typer.Option(help="default: digits, or sample where digits do not fit")] = None,
    train_batch_size: Annotated[int, typer.Option(min=1, help="samples per training step")] = 16,
    train_image_size: Annotated[int | None, typer.Option(min=1, help="default: the model's")] = None,
    train_threads: Annotated[int | None, typer.Option(min=1, help="default: the cores the loops leave")] = None,
    out: Annotated[Path | None, typer.Option(help="where run directories go; default result/")] = None,
) -> None:
    """Measure inference without a client; Ctrl-C once ends the window and saves, twice kills."""
    with guard():
        for name in [*models, *([with_train] if with_train else [])]:
            registry.model(name)
        registry.resolve_data(data)
        loops = tuple(
            Loop(model, name, batch_size, image_size, data, count, device, precision, weights, threads)
            for model, name in named(models)
        )
        train = None
        if with_train:
            train = Train(
                arch=with_train,
                data=train_data or _default_data(with_train),
                batch_size=train_batch_size,
                image_size=train_image_size,
                threads=train_threads,
                device=device,
            )
        raise typer.Exit(_run(LoopPlan(loops, seconds, train, seed), out or result_root()))


def _default_data(name: str) -> str:
    """Handwritten digits for classifiers, made targets on photographs for the rest."""
    row = registry.model(name)
    if row.train is None:
        raise InputError(f'model "{name}" cannot be trained')
    return "digits" if row.task == "classification" else "sample"


def _run(plan: LoopPlan, root: Path) -> int:
    from corun.report.console import console_for
    from corun.report.loops import show_loops, summarise_loops

    console = console_for()
    run = RunDirectory.create(root / run_id(plan.digest()), plan.resolved(), plan.digest())
    with StopSignal() as stop:
        outcome = run_loops(plan, run, stop, sayer(console))
    show_loops(summarise_loops(run.path), console)
    tell_reasons(console, outcome)
    return exit_code([outcome], outcome.status == "interrupted")


if __name__ == "__main__":
    app(spread(sys.argv[1:], "--models"))
