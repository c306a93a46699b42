"""One client with one request in flight: paced by a schedule, or as fast as replies come."""

from __future__ import annotations

import typer

from corun.errors import guard
from corun.flags import takes
from corun.load.flags import Flags
from corun.process import set_threads

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@takes(Flags, one_at_a_time=True)
def main(flags: Flags) -> None:
    """Send one request at a time and record every one; prints sojourn, response and slip."""
    with guard():
        set_threads(1)
        from corun.load.door import run

        run(flags)


if __name__ == "__main__":
    app()
