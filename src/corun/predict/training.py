"""The flow all three training programs share: read, train, judge, save, reload and compare, draw, tell.

A program ends with 0 only when every requested model was trained, saved and reloaded to identical forecasts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from corun.errors import InputError
from corun.predict import data, plots
from corun.predict.checkpoint import finite
from corun.predict.fitting import Epoch, OnEpoch
from corun.predict.levels import BASELINE, Level
from corun.predict.predictor import MODELS, RequestPredictor
from corun.predict.series import RESPONSE_LAG_S, Field

__all__ = ["CpuJob", "Job", "Outcome", "model_names", "run"]

DataPath = Annotated[Path | None, typer.Option(help="BurstGPT or Azure LLM CSV; default: dataset/BurstGPT_1*.csv")]
SampleSize = Annotated[int, typer.Option(min=2, help="contiguous rows to use; more than the file has = all")]
FromEnd = Annotated[bool, typer.Option("--from-end", help="the last rows instead of the first")]
Models = Annotated[list[str] | None, typer.Option(help="lstm, dlinear; repeat it, or list them; default both")]
MoreModels = Annotated[list[str] | None, typer.Argument(help="more models after --models", show_default=False)]
ModelDir = Annotated[Path | None, typer.Option(help="where models go; default $CORUN_MODEL_DIR, else models/")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Seed = Annotated[int, typer.Option(help="of weights and shuffling")]
SeqLen = Annotated[int | None, typer.Option(help="rows of input; default 100 on CUDA, 80 on CPU")]
Epochs = Annotated[int | None, typer.Option(help="at most; default 100 on CUDA, 50 on CPU")]
BatchSize = Annotated[int | None, typer.Option(help="default 64 on CUDA, 32 on CPU")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="of Adam; default 0.001")]
WindowS = Annotated[float, typer.Option(help="length of load windows in s")]
Interval = Annotated[float, typer.Option(help="nominal coverage of the intervals")]
ResponseLagS = Annotated[float, typer.Option(help="s until a response counts as known, where none is recorded")]
OutJson = Annotated[Path | None, typer.Option(help="write the results here as JSON")]


@dataclass(frozen=True)
class Job:
    """What one training program was asked to do, and so its flags; None = the device's default."""

    prefix: str
    data_path: DataPath = None
    sample_size: SampleSize = 100_000
    from_end: FromEnd = False
    models: Models = None
    model_dir: ModelDir = None
    device: Device = "auto"
    seed: Seed = 0
    seq_len: SeqLen = None
    epochs: Epochs = None
    batch_size: BatchSize = None
    lr: LearningRate = None
    window_s: WindowS = 10.0
    interval: Interval = 0.9
    response_lag_s: ResponseLagS = RESPONSE_LAG_S
    out_json: OutJson = None
    more_models: MoreModels = None


@dataclass(frozen=True)
class CpuJob(Job):
    """A job of half the rows, unless more are asked for."""

    sample_size: SampleSize = 50_000


@dataclass(frozen=True)
class Outcome:
    """The files written and the results by level."""

    checkpoints: tuple[Path, ...]
    pictures: tuple[Path, ...]
    levels: Mapping[str, Level]


def model_names(options: Sequence[str] | None, more: Sequence[str] | None) -> tuple[str, ...]:
    """`--models lstm dlinear`, `--models lstm --models dlinear` and `--models lstm,dlinear` mean the same."""
    if more and not options:
        raise InputError(f'"{more[0]}" is not expected here; models are named after --models')
    joined = ",".join([*(options or MODELS), *(more or ())])
    return tuple(dict.fromkeys(name.strip().lower() for name in joined.split(",") if name.strip()))


def run(job: Job, console: Console | None = None) -> Outcome:
    """Train, save, verify. Raises a CorunError with the reason when any step fails."""
    console = console or Console()
    predictor = RequestPredictor(
        job.model_dir,
        model_names(job.models, job.more_models),
        job.seq_len,
        job.device,
        job.interval,
        window_s=job.window_s,
        response_lag_s=job.response_lag_s,
        epochs=job.epochs,
        batch_size=job.batch_size,
        lr=job.lr,
        seed=job.seed,
    )
    _check_writable(predictor.model_dir)
    requests = data.read(data.find(job.data_path), job.sample_size, job.from_end)
    _introduce(console, requests, predictor)
    with _one_thread(), _progress(console, predictor) as on_epoch:
        levels = predictor.fit(requests, on_epoch)
    for level, reason in predictor.not_fitted.items():
        console.print(f"{level} level not fitted: {reason}", markup=False)
    paths = predictor.save(job.prefix)
    predictor.verify(paths)
    pictures = _draw(predictor, paths[0].stem.rsplit("_", 3)[0], paths[0])
    for level, outcome in levels.items():
        _tell(console, level, outcome)
    _finish(console, job, paths, pictures, levels)
    return Outcome(tuple(paths), tuple(pictures), levels)


