"""ChatGLM2-6B and ChatGLM3-6B as transformers' native Glm: shapes, checkpoints, tokenizer, LoRA conversion.

The published checkpoints come with remote code written for transformers 4; the network itself is transformers'
`GlmForCausalLM` under other names, so nothing of that code is run. Only one tensor per layer changes its form:

    query_key_value   rows [heads * 128 | groups * 128 | groups * 128]  ->  q_proj, k_proj, v_proj

Each part is a contiguous run of rows, that is a view: shards are mapped, sliced and assigned, and a converted model
occupies the pages of its files and nothing else. Rotary pairs are interleaved in both, so no row is permuted.
In fp32 the logits equal the original's; in half precision they do not (the original computes RoPE angles in it).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corun import torch_tools
from corun.errors import InputError, suggest

if TYPE_CHECKING:
    import torch

MAX_LISTED = 6
IGNORE = -100
LONGEST_CHARACTER = 4

TOP_LEVEL = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.output_layer.weight": "lm_head.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
}
IN_LAYER = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
FUSED = "self_attention.query_key_value"
SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LAYER = "transformer.encoder.layers."
DROPPED = "transformer.rotary_pos_emb.inv_freq"

FIXED_SETTINGS: Mapping[str, Any] = {
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "rope_ratio": 1,
}


@dataclass(frozen=True)
class Shape:
    """The sizes of one ChatGLM network; the defaults are ChatGLM2-6B's."""

    layers: int = 28
    hidden: int = 4096
    ffn: int = 13696
    heads: int = 32
    head_dim: int = 128
    groups: int = 2
    vocab: int = 65024
    max_length: int = 32768
    eps: float = 1e-5

    @property
    def fused_rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v in `query_key_value`."""
        return self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim

    def config(self) -> Any:
        """The GlmConfig; every default of that class that is GLM-4's is set."""
        from transformers import GlmConfig

        return GlmConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_length,
            rms_norm_eps=self.eps,
            attention_bias=True,
            attention_dropout=0.0,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        )

    def original(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of an original checkpoint, `inv_freq` excepted."""
        found: dict[str, tuple[int, ...]] = {
            "transformer.embedding.word_embeddings.weight": (self.vocab, self.hidden),
            "transformer.output_layer.weight": (self.vocab, self.hidden),
            "transformer.encoder.final_layernorm.weight": (self.hidden,),
        }
        rows = sum(self.fused_rows)
        for index in range(self.layers):
            layer = f"{LAYER}{index}."
            found[f"{layer}input_layernorm.weight"] = (self.hidden,)
            found[f"{layer}post_attention_layernorm.weight"] = (self.hidden,)
            found[f"{layer}{FUSED}.weight"] = (rows, self.hidden)
            found[f"{layer}{FUSED}.bias"] = (rows,)
            found[f"{layer}self_attention.dense.weight"] = (self.hidden, self.heads * self.head_dim)
            found[f"{layer}mlp.dense_h_to_4h.weight"] = (2 * self.ffn, self.hidden)
            found[f"{layer}mlp.dense_4h_to_h.weight"] = (self.hidden, self.ffn)
        return found


PRESETS: Mapping[str, Shape] = {
    "tiny": Shape(layers=3, hidden=128, ffn=432, heads=8, head_dim=16, vocab=320, max_length=2048),
    "small": Shape(layers=8, hidden=512, ffn=1712, heads=8, head_dim=64),
    "mid": Shape(layers=12, hidden=1024, ffn=3424, heads=16, head_dim=64),
    "6b": Shape(),
}


def preset_shape(name: str) -> Shape:
    """The sizes called `name`; InputError with a suggestion otherwise."""
    if name not in PRESETS:
        raise InputError(f'preset "{name}" is not one of {", ".join(PRESETS)}{suggest(name, PRESETS)}')
    return PRESETS[name]


# Checkpoints


def read_shape(directory: Path) -> Shape:
    """Sizes from the `config.json` of an original checkpoint; InputError lists what cannot be converted."""
    given = _read_json(directory / "config.json", "an original ChatGLM2 or ChatGLM3 checkpoint has one")
    problems = _refusals(given)
    problems += [
        f"{key} is {given[key]!r}, only {wanted!r} is supported"
        for key, wanted in FIXED_SETTINGS.items()
        if key in given and given[key] != wanted
    ]
    names = {
        "layers": "num_layers",
        "hidden": "hidden_size",
        "ffn": "ffn_hidden_size",
        "heads": "num_attention_heads",
        "head_dim": "kv_channels",
        "groups": "multi_query_group_num",
        "vocab": "padded_vocab_size",
        "max_length": "seq_length",
        "eps": "layernorm_epsilon",
    }
    problems += [f"{key} is missing" for key in names.values() if key not in given]
    if problems:
        raise InputError(f"the checkpoint in {directory} cannot be converted", problems)
    return Shape(**{field: given[key] for field, key in names.items()})


def _refusals(config: Mapping[str, Any]) -> list[str]:
    """What a config says that no conversion can follow."""
    problems = []
    if config.get("model_type", "chatglm") != "chatglm":
        problems.append(f"model_type is {config['model_type']!r}, not 'chatglm'")
    if config.get("quantization_bit"):
        problems.append(f"it is quantised to int{config['quantization_bit']}: use the fp16 checkpoint")
    if config.get("pre_seq_len"):
        problems.append("it has a p-tuning prefix (pre_seq_len): use the base checkpoint and a LoRA adapter")
    return problems


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: {hint}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object")
    return value


def shard_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint, from its index or by their usual single names; all missing are named."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (directory / name).is_file():
            names = sorted(set(_read_json(directory / name, "").get("weight_map", {}).values()))
            missing = [f"{shard} is missing" for shard in names if not (directory / shard).is_file()]
            if missing or not names:
                raise InputError(f"{directory} is incomplete: {name} lists {len(names)} shards", missing)
            return [directory / shard for shard in names]
    single = [directory / name for name in ("model.safetensors", "pytorch_model.bin") if (directory / name).is_file()]
    if not single:
        raise InputError(
            f"{directory} holds no weights: neither an index of shards nor a single .bin or .safetensors"
        )
    return single[:1]


def read_shard(path: Path) -> Mapping[str, torch.Tensor]:
    """One file's tensors, mapped and not copied; nothing of the file runs."""
    import pickle

    import torch

    if path.suffix == ".safetensors":
        return torch_tools.read_state_dict(path)
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, ValueError):  # a file older than torch 1.6 has no mappable layout
        state = torch_tools.read_state_dict(path)
    except (pickle.UnpicklingError, LookupError, EOFError, OSError) as error:
        raise InputError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from None
    if not isinstance(state, Mapping):
        raise InputError(f"{path} is not a state dict (a mapping from names to tensors)")
    return state


