"""Trains the request predictor on the best device there is, with its full settings."""

from __future__ import annotations

import typer

from corun.errors import guard
from corun.predict import training
from corun.predict.training import Job, model_names, run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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
    """Train on CUDA where there is a device (input 100, 100 epochs, batch 64), else as cpu_training.py does."""
    with guard():
        run(
            Job(
                prefix="production",
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
