"""What a launcher tells the person who started it: progress with the time of day, why cells failed, the exit code."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from rich.console import Console
from rich.markup import escape

from corun.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK


class Ended(Protocol):
    """How something that was measured ended: an Outcome or a CellResult."""

    @property
    def status(self) -> str: ...

    @property
    def reasons(self) -> Sequence[str]: ...


def sayer(console: Console, quiet: bool = False) -> Callable[[str], None]:
    """Lines of progress on a console, each with the time; none when quiet."""

    def say(line: str) -> None:
        if not quiet:
            console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {escape(line)}", highlight=False)

    return say


def tell_reasons(console: Console, ended: Ended, label: str = "") -> None:
    """Why something was not measured; nothing where there is nothing to say."""
    for reason in ended.reasons:
        console.print(f"[red]{label}{': ' * bool(label)}{ended.status}:[/] {escape(reason)}", highlight=False)


def exit_code(everything: Iterable[Ended], interrupted: bool) -> int:
    """130 when interrupted, 1 when anything is not complete, else 0."""
    if interrupted:
        return EXIT_INTERRUPTED
    return EXIT_OK if all(one.status == "complete" for one in everything) else EXIT_FAILED
