"""`python -m corun.share.start [flags] -- command ...`: become a process that is already under its policy.

Scheduling class, nice value, cores, cgroup and memory limit are set before the command is executed, so every
thread it ever makes inherits them, and an OpenMP pool is sized for the cores it really has. The log of a run
therefore shows one command line that a person can repeat.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from corun.errors import InputError, RunFault, guard
from corun.share.borders import set_autogroup_nice
from corun.share.host import IDLE_CLASS, Host, why_not

MIB = 1 << 20


@dataclass(frozen=True)
class Setup:
    """What is set before a process starts; None = left as it is.

    idle: SCHED_IDLE. cgroup: directory whose cgroup.procs takes the process. autogroup_nice: of its session.
    data_limit_mib: RLIMIT_DATA, so that running out of memory is this process' own error.
    """

    nice: int | None = None
    idle: bool = False
    cores: tuple[int, ...] = ()
    cgroup: str | None = None
    autogroup_nice: int | None = None
    data_limit_mib: int | None = None

    def merged(self, other: Setup) -> Setup:
        """Both; `other` wins where both say something."""
        said = {item.name: getattr(other, item.name) for item in fields(other)}
        return replace(
            self,
            **{name: value for name, value in said.items() if not (value is None or value is False or value == ())},
        )

    def flags(self) -> list[str]:
        """The command line flags that ask for it; none for an empty setup."""
        flags = ["--idle"] if self.idle else []
        if self.cores:
            flags += ["--cores", ",".join(map(str, self.cores))]
        for name in ("nice", "cgroup", "autogroup_nice", "data_limit_mib"):
            value = getattr(self, name)
            if value is not None:
                flags += [f"--{name.replace('_', '-')}", str(value)]
        return flags

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv` started under this setup; `argv` itself when there is nothing to set."""
        flags = self.flags()
        return [sys.executable, "-m", "corun.share.start", *flags, "--", *argv] if flags else list(argv)


def parse(argv: Sequence[str]) -> tuple[Setup, list[str]]:
    """Flags and the command behind `--`; InputError says what is wrong."""
    words = list(argv)
    if "--" not in words or words[-1] == "--":
        raise InputError("no command to start: python -m corun.share.start [flags] -- command ...")
    divider = words.index("--")
    given: dict[str, Any] = {}
    flags = iter(words[:divider])
    for flag in flags:
        name = flag.removeprefix("--").replace("-", "_")
        if name == "idle":
            given[name] = True
        elif name not in {item.name for item in fields(Setup)}:
            raise InputError(f'unknown flag "{flag}" before --')
        else:
            given[name] = _value(name, next(flags, ""))
    return Setup(**given), words[divider + 1 :]


def _value(name: str, text: str) -> object:
    if name == "cgroup":
        return text
    try:
        return tuple(int(core) for core in text.split(",")) if name == "cores" else int(text)
    except ValueError:
        raise InputError(f'--{name.replace("_", "-")} "{text}" is not a number') from None


def apply(setup: Setup, host: Host) -> None:
    """Put this process under the setup; RunFault says which part the kernel refused and why."""
    steps: tuple[tuple[str, object, Callable[[], None]], ...] = (
        ("cgroup", setup.cgroup, lambda: host.write(f"{setup.cgroup}/cgroup.procs", str(os.getpid()))),
        ("autogroup", setup.autogroup_nice, lambda: set_autogroup_nice(os.getpid(), setup.autogroup_nice or 0, host)),
        ("cores", setup.cores or None, lambda: host.set_cores(0, setup.cores)),
        ("nice", setup.nice, lambda: host.set_nice(0, setup.nice or 0)),
        ("SCHED_IDLE", setup.idle or None, lambda: host.set_class(0, IDLE_CLASS)),
        ("memory limit", setup.data_limit_mib, lambda: _limit_data(setup.data_limit_mib or 0)),
    )
    for what, wanted, act in steps:
        if wanted is None:
            continue
        try:
            act()
        except (OSError, ValueError) as error:
            reason = why_not(error) if isinstance(error, OSError) else str(error)
            raise RunFault(f"cannot set {what} to {wanted}: {reason}") from error


def _limit_data(mib: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (mib * MIB, mib * MIB))


def main(argv: Sequence[str]) -> None:
    """Apply, then become the command."""
    with guard():
        setup, command = parse(argv)
        apply(setup, Host())
        try:
            os.execvp(command[0], command)
        except OSError as error:
            raise InputError(f"cannot start {command[0]}: {error.strerror}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
