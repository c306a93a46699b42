"""One training job: model, data, optimiser, and a step that measures itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from corun import registry
from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.errors import InputError, RunFault
from corun.torch_tools import autocast
from corun.train.arrivals import ArrivalBatches, Arrivals
from corun.train.loader import Batches
from corun.train.micro import (
    LAYER,
    MICRO,
    STEP,
    Gate,
    OpenGate,
    RunAhead,
    freeze_statistics,
    gate_layers,
    give_memory_back,
    out_of_memory,
    part_sizes,
    split,
)
from corun.train.options import OPTIMIZERS, TrainOptions


@dataclass(frozen=True)
class Step:
    """One optimiser step; times in ns of CLOCK_MONOTONIC, loss is the mean over its samples.

    gate_wait_ns: held at the gate, all stops of the step together. micro: parts the batch was cut into.
    """

    epoch: int
    step: int
    t_start_ns: int
    t_end_ns: int
    data_wait_ns: int
    decode_ns: int
    samples: int
    loss: float
    gate_wait_ns: int = 0
    micro: int = 1

    @property
    def samples_per_s(self) -> float:
        return self.samples * NS_PER_S / max(1, self.t_end_ns - self.t_start_ns)

    def row(self) -> dict[str, Any]:
        """Cells of train.csv, the segment's excepted."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "t_start_ns": self.t_start_ns,
            "t_end_ns": self.t_end_ns,
            "step_ms": round((self.t_end_ns - self.t_start_ns) / NS_PER_MS, 6),
            "data_wait_ms": round(self.data_wait_ns / NS_PER_MS, 6),
            "decode_ms": round(self.decode_ns / NS_PER_MS, 6),
            "samples": self.samples,
            "samples_per_s": round(self.samples_per_s, 3),
            "loss": self.loss,
            "gate_wait_ms": round(self.gate_wait_ns / NS_PER_MS, 6),
            "micro": self.micro,
        }


