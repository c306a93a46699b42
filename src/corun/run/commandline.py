"""A program's command line as a value, so that another program can read it and do the same work in a thread.

A function with typer's annotations and a value as its result describes the flags; `program` makes the command of it,
`read` gives the value alone. Both take the very same words.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import typer

from corun.errors import InputError, guard

T = TypeVar("T")


def program(flags: Callable[..., T], act: Callable[[T], None]) -> typer.Typer:
    """The command that reads its flags and acts on them, guarded; its help is the docstring of `flags`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @functools.wraps(flags)
    def main(**given: Any) -> None:
        with guard():
            act(flags(**given))

    app.command()(main)
    return app


def read(flags: Callable[..., T], argv: Sequence[str]) -> T:
    """The value of a command line without the program's name; InputError with what is wrong with it."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    found: list[T] = []

    @functools.wraps(flags)
    def keep(**given: Any) -> None:
        found.append(flags(**given))

    app.command()(keep)
    try:
        typer.main.get_command(app).main(args=list(argv), standalone_mode=False)
    except Exception as error:  # click's usage errors; typer brings a click of its own, so they have no one class
        sentence: Callable[[], str] | None = getattr(error, "format_message", None)
        if sentence is None:
            raise
        raise InputError(sentence()) from None
    if not found:
        raise InputError("it asks for help instead of work")
    return found[0]


def json_object(flag: str, text: str) -> dict[str, Any]:
    """The value of a flag that takes a JSON object; InputError names the flag."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{flag} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{flag} is not a JSON object such as '{{\"name\": 1}}': {text}")
    return value
