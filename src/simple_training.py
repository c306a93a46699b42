"""Trains the request predictor in one call and says whether it worked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from corun.errors import CorunError, guard
from corun.predict import training
from corun.predict.training import Job, model_names, run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class SimpleTrainer:
    """Training in one call, for notebooks and scripts.

    Usage::

        SimpleTrainer().run_simple_training("dataset/BurstGPT_1.csv", 100_000)
    """

    def __init__(self, model_dir: Path | None = None, **settings: Any) -> None:
        self.model_dir = model_dir
        self.settings = settings
        self.reason = ""

    def run_simple_training(self, data_path: str | Path | None = None, sample_size: int = 100_000) -> bool:
        """Train, save and reload; False when any of it failed, with the cause in `reason` and on stderr."""
        path = None if data_path is None else Path(data_path)
        job = Job("simple", path, sample_size, model_dir=self.model_dir, **self.settings)
        try:
            run(job)
        except CorunError as error:
            self.reason = str(error)
            print(f"error: {error}", file=sys.stderr)
            return False
        return True


@app.command()
def main(
    more_models: training.MoreModels = None,
    data_path: training.DataPath = None,
    sample_size: training.SampleSize = 100_000,
    from_end: training.FromEnd = False,
    models: training.Models = None,
    model_dir: training.ModelDir = None,
    device: training.Device = "auto",
    seed: training.Seed = 0,
    seq_len: training.SeqLen = None,
    epochs: training.Epochs = None,
    batch_size: training.BatchSize = None,
    lr: training.LearningRate = None,
    window_s: training.WindowS = 10.0,
    interval: training.Interval = 0.9,
    response_lag_s: training.ResponseLagS = training.RESPONSE_LAG_S,
    out_json: training.OutJson = None,
) -> None:
    """Train LSTM and DLinear on a trace, judge them against the best naive forecast, save and reload them."""
    with guard():
        run(
            Job(
                prefix="simple",
                data_path=data_path,
                sample_size=sample_size,
                from_end=from_end,
                models=model_names(models, more_models),
                model_dir=model_dir,
                device=device,
                seed=seed,
                seq_len=seq_len,
                epochs=epochs,
                batch_size=batch_size,
                lr=lr,
                window_s=window_s,
                interval=interval,
                response_lag_s=response_lag_s,
                out_json=out_json,
            )
        )


if __name__ == "__main__":
    app()
