"""Runtimes by name, as tasks ask for them."""

from __future__ import annotations

from corun.errors import InputError, suggest
from corun.tasks.runtime import Runtime
from corun.tasks.task import RUNTIMES

__all__ = ["make_runtime"]


def make_runtime(name: str, image: str | None = None, checkout: bool = False, owner: str = "") -> Runtime:
    """The runtime called `process` or `docker`.

    image, checkout, owner: see docker_runtime. InputError for another name, or when no container engine answers.
    """
    if name == "process":
        from corun.tasks.process_runtime import ProcessRuntime

        return ProcessRuntime()
    if name == "docker":
        from corun.tasks.docker_runtime import IMAGE, DockerRuntime, Source

        return DockerRuntime(Source.checkout(image or IMAGE) if checkout else Source(image or IMAGE), owner)
    raise InputError(f'unknown runtime "{name}"{suggest(name, RUNTIMES)}', [f"runtimes: {', '.join(RUNTIMES)}"])
