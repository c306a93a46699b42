"""The errors corun raises on purpose, and the one place that turns them into exit codes.

    CorunError                 exit 1: something went wrong and was recorded
    ├── InputError             exit 2: a flag, a file or a name the user can correct; lists every problem
    ├── RunFault               exit 1: a fault while running (killed child, full disk, lost peer)
    └── WireError              exit 1: the peer broke the protocol
        ├── FrameError         a header or payload that is not protocol v1
        └── PeerClosed         the peer went away

Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_SLO_MISSED = 3
EXIT_INTERRUPTED = 130


class CorunError(Exception):
    """Base of all errors raised on purpose; the message is a sentence for the user."""

    exit_code = EXIT_FAILED


class InputError(CorunError):
    """Bad input: `what` is wrong, with every problem found listed below it.

    Usage::

        raise InputError("config.json has 2 problems", ["train.0.arch: ...", "infer.1.rate: ..."])
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, what: str, problems: Sequence[str] = ()) -> None:
        self.what = what
        self.problems = tuple(problems)
        super().__init__("\n".join([what, *(f"  - {problem}" for problem in self.problems)]))


class RunFault(CorunError):
    """A fault while running; the run directory keeps everything up to it."""


class WireError(CorunError):
    """The peer broke the protocol or went away."""


class FrameError(WireError):
    """Bytes that are not a protocol v1 frame."""


class PeerClosed(WireError):
    """The peer closed the connection."""


def suggest(name: str, known: Iterable[str]) -> str:
    """`'; did you mean "resnet18"?'` for a near miss, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


@contextmanager
def guard() -> Iterator[None]:
    """Run a front door: our errors become one message on stderr and their exit code, never a traceback."""
    try:
        yield
    except CorunError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
