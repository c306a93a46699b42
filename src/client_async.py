"""One open-loop client: every request leaves at its due instant, however slow the server is."""

from __future__ import annotations

import typer

from corun.errors import guard
from corun.flags import takes
from corun.load.flags import OpenFlags
from corun.process import set_threads

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@takes(OpenFlags, one_at_a_time=False, after_reply=False, think_s=0.0)
def main(flags: OpenFlags) -> None:
    """Send requests on a schedule and record every one; prints sojourn, response and slip."""
    with guard():
        set_threads(1)
        from corun.load.door import run

        run(flags)


if __name__ == "__main__":
    app()
