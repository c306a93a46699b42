"""One base network as read-only tensors, and module trees over them.

    base tensors (once) ◀── tree A ── adapter `serve`        each tree has its own Parameter objects, hooks and
                        ◀── tree B ── adapter `learner`      requires_grad; both point into the same memory

One module tree with two adapters does not work: switching the active adapter changes the module for everybody, and
with two threads training is silently wrong. Two trees cost about 1 MiB of Python objects and need no lock,
because nobody writes to the base. Never merge an adapter into a tree: that writes the shared tensors in place.

Between processes the tensors are shared by mapping the same files on the CPU, the checkpoint's own where its
precision is the one in use, else one stored for the purpose, and by CUDA IPC on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from corun import torch_tools
from corun.errors import RunFault
from corun.registry import load_plugin

STORED = "base.safetensors"


def glm() -> ModuleType:
    """The plug-in that knows ChatGLM's shapes, checkpoints and tokenizer."""
    return load_plugin("models", "_chatglm")


def load_base(
    source: str | None = None, preset: str = "tiny", precision: str = "fp32", device: str = "cpu", seed: int = 0
) -> Any:
    """A `Base` (shape, state, label, tokenizer) from a checkpoint directory, or random of a preset's size."""
    return glm().load_base(source, preset, precision, device, seed)


def tree(base: Any) -> Any:
    """A new GlmForCausalLM over the base's own tensors: eval mode, no gradients."""
    return glm().assemble(base.shape, base.state)


def copied(base: Any) -> Any:
    """A base with memory of its own: the control of what sharing saves."""
    state = {name: value.clone() for name, value in base.state.items()}
    return type(base)(base.shape, state, base.label, base.tokenizer)


def base_bytes(base: Any) -> int:
    """Bytes of the base's tensors."""
    return sum(value.numel() * value.element_size() for value in base.state.values())


@dataclass(frozen=True)
class SharedBase:
    """What another process needs to have the same base: CUDA tensors sent by IPC, a stored file, or the checkpoint.

    source: the checkpoint directory; with neither `path` nor `tensors` its shards are mapped, else it gives the
    tokenizer. The process that made CUDA tensors must outlive the others.
    """

    sizes: Mapping[str, Any]
    label: str
    source: str | None
    path: Path | None = None
    tensors: Mapping[str, Any] | None = None

    def open(self) -> Any:
        """The base in this process; files are mapped, so their pages are shared with all who open them."""
        plugin = glm()
        source = Path(self.source) if self.source else None
        shape, tokenizer = plugin.Shape(**self.sizes), plugin.load_tokenizer(source)
        return plugin.Base(shape, self._state(source), self.label, tokenizer)

    def _state(self, source: Path | None) -> Mapping[str, Any]:
        if self.tensors is not None:
            return self.tensors
        if self.path is not None:
            return torch_tools.read_state_dict(self.path)
        assert source is not None
        state: Mapping[str, Any] = glm().read_checkpoint(source)[1]
        return state


def share(base: Any, directory: Path, source: str | None = None) -> SharedBase:
    """Make a base ready for other processes.

    On the CPU it is written once to `directory`, unless it is that of `source` in its own precision. Open the result
    in this process too and drop `base`, or this process keeps a copy of its own.
    """
    sizes = vars(base.shape).copy()
    if base.state["lm_head.weight"].device.type == "cuda":
        return SharedBase(sizes, base.label, source, tensors=dict(base.state))
    if source is not None and _is_files_own(base, source):
        return SharedBase(sizes, base.label, source)
    from safetensors.torch import save_file

    path = directory / STORED
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in base.state.items()}, path)
    except OSError as error:
        raise RunFault(f"cannot store the base in {path}: {error}") from error
    return SharedBase(sizes, base.label, source, path=path)


def _is_files_own(base: Any, source: str) -> bool:
    """True when the checkpoint holds the base's tensors in the base's precision."""
    stored = glm().read_checkpoint(Path(source))[1]
    return all(stored[name].dtype == value.dtype for name, value in base.state.items())
