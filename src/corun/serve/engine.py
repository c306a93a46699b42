"""What answers requests: a batch goes in, every request comes back with a status, a reply and its stage stamps.

    picked ─ batched ─ decoded ─ preprocessed ─ h2d ─ device ─ d2h ─ (tx: stamped when the reply is sent)

On the CPU each stamp is the clock when the stage returned. On CUDA copies and kernels run behind the host's
back, so events are recorded around them on a stream of our own and mapped to CLOCK_MONOTONIC afterwards::

    host   ──to_device──forward──to_host (waits)──┤ d2h ├── end.synchronize() ┤ now
    device     h2d ■          forward ■■■■   d2h ■          end ■
    stamp of an event = now - elapsed(event, end), never before its stage began nor after d2h

What a model raises is answered, never fatal: ValueError while decoding is that request's BAD_REQUEST and does not
touch its batch mates; anything else (out of memory included) is FAILED with the reason.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

import msgspec

from corun import registry
from corun.clock import NS_PER_MS, now_ns
from corun.errors import InputError, RunFault, suggest
from corun.registry import ModelOptions, Servable, ServableInfo
from corun.serve.queue import Request
from corun.torch_tools import compute_with, misfits
from corun.wire import MAX_PAYLOAD, STAMPS, Status
from corun.wire.messages import Load

DECODED = STAMPS.index("decoded")
PREPROCESSED = STAMPS.index("preprocessed")
H2D = STAMPS.index("h2d")
DEVICE = STAMPS.index("device")
D2H = STAMPS.index("d2h")

AUTO = "auto"
REASON_LENGTH = 500

DeviceTimes = tuple[Any, int, int, int]
DeviceStages = Callable[[Servable, Any], DeviceTimes]


class Engine(Protocol):
    """Runs on the model thread only."""

    @property
    def info(self) -> ServableInfo:
        """What it serves."""

    def run(self, batch: Sequence[Request]) -> None:
        """Answer every request of the batch: status, reply, detail, batch, stamps up to d2h. Never raises."""

    def warm_up(self, count: int, batch_size: int) -> list[float]:
        """Run its own example `count` times per batch size (1 and batch_size); ms of each. May raise."""


class ServableEngine:
    """Runs the stages of a `registry.Servable`."""

    def __init__(self, servable: Servable) -> None:
        self._servable = servable
        device = servable.info.device
        self._device_stages: DeviceStages = CudaStages(device) if device.startswith("cuda") else cpu_stages

    @property
    def info(self) -> ServableInfo:
        return self._servable.info

    def run(self, batch: Sequence[Request]) -> None:
        info = self._servable.info
        for request in batch:
            request.info = info
        decoded, samples = self._decode(batch)
        if not decoded:
            return
        try:
            replies = self._compute(decoded, samples)
        except Exception as error:  # noqa: BLE001 - a plug-in may raise anything; the batch gets the reason
            reason = reason_of(error)
            for request in decoded:
                request.end(Status.FAILED, reason)
            _recover(error)
            return
        size = len(decoded)
        for request, reply in zip(decoded, replies, strict=True):
            request.reply = reply
            request.batch = size

    def _decode(self, batch: Sequence[Request]) -> tuple[list[Request], list[Any]]:
        """Requests that could be decoded, and their samples; the others get their status here."""
        decode: Callable[[Any], Any] = self._servable.decode
        decoded, samples = [], []
        for request in batch:
            try:
                samples.append(decode(request.payload))
            except ValueError as error:
                request.end(Status.BAD_REQUEST, reason_of(error, named=False))
            except Exception as error:  # noqa: BLE001 - as above
                request.end(Status.FAILED, reason_of(error))
            else:
                request.stamps[DECODED] = now_ns()
                decoded.append(request)
            request.payload = b""
        return decoded, samples

    def _compute(self, requests: list[Request], samples: list[Any]) -> list[bytes]:
        servable = self._servable
        host = servable.preprocess(samples)
        preprocessed = now_ns()
        output, h2d, device, d2h = self._device_stages(servable, host)
        for request in requests:
            request.stamps[PREPROCESSED : D2H + 1] = (preprocessed, h2d, device, d2h)
        return self._replies(output, len(requests))

    def _replies(self, output: Any, count: int) -> list[bytes]:
        servable = self._servable
        replies = servable.postprocess(output, count)
        if len(replies) != count:
            raise RunFault(f"{servable.info.model} gave {len(replies)} replies to {count} requests")
        for reply in replies:
            if not isinstance(reply, bytes | bytearray):
                raise RunFault(f"{servable.info.model} gave a reply of type {type(reply).__name__} instead of bytes")
        if max(map(len, replies)) > MAX_PAYLOAD:
            raise RunFault(f"{servable.info.model} gave a reply of more than {MAX_PAYLOAD} bytes")
        return replies

    def warm_up(self, count: int, batch_size: int) -> list[float]:
        servable = self._servable
        taken = []
        for size in sorted({1, batch_size}):
            for _ in range(count):
                start = now_ns()
                host = servable.preprocess([servable.decode(servable.example()) for _ in range(size)])
                output = self._device_stages(servable, host)[0]
                servable.postprocess(output, size)
                taken.append((now_ns() - start) / NS_PER_MS)
        return taken

    def successor(self, state: Mapping[str, Any], weights: str, version: int) -> Callable[[], None]:
        """New weights made ready in any thread; the returned call puts them in place, on the model thread only.

        state: tensors by name, as the training side's module has them. What a service does not need of it is named
        by the servable's `unserved` prefixes (auxiliary heads). Precision, device and layout become those in use.
        The swap itself moves no data: every parameter and buffer is pointed to its new tensor. Raises InputError
        when the model has no torch module, or names or shapes differ; then nothing has changed.
        """
        import torch

        servable = self._servable
        module = self.module()
        unserved = tuple(getattr(servable, "unserved", ()))
        own: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
        given = {name: value for name, value in state.items() if name in own or not name.startswith(unserved)}
        problems = misfits(own, given)
        if problems:
            raise InputError(f"version {version} does not fit {servable.info.model}", problems)
        fresh = self._placed(own, given)

        def swap() -> None:
            for name, tensor in own.items():
                tensor.data = fresh[name]
            servable.info = replace(servable.info, weights=weights, version=version)

        return swap

    def module(self) -> Any:
        """The torch module whose weights can be replaced; InputError when the model has none."""
        import torch

        module = getattr(self._servable, "module", None)
        if not isinstance(module, torch.nn.Module):
            raise InputError(
                f"{self.info.model} cannot follow published weights: it has no torch module (its servable's `module`)"
            )
        return module

    def _placed(self, own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Copies of the given tensors like those they replace: device, precision, layout."""
        import torch

        with torch.no_grad():
            fresh = {name: torch.empty_like(tensor.data).copy_(given[name]) for name, tensor in own.items()}
        if self.info.device.startswith("cuda"):
            torch.cuda.current_stream(self.info.device).synchronize()
        return fresh


