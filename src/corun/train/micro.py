"""Micro-steps: a step cut into parts between which the trainer can stop, with the same update in the end.

    loss of a batch = mean over its samples  =>  gradient = sum over parts of (n_part / n) * gradient(part)

so accumulating the weighted gradients and stepping once makes the update of the whole batch, up to the rounding of
the sums. Two exceptions are not the same update. BatchNorm normalises each part by the part's own mean and variance
and moves its running statistics once a part: freeze the statistics (`freeze_statistics`) or accept a noisier
estimate, as in training with the smaller batch. A loss whose mean is not over samples (over labelled pixels, say)
weighs parts by samples all the same.

Between parts stands a gate: whatever decides how long the trainer waits there. `corun.share` has one that yields to
requests; the trainer knows only the protocol.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from corun.errors import InputError

STEP, MICRO, LAYER = "step", "micro", "layer"


class Knobs(Protocol):
    """What a gate asks of the next step; threads 0 = as the trainer was started."""

    @property
    def micro(self) -> int: ...
    @property
    def threads(self) -> int: ...


class Gate(Protocol):
    """Decides at every place where the trainer may stop. `attend` is the session's; see corun.share.gates."""

    attend: Callable[[], bool]

    def begin(self) -> None:
        """A measured window is about to begin after a pause that was no work."""

    def wait(self, boundary: str) -> None:
        """Return when the trainer may go on from a step, micro or layer boundary."""

    def knobs(self) -> Knobs:
        """How to make the next step."""

    def report(self) -> dict[str, Any]:
        """Counters for STATS."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Fixed:
    """Knobs that never change."""

    micro: int = 1
    threads: int = 0


class OpenGate:
    """Never holds anybody."""

    def __init__(self) -> None:
        self.attend: Callable[[], bool] = lambda: False
        self._knobs = Fixed()

    def begin(self) -> None:
        """Nothing was counted."""

    def wait(self, boundary: str) -> None:
        """Go on."""

    def knobs(self) -> Knobs:
        return self._knobs

    def report(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Nothing to close."""


def load_gate(spec: str, options: Mapping[str, Any]) -> Gate:
    """The gate made by `module:function` from its options; InputError when there is no such function."""
    module_name, colon, function_name = spec.partition(":")
    if not colon:
        raise InputError(f'--gate "{spec}" is not MODULE:FUNCTION, e.g. corun.share.gates:from_options')
    try:
        make: Callable[[Mapping[str, Any]], Gate] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise InputError(f'--gate "{spec}" cannot be loaded: {error}') from error
    return make(options)


def part_sizes(batch_size: int, micro: int, least: int = 1) -> list[int]:
    """Sizes of at most `micro` parts of a batch, each at least `least`, differing by one at most.

    Fewer parts than asked for when they would be too small; their sum is the batch size.
    """
    count = max(1, min(micro, batch_size // max(1, least)))
    size, larger = divmod(batch_size, count)
    return [size + 1] * larger + [size] * (count - larger)


def split(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """A collated batch as parts of these sizes, in order.

    Tensors are cut along their first dimension (views, nothing is copied), lists with one entry per sample by
    their entries, tuples, lists and dicts of such things recursively. Anything else goes to every part unchanged.
    Raises InputError when nothing in the batch has one entry per sample: such a batch cannot be cut.
    """
    if len(sizes) == 1:
        return [batch]
    total = sum(sizes)
    if not _has_samples(batch, total):
        raise InputError(
            f"a batch of {total} cannot be cut into micro-batches: no part of it has one entry per sample",
            ["give the Trainable a method split(batch, sizes), or train with micro 1"],
        )
    begins = [sum(sizes[:index]) for index in range(len(sizes))]
    return [_cut(batch, begin, size, total, top=True) for begin, size in zip(begins, sizes, strict=True)]


def _is_per_sample(value: Any, total: int) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() > 0 and len(value) == total
    return (
        isinstance(value, list)
        and len(value) == total
        and not all(isinstance(item, torch.Tensor) and _is_per_sample(item, total) for item in value)
    )


def _has_samples(value: Any, total: int) -> bool:
    if isinstance(value, dict):
        return any(_has_samples(item, total) for item in value.values())
    if isinstance(value, tuple | list):
        return _is_per_sample(value, total) or any(_has_samples(item, total) for item in value)
    return _is_per_sample(value, total)


def _cut(value: Any, begin: int, size: int, total: int, top: bool = False) -> Any:
    if isinstance(value, torch.Tensor):
        return value.narrow(0, begin, size) if _is_per_sample(value, total) else value
    if isinstance(value, list) and not top and _is_per_sample(value, total):
        return value[begin : begin + size]
    if isinstance(value, dict):
        return {key: _cut(item, begin, size, total) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cut(item, begin, size, total) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_cut(item, begin, size, total) for item in value)
    return value


def freeze_statistics(module: torch.nn.Module) -> int:
    """Normalise by the running statistics from now on, whatever `train()` is called; returns how many layers.

    Scale and shift are still trained. With it micro-steps make the very update of the whole batch; it suits
    fine-tuning of trained weights, not training from scratch (fresh statistics are mean 0, variance 1).
    """
    frozen = 0
    for layer in module.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.eval()
            layer.train = _stay(layer)  # type: ignore[method-assign]
            frozen += 1
    return frozen


def _stay(layer: torch.nn.Module) -> Callable[..., torch.nn.Module]:
    return lambda mode=True: layer


def gate_layers(module: torch.nn.Module, wait: Callable[[], None]) -> int:
    """Call `wait` before the forward and before the backward of every layer that has no layers inside.

    The backward stop is a hook on the layer's output, which leaves in-place activations behind it legal (module
    backward hooks do not). Gradients pass unchanged. Returns the number of layers.
    """
    layers = [layer for layer in module.modules() if not any(True for _ in layer.children())]

    def before_forward(_layer: torch.nn.Module, _inputs: Any) -> None:
        wait()

    def after_forward(_layer: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(before_backward)

    def before_backward(_gradient: torch.Tensor) -> None:
        wait()

    for layer in layers:
        layer.register_forward_pre_hook(before_forward)
        layer.register_forward_hook(after_forward)
    return len(layers)


class RunAhead:
    """At most `depth` micro-steps in flight on a device: `mark` behind each waits for the one `depth` before it.

    Launches are asynchronous: without a bound the whole step is queued before the first gate is asked.
    """

    def __init__(self, depth: int, make_event: Callable[[], Any]) -> None:
        self._depth = max(1, depth)
        self._make_event = make_event
        self._events: deque[Any] = deque()

    def mark(self) -> None:
        """A micro-step was issued on the current stream."""
        event = self._make_event()
        event.record()
        self._events.append(event)
        while len(self._events) >= self._depth:
            self._events.popleft().synchronize()


_CPU_SENTENCES = (
    "can't allocate memory",  # torch's allocator
    "could not create a primitive",  # oneDNN, whose reason is kept to itself
    "could not create a memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a smaller micro-batch might fit."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sentence in str(error) for sentence in _CPU_SENTENCES)


def give_memory_back() -> None:
    """Return what a failed attempt had allocated, so that a smaller one finds it."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
