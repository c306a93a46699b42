"""`python -m corun.launch.together [--lanes JSON] -- COMMAND -- COMMAND ...`: programs of a run as threads of one process.

    main thread     signals ─ starts the parts one after the other ─ waits until all have ended
    server NAME     the serve loop (io thread); its model thread lives in the services' lane
    trainer NAME    builds, reports and trains, in the trainer's lane

Each COMMAND is the very command line the program has as a process: `python src/server.py ...` or
`python -m corun.train ...`. Sockets, control connections, files and rows are those of separate processes; what they
have in common is the interpreter (its lock is why one process costs something even on a CPU), the allocator and, on a
GPU, one CUDA context, inside which stream priorities and green contexts act (`--lanes`, see corun.share.in_process).

Parts start in the order given, each once the one before is ready: models draw their weights from one global generator.
Until all are ready one failure ends everything. Later a part that fails is named on a line `error: PART: reason`, and
the others go on; the exit code is then 1.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from corun.errors import EXIT_FAILED, EXIT_INTERRUPTED, CorunError, InputError, RunFault, guard
from corun.process import StopFlag, StopSignal, available_cores, die_with_parent, set_threads
from corun.run import serving
from corun.run.commandline import read
from corun.run.serving import Serving
from corun.share.in_process import NO_LANES, Lanes, check_lanes, make_lanes
from corun.torch_tools import one_cuda_device
from corun.train import program as training
from corun.train.program import Training

SERVER, TRAINER = "server", "trainer"
SCRIPT, MODULE = "server.py", "corun.train"
LOOK_S = 0.1
ERROR = "error: "

T = TypeVar("T")


@dataclass(frozen=True)
class Together:
    """What is asked for: services, at most one trainer, and the lanes they run in ({} = none)."""

    services: tuple[Serving, ...]
    trainer: Training | None
    lanes: Mapping[str, Any]

    @property
    def threads(self) -> int:
        """Intra-op threads the process' libraries are made for: those of the part that has most."""
        asked = [service.threads for service in self.services]
        return max([*asked, *([self.trainer.threads or available_cores()] if self.trainer else [])])

    @property
    def labels(self) -> list[str]:
        """Names of all parts, as messages have them."""
        trainer = [f"{TRAINER} {self.trainer.label}"] if self.trainer else []
        return [*(f"{SERVER} {service.label}" for service in self.services), *trainer]


# The command line


def parse(argv: Sequence[str]) -> Together:
    """The whole command line; InputError lists what is wrong with every command."""
    head, *commands = _cut(argv)
    problems: list[str] = []
    lanes = _attempt(problems, "--lanes", lambda: _lanes(head)) or {}
    found = [_attempt(problems, _name(command), lambda each=command: _read(each)) for command in commands]  # type: ignore[misc]
    if not commands:
        problems.append("no command: give each program's command line behind a --")
    services = tuple(one for one in found if isinstance(one, Serving))
    trainers = [one for one in found if isinstance(one, Training)]
    if len(trainers) > 1:
        problems.append(f"{len(trainers)} trainers: one process has one at most")
    names = [service.label for service in services]
    problems += [f"service {name} stands twice" for name in sorted(set(names)) if names.count(name) > 1]
    if problems:
        raise InputError("these programs cannot be one process", problems)
    return Together(services, trainers[0] if trainers else None, lanes)


def check(together: Together) -> None:
    """InputError that lists every service with an unknown model or wrong options; imports what lists the models."""
    problems: list[str] = []
    for service in together.services:
        _attempt(problems, f"{SERVER} {service.label}", service.check)
    if problems:
        raise InputError("these programs cannot be one process", problems)


def _cut(argv: Sequence[str]) -> list[list[str]]:
    """The words before the first `--`, between each two, and behind the last."""
    parts: list[list[str]] = [[]]
    for word in argv:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _lanes(head: Sequence[str]) -> dict[str, Any]:
    if not head:
        return {}
    if head[0] != "--lanes" or len(head) != 2:
        raise InputError(f"before the first -- stands --lanes JSON or nothing, not {' '.join(head)}")
    try:
        asked = json.loads(head[1])
    except ValueError as error:
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(asked, dict):
        raise InputError(f"not a JSON object: {head[1]}")
    check_lanes(asked)
    return asked


def _words(command: Sequence[str]) -> list[str]:
    """A command line without its interpreter."""
    python = command and os.path.basename(command[0]).startswith("python")
    return list(command[1:] if python else command)


def _name(command: Sequence[str]) -> str:
    return " ".join(_words(command)[:4]) or "an empty command"


def _read(command: Sequence[str]) -> Serving | Training:
    """One program's command line as that program would read it."""
    words = _words(command)
    if words and os.path.basename(words[0]) == SCRIPT:
        return read(serving.flags, words[1:])
    if words[:2] == ["-m", MODULE]:
        return read(training.flags, words[2:])
    raise InputError(f"neither {SCRIPT} nor -m {MODULE}")


def _attempt(problems: list[str], what: str, act: Callable[[], T]) -> T | None:
    try:
        return act()
    except InputError as error:
        problems.append(f"{what}: {'; '.join([error.what, *error.problems])}")
        return None


# Parts


