"""`--models a b c` on command lines whose parser wants `--models a --models b --models c`; `--launch` on all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from corun.errors import InputError
from corun.run import config
from corun.run.launching import Launch


def spread(argv: Sequence[str], *options: str) -> list[str]:
    """Repeat each of `options` before every further word that follows it, up to the next option."""
    spread_out: list[str] = []
    current: str | None = None
    expects_value = False
    for word in argv:
        if word.startswith("--"):
            current = word if word in options else None
            expects_value = current is not None
        elif current is not None:
            if not expects_value:
                spread_out.append(current)
            expects_value = False
        spread_out.append(word)
    return spread_out


def launch_of(text: str | None) -> Launch:
    """The value of `--launch`: a config.json whose `launch` key is taken, or that object itself; None = local.

    InputError lists every problem.
    """
    if text is None:
        return Launch()
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"--launch is not JSON: {error}") from None
        return config.parse({"launch": value}, "--launch").launch
    return config.load(Path(text)).launch