class Trainer:
    """A training job that can be stepped, saved and resumed.

    Bit-repeatable on one device with the same seed, thread count and micro-steps: a job stopped and resumed, or
    held at its gate, has the same losses as one that ran through.
    """

    def __init__(self, options: TrainOptions, gate: Gate | None = None) -> None:
        _check(options)
        self.gate = gate or OpenGate()
        torch.manual_seed(options.seed)
        model = registry.model(options.model)
        if model.train is None:
            raise InputError(f'model "{options.model}" cannot be trained')
        image_size = options.image_size or model.image_size
        self.data, num_classes = _training_data(options, model.task, image_size)
        self.options = replace(options, image_size=image_size, num_classes=num_classes)
        self.trainable = model.train(
            registry.ModelOptions(
                weights=options.weights,
                device=options.device,
                precision=options.precision,
                channels_last=options.channels_last,
                compile=options.compile,
                image_size=image_size,
                num_classes=num_classes,
                seed=options.seed,
                extra=options.extra,
            )
        )
        self._check_batch()
        self.batches = self._batches(model)
        self.after_step: Callable[[], object] = lambda: None
        self._optimizer = _optimizer(options, self.trainable.module)
        self.steps_done = 0
        self.least_micro = options.micro
        self._held_ns = 0
        self._threads = torch.get_num_threads()
        self._run_ahead = None if options.device == "cpu" else RunAhead(options.run_ahead, torch.cuda.Event)
        if options.frozen_statistics:
            freeze_statistics(self.trainable.module)
        if options.layer_gate:
            gate_layers(self.trainable.module, lambda: self._stop_at(LAYER))
        if options.resume:
            self._load()

    def _batches(self, model: registry.Model) -> Batches:
        options, publish = self.options, self.options.publish
        if publish is None:
            return Batches(self.data, options.batch_size, options.seed, options.workers, options.device != "cpu")
        arrivals = Arrivals.read(publish, _labelled_requests(options, model.task))
        return ArrivalBatches(self.data, arrivals, options.batch_size, options.seed, publish)

    def begin(self, start_ns: int) -> None:
        """The measured window, hence the arrivals' schedule, begins at this instant; the pause before was no work."""
        self.gate.begin()
        if isinstance(self.batches, ArrivalBatches):
            self.batches.arrivals.begin(start_ns)

    def restart_from(self, state: Mapping[str, Any]) -> None:
        """Go on from these weights with a fresh optimiser."""
        self.trainable.module.load_state_dict(state)
        self._optimizer = _optimizer(self.options, self.trainable.module)

    def _check_batch(self) -> None:
        size, least = self.options.batch_size, self.trainable.min_batch
        if size < least:
            raise InputError(
                f"{self.options.model} cannot be trained with batch_size {size}: its BatchNorm needs at least "
                f"{least} samples to have a variance; use batch_size {least} or more"
            )
        if len(self.data) < size:
            raise InputError(
                f"data set {self.options.data} has {len(self.data)} samples, fewer than one batch of {size}; "
                "lower batch_size or raise count"
            )

    @property
    def finished(self) -> bool:
        """True once `epochs` epochs are done (never with epochs 0)."""
        batches = self.batches
        done = batches.epoch + (batches.index >= batches.per_epoch)
        return bool(self.options.epochs) and done >= self.options.epochs

    @property
    def at_epoch_end(self) -> bool:
        """True when the step just made was the last one of its epoch."""
        return self.batches.index >= self.batches.per_epoch

    def step(self) -> Step:
        """Fetch one batch, make one optimiser step in as many parts as the gate asks for, synchronise the device."""
        t_start = now_ns()
        self._held_ns = 0
        self._stop_at(STEP)
        t_fetch = now_ns()
        batch, decode_ns = self.batches.next()
        t_data = now_ns()
        value, parts = self._accumulate(_to(batch, self.options.device))
        self._update()
        if self.options.device != "cpu":
            torch.cuda.current_stream().synchronize()
        self.steps_done += 1
        return Step(
            self.batches.epoch,
            self.steps_done - 1,
            t_start,
            now_ns(),
            t_data - t_fetch,
            decode_ns,
            self.options.batch_size,
            value,
            self._held_ns,
            parts,
        )

    def _stop_at(self, boundary: str) -> None:
        began = now_ns()
        self.gate.wait(boundary)
        self._held_ns += now_ns() - began
        threads = self.gate.knobs().threads or self._threads
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _accumulate(self, batch: Any) -> tuple[float, int]:
        """Gradients of the whole batch; (mean loss, parts). Twice as many parts when memory runs out."""
        while True:
            micro = max(self.least_micro, self.gate.knobs().micro)
            sizes = part_sizes(self.options.batch_size, micro, self.trainable.min_batch)
            self._optimizer.zero_grad(set_to_none=True)
            try:
                return self._backward(batch, sizes), len(sizes)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                error.__traceback__ = None
            self._after_out_of_memory(len(sizes), reason)

    def _update(self) -> None:
        """The optimiser's step; it cannot be made again, so running out of memory in it is the end."""
        try:
            self._optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            name = self.options.optimizer
            raise RunFault(
                f"the state of {name} for {self.options.model} does not fit into memory: {error}"
            ) from error

    def _backward(self, batch: Any, sizes: list[int]) -> float:
        cut = getattr(self.trainable, "split", split)
        parts = [batch] if len(sizes) == 1 else cut(batch, sizes)
        losses = []
        for part, size in zip(parts, sizes, strict=True):
            self._stop_at(MICRO)
            with autocast(self.options):
                loss = self.trainable.loss(part)
            if len(sizes) > 1:
                loss = loss * (size / self.options.batch_size)
            loss.backward()
            losses.append(loss.detach())
            if self._run_ahead:
                self._run_ahead.mark()
        return sum(float(loss) for loss in losses)

    def _after_out_of_memory(self, parts: int, reason: str) -> None:
        """Ask for twice as many parts from now on; RunFault when they cannot get smaller."""
        self._optimizer.zero_grad(set_to_none=True)
        give_memory_back()
        if len(part_sizes(self.options.batch_size, 2 * parts, self.trainable.min_batch)) == parts:
            raise RunFault(
                f"{self.options.model} does not fit into memory even in {parts} micro-batches: {reason}; "
                "lower batch_size or image_size, or raise the memory limit"
            )
        self.least_micro = 2 * parts

    def warm_up(self, steps: int = 1) -> None:
        """Run forward and backward `steps` times without touching weights, buffers or the data order."""
        module, position = self.trainable.module, (self.batches.epoch, self.batches.index)
        saved = {name: buffer.clone() for name, buffer in module.named_buffers()}
        rng = torch.get_rng_state()
        for _ in range(steps):
            batch, _ = self.batches.next()
            self._warm_up_with(_to(batch, self.options.device))
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(saved[name])
        torch.set_rng_state(rng)
        self.batches.seek(*position)

    def _warm_up_with(self, batch: Any) -> None:
        gate, self.gate = self.gate, OpenGate()
        try:
            self._accumulate(batch)
        finally:
            self.gate = gate

    def save(self, path: Path) -> None:
        """Write a checkpoint next to `path` and move it there in one step."""
        temporary = path.with_suffix(path.suffix + ".part")
        state = {
            "model": self.trainable.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "epoch": self.batches.epoch,
            "index": self.batches.index,
            "steps_done": self.steps_done,
            "rng": torch.get_rng_state(),
            "name": self.options.model,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            raise RunFault(f"cannot write the checkpoint {path}: {error}") from error

    def _load(self) -> None:
        path = self.options.checkpoint
        if path is None or not path.exists():
            raise InputError(f"cannot resume: there is no checkpoint at {path}; leave out --resume to start anew")
        try:
            state = torch.load(path, map_location=self.options.device, weights_only=True)
            if state["name"] != self.options.model:
                raise InputError(f"{path} is a checkpoint of {state['name']}, not of {self.options.model}")
            self.trainable.module.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, KeyError, ValueError, OSError, EOFError, UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"cannot resume from {path}: {reason}; is it a checkpoint of this program?") from error
        self.batches.seek(state["epoch"], state["index"])
        self.steps_done = state["steps_done"]
        torch.set_rng_state(state["rng"].cpu())

    def describe(self) -> dict[str, Any]:
        """Options and model facts for HELLO and the manifest."""
        info = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self.options).items()}
        return {**info, "params": self.trainable.info.params, "weights_label": self.trainable.info.weights}


def _check(options: TrainOptions) -> None:
    problems = []
    if options.batch_size < 1:
        problems.append(f"batch_size is {options.batch_size}; it must be 1 or more")
    if options.optimizer not in OPTIMIZERS:
        problems.append(f'optimizer is "{options.optimizer}"; use one of {", ".join(OPTIMIZERS)}')
    if options.precision not in registry.PRECISIONS:
        problems.append(f'precision is "{options.precision}"; use one of {", ".join(registry.PRECISIONS)}')
    if options.micro < 1 or options.run_ahead < 1:
        problems.append(f"micro is {options.micro} and run_ahead {options.run_ahead}; both must be 1 or more")
    if options.layer_gate and options.compile:
        problems.append(
            "layer_gate and compile exclude each other: compiled code has no layers to stop between; "
            'under a sharing policy say "layers": false'
        )
    if options.publish and options.compile:
        problems.append("publish and compile exclude each other: the version in service is a copy of the network")
    if options.publish and options.workers:
        problems.append(f"workers is {options.workers}; labelled arrivals are decoded in the trainer: use 0")
    if problems:
        raise InputError("the training job cannot start", problems)


def _labelled_requests(options: TrainOptions, task: str) -> Any:
    """The requests of the data set as training items, in their order; InputError when they have no labels."""
    source, root = registry.resolve_data(options.data)
    if not source.labelled or source.training is None or task != "classification":
        able = [name for name, row in registry.datasets().items() if row.labelled]
        raise InputError(
            f'publish validates classifiers on labelled requests; data set "{options.data}" has none for {task}',
            [f"data sets with labelled requests: {', '.join(able) or 'none'}"],
        )
    return source.training(
        registry.DataOptions(
            root=root,
            image_size=options.image_size or registry.DataOptions.image_size,
            count=options.count,
            seed=options.seed,
            task=task,
            num_classes=options.num_classes,
            split="arrivals",
        )
    )


def _training_data(options: TrainOptions, task: str, image_size: int) -> tuple[Any, int | None]:
    source, root = registry.resolve_data(registry.fitting_data(options.data, task))
    if source.training is None or task not in source.tasks:
        able = [name for name, row in registry.datasets().items() if task in row.tasks and row.training]
        raise InputError(
            f'data set "{options.data}" cannot train {options.model} (task {task})',
            [f"data sets for {task}: {', '.join(able) or 'none'}"],
        )
    data = source.training(
        registry.DataOptions(
            root=root,
            image_size=image_size,
            count=options.count,
            seed=options.seed,
            task=task,
            num_classes=options.num_classes,
        )
    )
    return data, options.num_classes or getattr(data, "num_classes", None)


def _optimizer(options: TrainOptions, module: Any) -> Any:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    make: dict[str, Callable[[], Any]] = {
        "sgd": lambda: torch.optim.SGD(
            parameters, options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        ),
        "adam": lambda: torch.optim.Adam(parameters, options.lr, weight_decay=options.weight_decay),
        "adamw": lambda: torch.optim.AdamW(parameters, options.lr, weight_decay=options.weight_decay),
    }
    return make[options.optimizer]()


def _to(batch: Any, device: str) -> Any:
    """The batch's tensors on the device, whatever they are nested in."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_to(value, device) for value in batch)
    return batch