class Part:
    """One program in a thread of its own, asked to end by `stop`.

    is_ready: whether it does its work already. error: what ended it early. bell: written to when it ended.
    """

    def __init__(self, label: str, work: Callable[[StopFlag], None], is_ready: Callable[[], bool], bell: int) -> None:
        self.label = label
        self.stop = StopFlag()
        self.error: CorunError | None = None
        self._work = work
        self._is_ready = is_ready
        self._bell = bell
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=label, daemon=True)

    def start(self, stop: StopFlag) -> None:
        """Until it is ready, has ended, or all is to stop; raises what it failed with."""
        self._thread.start()
        while not (self._is_ready() or self.join(LOOK_S) or stop.requested):
            pass
        if self.ended and self.error:
            raise self.error

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def join(self, timeout_s: float) -> bool:
        """Wait for its end; False when it still runs."""
        return self._ended.wait(timeout_s)

    def _run(self) -> None:
        try:
            self._work(self.stop)
        except CorunError as error:
            self._fail(error)
        except BaseException as error:  # noqa: BLE001 - top of the thread: the main thread says it
            traceback.print_exc()
            self._fail(RunFault(f"{type(error).__name__}: {error}"))
        finally:
            self._ended.set()
            os.eventfd_write(self._bell, 1)

    def _fail(self, error: CorunError) -> None:
        """Keep the error without what its frames hold: a model's memory is wanted by those that go on."""
        error.__cause__ = error.__context__ = None
        self.error = error.with_traceback(None)


def server_part(service: Serving, lanes: Lanes, facts: Mapping[str, Any], bell: int) -> Part:
    """A service: its loop in the part's thread, its model thread in the services' lane."""
    from corun.serve.program import build, serve
    from corun.share.announce import parse as announcer

    observer = announcer(service.announce) if service.announce else None
    server = build(service, observer, None if lanes is NO_LANES else lanes.service, facts)

    def work(stop: StopFlag) -> None:
        say(serve(server, service, stop))

    return Part(
        f"{SERVER} {service.label}", work, lambda: not service.model or server.worker.engine is not None, bell
    )


def trainer_part(job: Training, lanes: Lanes, facts: Mapping[str, Any], bell: int) -> Part:
    """The trainer: built and run in the trainer's lane."""
    built = threading.Event()

    def work(stop: StopFlag) -> None:
        with lanes.trainer():
            training.run(job, stop, built.set, facts)

    return Part(f"{TRAINER} {job.label}", work, built.is_set, bell)


def say(line: str) -> None:
    print(line, flush=True)


# All of them


def run(together: Together, stop: StopFlag) -> int:
    """Run all parts until each has ended; the exit code. Raises what one failed with before all were ready."""
    from corun.serve.options import SWITCH_INTERVAL_S

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    lanes = lanes_of(together)
    facts = {"one_process": together.labels, "lanes": lanes.in_force}
    bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    makers: list[Callable[[], Part]] = [
        partial(server_part, service, lanes, facts, bell) for service in together.services
    ]
    if together.trainer:
        makers.append(partial(trainer_part, together.trainer, lanes, facts, bell))
    parts: list[Part] = []
    try:
        for label, make in zip(together.labels, makers, strict=True):
            if stop.requested:
                break
            with _naming(label):
                parts.append(make())
                parts[-1].start(stop)
        return _watch(parts, stop, bell)
    finally:
        _end(parts)


@contextmanager
def _naming(label: str) -> Iterator[None]:
    """Errors inside get the part's name in front and stay of their kind."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{label}: {error.what}", error.problems) from None
    except CorunError as error:
        raise type(error)(f"{label}: {error}") from None


def lanes_of(together: Together) -> Lanes:
    """The lanes on the one CUDA device of all parts; InputError when they are on several devices or on none."""
    if not together.lanes:
        return NO_LANES
    names = [service.device for service in together.services]
    names += [together.trainer.options.device] if together.trainer else []
    torch, device = one_cuda_device(names)
    return make_lanes(torch, device, together.lanes)


def _watch(parts: Sequence[Part], stop: StopFlag, bell: int) -> int:
    """Name the parts that fail, pass a stop on, return when none is left."""
    told: set[str] = set()
    while not all(part.ended for part in parts):
        if stop.requested:
            for part in parts:
                part.stop.request()
        select.select([bell] if stop.requested else [bell, stop.fileno()], [], [])
        _silence(bell)
        _tell(parts, told)
    _tell(parts, told)
    return EXIT_FAILED if told else 0


def _tell(parts: Sequence[Part], told: set[str]) -> None:
    for part in parts:
        if part.error and part.label not in told:
            told.add(part.label)
            say(f"{ERROR}{part.label}: {part.error}")


def _silence(bell: int) -> None:
    with suppress(BlockingIOError):
        os.eventfd_read(bell)


def _end(parts: Sequence[Part]) -> None:
    """Ask whatever still runs to end, and wait; a further interrupt does not wait."""
    for part in parts:
        part.stop.request()
    while not all(part.join(LOOK_S) for part in parts):
        pass


def main(argv: Sequence[str]) -> None:
    """Read the command lines, be their process, end with an exit code; never leaves a thread behind."""
    code = EXIT_INTERRUPTED
    try:
        with guard(), StopSignal() as stop:
            together = parse(argv)
            parents = {service.parent for service in together.services if service.parent}
            if parents or (together.trainer and together.trainer.control):
                die_with_parent(next(iter(parents), None))
            set_threads(together.threads)
            check(together)
            code = run(together, stop)
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else EXIT_FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
