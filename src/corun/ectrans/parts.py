"""Splits a translation model into an encoder part and a decoder part, and puts them together again.

    parts/
      device/               what a client needs: the tokenizer, and the embedding table when asked for
      config.json           the whole network's configuration
      encoder.safetensors   under the names of the whole network; tied tensors once a file
      decoder.safetensors   with the head
      manifest.json         format, architecture, split point, type, tied names, sha256 and bytes of every file

Every file is hashed before it is used, the manifest itself included, and nothing is ever unpickled: the published
system loaded pickled modules, which run whatever they contain.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corun import torch_tools
from corun.ectrans import build, tokens
from corun.ectrans.decode import Decoder
from corun.ectrans.encode import PARTITIONS, Embedding, Encoder
from corun.errors import InputError, suggest

FORMAT = "corun-ectrans-parts-1"
SPLIT_POINT = "encoder output"
MANIFEST = "manifest.json"
ENCODER, DECODER = "encoder.safetensors", "decoder.safetensors"
DEVICE = "device"
EMBEDDING = f"{DEVICE}/embedding.safetensors"
TABLE = "embed_tokens.weight"
CHECKED_TOKENS = 7


def split(model_dir: Path, out: Path, embedding: bool = False) -> Path:
    """Write the parts of a model directory to `out`; `embedding` puts a copy of the source table into device/.

    Raises InputError: not a model directory, `out` holds something else or cannot be written.
    """
    model = build.read_model(model_dir)
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise InputError(f"{out} is not empty and not a parts directory: give another one")
    state = _whole_state(model)
    try:
        (out / DEVICE).mkdir(parents=True, exist_ok=True)
        (out / MANIFEST).unlink(missing_ok=True)
        shutil.copyfile(model_dir / build.CONFIG_FILE, out / build.CONFIG_FILE)
        for path in tokens.tokenizer_files(model_dir):
            shutil.copyfile(path, out / DEVICE / path.name)
        tied = {ENCODER: _write(_encoder_state(model, state), out / ENCODER)}
        tied[DECODER] = _write(_decoder_state(model, state), out / DECODER)
        if embedding:
            _write({TABLE: state[build.encoder_prefix(model.config) + TABLE]}, out / EMBEDDING)
        _write_manifest(out, model, tied)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error}") from None
    return out


def join(parts: Path, out: Path) -> Path:
    """Write the whole model directory that the parts came from."""
    model = joined(parts)
    build.write_model(model, out)
    for path in tokens.tokenizer_files(parts / DEVICE):
        shutil.copyfile(path, out / path.name)
    return out


def joined(parts: Path) -> Any:
    """The whole network of the parts, in memory."""
    manifest = read_manifest(parts)
    state = {**_state(parts, manifest, ENCODER), **_state(parts, manifest, DECODER)}
    return build.filled(build.read_config(parts), state, parts)


def check(parts: Path, model_dir: Path | None = None) -> None:
    """Every file is what the manifest says, and the parts give the logits of the whole network bit for bit.

    The whole network is that of `model_dir`, or the parts joined. Raises InputError otherwise.
    """
    import torch

    manifest = read_manifest(parts)
    for name in manifest["files"]:
        _verify(parts, manifest, name)
    whole = (joined(parts) if model_dir is None else build.read_model(model_dir)).float()
    rows = [
        [3 + (7 * i + row) % (whole.config.vocab_size - 3) for i in range(CHECKED_TOKENS - row)] for row in (0, 3)
    ]
    encoder, decoder = load_encoder(parts), load_decoder(parts)
    hidden, mask = encoder.encode(rows)
    answer = torch.tensor(rows[:1] * 2)
    ids, _ = encoder_ids(rows, encoder)
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=mask, decoder_input_ids=answer).logits
    found = decoder.logits(hidden, mask, answer)
    if not torch.equal(expected, found):
        worst = (expected - found).abs().max().item()
        raise InputError(f"the parts in {parts} do not give the whole network's logits: they differ by {worst:g}")


def encoder_ids(rows: list[list[int]], encoder: Encoder) -> Any:
    """The padded ids the encoder sees."""
    from corun.ectrans.encode import padded

    return padded(rows, encoder.pad_id, encoder.device)


def load_encoder(parts: Path, device: str = "cpu", dtype: str = "fp32", partition: str = "ids") -> Encoder:
    """The encoder part in eval mode; the partition `embed` leaves the embedding table on the disk.

    On the CPU in the file's own type the weights stay mapped from the file, so processes share its pages.
    Raises InputError: no parts, a file that is not what the manifest says, unknown partition, device or type.
    """
    if partition not in PARTITIONS:
        known = ", ".join(PARTITIONS)
        raise InputError(f'partition "{partition}" is not one of {known}{suggest(partition, PARTITIONS)}')
    manifest = read_manifest(parts)
    config = build.read_config(parts)
    model = build.skeleton(config)
    module, prefix = build.encoder_of(model), build.encoder_prefix(config)
    state = {name.removeprefix(prefix): value for name, value in _state(parts, manifest, ENCODER).items()}
    state |= build.position_tables(module, state)
    if partition == "embed":
        module.embed_tokens = None
        state.pop(TABLE)
    build.adopt(module, state, parts / ENCODER)
    return Encoder(_placed(module, device, dtype), config, partition)


def load_embedding(parts: Path, device: str = "cpu", dtype: str = "fp32") -> Embedding:
    """The source embedding table alone, from device/ or, where that has none, from the encoder's file."""
    manifest = read_manifest(parts)
    config = build.read_config(parts)
    if EMBEDDING in manifest["files"]:
        table = _state(parts, manifest, EMBEDDING)[TABLE]
    else:
        table = _state(parts, manifest, ENCODER)[build.encoder_prefix(config) + TABLE]
    scale = float(getattr(build.encoder_of(build.skeleton(config)), "embed_scale", 1.0))
    placed = table.to(torch_tools.torch_device(device), torch_tools.torch_dtype(dtype))
    return Embedding(placed, scale, int(config.pad_token_id))