def _check_writable(directory: Path) -> None:
    """Minutes of training are not spent on a directory that cannot take the result."""
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{directory} cannot be written; give another --model-dir")


def _introduce(console: Console, requests: data.Requests, predictor: RequestPredictor) -> None:
    settings, source = predictor.settings, requests.source
    console.print(
        f"{source.path}: {len(requests)} of {source.rows_in_file} requests over {requests.span_s:.0f} s, "
        f"{source.release or requests.format}",
        markup=False,
    )
    for warning in requests.warnings():
        console.print(f"warning: {warning}", markup=False)
    console.print(
        f"{', '.join(predictor.models)} on {settings.device}: input {settings.seq_len}, at most {settings.epochs} epochs, "
        f"batch {settings.batch_size}, lr {settings.lr:g}, seed {settings.seed}",
        markup=False,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Nets of a few thousand parameters lose more to waking a second thread than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress(console: Console, predictor: RequestPredictor) -> Iterator[OnEpoch]:
    """A bar per net being trained; an epoch that stops early leaves its bar where it stopped."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=console) as progress:
        bars: list[Any] = []

        def on_epoch(epoch: Epoch) -> None:
            if epoch.epoch == 1:
                level = "requests" if len(bars) < len(predictor.models) else "windows"
                bars.append(progress.add_task(f"{epoch.model} {level}", total=epoch.epochs, loss=""))
            loss = f"loss {epoch.train_loss:.4f}, held out {epoch.early_loss:.4f}"
            progress.update(bars[-1], completed=epoch.epoch, loss=loss)

        yield on_epoch


def _draw(predictor: RequestPredictor, prefix: str, first: Path) -> list[Path]:
    stamp = "_".join(first.stem.split("_")[-2:])
    directory = first.parent
    made = [plots.learning_curves(directory / f"{prefix}_{stamp}_learning_curves.png", predictor.outcome)]
    for level, outcome in predictor.outcome.items():
        fields: tuple[Field, ...] = next(iter(outcome.models.values())).trained.fields
        made.append(plots.forecasts(directory / f"{prefix}_{stamp}_{level}_forecast.png", outcome, fields))
    return made


def _tell(console: Console, level: str, outcome: Level) -> None:
    table = Table(title=f"{level} level, test part; skill against the {BASELINE}", box=None, header_style="")
    for column in ("model", "target", "MAE", "MASE", "skill", "95 %", "coverage"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("model", "target") else "right")
    for name in (*outcome.models, BASELINE):
        for field, score in outcome.scores[name].items():
            skill, ends = f"{score.skill:+.1%}", f"{score.skill_ci[0]:+.1%} {score.skill_ci[1]:+.1%}"
            against = ("", "") if name == BASELINE else (skill, ends)
            table.add_row(name, field, f"{score.mae:.4g}", f"{score.mase:.3f}", *against, f"{score.coverage:.3f}")
    console.print(table)
    naive = ", ".join(
        f"{field}: {one.label}" for field, one in zip(outcome.scores[BASELINE], outcome.naive, strict=True)
    )
    console.print(f"{BASELINE} = {naive}", markup=False)
    console.print(f"recommended: {outcome.recommended}", markup=False)


def _finish(
    console: Console, job: Job, paths: Sequence[Path], pictures: Sequence[Path], levels: Mapping[str, Level]
) -> None:
    for path in (*paths, *pictures):
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    console.print(
        f"{len(paths)} models saved, reloaded and found identical at {datetime.now():%H:%M:%S}", markup=False
    )
    if job.out_json is None:
        return
    results = {
        "checkpoints": [str(path) for path in paths],
        "pictures": [str(path) for path in pictures],
        "verified": True,
        "levels": {
            level: {
                "recommended": outcome.recommended,
                "scores": {
                    name: {field: score.as_dict() for field, score in by_field.items()}
                    for name, by_field in outcome.scores.items()
                },
            }
            for level, outcome in levels.items()
        },
    }
    try:
        job.out_json.write_text(json.dumps(finite(results), indent=1, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{job.out_json} cannot be written ({error.strerror})") from error
