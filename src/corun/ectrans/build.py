"""Makes a translation model directory: config.json, model.safetensors, tokenizer.model, with seeded random weights.

Marian is the default; T5 is the second architecture, because its relative positions let a newcomer join a running
batch with no correction at all. Both are unmodified transformers networks, so a user's own directory of either kind
works in place of a made one.

    preset   d_model  heads  layers  d_ff   vocabulary
    tiny          64      4    2 + 2   128       1,000
    base         512      8    6 + 6  2048      32,000
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corun import torch_tools
from corun.ectrans import tokens
from corun.errors import InputError, suggest
from corun.registry import load_plugin

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
ARCHITECTURES = ("marian", "t5")
MAX_POSITIONS = 512
POSITIONS_SUFFIX = "embed_positions.weight"


@dataclass(frozen=True)
class Preset:
    """Sizes of a network, and how many made words a made tokenizer is trained on."""

    d_model: int
    heads: int
    layers: int
    d_ff: int
    vocabulary: int
    words: int
    init_std: float


PRESETS: Mapping[str, Preset] = {
    "tiny": Preset(64, 4, 2, 128, 1_000, 48, 0.1),
    "base": Preset(512, 8, 6, 2048, 32_000, 20_000, 0.02),
}
TOKENIZER_SENTENCES = 2_000


def prepare(
    preset: str,
    texts: Iterable[str] | None = None,
    synthetic: int = TOKENIZER_SENTENCES,
    out: Path = Path("models/nmt"),
    seed: int = 0,
    architecture: str = "marian",
) -> Path:
    """Write a model directory with a tokenizer trained on `texts`, or on `synthetic` made pairs, and random weights.

    Raises InputError: unknown preset or architecture, no text, a directory that cannot be written.
    """
    sizes = _preset(preset)
    pieces = made_tokenizer(preset, synthetic) if texts is None else tokens.train_pieces(texts, sizes.vocabulary)
    model = random_model(preset, architecture, seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / tokens.MODEL_FILE).write_bytes(pieces)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error}") from None
    write_model(model, out)
    return out


def made_tokenizer(preset: str, sentences: int = TOKENIZER_SENTENCES) -> bytes:
    """The SentencePiece model of the made language; it depends on the preset and the number of sentences alone."""
    sizes = _preset(preset)
    language = load_plugin("datasets", "pairs")
    pairs = language.made_pairs(sentences, seed=0, words=sizes.words)
    return tokens.train_pieces([text for pair in pairs for text in pair], sizes.vocabulary)


def configuration(preset: str, architecture: str = "marian") -> Any:
    """The transformers configuration of a preset; one table of embeddings for both languages, tied to the head."""
    sizes = _preset(preset)
    if architecture not in ARCHITECTURES:
        near = suggest(architecture, ARCHITECTURES)
        raise InputError(f'architecture "{architecture}" is not one of {", ".join(ARCHITECTURES)}{near}')
    ids = {
        "pad_token_id": tokens.PAD_ID,
        "eos_token_id": tokens.EOS_ID,
        "decoder_start_token_id": tokens.PAD_ID,
        "vocab_size": sizes.vocabulary,
        "tie_word_embeddings": True,
        "d_model": sizes.d_model,
    }
    if architecture == "t5":
        from transformers import T5Config

        return T5Config(
            **ids,
            num_layers=sizes.layers,
            num_decoder_layers=sizes.layers,
            num_heads=sizes.heads,
            d_kv=sizes.d_model // sizes.heads,
            d_ff=sizes.d_ff,
            dropout_rate=0.0,
        )
    from transformers import MarianConfig

    return MarianConfig(
        **ids,
        decoder_vocab_size=sizes.vocabulary,
        encoder_layers=sizes.layers,
        decoder_layers=sizes.layers,
        encoder_attention_heads=sizes.heads,
        decoder_attention_heads=sizes.heads,
        encoder_ffn_dim=sizes.d_ff,
        decoder_ffn_dim=sizes.d_ff,
        max_position_embeddings=MAX_POSITIONS,
        scale_embedding=True,
        share_encoder_decoder_embeddings=True,
        activation_function="relu",
        init_std=sizes.init_std,
        forced_eos_token_id=None,
        dropout=0.0,
    )


def random_model(preset: str, architecture: str = "marian", seed: int = 0) -> Any:
    """An unmodified MarianMTModel or T5ForConditionalGeneration in eval mode, its weights drawn from `seed`."""
    config = configuration(preset, architecture)
    with torch_tools.seeded(seed):
        return model_class(config)(config).eval()


def model_class(config: Any) -> Any:
    """The class that a configuration belongs to; InputError when it is neither Marian nor T5."""
    import transformers

    classes = {"marian": transformers.MarianMTModel, "t5": transformers.T5ForConditionalGeneration}
    if config.model_type not in classes:
        raise InputError(f'a model of type "{config.model_type}" cannot be split: give Marian or T5')
    return classes[config.model_type]


def read_config(directory: Path) -> Any:
    """The transformers configuration in a directory; InputError when there is none."""
    import transformers

    path = directory / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{directory} is not a model directory: it has no {CONFIG_FILE}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        classes = {"marian": transformers.MarianConfig, "t5": transformers.T5Config}
        return classes[fields["model_type"]].from_dict(fields)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the configuration of a Marian or T5 model: {error}") from None


def read_model(directory: Path) -> Any:
    """The network of a model directory, in eval mode on the CPU, in the precision of its file.

    Only safetensors is read. Raises InputError: no such directory, no weights, weights that do not fit.
    """
    config = read_config(directory)
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(f"{directory} has no {WEIGHTS_FILE}", ["other formats can run code and are not read"])
    return filled(config, torch_tools.read_state_dict(path), path)


def skeleton(config: Any) -> Any:
    """The network without memory: every tensor is on the meta device."""
    import torch

    with torch.device("meta"):
        return model_class(config)(config).eval()


def filled(config: Any, state: Mapping[str, Any], source: Path | str) -> Any:
    """A network over the tensors of `state`, which may leave out tied names and the tables of positions.

    The tensors are taken as they are: what is mapped from a file stays mapped. Raises InputError when they do not fit.
    """
    model = skeleton(config)
    adopt(model, {**with_tied(model, state), **position_tables(model, state)}, source)
    return model.requires_grad_(False)


def adopt(module: Any, state: Mapping[str, Any], source: Path | str) -> None:
    """Put the tensors of `state` in place of the module's own; InputError lists the names that do not fit."""
    own = module.state_dict()
    wrong = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    problems = [f"does not fit: {name}" for name in wrong] + [f"missing: {name}" for name in own if name not in state]
    if problems:
        raise InputError(f"the weights in {source} do not fit their configuration", problems[:6])
    tied = tied_names(module)
    module.load_state_dict(dict(state), assign=True)
    for names in tied:
        kept = module.get_parameter(names[0])
        for name in names[1:]:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, kept)


