"""What torch plug-ins share: devices, precisions, safe weight files, placement, a servable base, data items.

Torch is imported inside functions, so importing this module is free. Options are taken structurally
(`Placement`): `corun.registry.ModelOptions` fits.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from corun import images
from corun.errors import InputError, suggest

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MAX_LISTED = 6


class Placement(Protocol):
    """The part of the model options that says where and how a network runs."""

    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def channels_last(self) -> bool: ...
    @property
    def compile(self) -> bool: ...


def torch_device(name: str) -> torch.device:
    """The torch device called `name`; InputError when it is no device or this machine lacks it."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f'device "{name}" is unknown: use "cpu", "cuda" or "cuda:N"') from None
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise InputError(f'device "{name}" is not there: this process sees {found} CUDA devices')
    return device


def resolve_device(name: str) -> str:
    """`auto` becomes "cuda" where there is a CUDA device, else "cpu"; other names are checked and returned."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(torch_device(name))


def compute_with(threads: int) -> None:
    """Intra-op threads of what the calling thread computes from now on, whatever other threads of the process set.

    OpenMP's number belongs to a thread, but a thread takes over the last one set anywhere at its first look at it
    (at::internal::lazy_init_num_threads): looking first makes its own stay.
    """
    import torch

    torch.get_num_threads()
    torch.set_num_threads(threads)


def one_cuda_device(names: Iterable[str]) -> tuple[ModuleType, str]:
    """torch, and the one CUDA device that all these names mean; InputError when they mean several, or a CPU."""
    import torch

    devices = {resolve_device(name) for name in names}
    devices = {"cuda:0" if device == "cuda" else device for device in devices}
    if len(devices) != 1 or "cpu" in devices:
        raise InputError(
            f"streams belong to one CUDA device, and these are on {', '.join(sorted(devices)) or 'none'}"
        )
    return torch, devices.pop()


def torch_dtype(precision: str) -> torch.dtype:
    """fp32, bf16 or fp16 as a torch dtype; InputError with a suggestion otherwise."""
    import torch

    if precision not in DTYPES:
        known = ", ".join(DTYPES)
        raise InputError(f'precision "{precision}" is not one of {known}{suggest(precision, DTYPES)}')
    dtype: torch.dtype = getattr(torch, DTYPES[precision])
    return dtype


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Build a network from `seed` without disturbing the process's random state."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def count_params(module: torch.nn.Module) -> int:
    """Number of parameters (buffers are not counted)."""
    return sum(parameter.numel() for parameter in module.parameters())


def sha256_label(path: str | Path) -> str:
    """`sha256:<first 12 hex digits> <path>`: names the weights in manifests and tables."""
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:12]} {path}"


def read_state_dict(path: str | Path, wrappers: Sequence[str] = ("state_dict", "model", "params")) -> dict[str, Any]:
    """Read a state dict (.safetensors, or a torch file with weights_only=True: nothing of the file runs).

    One of `wrappers` is unwrapped when the file holds a dict of dicts, and DistributedDataParallel's
    `module.` prefix is dropped. Raises InputError: no such file, not weights, or a pickle of code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights file {path} does not exist: give a state dict (.pt, .pth, .safetensors)")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in wrappers:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    if not isinstance(state, Mapping) or not state or not all(hasattr(v, "shape") for v in state.values()):
        raise InputError(f"{path} is not a state dict (a mapping from names to tensors)")
    return _unprefixed(state)


