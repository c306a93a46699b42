"""What a launcher says and how it exits."""

from __future__ import annotations

import io
import re

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from corun.launch.experiment import Outcome
from corun.launch.sweep import CellResult
from corun.launch.telling import exit_code, sayer, tell_reasons


def _console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=100), text


def test_progress_has_the_time_and_is_taken_literally() -> None:
    """A line is printed as it is, square brackets included, behind the time of day; quiet prints nothing."""
    console, text = _console()
    sayer(console)("cell [red] of [1/3]")
    sayer(console, quiet=True)("never")
    assert re.fullmatch(r"\d\d:\d\d:\d\d cell \[red\] of \[1/3\]\n", text.getvalue())


def test_reasons_stand_behind_the_status_and_the_label() -> None:
    """One line a reason; a label comes first where there is one."""
    console, text = _console()
    tell_reasons(console, CellResult("failed", ("no [data]", "too slow")), "null at 10/s")
    tell_reasons(console, Outcome("interrupted", ("by the user",)))
    tell_reasons(console, Outcome("complete"))
    assert text.getvalue().splitlines() == [
        "null at 10/s: failed: no [data]",
        "null at 10/s: failed: too slow",
        "interrupted: by the user",
    ]


@given(st.lists(st.sampled_from(["complete", "failed", "interrupted"])), st.booleans())
def test_exit_codes(statuses: list[str], interrupted: bool) -> None:
    """130 when interrupted, else 1 when anything is not complete, else 0."""
    wanted = 130 if interrupted else int(any(status != "complete" for status in statuses))
    assert exit_code([CellResult(status) for status in statuses], interrupted) == wanted
