"""Replicas as containers of Docker or Podman, through the docker SDK and the engine at DOCKER_HOST.

Two ways to bring the program into a container:

    image      the project's own image, built from its Dockerfile: nothing of the host is seen
    checkout   any small image, with this checkout and this Python mounted read-only: no build, for development

Containers use the host's network: the router reaches a replica at its port as it does a process. A container outlives
its supervisor, so each carries the label of the registry it belongs to, and `sweep` removes what an earlier one left.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from requests.exceptions import RequestException

from corun.errors import InputError, RunFault
from corun.registry import home
from corun.tasks.machine import MIB, cpu_and_memory, family_of, gpu_mib_of
from corun.tasks.runtime import ReplicaSpec, Usage, answers, last_words, server_command, server_flags, tail_of
from corun.tasks.variant import Variant
from corun.wire.sockets import Address

IMAGE: Final = "corun:latest"
APP: Final = "/app"
OWNER: Final = "corun.owner"
TASK: Final = "corun.task"
TIMEOUT_S: Final = 60
NANO: Final = 10**9
NS_PER_S: Final = 10**9


@dataclass(frozen=True)
class Source:
    """What runs in the containers. mounts: host directories seen read-only at the same path; {} = all is in the image."""

    image: str = IMAGE
    mounts: tuple[str, ...] = ()

    @classmethod
    def checkout(cls, image: str) -> Source:
        """This checkout under this Python, mounted into `image`."""
        wanted = ("/usr", "/lib", "/lib64", "/etc", sys.base_prefix, sys.prefix, str(home()))
        found = sorted({path for path in wanted if Path(path).exists()}, key=len)
        covered = [path for path in found if any(path.startswith(f"{other}/") for other in found)]
        return cls(image, tuple(path for path in found if path not in covered))

    def command(self, spec: ReplicaSpec) -> tuple[list[str], dict[str, str]]:
        """Command line and environment inside the container."""
        argv, environment = server_command(spec)
        if self.mounts:
            environment = {**environment, "PYTHONPATH": str(home() / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
            passed = ("TORCH_HOME", "CORUN_HOME", "CORUN_DATA")
            return argv, {**{name: os.environ[name] for name in passed if name in os.environ}, **environment}
        return ["python", f"{APP}/src/server.py", *server_flags(spec)], environment


@contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """The SDK's errors as ours, naming what was attempted."""
    try:
        yield
    except ImageNotFound as error:
        raise InputError(f"{what}: {error.explanation or error}; build it: docker build -t {IMAGE} .") from error
    except APIError as error:
        raise RunFault(f"{what}: the container engine refused: {error.explanation or error}") from error
    except (DockerException, RequestException) as error:
        raise RunFault(f"{what}: the container engine does not answer: {error}") from error


class DockerRuntime:
    """Starts replicas in containers. owner: whose they are, e.g. the path of the registry.

    Raises InputError when no engine answers at DOCKER_HOST (or the SDK's default socket).
    """

    name = "docker"

    def __init__(self, source: Source | None = None, owner: str = "", client: Any = None) -> None:
        self.source = source or Source()
        self.owner = owner or f"pid-{os.getpid()}"
        try:
            self._client = client or docker.from_env(timeout=TIMEOUT_S)
            self._client.ping()
        except (DockerException, RequestException) as error:
            where = os.environ.get("DOCKER_HOST") or "the default socket"
            raise InputError(
                f"no container engine answers at {where}: {error}",
                [
                    "start Docker or `podman system service`, and set DOCKER_HOST=unix:///path/to.sock if it is elsewhere"
                ],
            ) from error

    def close(self) -> None:
        """Release the connection to the engine."""
        self._client.close()

    def start(self, spec: ReplicaSpec) -> DockerHandle:
        """Create and start one container and return at once.

        InputError when the image is not there, RunFault when the engine refuses or cannot run it.
        """
        with engine_errors(f"cannot start {spec.name}"):
            container = self._client.containers.create(**self.settings(spec))
            try:
                container.start()
            except BaseException:
                with contextlib.suppress(DockerException, RequestException):
                    container.remove(force=True)
                raise
        return DockerHandle(spec, container)

    def settings(self, spec: ReplicaSpec) -> dict[str, Any]:
        """Arguments of the SDK's `containers.create` for a replica."""
        argv, environment = self.source.command(spec)
        limits = spec.limits
        volumes = {path: {"bind": path, "mode": "ro"} for path in self.source.mounts}
        if spec.out is not None:
            spec.out.mkdir(parents=True, exist_ok=True)
            volumes[str(spec.out.resolve())] = {"bind": str(spec.out), "mode": "rw"}
        for weights in (spec.weights, Variant.parse(spec.model).options.get("weights")):
            if weights and os.path.isabs(weights):
                volumes.setdefault(weights, {"bind": weights, "mode": "ro"})
        settings: dict[str, Any] = {
            "image": self.source.image,
            "command": argv,
            "name": f"corun-{spec.name}-{uuid4().hex[:6]}",
            "environment": environment,
            "labels": {OWNER: self.owner, TASK: spec.task_id},
            "network_mode": "host",
            "volumes": volumes,
            "detach": True,
        }
        if limits.cpu is not None:
            settings["nano_cpus"] = round(limits.cpu * NANO)
        if limits.memory_mib is not None:
            settings["mem_limit"] = round(limits.memory_mib * MIB)
        gpu = 0 if limits.gpu is None and spec.device.startswith("cuda") else limits.gpu
        if gpu is not None:
            settings["device_requests"] = [docker.types.DeviceRequest(device_ids=[str(gpu)], capabilities=[["gpu"]])]
            settings["environment"] = {
                name: text for name, text in environment.items() if name != "CUDA_VISIBLE_DEVICES"
            }
        return settings

    def sweep(self) -> int:
        """Remove every container of this owner, whoever started it; returns how many there were."""
        with engine_errors("cannot look for containers of an earlier run"):
            left = self._client.containers.list(all=True, filters={"label": f"{OWNER}={self.owner}"})
            for container in left:
                with contextlib.suppress(NotFound):
                    container.remove(force=True)
            return len(left)