def load_decoder(parts: Path, device: str = "cpu", dtype: str = "fp32") -> Decoder:
    """The decoder part with the head, in eval mode; as `load_encoder`."""
    manifest = read_manifest(parts)
    config = build.read_config(parts)
    model = build.without_encoder(build.skeleton(config))
    state = build.with_tied(model, _state(parts, manifest, DECODER))
    state |= build.position_tables(model, state)
    build.adopt(model, state, parts / DECODER)
    return Decoder(_placed(model, device, dtype))


def read_manifest(parts: Path) -> dict[str, Any]:
    """The manifest; InputError when there is none, it is of another format, or it was changed."""
    path = parts / MANIFEST
    if not path.is_file():
        raise InputError(f"{parts} is not a parts directory: it has no {MANIFEST}", ["make one: ectrans.py split"])
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        said = manifest.pop("digest")
        form, files = manifest["format"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not a manifest of model parts") from None
    if form != FORMAT:
        raise InputError(f"{path} has the format {form!r}; this program reads {FORMAT}")
    if said != _digest(manifest):
        raise InputError(f"{path} was changed after it was written", ["split the model again"])
    missing = [name for name in (ENCODER, DECODER, build.CONFIG_FILE) if name not in files]
    if missing:
        raise InputError(f"{path} does not list {', '.join(missing)}")
    _verify(parts, manifest, build.CONFIG_FILE)
    return dict(manifest)


def _verify(parts: Path, manifest: Mapping[str, Any], name: str) -> None:
    path, said = parts / name, manifest["files"][name]
    if not path.is_file():
        raise InputError(f"{path} is missing: the manifest lists it")
    if path.stat().st_size != said["bytes"] or _sha256(path) != said["sha256"]:
        raise InputError(f"{path} is not the file the manifest describes", ["split the model again"])


def _state(parts: Path, manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The tensors of one file after checking it."""
    _verify(parts, manifest, name)
    state = torch_tools.read_state_dict(parts / name)
    tied: Mapping[str, str] = manifest["tied"].get(name, {})
    return {**state, **{alias: state[kept] for alias, kept in tied.items()}}


def _whole_state(model: Any) -> dict[str, Any]:
    """Every name with its tensor but Marian's tables of positions."""
    return {k: v.detach() for k, v in model.state_dict().items() if not k.endswith(build.POSITIONS_SUFFIX)}


def _encoder_state(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    prefix = build.encoder_prefix(model.config)
    return {name: value for name, value in state.items() if name.startswith(prefix)}


def _decoder_state(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Decoder and head; the table both languages share goes with them where the decoder uses it."""
    own = build.without_encoder(model).state_dict()
    return {name: state[name] for name in own if name in state}


def _write(state: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Write the tensors once each; returns {tied name: the name it is stored under}."""
    from safetensors.torch import save_file

    kept: dict[tuple[int, int], str] = {}
    tied: dict[str, str] = {}
    for name, value in state.items():
        key = (value.data_ptr(), value.numel())
        if key in kept:
            tied[name] = kept[key]
        else:
            kept[key] = name
    save_file({name: state[name].contiguous() for name in kept.values()}, path, metadata={"format": "pt"})
    return tied


def _write_manifest(out: Path, model: Any, tied: Mapping[str, Mapping[str, str]]) -> None:
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest = {
        "format": FORMAT,
        "architecture": model.config.model_type,
        "split": SPLIT_POINT,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tied": tied,
        "files": {
            path.relative_to(out).as_posix(): {"sha256": _sha256(path), "bytes": path.stat().st_size}
            for path in files
        },
    }
    text = json.dumps({**manifest, "digest": _digest(manifest)}, indent=2)
    (out / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _placed(module: Any, device: str, dtype: str) -> Any:
    module.eval().requires_grad_(False)
    return module.to(device=torch_tools.torch_device(device), dtype=torch_tools.torch_dtype(dtype))
