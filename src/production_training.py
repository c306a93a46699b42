"""Trains the request predictor on the best device there is, with its full settings."""

from __future__ import annotations

import typer

from corun.errors import guard
from corun.flags import takes
from corun.predict.training import Job, run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@takes(Job, prefix="production")
def main(job: Job) -> None:
    """Train on CUDA where there is a device (input 100, 100 epochs, batch 64), else as cpu_training.py does."""
    with guard():
        run(job)


if __name__ == "__main__":
    app()
