"""LoRA adapters on a module tree: new, loaded, saved, read out and replaced while the tree is in use.

An adapter is handed around as plain tensors under peft's file names (`base_model.model....lora_A.weight`), so what
the learner publishes, what a file holds and what the server takes are the same thing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corun import torch_tools
from corun.errors import InputError, RunFault
from corun.llm.base import glm

SERVE, LEARNER = "serve", "learner"
CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

Tensors = Mapping[str, Any]


@dataclass(frozen=True)
class AdapterOptions:
    """A new adapter: W + (alpha / rank) B A on each target (Hu et al. 2021); B starts at 0, so it changes nothing."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    seed: int = 0


def attach(tree: Any, name: str, base: Any, path: Path | None = None, options: AdapterOptions | None = None) -> Any:
    """Put adapter `name` on a tree: loaded from a peft directory, or new when `path` is None; the tree as a PeftModel.

    The adapter's tensors are float32 whatever the base is. An adapter made on the original's `query_key_value` is
    converted. Raises InputError: no adapter there, not a LoRA, made for another model.
    """
    from peft import get_peft_model

    wanted = options or AdapterOptions()
    config, state = (_new_config(wanted), None) if path is None else _read(path, base)
    with torch_tools.seeded(wanted.seed):
        try:
            model = get_peft_model(tree, config, adapter_name=name)
        except ValueError as error:
            raise InputError(f"the adapter does not fit this network: {str(error).splitlines()[0]}") from None
    if state is not None:
        replace(model, name, state)
    return model


def _new_config(options: AdapterOptions) -> Any:
    from peft import LoraConfig, TaskType

    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
        task_type=TaskType.CAUSAL_LM,
    )


def _read(path: Path, base: Any) -> tuple[Any, Tensors]:
    """(LoraConfig, tensors) of a peft directory, converted to Glm's names."""
    from peft import LoraConfig

    given = _read_config(path)
    weights = [path / name for name in WEIGHTS if (path / name).is_file()]
    if not weights:
        raise InputError(f"{path} holds no adapter weights: {' or '.join(WEIGHTS)}")
    plugin = glm()
    state = {name.replace(".default.", "."): value for name, value in torch_tools.read_state_dict(weights[0]).items()}
    targets = given.get("target_modules") or ["query_key_value"]
    known = {key: given[key] for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "bias") if key in given}
    config = LoraConfig(
        **known, task_type=given.get("task_type"), target_modules=plugin.convert_targets(_as_list(targets))
    )
    return config, plugin.convert_lora(state, base.shape)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        given = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is no adapter: {CONFIG} is missing; an empty path starts a new one") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path / CONFIG} cannot be read: {error}") from None
    if given.get("peft_type") != "LORA":
        raise InputError(f"{path} is a {given.get('peft_type')} adapter: only LORA can be used")
    if given.get("use_dora") or given.get("modules_to_save"):
        raise InputError(f"{path} uses DoRA or modules_to_save: only plain LoRA matrices can be used")
    return dict(given)


def _as_list(targets: Any) -> list[str]:
    return [targets] if isinstance(targets, str) else list(targets)


def scale(path: Path | None, options: AdapterOptions | None = None) -> float:
    """alpha / rank of the adapter `attach` would make of the same arguments."""
    if path is None:
        wanted = options or AdapterOptions()
        return wanted.alpha / wanted.rank
    given = _read_config(path)
    return float(given.get("lora_alpha", 8)) / float(given.get("r", 8))


def parameters(model: Any, name: str) -> dict[str, Any]:
    """The adapter's own parameters by their names in a file."""
    mark = f".{name}."
    return {
        key.replace(mark, "."): value for key, value in model.named_parameters() if mark in key and "lora_" in key
    }


def snapshot(model: Any, name: str) -> dict[str, Any]:
    """A copy of the adapter's tensors on the host."""
    return {key: value.detach().to("cpu", copy=True) for key, value in parameters(model, name).items()}


def replace(model: Any, name: str, state: Tensors) -> None:
    """Write `state` over the adapter in place; InputError, and nothing written, when it is not of the same form."""
    import torch

    own = parameters(model, name)
    problems = [f"missing: {key}" for key in own if key not in state]
    problems += [f"unknown: {key}" for key in state if key not in own]
    problems += [
        f"shape of {key}: {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        raise InputError("the adapter is not of the same form (rank and targets)", problems[:6])
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(state[key])


def save(model: Any, name: str, path: Path) -> None:
    """Write the adapter as peft does: adapter_config.json and adapter_model.safetensors."""
    from safetensors.torch import save_file

    try:
        path.mkdir(parents=True, exist_ok=True)
        model.peft_config[name].save_pretrained(str(path))
        save_file(snapshot(model, name), path / WEIGHTS[0])
    except OSError as error:
        raise RunFault(f"cannot save the adapter in {path}: {error}") from error
