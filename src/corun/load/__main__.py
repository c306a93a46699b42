"""`python -m corun.load RING... --csv FILE`: turn record files into a table, those of a killed client too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corun.errors import guard
from corun.load.ring import ring_to_csv

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    rings: Annotated[list[Path], typer.Argument(help="record files (.ring), oldest first")],
    csv: Annotated[Path, typer.Option(help="table the rows are appended to")],
) -> None:
    """Append the rows of record files to an infer_client table."""
    with guard():
        for ring in rings:
            print(f"{ring_to_csv(ring, csv)} rows of {ring} -> {csv}")


if __name__ == "__main__":
    app()