@dataclass
class DockerHandle:
    """A replica that is, or was, a container. It is removed when it was stopped; its output is kept in the log."""

    spec: ReplicaSpec
    _container: Any
    _ended: str = ""
    _last: Usage = field(default_factory=lambda: Usage(0.0, 0.0))

    @property
    def address(self) -> Address:
        return self.spec.address

    @property
    def id(self) -> str:
        return str(self._container.id)[:12]

    @property
    def pid(self) -> int | None:
        """Pid of its first process on this host, None when it ended or the engine runs elsewhere."""
        pid = self._state().get("Pid") or 0
        return pid if pid and Path(f"/proc/{pid}").exists() else None

    @property
    def limits_in_force(self) -> dict[str, str]:
        limits = self.spec.limits
        found = {}
        if limits.cpu is not None:
            found["cpu"] = f"{limits.cpu:g} cores (container)"
        if limits.memory_mib is not None:
            found["memory"] = f"{limits.memory_mib:g} MiB (container)"
        return found | ({"gpu": f"device {limits.gpu}"} if limits.gpu is not None else {})

    def _state(self) -> Mapping[str, Any]:
        if self._ended:
            return {}
        with engine_errors(f"cannot ask about {self.spec.name}"):
            try:
                self._container.reload()
            except NotFound:
                self._ended = "was removed by somebody else"
                return {}
        state: Mapping[str, Any] = self._container.attrs["State"]
        return state

    def alive(self) -> bool:
        return bool(self._state().get("Running"))

    def healthy(self, timeout_s: float = 2.0) -> bool:
        if not self.alive():
            return False
        body = answers(self.address, timeout_s)
        return body is not None and body.get("name") == self.spec.name and bool(body.get("model"))

    def logs(self, tail: int = 50) -> str:
        from corun.tasks.process_runtime import read_tail

        if self._ended:
            return tail_of(read_tail(self.spec.log_path), tail)
        return tail_of(self._output(), tail)

    def _output(self) -> str:
        with engine_errors(f"cannot read the log of {self.spec.name}"):
            try:
                text: bytes = self._container.logs(stdout=True, stderr=True)
            except NotFound:
                return ""
        return text.decode("utf-8", errors="replace")

    def how_it_ended(self) -> str:
        if self._ended:
            return self._ended
        state = self._state()
        if not state:
            return self._ended
        if state.get("Running"):
            return "is running"
        if state.get("OOMKilled"):
            return f"was killed: it needed more than its {self.limits_in_force.get('memory', 'memory')}"
        words = last_words(self._output())
        return f"exited with {state.get('ExitCode')}" + (f": {words}" if words else "")

    def stop(self, grace_s: float = 10.0) -> None:
        with engine_errors(f"cannot stop {self.spec.name}"), contextlib.suppress(NotFound):
            if not self._ended:
                self._container.stop(timeout=max(1, round(grace_s)))
        self._remove()

    def kill(self) -> None:
        self._remove()

    def _remove(self) -> None:
        """Keep its output, then remove it."""
        if self._ended:
            return
        ended = self.how_it_ended()
        ended = "was killed" if ended == "is running" else ended
        with contextlib.suppress(RunFault, OSError):
            self.spec.log_path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.spec.log_path, "a", encoding="utf-8") as file:
                file.write(f"# container {self.id}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n{self._output()}")
        with engine_errors(f"cannot remove {self.spec.name}"), contextlib.suppress(NotFound):
            self._container.remove(force=True)
        self._ended = ended

    def usage(self) -> Usage:
        pid = self.pid
        if pid is not None:
            cpu_s, rss_mib = cpu_and_memory(pid)
            self._last = Usage(cpu_s, rss_mib, gpu_mib_of(process.pid for process in family_of(pid)))
        elif self.alive():
            self._last = self._by_engine()
        else:
            return Usage(self._last.cpu_s, 0.0)
        return self._last

    def _by_engine(self) -> Usage:
        """As the engine counts it, where its processes are not this host's."""
        with engine_errors(f"cannot ask what {self.spec.name} uses"):
            stats = self._container.stats(stream=False)
        memory = stats.get("memory_stats", {})
        used = memory.get("usage", 0) - memory.get("stats", {}).get("cache", 0)
        return Usage(stats["cpu_stats"]["cpu_usage"]["total_usage"] / NS_PER_S, used / MIB)