def read_checkpoint(directory: Path) -> tuple[Shape, dict[str, torch.Tensor]]:
    """(sizes, Glm state dict of views into the mapped shards) of an original checkpoint directory.

    Raises InputError: no such directory, missing shards, quantised or p-tuning weights, tensors that are missing,
    unknown or of a wrong shape.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory: give the folder of a ChatGLM2-6B checkpoint")
    shape = read_shape(directory)
    state: dict[str, torch.Tensor] = {}
    for path in shard_files(directory):
        state.update(read_shard(path))
    return shape, convert(state, shape, str(directory))


def convert(state: Mapping[str, torch.Tensor], shape: Shape, source: str) -> dict[str, torch.Tensor]:
    """Original names and tensors to Glm's; each result is a view of what was given."""
    _refuse_weights(state, source)
    wanted = shape.original()
    problems = [
        f"shape of {name}: {tuple(state[name].shape)} in the file, {size} by its config"
        for name, size in wanted.items()
        if name in state and tuple(state[name].shape) != size
    ]
    problems += [f"missing: {name}" for name in wanted if name not in state]
    problems += [f"unknown: {name}" for name in state if name not in wanted and name != DROPPED]
    if problems:
        more = len(problems) - MAX_LISTED
        shown = problems[:MAX_LISTED] + ([f"... and {more} more"] if more > 0 else [])
        raise InputError(f"the weights in {source} are not a ChatGLM2 network of this size", shown)
    return {new: part for name in wanted for new, part in _renamed(name, state[name], shape)}


def _refuse_weights(state: Mapping[str, torch.Tensor], source: str) -> None:
    import torch

    if any(".prefix_encoder." in name for name in state):
        raise InputError(f"{source} holds a p-tuning prefix: use the base checkpoint and a LoRA adapter")
    if any(
        name.endswith("weight_scale") or value.dtype in (torch.int8, torch.uint8) for name, value in state.items()
    ):
        raise InputError(f"{source} is quantised (int4 or int8): use the fp16 checkpoint")