def with_tied(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` under every name that shares its tensor in the model."""
    whole = dict(state)
    for names in tied_names(model):
        known = [name for name in names if name in state]
        if known:
            whole |= {name: whole.get(name, state[known[0]]) for name in names}
    return whole


def made_trainable(model: Any) -> Any:
    """The network in fp32 with gradients for everything but the tables of positions, which are constants."""
    for name, value in model.float().named_parameters():
        value.requires_grad_(not name.endswith(POSITIONS_SUFFIX))
    return model


def tied_names(model: Any) -> list[list[str]]:
    """Groups of state names that are one parameter in the network."""
    groups: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def position_tables(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Marian's tables of positions, which its files leave out, for the names `state` lacks."""
    shapes = {name: value.shape for name, value in model.state_dict().items() if name.endswith(POSITIONS_SUFFIX)}
    dtype = next(iter(state.values())).dtype
    return {name: sinusoids(*shape).to(dtype) for name, shape in shapes.items() if name not in state}


def sinusoids(positions: int, width: int) -> Any:
    """Marian's table (positions, width): sines of all frequencies, then cosines (Vaswani et al. 2017, 3.5)."""
    import numpy as np
    import torch

    angles = np.array([[p / np.power(10000, 2 * (j // 2) / width) for j in range(width)] for p in range(positions)])
    return torch.from_numpy(np.hstack([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])]).astype(np.float32))


def stored_state(model: Any) -> dict[str, Any]:
    """What a file of the network holds: one name for each tied tensor, no tables of positions."""
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(POSITIONS_SUFFIX)}
    for names in tied_names(model):
        for name in names[1:]:
            state.pop(name, None)
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def write_model(model: Any, directory: Path) -> None:
    """Write config.json and model.safetensors, so that transformers' `from_pretrained` reads them too."""
    from safetensors.torch import save_file

    try:
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f"{WEIGHTS_FILE}.part"
        save_file(stored_state(model), part, metadata={"format": "pt"})
        part.replace(directory / WEIGHTS_FILE)
        fields = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        (directory / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{directory} cannot be written: {error}") from None


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise InputError(f'preset "{name}" is not one of {", ".join(PRESETS)}{suggest(name, PRESETS)}')
    return PRESETS[name]


def encoder_prefix(config: Any) -> str:
    """What the names of the encoder's tensors start with in the whole network."""
    return "encoder." if config.model_type == "t5" else "model.encoder."


def encoder_of(model: Any) -> Any:
    """The encoder inside the whole network."""
    return model.get_encoder()


def without_encoder(model: Any) -> Any:
    """The same network whose encoder holds nothing: `generate` and `forward` work when given encoder outputs."""
    import torch

    nothing = torch.nn.Identity()
    nothing.main_input_name = "input_ids"  # type: ignore[assignment]
    holder = model if model.config.model_type == "t5" else model.model
    holder.encoder = nothing
    return model
