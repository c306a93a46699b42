"""Writes trained forecasters to disk and reads them back: weights that cannot run code, and a JSON card beside them.

    production_lstm_20261121_093000.pth     a state dict, read with torch's weights-only mode
    production_lstm_20261121_093000.json    shapes, scales, offsets, naive forecasts, proof; data hash, split, scores

The card holds the sha256 of the weights: a pair that does not belong together is refused. Both files are written under
another name first, so a killed program leaves no half of them. Numbers survive exactly, so a reloaded model forecasts
bit for bit what the saved one did.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from corun.errors import InputError
from corun.predict.baselines import Naive
from corun.predict.fitting import Trained
from corun.predict.levels import LevelModel
from corun.predict.nets import Shape, build
from corun.predict.scores import Proof
from corun.predict.series import Field

__all__ = ["Saved", "load", "newest", "save", "stamp_for"]

FORMAT: Final = 1
LEVELS: Final = ("request", "window")
STAMP: Final = "%Y%m%d_%H%M%S"


@dataclass(frozen=True)
class Saved:
    """A checkpoint: its models by level ("request" and, where windows sufficed, "window") and the card as read."""

    name: str
    path: Path
    levels: Mapping[str, LevelModel]
    card: Mapping[str, Any]


def stamp_for(directory: Path, prefix: str, names: Sequence[str], now: datetime) -> str:
    """A time stamp under which no file of these models exists yet: now, or the next free second."""
    while any((directory / f"{prefix}_{name}_{now.strftime(STAMP)}.pth").exists() for name in names):
        now += timedelta(seconds=1)
    return now.strftime(STAMP)


def save(path: Path, name: str, levels: Mapping[str, LevelModel], facts: Mapping[str, Any]) -> None:
    """Write `path` (.pth) and the card beside it; facts: what else the card tells (JSON values).

    Raises InputError when the directory cannot be written.
    """
    tensors = {
        f"{level}.{key}": value.detach().cpu()
        for level, model in levels.items()
        for key, value in model.trained.net.state_dict().items()
    }
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    weights = buffer.getvalue()
    card = {
        "format": FORMAT,
        "model": name,
        "weights": path.name,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "levels": {level: _level_card(model) for level, model in levels.items()},
        **facts,
    }
    text = json.dumps(finite(card), indent=1, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, weights)
        _write(path.with_suffix(".json"), text.encode())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); give another --model-dir") from error


def newest(directory: Path, name: str) -> Path | None:
    """The checkpoint of model `name` with the latest stamp in its file name, whatever program made it."""
    pattern = re.compile(rf"(?:.*_)?{re.escape(name)}_(\d{{8}}_\d{{6}})\.pth")
    found = [(match[1], path) for path in directory.glob("*.pth") if (match := pattern.fullmatch(path.name))]
    return max(found)[1] if found else None


def load(path: Path, device: str = "cpu") -> Saved:
    """Read a checkpoint and its card.

    Raises InputError: a file is missing, damaged, of another format, or weights and card do not belong together.
    """
    card = _read_card(path.with_suffix(".json"))
    try:
        weights = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    if hashlib.sha256(weights).hexdigest() != card.get("weights_sha256"):
        raise InputError(f"{path} does not belong to its card: the sha256 differs; train again or restore both files")
    try:
        tensors = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
        found = {level: _level(card, level, tensors, device) for level in LEVELS if level in card["levels"]}
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be used: {str(error).splitlines()[0]}; train again") from error
    return Saved(str(card["model"]), path, found, card)


def finite(value: Any) -> Any:
    """JSON values with nan and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: the card of the weights cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: the card is not JSON ({error}); train again") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise InputError(f"{path}: not a card of format {FORMAT}; train again")
    return card


def _level_card(model: LevelModel) -> dict[str, Any]:
    trained = model.trained
    return {
        "shape": asdict(trained.shape),
        "fields": [asdict(field) for field in trained.fields],
        "quantile_levels": list(trained.levels),
        "scaler": {
            "input_mean": trained.input_mean.tolist(),
            "input_std": trained.input_std.tolist(),
            "output_mean": trained.output_mean.tolist(),
            "output_std": trained.output_std.tolist(),
        },
        "naive": [asdict(naive) for naive in model.naive],
        "spread": model.spread.tolist(),
        "offsets": model.offsets.tolist(),
        "bias": model.bias.tolist(),
        "proof": asdict(model.proof) | {"holds": model.proof.holds},
        "field_proofs": {name: asdict(p) | {"holds": p.holds} for name, p in model.field_proofs.items()},
        "validation_mase": model.validation_mase,
        "confidence": model.confidence,
        "baseline_confidence": model.baseline_confidence,
    }


def _level(card: Mapping[str, Any], level: str, tensors: Mapping[str, Any], device: str) -> LevelModel:
    stored = card["levels"][level]
    shape = Shape(**stored["shape"])
    net = build(str(card["model"]), shape, stored["quantile_levels"], 0)
    prefix = f"{level}."
    net.load_state_dict({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})
    scaler = {key: np.array(value, dtype=np.float64) for key, value in stored["scaler"].items()}
    trained = Trained(
        name=str(card["model"]),
        shape=shape,
        net=net.to(device),
        levels=tuple(stored["quantile_levels"]),
        fields=tuple(Field(**field) for field in stored["fields"]),
        device=device,
        **scaler,
    )
    return LevelModel(
        trained=trained,
        naive=tuple(Naive(**naive) for naive in stored["naive"]),
        spread=np.array(stored["spread"]),
        offsets=np.array(stored["offsets"]),
        bias=np.array(stored["bias"]),
        proof=_proof(stored["proof"]),
        field_proofs={name: _proof(proof) for name, proof in stored["field_proofs"].items()},
        validation_mase=float(stored["validation_mase"]),
        confidence=stored["confidence"],
        baseline_confidence=stored["baseline_confidence"],
    )


def _proof(stored: Mapping[str, Any]) -> Proof:
    return Proof(**{key: value for key, value in stored.items() if key != "holds"})


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
