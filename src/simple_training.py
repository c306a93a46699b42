"""Trains the request predictor in one call and says whether it worked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from corun.errors import CorunError, guard
from corun.flags import takes
from corun.predict.training import Job, run

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
@takes(Job, prefix="simple")
def main(job: Job) -> None:
    """Train LSTM and DLinear on a trace, judge them against the best naive forecast, save and reload them."""
    with guard():
        run(job)


if __name__ == "__main__":
    app()