def _renamed(name: str, value: torch.Tensor, shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    if name in TOP_LEVEL:
        yield TOP_LEVEL[name], value
        return
    index, _, rest = name.removeprefix(LAYER).partition(".")
    part, _, kind = rest.rpartition(".")
    if part != FUSED:
        yield f"model.layers.{index}.{IN_LAYER[part]}.{kind}", value
        return
    for target, piece in zip(SPLIT, value.split(shape.fused_rows), strict=True):
        yield f"model.layers.{index}.{target}.{kind}", piece


def random_state(shape: Shape, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights drawn from `seed`: linear maps with variance 1 / fan-in, embeddings of variance 1, norms 1, biases 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in empty_module(shape).state_dict().items():
        if name.endswith("norm.weight"):
            state[name] = torch.ones(value.shape, dtype=dtype)
        elif value.ndim == 1:
            state[name] = torch.zeros(value.shape, dtype=dtype)
        else:
            std = 1.0 if "embed_tokens" in name else value.shape[1] ** -0.5
            state[name] = torch.empty(value.shape, dtype=dtype).normal_(0.0, std, generator=generator)
    return state


def empty_module(shape: Shape) -> Any:
    """A Glm of these sizes on the meta device: names and shapes, no memory."""
    import torch
    from transformers import GlmForCausalLM

    with torch.device("meta"):
        return GlmForCausalLM(shape.config())


def assemble(shape: Shape, state: Mapping[str, torch.Tensor]) -> Any:
    """A GlmForCausalLM in eval mode whose parameters are the given tensors themselves, without gradients.

    The rotary table is not part of a state dict and is built anew on the tensors' device.
    """
    from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

    module = empty_module(shape)
    module.load_state_dict(state, strict=True, assign=True)
    module.model.rotary_emb = GlmRotaryEmbedding(module.config).to(state["lm_head.weight"].device)
    return module.eval().requires_grad_(False)


# LoRA


def convert_lora(state: Mapping[str, torch.Tensor], shape: Shape) -> dict[str, torch.Tensor]:
    """A peft adapter made on the original's module names, for Glm's; native ones pass unchanged.

    On `query_key_value` A goes to q, k and v alike and B is split by rows, which gives the same product.
    """
    converted: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if f".{LAYER}" not in name:
            converted[name] = value
            continue
        head, _, tail = name.partition(LAYER)
        index, _, rest = tail.partition(".")
        part, _, kind = rest.partition(".lora_")
        targets = SPLIT if part == FUSED else (IN_LAYER.get(part),)
        if None in targets or not kind:
            raise InputError(f"{name} is no LoRA tensor of a ChatGLM layer")
        is_b = kind.startswith("B") and part == FUSED
        if is_b and len(value) != sum(shape.fused_rows):
            raise InputError(f"{name} has {len(value)} rows; this base has {sum(shape.fused_rows)}: another model's?")
        pieces = value.split(shape.fused_rows) if is_b else [value] * len(targets)
        for target, piece in zip(targets, pieces, strict=True):
            converted[f"{head}model.layers.{index}.{target}.lora_{kind}"] = piece.clone()
    return converted


def convert_targets(targets: Sequence[str]) -> list[str]:
    """`target_modules` of an adapter made on the original's names, for Glm's."""
    names = {FUSED.rpartition(".")[2]: SPLIT, **{old.rpartition(".")[2]: (new,) for old, new in IN_LAYER.items()}}
    return sorted({new.rpartition(".")[2] for old in targets for new in names.get(old.rpartition(".")[2], (old,))})


# Text


class Tokenizer:
    """Text to ids and back, over SentencePiece or, without a model file, over bytes.

    After the n pieces come five special ids: [MASK] n, [gMASK] n+1, [sMASK] n+2, sop n+3, eop n+4 (n = 64789 in
    ChatGLM2). A prompt is [gMASK] sop + pieces; 0 pads on the left, 2 ends a text.
    """

    pad, bos, eos = 0, 1, 2

    def __init__(self, pieces: Any, label: str) -> None:
        self.label = label
        self._pieces = pieces
        self.size: int = pieces.get_piece_size()
        self.prefix = (self.size + 1, self.size + 3)

    @property
    def vocab(self) -> int:
        """Ids in use, special ones included; a network's table may be padded beyond it."""
        return self.size + 5

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text, with the prefix [gMASK] sop unless `special` is False."""
        ids: list[int] = self._pieces.encode(text)
        return [*self.prefix, *ids] if special else ids

    def prompt(self, question: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Ids of a question in the chat format, after rounds of (question, answer)."""
        return self.encode(chat_prompt(question, history))

    def decode(self, ids: Sequence[int], partial: bool = False) -> str:
        """Text of ids; special and padding ids are left out.

        partial: more ids follow, so an unfinished character at the end is held back.
        """
        text: str = self._pieces.decode([int(i) for i in ids if self.eos < i < self.size])
        return text.rstrip("\ufffd") if partial else text


class TextStream:
    """The text of an answer whose ids come one by one: `add` returns what each adds, "" in mid-character.

    Pieces are decoded together with those before them (a piece alone loses its leading space); only what follows the
    last text given is kept, so each step costs the same however long the answer is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0

    def add(self, token: int) -> str:
        """One more id."""
        self._ids.append(int(token))
        before = self._tokenizer.decode(self._ids[: self._given])
        text = self._tokenizer.decode(self._ids)
        unfinished = text.endswith("\ufffd") and len(self._ids) - self._given < LONGEST_CHARACTER
        if len(text) <= len(before) or unfinished:
            return ""
        self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        return text[len(before) :]


class BytePieces:
    """UTF-8 bytes as pieces 3..258: any text works where no SentencePiece model is at hand."""

    def get_piece_size(self) -> int:
        return 259

    def encode(self, text: str) -> list[int]:
        return [3 + byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - 3 for i in ids).decode(errors="replace")


def chat_prompt(question: str, history: Sequence[tuple[str, str]] = ()) -> str:
    """ChatGLM2's chat format: `[Round i]`, question and answer of each round, the last answer left open."""
    rounds = [f"[Round {i}]\n\n问：{asked}\n\n答：{answer}\n\n" for i, (asked, answer) in enumerate(history, 1)]
    return "".join(rounds) + f"[Round {len(history) + 1}]\n\n问：{question}\n\n答："


def load_tokenizer(directory: Path | None) -> Tokenizer:
    """The tokenizer of a checkpoint directory (`tokenizer.model`), or the byte tokenizer for None."""
    if directory is None:
        return Tokenizer(BytePieces(), "bytes")
    path = directory / "tokenizer.model"
    if not path.is_file():
        return Tokenizer(BytePieces(), "bytes")
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{path} is not a SentencePiece model: {error}") from None
    return Tokenizer(pieces, torch_tools.sha256_label(path))


def left_padded(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), both int64 (B, T): rows end together, as generation in a batch needs it."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def label_batch(examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, torch.Tensor]:
    """Collate (prompt ids, label ids): right-padded ids, mask, and labels that are IGNORE outside the label ids."""
    import torch

    longest = max(len(prompt) + len(label) for prompt, label in examples)
    ids = torch.zeros((len(examples), longest), dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row, (prompt, label) in enumerate(examples):
        end = len(prompt) + len(label)
        ids[row, :end] = torch.tensor([*prompt, *label])
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(label)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def label_loss(module: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of predicting each label id from the ids before it, averaged over the label ids of the batch."""
    import torch

    logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    predicted = logits[:, :-1].float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(predicted, batch["labels"][:, 1:].flatten(), ignore_index=IGNORE)


def fit_tokenizer(shape: Shape, tokenizer: Tokenizer) -> Shape:
    """`shape` with room for the tokenizer's ids: a random network is widened."""
    return shape if shape.vocab >= tokenizer.vocab else replace(shape, vocab=-(-tokenizer.vocab // 64) * 64)


@dataclass(frozen=True)
class Base:
    """A base network as tensors: nothing in it is written to once it is made."""

    shape: Shape
    state: Mapping[str, torch.Tensor]
    label: str
    tokenizer: Tokenizer

    @property
    def params(self) -> int:
        return sum(value.numel() for value in self.state.values())


def load_base(source: str | None, preset: str, precision: str, device: str, seed: int) -> Base:
    """The base from a checkpoint directory, or of a preset's size with random weights when `source` is None.

    Tensors already in `precision` and on the CPU stay views of the mapped files.
    """
    dtype, place = torch_tools.torch_dtype(precision), torch_tools.torch_device(device)
    if source is None:
        tokenizer = load_tokenizer(None)
        shape = fit_tokenizer(preset_shape(preset), tokenizer)
        state = random_state(shape, seed, dtype)
        label = f"random (preset {preset}, seed {seed})"
    else:
        directory = Path(source).expanduser()
        shape, state = read_checkpoint(directory)
        tokenizer, label = load_tokenizer(directory), _checkpoint_label(directory)
    moved = {name: value.to(device=place, dtype=dtype) for name, value in state.items()}
    return Base(shape, moved, label, tokenizer)


def _checkpoint_label(directory: Path) -> str:
    """A checkpoint by the digest of its index (of its only weight file when it has none)."""
    indexes = sorted(directory.glob("*.index.json"))
    named = indexes[0] if indexes else shard_files(directory)[0]
    return f"{torch_tools.sha256_label(named).partition(' ')[0]} {directory}"
