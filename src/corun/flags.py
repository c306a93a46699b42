"""A command line from a dataclass: its fields are the flags, so that what a program takes is written down once.

    @dataclass(frozen=True)
    class Flags:
        rate: Annotated[float, typer.Option(help="mean requests/s")] = 10.0
        duration_s: Annotated[float, typer.Option("--duration", help="seconds")] = 10.0
        one_at_a_time: bool = False

    @app.command()
    @takes(Flags, one_at_a_time=True)
    def main(flags: Flags) -> None:
        ...

Typer reads a function's signature; `takes` writes the one that the fields spell. Programs that differ in a default or
in a help text override that field in a subclass: it keeps its place among the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")
Result = TypeVar("Result")


def takes(options: type[Options], **fixed: Any) -> Callable[[Callable[[Options], Result]], Callable[..., Result]]:
    """Give a program of one `options` object a flag for every field that is not `fixed`; its result stays.

    Raises TypeError when a fixed name is not a field.
    """
    known = {field.name: field for field in fields(options)}
    if unknown := fixed.keys() - known:
        raise TypeError(f"{options.__name__} has no field {', '.join(sorted(unknown))}")
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[name],
        )
        for name, field in known.items()
        if name not in fixed
    ]

    def decorate(program: Callable[[Options], Result]) -> Callable[..., Result]:
        @wraps(program)
        def command(**given: Any) -> Result:
            return program(options(**given, **fixed))

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate
