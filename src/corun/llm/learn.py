"""Fine-tuning one adapter on a tree whose base it never writes.

The loss is the cross-entropy of the label tokens alone. A step may be accumulated over several micro-batches; each
is weighted by its label tokens, so the step equals one big batch. With dropout 0 the losses are bit-repeatable on
one device and thread count, whatever else the process does; with dropout they draw from torch's one random state.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from corun import torch_tools
from corun.clock import now_ns
from corun.errors import InputError, RunFault
from corun.llm import adapters
from corun.llm.base import glm

Example = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class LearnOptions:
    """How an adapter is trained: AdamW; a step is `accumulate` micro-batches of `batch_size` examples."""

    batch_size: int = 2
    accumulate: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class LearnStep:
    """One optimiser step; loss is the mean over its label tokens."""

    step: int
    epoch: int
    t_start_ns: int
    t_end_ns: int
    samples: int
    tokens: int
    loss: float


class Learner:
    """Trains adapter `name` of a PeftModel on (prompt ids, label ids) examples.

    Raises InputError when there are too few examples or one has no label ids.
    """

    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        options: LearnOptions | None = None,
        name: str = adapters.LEARNER,
    ) -> None:
        import torch

        self.options = options or LearnOptions()
        _check(examples, self.options)
        self.model, self.name, self.examples = model, name, list(examples)
        self._own = adapters.parameters(model, name)
        for parameter in self._own.values():
            parameter.requires_grad_(True)
        model.train()
        self.device = next(iter(self._own.values())).device
        self._optimizer = torch.optim.AdamW(
            self._own.values(), lr=self.options.lr, weight_decay=self.options.weight_decay
        )
        self.epoch, self.index, self.steps_done = 0, 0, 0
        self._order = self._shuffled(0)

    def _shuffled(self, epoch: int) -> list[int]:
        import torch

        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(len(self.examples), generator=generator).tolist()
        return order

    def _next(self) -> list[Example]:
        """The next micro-batch; a rest shorter than one ends the epoch."""
        size = self.options.batch_size
        if self.index + size > len(self.examples):
            self.epoch, self.index = self.epoch + 1, 0
            self._order = self._shuffled(self.epoch)
        chosen = self._order[self.index : self.index + size]
        self.index += size
        return [self.examples[i] for i in chosen]

    def add(self, examples: Sequence[Example]) -> None:
        """More to learn from; a new epoch over all of it begins with the next step."""
        _check(examples, LearnOptions(batch_size=1))
        self.examples += examples
        self.index = len(self.examples)

    def step(self) -> LearnStep:
        """One optimiser step; reading the loss waits for the device's current stream."""
        start, plugin = now_ns(), glm()
        micro = [self._next() for _ in range(self.options.accumulate)]
        epoch = self.epoch
        counts = [sum(len(label) for _, label in batch) for batch in micro]
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch, count in zip(micro, counts, strict=True):
            tensors = {key: value.to(self.device) for key, value in plugin.label_batch(batch).items()}
            loss = plugin.label_loss(self.model, tensors) * (count / sum(counts))
            loss.backward()
            total += float(loss.detach())
        self._optimizer.step()
        self.steps_done += 1
        samples = self.options.batch_size * self.options.accumulate
        return LearnStep(self.steps_done - 1, epoch, start, now_ns(), samples, sum(counts), total)

    def adapter(self) -> dict[str, Any]:
        """A copy of the adapter's tensors on the host."""
        return adapters.snapshot(self.model, self.name)

    def save_adapter(self, path: Path) -> None:
        """The adapter in peft's format."""
        adapters.save(self.model, self.name, path)

    def save(self, path: Path) -> None:
        """Checkpoint: adapter, optimiser and position, replaced in one step."""
        import torch

        temporary = path.with_suffix(path.suffix + ".part")
        state = {
            "adapter": self.adapter(),
            "optimizer": self._optimizer.state_dict(),
            "epoch": self.epoch,
            "index": self.index,
            "steps_done": self.steps_done,
            "examples": len(self.examples),
            "rng": torch.get_rng_state(),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            raise RunFault(f"cannot write the checkpoint {path}: {error}") from error

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint; the losses that follow are those of a run that never stopped."""
        import torch

        if not path.is_file():
            raise InputError(f"cannot resume: there is no checkpoint at {path}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["examples"] != len(self.examples):
                raise InputError(
                    f"{path} was made with {state['examples']} examples, now there are {len(self.examples)}"
                )
            adapters.replace(self.model, self.name, state["adapter"])
            self._optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, LookupError, ValueError, OSError, EOFError, UnpicklingError) as error:
            raise InputError(f"cannot resume from {path}: {str(error).splitlines()[0]}") from error
        self.epoch, self.index, self.steps_done = state["epoch"], state["index"], state["steps_done"]
        self._order = self._shuffled(self.epoch)
        torch.set_rng_state(state["rng"])


def _check(examples: Sequence[Example], options: LearnOptions) -> None:
    problems = [f"example {i} has no label" for i, (_, label) in enumerate(examples) if not len(label)]
    if options.batch_size < 1 or options.accumulate < 1:
        problems.append("batch_size and accumulate must be 1 or more")
    elif len(examples) < options.batch_size:
        problems.append(f"{len(examples)} examples are fewer than one batch of {options.batch_size}")
    if problems:
        raise InputError("the adapter cannot be trained", problems[:6])


def new_learner(
    base: Any,
    examples: Sequence[Example],
    options: LearnOptions | None = None,
    path: Path | None = None,
    adapter: adapters.AdapterOptions | None = None,
    threads: int = 1,
) -> Learner:
    """A learner on a tree of its own over `base`; a new adapter, or the one in `path`."""
    import torch

    from corun.llm.base import tree

    torch.set_num_threads(threads)
    with torch_tools.seeded((adapter or adapters.AdapterOptions()).seed):
        model = adapters.attach(tree(base), adapters.LEARNER, base, path, adapter)
    return Learner(model, examples, options)
