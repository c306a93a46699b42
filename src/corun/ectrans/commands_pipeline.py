"""The commands of `src/ectrans.py` that serve, load, compare and simulate the pipeline."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add serve, load, compare and simulate."""
