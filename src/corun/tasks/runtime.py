"""What a replica is, and what the runtimes that start one have in common: handles, limits, health, back-off.

A replica is the project's own server for one model on one port, started by hand's command line:

    process   a child in its own process group, cgroup limits where this user may set them
    docker    a container of the project's image, or of any image with the checkout mounted
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from corun.errors import InputError, RunFault, WireError
from corun.process import thread_environment
from corun.registry import home
from corun.tasks.variant import Variant
from corun.wire.channel import Channel
from corun.wire.messages import Hello, Stats
from corun.wire.sockets import Address, connect

STABLE_S: Final = 60.0


@dataclass(frozen=True)
class Limits:
    """What one replica may use; None = no limit. cpu: cores. gpu: index of the device it sees."""

    cpu: float | None = None
    memory_mib: float | None = None
    gpu: int | None = None


@dataclass(frozen=True)
class ReplicaSpec:
    """One replica: what it serves and where.

    weights: None = random, "default" = released, else a file. nice: of the process (0 to 19). policy: of its queue.
    log_path: its output is appended there, restarts included. out: directory of infer_server/*.csv, None = no rows.
    """

    task_id: str
    index: int
    model: str
    weights: str | None
    port: int
    log_path: Path
    threads: int = 1
    limits: Limits = field(default_factory=Limits)
    nice: int = 0
    policy: str = "fifo"
    host: str = "127.0.0.1"
    device: str = "cpu"
    max_batch: int = 1
    max_delay_ms: float = 0.0
    queue_limit: int = 1024
    warmup: int = 3
    out: Path | None = None

    @property
    def name(self) -> str:
        """`<task>-<index>`: of the service, the container and its rows."""
        return f"{self.task_id}-{self.index}"

    @property
    def address(self) -> Address:
        return Address("tcp", self.host, self.port)


@dataclass(frozen=True)
class Usage:
    """What a replica has used; None where it cannot be read.

    cpu_s: since its start. rss_mib, gpu_mib: now.
    """

    cpu_s: float
    rss_mib: float | None
    gpu_mib: float | None = None


class Handle(Protocol):
    """A replica that was started; every method may be called after it ended."""

    @property
    def spec(self) -> ReplicaSpec: ...

    @property
    def address(self) -> Address:
        """Where it listens."""

    @property
    def id(self) -> str:
        """Its pid or container id."""

    @property
    def pid(self) -> int | None:
        """Pid on this host of what it runs in, None when it cannot be known."""

    @property
    def limits_in_force(self) -> dict[str, str]:
        """What limits it really has and why one it asked for is missing: `{"memory": "512 MiB (cgroup v1)"}`."""

    def alive(self) -> bool:
        """Whether it runs; it may still be loading its model."""

    def healthy(self, timeout_s: float = 2.0) -> bool:
        """Whether it answers HELLO and STATS in time with the model loaded."""

    def logs(self, tail: int = 50) -> str:
        """Its last lines."""

    def how_it_ended(self) -> str:
        """`exited with 2: error: ...`, `was killed by SIGKILL`, `is running`."""

    def stop(self, grace_s: float = 10.0) -> None:
        """Ask it to finish what is outstanding, kill it after grace_s, wait until it is gone."""

    def kill(self) -> None:
        """End it now and wait until it is gone."""

    def usage(self) -> Usage:
        """What it uses; zeros after its end."""


class Runtime(Protocol):
    """Starts replicas."""

    name: str

    def start(self, spec: ReplicaSpec) -> Handle:
        """Start one and return at once; InputError or RunFault when it cannot be started at all."""


@dataclass(frozen=True)
class Backoff:
    """When a replica that ended is started again: after first_s, doubled for each quick end up to most_s.

    A replica that had run for stable_s begins anew. Pure: the caller brings the clock.

        ends        1      2      3      4 ...
        waits       0.5    1      2      4 ... 30 s
    """

    first_s: float = 0.5
    factor: float = 2.0
    most_s: float = 30.0
    stable_s: float = STABLE_S
    failures: int = 0
    due_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.first_s > 0 and self.factor >= 1 and self.most_s >= self.first_s and self.stable_s > 0):
            raise InputError("the back-off needs first_s > 0, factor >= 1, most_s >= first_s and stable_s > 0")

    def ended(self, now_s: float, ran_s: float) -> Backoff:
        """The back-off after an end at now_s of a replica that had run for ran_s; `due_s` is when to start again."""
        failures = 1 if ran_s >= self.stable_s else self.failures + 1
        steps = min(failures - 1, 64)
        wait_s = min(self.most_s, self.first_s * self.factor**steps)
        return Backoff(self.first_s, self.factor, self.most_s, self.stable_s, failures, now_s + wait_s)

    def due(self, now_s: float) -> bool:
        """Whether it may be started now."""
        return now_s >= self.due_s


def server_flags(spec: ReplicaSpec, host: str | None = None) -> list[str]:
    """Flags of src/server.py for a replica; host: where it listens, when that differs from where it is reached."""
    words = Variant.parse(spec.model).flags(spec.weights)
    given: dict[str, Any] = {
        "--name": spec.name,
        "--host": host or spec.host,
        "--port": spec.port,
        "--device": spec.device,
        "--threads": spec.threads,
        "--queue-limit": spec.queue_limit,
        "--max-batch": spec.max_batch,
        "--max-delay-ms": spec.max_delay_ms,
        "--policy": spec.policy,
        "--warmup": spec.warmup,
        "--out": spec.out,
    }
    return words + [word for flag, value in given.items() if value is not None for word in (flag, str(value))]


def server_command(spec: ReplicaSpec, parent_pid: int | None = None) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a replica on this host, as a person could type them."""
    argv = [sys.executable, str(home() / "src" / "server.py"), *server_flags(spec)]
    if parent_pid is not None:
        argv += ["--parent", str(parent_pid)]
    environment = {**thread_environment(spec.threads), "PYTHONUNBUFFERED": "1"}
    if spec.limits.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(spec.limits.gpu)
    return argv, environment


def answers(address: Address, timeout_s: float) -> dict[str, Any] | None:
    """HELLO and STATS of a server as one dict, or None when it does not answer both in time."""
    try:
        channel = Channel(connect(address, timeout_s))
    except WireError:
        return None
    try:
        return {**channel.request(Hello(role="supervisor"), timeout_s), **channel.request(Stats(), timeout_s)}
    except (WireError, RunFault):
        return None
    finally:
        channel.close()


def tail_of(text: str, lines: int) -> str:
    """The last lines of a text."""
    return "\n".join(text.rstrip().splitlines()[-lines:]) if lines > 0 else ""


def last_words(text: str) -> str:
    """What a program said last: its `error:` and what follows, or its last line."""
    lines = text.strip().splitlines()
    errors = [index for index, line in enumerate(lines) if line.startswith("error:")]
    return "\n".join(lines[errors[-1] :] if errors else lines[-1:])
