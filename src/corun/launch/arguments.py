"""`--models a b c` on command lines whose parser wants `--models a --models b --models c`."""

from __future__ import annotations

from collections.abc import Sequence


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
