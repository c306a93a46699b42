"""A machine made of files in a temporary directory, for tests of sharing policies.

    host = FakeHost(tmp_path, processes={10: [10, 11], 20: [20]}, programs={"nvidia-smi": script})

/proc and /sys are real files under `root`; scheduler calls are recorded in `state`; commands run functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from corun.share.host import NORMAL_CLASS, Host

Program = Callable[[Sequence[str], Mapping[str, str], str], str]

NO_RIGHT = PermissionError(1, "Operation not permitted")


@dataclass
class ThreadState:
    """What the scheduler knows of one thread."""

    scheduling_class: int = NORMAL_CLASS
    nice: int = 0
    cores: tuple[int, ...] = (0, 1, 2, 3)


@dataclass
class Ran:
    """One command that was run."""

    argv: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    stdin: str = ""


class FakeHost(Host):
    """processes: threads of each process. programs: what each command does; it may raise OSError.

    forbidden: names of scheduler calls that fail with EPERM. user: the uid. machine_cores: those of the machine.
    """

    def __init__(
        self,
        root: Path,
        processes: Mapping[int, Sequence[int]] | None = None,
        programs: Mapping[str, Program] | None = None,
        forbidden: frozenset[str] = frozenset(),
        user: int = 1000,
        machine_cores: tuple[int, ...] = (0, 1, 2, 3),
    ) -> None:
        super().__init__(root)
        self.programs = dict(programs or {})
        self.forbidden = forbidden
        self.user = user
        self.machine_cores = machine_cores
        self.ran: list[Ran] = []
        self.state: dict[int, ThreadState] = {}
        for pid, tids in (processes or {}).items():
            self.add_process(pid, tids)

    def add_process(self, pid: int, tids: Sequence[int], children: Sequence[int] = ()) -> None:
        """A process with its threads; children are other processes added apart."""
        for tid in tids:
            self.put(f"proc/{pid}/task/{tid}/children", " ".join(map(str, children)) if tid == tids[0] else "")
            self.state[tid] = ThreadState(cores=self.machine_cores)

    def put(self, path: str, text: str = "") -> None:
        """A file of the machine."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def write(self, path: str, text: str) -> None:
        """Overwrite like /proc and cgroup files do, which have no length of their own."""
        file = self.root / path.lstrip("/")
        if not file.exists():
            raise FileNotFoundError(2, "No such file or directory", str(file))
        if not os.access(file, os.W_OK):
            raise NO_RIGHT
        file.write_text(text, encoding="utf-8")

    def make_directory(self, path: str) -> None:
        """A new cgroup has the files of its parent's controllers."""
        super().make_directory(path)
        parent = (self.root / path.lstrip("/")).parent
        for name in ("cgroup.procs", "cpu.idle", "cpu.weight", "cpu.shares"):
            if (parent / f"template.{name}").exists():
                self.put(f"{path}/{name}")

    def remove_directory(self, path: str) -> None:
        """A cgroup's files go with it."""
        directory = self.root / path.lstrip("/")
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()

    def _may(self, call: str) -> None:
        if call in self.forbidden:
            raise NO_RIGHT

    def set_class(self, tid: int, scheduling_class: int) -> None:
        self._may("set_class")
        self.state[tid].scheduling_class = scheduling_class

    def class_of(self, tid: int) -> int:
        return self.state[tid].scheduling_class

    def set_nice(self, tid: int, nice: int) -> None:
        self._may("set_nice")
        self.state[tid].nice = nice

    def nice_of(self, tid: int) -> int:
        return self.state[tid].nice

    def set_cores(self, tid: int, cores: Sequence[int]) -> None:
        self._may("set_cores")
        self.state[tid].cores = tuple(cores)

    def cores_of(self, tid: int) -> tuple[int, ...]:
        return self.machine_cores if tid == 0 else self.state[tid].cores

    @property
    def uid(self) -> int:
        return self.user

    def which(self, program: str) -> str | None:
        return f"/usr/bin/{program}" if program in self.programs else None

    def command(self, argv: Sequence[str], environment: Mapping[str, str] | None = None, stdin: str = "") -> str:
        self.ran.append(Ran(tuple(argv), dict(environment or {}), stdin))
        if argv[0] not in self.programs:
            raise FileNotFoundError(2, "No such file or directory", argv[0])
        return self.programs[argv[0]](argv, environment or {}, stdin)