def cpu_stages(servable: Servable, host: Any) -> DeviceTimes:
    """(result on the host, h2d, device, d2h) with the host's clock after each stage."""
    batch = servable.to_device(host)
    h2d = now_ns()
    output = servable.forward(batch)
    device = now_ns()
    result = servable.to_host(output)
    return result, h2d, device, now_ns()


class CudaStages:
    """The same on a stream of a CUDA device, with event times: the current one, or its own where that is the default.

    A thread in a lane (corun.share.in_process) has made its lane's stream the current one.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._torch = torch
        current = torch.cuda.current_stream(device)
        self._stream = current
        if current == torch.cuda.default_stream(device):
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(current)
        self._copied, self._computed, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(3))

    def __call__(self, servable: Servable, host: Any) -> DeviceTimes:
        """(result on the host, h2d, device, d2h); waits for its own stream only."""
        begun = now_ns()
        with self._torch.cuda.stream(self._stream):
            batch = servable.to_device(host)
            self._copied.record()
            output = servable.forward(batch)
            self._computed.record()
            result = servable.to_host(output)
            d2h = now_ns()
            self._end.record()
        self._end.synchronize()
        end = now_ns()
        h2d = min(max(self._at(self._copied, end), begun), d2h)
        device = min(max(self._at(self._computed, end), h2d), d2h)
        return result, h2d, device, d2h

    def _at(self, event: Any, end_ns: int) -> int:
        return end_ns - round(event.elapsed_time(self._end) * NS_PER_MS)


def reason_of(error: BaseException, named: bool = True) -> str:
    """One line about an exception, short enough for a reply and always valid UTF-8."""
    text = " ".join(str(error).encode("utf-8", "replace").decode().split())
    if named or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text[:REASON_LENGTH]


def _recover(error: BaseException) -> None:
    """After an out-of-memory error give cached device memory back, so that a smaller batch may fit."""
    error.__traceback__ = None
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.cuda.OutOfMemoryError):
        gc.collect()
        torch.cuda.empty_cache()


def model_options(given: Mapping[str, Any]) -> ModelOptions:
    """ModelOptions from the body of a LOAD message; InputError says which fields are unknown or of a wrong type."""
    known = [item.name for item in fields(ModelOptions)]
    problems = [f'option "{name}" is unknown{suggest(name, known)}' for name in given if name not in known]
    if problems:
        raise InputError("the model's options are wrong", problems)
    try:
        return msgspec.convert(dict(given), ModelOptions)
    except msgspec.ValidationError as error:
        raise InputError("the model's options are wrong", [str(error)]) from None


def load_engine(load: Load, defaults: ModelOptions, threads: int = 1) -> ServableEngine:
    """Build the model of a LOAD message; what the message leaves out comes from `defaults`.

    Raises InputError (unknown model or option, no such device, bad weights); a plug-in may raise more.
    """
    model = registry.model(load.model)
    given = model_options(load.options)
    options = replace(defaults, **{name: getattr(given, name) for name in load.options})
    if options.device == AUTO:
        options = replace(options, device=_auto_device(model))
    servable = model.serve(options)
    if "torch" in sys.modules:
        compute_with(threads)
    from corun.serve.generation import engine_for

    return engine_for(servable)


def _auto_device(model: registry.Model) -> str:
    if model.task == "null":
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
