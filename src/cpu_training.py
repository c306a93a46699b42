"""Trains the request predictor on the CPU, with settings that end in minutes."""

from __future__ import annotations

import typer

from corun.errors import guard
from corun.flags import takes
from corun.predict.training import CpuJob, run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@takes(CpuJob, prefix="cpu", device="cpu")
def main(job: CpuJob) -> None:
    """Train on the CPU: input 80, 50 epochs at most, batch 32, stopped early when nothing improves."""
    with guard():
        run(job)


if __name__ == "__main__":
    app()
