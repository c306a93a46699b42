"""The command line and environment of every role, as a person could type them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from corun import registry
from corun.launch.children import PYTHON
from corun.process import thread_environment
from corun.registry import home
from corun.run.config import NONE, Pair, Service, Train
from corun.wire.sockets import Address

CONNECT_WAIT_S = 10

Command = tuple[list[str], dict[str, str]]


def _script(name: str) -> list[str]:
    return [PYTHON, str(home() / "src" / name)]


def _flags(**values: object) -> list[str]:
    """`--flag value` for every value that is set; True is a bare flag."""
    flags: list[str] = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(option)
        elif value is not None and value is not False and value != {}:
            flags += [option, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def image_size(service: Service) -> int | None:
    """Side of the network's input: the service's own or the model's default; None when it has none."""
    return service.image_size or registry.model(service.arch).image_size or None


def server(service: Service, address: Address, out: Path, parent_pid: int) -> Command:
    """src/server.py for one service."""
    return [
        *_script("server.py"),
        *_flags(
            model=None if service.arch == NONE else service.arch,
            name=service.label,
            host=address.host,
            port=address.port,
            device=service.device,
            threads=service.threads,
            queue_limit=service.queue_limit,
            max_batch=service.max_batch,
            max_delay_ms=service.max_delay_ms,
            policy=service.policy,
            precision=service.precision,
            channels_last=service.channels_last,
            compile=service.compile,
            weights=service.weights,
            image_size=service.image_size,
            num_classes=service.num_classes,
            extra=service.extra,
            follow=service.follow,
            out=out,
            parent=parent_pid,
        ),
    ], thread_environment(service.threads)


def client(
    service: Service, address: Address, stream: int, schedule: Path, pair: Pair, out: Path, control: Address
) -> Command:
    """src/client_async.py (open loop) or src/client.py (one request in flight) for one service."""
    script = "client_async.py" if service.mode == "open" else "client.py"
    return [
        *_script(script),
        *_flags(
            model=service.arch,
            name=service.label,
            host=address.host,
            port=address.port,
            stream=stream,
            schedule=schedule,
            rate=service.rate,
            data=registry.fitting_data(service.data, registry.model(service.arch).task),
            count=service.count,
            image_size=image_size(service),
            train_model=pair.train_label,
            seed=pair.config.seed,
            wait=CONNECT_WAIT_S,
            drain_timeout=pair.config.drain_timeout_s,
            after_reply=service.mode == "closed",
            whole=service.whole,
            deadline_ms=service.deadline_ms or None,
            cancel_after_ms=service.cancel_after_ms or None,
            out=out,
            control=control,
        ),
    ], thread_environment(1)


def resolved_device(name: str, cuda: bool) -> str:
    """`auto` as the children will resolve it, without importing torch here: CUDA where the driver answers."""
    return ("cuda" if cuda else "cpu") if name == "auto" else name


def trainer_threads(pair: Pair, free_cores: int) -> int:
    """The trainer's threads: as configured, else the cores the services beside it leave, at least one."""
    return (pair.train and pair.train.threads) or max(1, free_cores)


def trainer(job: Train, threads: int, seed: int, out: Path, control: Address) -> Command:
    """`python -m corun.train` for the training job."""
    return [
        PYTHON,
        "-m",
        "corun.train",
        *_flags(
            model=job.arch,
            data=registry.fitting_data(job.data, registry.model(job.arch).task),
            batch_size=job.batch_size,
            image_size=job.image_size,
            num_classes=job.num_classes,
            count=job.count,
            epochs=job.epochs,
            lr=job.lr,
            momentum=job.momentum,
            weight_decay=job.weight_decay,
            optimizer=job.optimizer,
            workers=job.workers,
            seed=seed,
            device=job.device,
            precision=job.precision,
            channels_last=job.channels_last,
            compile=job.compile,
            weights=job.weights,
            threads=threads,
            checkpoint=out / "checkpoint.pt" if job.checkpoint else None,
            extra=job.extra,
            publish=job.publish.model_dump() if job.publish else None,
            out=out,
            control=control,
        ),
    ], thread_environment(threads)


def together(parts: Sequence[Sequence[str]], lanes: Mapping[str, object], threads: int) -> Command:
    """`python -m corun.launch.together` for these command lines of servers and a trainer, in one process."""
    argv = [PYTHON, "-m", "corun.launch.together", *(["--lanes", json.dumps(lanes)] if lanes else [])]
    for part in parts:
        argv += ["--", *part]
    return argv, thread_environment(threads)


def profiler(out: Path, watch: Path, period_s: float, control: Address) -> Command:
    """src/profiler.py for the whole run."""
    device_file = home() / "device.json"
    return [
        *_script("profiler.py"),
        *_flags(
            out=out,
            watch=watch,
            period=period_s,
            device_file=device_file if device_file.exists() else None,
            control=control,
        ),
    ], thread_environment(1)