def _unprefixed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Drop a `module.` prefix all names share; keep `_metadata`, by which torch converts old layouts."""
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    plain: dict[str, Any] = OrderedDict((name.removeprefix(prefix), value) for name, value in state.items())
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        cut = {name.removeprefix("module").removeprefix("."): value for name, value in versions.items()}
        vars(plain)["_metadata"] = cut if prefix else versions
    return plain


def _read_torch(path: Path) -> Any:
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        problems = [reason, "only tensors are read; save model.state_dict() and give that file"]
        raise InputError(f"{path} is refused: it holds more than weights", problems) from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise InputError(f"{path} cannot be read as a torch file: {error}") from None


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from None


def load_strict(module: torch.nn.Module, state: Mapping[str, Any], source: str | Path) -> None:
    """Load `state` into `module`; InputError lists the first missing, unknown and misshapen names.

    Torch's own conversions of older layouts apply. A state without version marks (safetensors has none)
    counts as the current layout.
    """
    own = module.state_dict()
    versioned = OrderedDict(state)
    vars(versioned)["_metadata"] = getattr(state, "_metadata", None) or getattr(own, "_metadata", None)
    try:
        module.load_state_dict(versioned)
    except (RuntimeError, ValueError) as error:
        problems = misfits(own, state) or [str(error)]
        raise InputError(f"the weights in {source} do not fit {type(module).__name__}", problems) from None


def misfits(own: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """The first MAX_LISTED differences between a network's names and shapes and a file's."""
    misshapen = [
        f"shape of {name}: {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the network"
        for name in own
        if name in state and tuple(state[name].shape) != tuple(own[name].shape)
    ]
    missing = [f"missing: {name}" for name in own if name not in state]
    unknown = [f"unknown: {name}" for name in state if name not in own]
    problems = misshapen + missing + unknown
    more = len(problems) - MAX_LISTED
    return problems[:MAX_LISTED] + ([f"... and {more} more"] if more > 0 else [])


def place_for_serving(module: torch.nn.Module, options: Placement) -> torch.nn.Module:
    """Eval mode, no gradients, on the device, in the precision and layout asked for, compiled if asked."""
    import torch

    module.eval().requires_grad_(False)
    module.to(device=torch_device(options.device), dtype=torch_dtype(options.precision))
    if options.channels_last:
        module.to(memory_format=torch.channels_last)
    if options.compile:
        module.compile()
    return module


def place_for_training(module: torch.nn.Module, options: Placement) -> torch.nn.Module:
    """Train mode on the device; weights stay float32, bf16 is done by `autocast`.

    fp16 is refused: it needs loss scaling, which the training loop does not do.
    """
    import torch

    if options.precision == "fp16":
        raise InputError("training in fp16 needs loss scaling, which is not done here: use bf16 or fp32")
    torch_dtype(options.precision)
    module.train().to(device=torch_device(options.device))
    if options.channels_last:
        module.to(memory_format=torch.channels_last)
    if options.compile:
        module.compile()
    return module


def autocast(options: Placement) -> AbstractContextManager[Any]:
    """The mixed-precision context of a training step; does nothing in fp32."""
    import torch

    if options.precision == "fp32":
        return nullcontext()
    context: AbstractContextManager[Any] = torch.autocast(
        torch.device(options.device).type, dtype=torch_dtype(options.precision)
    )
    return context


def host_batch(arrays: Sequence[NDArray[Any]], device: torch.device) -> torch.Tensor:
    """Stack equal arrays into one host tensor; page-locked when it goes to a CUDA device."""
    import torch

    stacked = torch.empty(
        (len(arrays), *arrays[0].shape),
        dtype=torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype,
        pin_memory=device.type == "cuda",
    )
    np.stack(arrays, out=stacked.numpy())
    return stacked


@dataclass(frozen=True)
class PluginFunction:
    """A function of a plug-in file, named by where it is: `load(kind, stem)` gives the file's module.

    Plug-ins are loaded by path, so a spawned worker process cannot import them by module name and a plain
    function of theirs cannot be pickled. This can: the worker loads the file again.
    """

    load: Callable[[str, str], ModuleType]
    kind: str
    stem: str
    name: str

    def __call__(self, *arguments: Any) -> Any:
        return getattr(self.load(self.kind, self.stem), self.name)(*arguments)


@dataclass(frozen=True)
class Items:
    """A map-style training data set that worker processes can receive: item i is `read(entries[i], options)`.

    entries: small picklable descriptions (a path and a label, a crop), not decoded images.
    num_classes: None where the task has no classes. collate: None = torch's default_collate.
    """

    read: PluginFunction
    entries: Sequence[Any]
    options: Any
    num_classes: int | None = None
    collate: Callable[[Sequence[Any]], Any] | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Any:
        return self.read(self.entries[index], self.options)


def collate_detection(
    items: Sequence[tuple[torch.Tensor, Mapping[str, torch.Tensor]]],
) -> tuple[torch.Tensor, list[Mapping[str, torch.Tensor]]]:
    """Images (3, H, W) to one tensor (B, 3, H, W); targets stay a list, as they have any number of boxes."""
    import torch

    return torch.stack([image for image, _ in items]), [target for _, target in items]


class ImageServable:
    """A network behind JPEG or PNG requests: all of `Servable` but `preprocess` and `postprocess`.

    Subclasses give `info` (a ServableInfo), turn decoded images into one float32 host batch (B, 3, H, W)
    with `host_batch`, and turn what `forward` returned, on the host, into one reply per sample. A network
    that does not return one tensor overrides `forward` and calls `super().forward`.
    """

    info: Any

    def __init__(self, module: torch.nn.Module, options: Placement, info: Any) -> None:
        self.module = place_for_serving(module, options)
        self.device = torch_device(options.device)
        self.dtype = torch_dtype(options.precision)
        self.channels_last = options.channels_last
        self.info = info

    def decode(self, payload: bytes) -> images.Rgb:
        """One JPEG or PNG to an RGB array (height, width, 3); ValueError when it is corrupt."""
        return images.decode_rgb(payload)

    def to_device(self, batch: torch.Tensor) -> torch.Tensor:
        """Copy to the device in float32 (asynchronous from page-locked memory), then cast there."""
        import torch

        moved = batch.to(self.device, non_blocking=True).to(self.dtype)
        return moved.contiguous(memory_format=torch.channels_last) if self.channels_last else moved

    def forward(self, batch: torch.Tensor) -> Any:
        """The network without autograd; asynchronous on CUDA."""
        import torch

        with torch.inference_mode():
            return self.module(batch)

    def to_host(self, output: torch.Tensor) -> torch.Tensor:
        """A float32 host tensor; waits for the device."""
        return output.float().cpu()

    def example(self) -> bytes:
        """A made JPEG a little larger than the network's input, as requests are."""
        side = round(self.info.image_size * 256 / 224)
        return images.encode_jpeg(images.made_image(0, side, side))
