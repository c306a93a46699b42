"""ChatGLM2 checkpoints converted to Glm: same numbers as an independent reference, and clear refusals."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from corun import registry
from corun.errors import InputError
from corun.registry import ModelOptions

glm = registry.load_plugin("models", "_chatglm")
plugin = registry.load_plugin("models", "chatglm")
SMALL = glm.Shape(layers=3, hidden=64, ffn=96, heads=4, head_dim=16, groups=2, vocab=128, max_length=512)
ORIGINAL_CONFIG = {
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True,
    "ffn_hidden_size": SMALL.ffn,
    "fp32_residual_connection": False,
    "hidden_size": SMALL.hidden,
    "kv_channels": SMALL.head_dim,
    "layernorm_epsilon": SMALL.eps,
    "multi_query_attention": True,
    "multi_query_group_num": SMALL.groups,
    "num_attention_heads": SMALL.heads,
    "num_layers": SMALL.layers,
    "original_rope": True,
    "padded_vocab_size": SMALL.vocab,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": SMALL.max_length,
    "torch_dtype": "float16",
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def original_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the original's names, norms and biases included, so that every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, size in SMALL.original().items():
        scale = size[1] ** -0.5 if len(size) == 2 else 0.2
        offset = 1.0 if "layernorm" in name else 0.0
        state[name] = torch.randn(size, generator=generator) * scale + offset
    state["transformer.rotary_pos_emb.inv_freq"] = torch.ones(4, dtype=torch.float16)
    return state


def write_checkpoint(
    root: Path, state: dict[str, torch.Tensor], kind: str = "bin", shards: int = 3, **config: Any
) -> Path:
    """A directory as the hub has it: config.json, an index and shards."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps({**ORIGINAL_CONFIG, **config}))
    stem, suffix = ("pytorch_model", "bin") if kind == "bin" else ("model", "safetensors")
    names = list(state)
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.{suffix}"
        part = {name: state[name] for name in names[shard::shards]}
        weight_map.update(dict.fromkeys(part, file))
        if kind == "bin":
            torch.save(part, root / file)
        else:
            save_file(part, root / file)
    (root / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root


def reference_logits(state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """ChatGLM2's forward pass, written from its facts: (T,) ids to (T, vocab) logits."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + SMALL.eps) * weight

    def rotate(x: torch.Tensor) -> torch.Tensor:
        half = SMALL.head_dim // 2
        angles = torch.outer(torch.arange(len(x)).double(), 10000.0 ** -(torch.arange(0, half, 2).double() / half))
        turned = torch.view_as_complex(x[..., :half].double().reshape(*x.shape[:-1], half // 2, 2).contiguous())
        turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat([torch.view_as_real(turned).flatten(-2).float(), x[..., half:]], -1)

    def tensor(layer: int, name: str) -> torch.Tensor:
        return state[f"transformer.encoder.layers.{layer}.{name}"]

    count, heads, groups, size = len(ids), SMALL.heads, SMALL.groups, SMALL.head_dim
    hidden = state["transformer.embedding.word_embeddings.weight"][ids]
    causal = torch.full((count, count), float("-inf")).triu(1)
    for n in range(SMALL.layers):
        x = norm(hidden, tensor(n, "input_layernorm.weight"))
        mixed = x @ tensor(n, "self_attention.query_key_value.weight").T + tensor(
            n, "self_attention.query_key_value.bias"
        )
        q, k, v = mixed.split([heads * size, groups * size, groups * size], -1)
        q = rotate(q.view(count, heads, size))
        k = rotate(k.view(count, groups, size)).repeat_interleave(heads // groups, 1)
        v = v.view(count, groups, size).repeat_interleave(heads // groups, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / size**0.5 + causal
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(count, heads * size)
        hidden = hidden + mixed @ tensor(n, "self_attention.dense.weight").T
        x = norm(hidden, tensor(n, "post_attention_layernorm.weight"))
        gate, up = (x @ tensor(n, "mlp.dense_h_to_4h.weight").T).chunk(2, -1)
        hidden = hidden + (torch.nn.functional.silu(gate) * up) @ tensor(n, "mlp.dense_4h_to_h.weight").T
    return (
        norm(hidden, state["transformer.encoder.final_layernorm.weight"]) @ state["transformer.output_layer.weight"].T
    )


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_converted_checkpoint_gives_the_references_logits(tmp_path: Path, kind: str) -> None:
    """Shards in the original's layout, loaded as Glm, give the fp32 logits of the network's definition."""
    state = original_state()
    base = glm.load_base(str(write_checkpoint(tmp_path, state, kind)), "6b", "fp32", "cpu", 0)
    ids = torch.randint(0, SMALL.vocab, (100,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = glm.assemble(base.shape, base.state)(ids[None]).logits[0]
    expected = reference_logits(state, ids)
    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() <= 1e-4
    assert base.label.startswith("sha256:")


def test_the_parts_of_a_fused_tensor_stay_in_its_memory() -> None:
    """Conversion copies nothing: q, k and v are runs of rows of query_key_value, other tensors are themselves."""
    state = original_state()
    converted = glm.convert(state, SMALL, "test")
    fused = state["transformer.encoder.layers.1.self_attention.query_key_value.weight"]
    parts = [converted[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert {part.untyped_storage().data_ptr() for part in parts} == {fused.untyped_storage().data_ptr()}
    assert torch.equal(torch.cat(parts), fused)
    module = glm.assemble(SMALL, converted)
    assert (
        module.model.embed_tokens.weight.data_ptr()
        == state["transformer.embedding.word_embeddings.weight"].data_ptr()
    )


def test_the_full_size_has_the_published_parameters() -> None:
    """The default sizes are those of the published 200 tensors: 6,243,584,000 parameters."""
    names = glm.Shape().original()
    assert len(names) + 1 == 200
    assert sum(torch.Size(size).numel() for size in names.values()) == 6_243_584_000
    module = glm.empty_module(glm.Shape())
    assert sum(parameter.numel() for parameter in module.parameters()) == 6_243_584_000


def test_precision_is_that_asked_for(tmp_path: Path) -> None:
    """A checkpoint is cast to fp32, bf16 or fp16, and stays close to fp32."""
    state = {name: value.half() for name, value in original_state().items()}
    source = str(write_checkpoint(tmp_path, state))
    ids = torch.arange(40)[None]
    full = glm.load_base(source, "6b", "fp32", "cpu", 0)
    with torch.no_grad():
        expected = glm.assemble(full.shape, full.state)(ids).logits
        for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            base = glm.load_base(source, "6b", precision, "cpu", 0)
            logits = glm.assemble(base.shape, base.state)(ids).logits
            assert logits.dtype == dtype
            assert (logits.float() - expected).abs().max() < 1


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """An index whose shard is not there is refused with the shard's name."""
    root = write_checkpoint(tmp_path, original_state())
    (root / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(InputError, match=r"pytorch_model-00002-of-00003\.bin is missing"):
        glm.read_checkpoint(root)


def test_wrong_missing_and_unknown_tensors_are_listed(tmp_path: Path) -> None:
    """One refusal names a wrong shape, a missing and an unknown tensor."""
    state = original_state()
    state["transformer.output_layer.weight"] = torch.zeros(7, 7)
    del state["transformer.encoder.final_layernorm.weight"]
    state["transformer.extra.weight"] = torch.zeros(1)
    with pytest.raises(InputError) as refused:
        glm.read_checkpoint(write_checkpoint(tmp_path, state))
    text = str(refused.value)
    assert "shape of transformer.output_layer.weight: (7, 7) in the file, (128, 64)" in text
    assert "missing: transformer.encoder.final_layernorm.weight" in text
    assert "unknown: transformer.extra.weight" in text


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quantization_bit": 4}, "int4"),
        ({"quantization_bit": 8}, "int8"),
        ({"pre_seq_len": 128}, "p-tuning"),
        ({"rope_ratio": 50}, "rope_ratio is 50"),
        ({"model_type": "llama"}, "model_type"),
    ],
)
def test_configs_that_cannot_be_converted_are_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    """Quantised, p-tuned, stretched and foreign checkpoints are refused with the reason."""
    with pytest.raises(InputError, match=reason):
        glm.read_checkpoint(write_checkpoint(tmp_path, original_state(), **config))


def test_quantised_and_p_tuned_weights_are_refused_without_their_configs_word(tmp_path: Path) -> None:
    """int8 tensors and a prefix encoder are found in the weights too."""
    layer = "transformer.encoder.layers.0.mlp.dense_4h_to_h"
    quantised = original_state() | {f"{layer}.weight": torch.zeros(64, 48, dtype=torch.int8)}
    with pytest.raises(InputError, match="quantised"):
        glm.read_checkpoint(write_checkpoint(tmp_path / "a", quantised))
    prefixed = original_state() | {"transformer.prefix_encoder.embedding.weight": torch.zeros(2, 2)}
    with pytest.raises(InputError, match="p-tuning"):
        glm.read_checkpoint(write_checkpoint(tmp_path / "b", prefixed))


def test_a_directory_without_config_or_weights_says_so(tmp_path: Path) -> None:
    """What is missing is named: the directory, config.json, the weight files."""
    with pytest.raises(InputError, match="not a directory"):
        glm.read_checkpoint(tmp_path / "none")
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        glm.read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    with pytest.raises(InputError, match="no weights"):
        glm.read_checkpoint(tmp_path)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        raise_it = Path("/nonexistent/bomb").write_text
        return raise_it, ("boom",)


def test_a_shard_that_holds_code_is_refused(tmp_path: Path) -> None:
    """Shards are read with weights_only: a pickle of code is an error and is not run."""
    root = write_checkpoint(tmp_path, original_state(), shards=1)
    torch.save({"transformer.output_layer.weight": _Bomb()}, root / "pytorch_model-00001-of-00001.bin")
    with pytest.raises(InputError, match=r"pytorch_model-00001-of-00001\.bin"):
        glm.read_checkpoint(root)


def test_an_adapter_on_the_fused_projection_converts() -> None:
    """A LoRA on query_key_value gives the same logits as the same product added to the converted base."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    state, rank, generator = original_state(), 4, torch.Generator().manual_seed(3)
    lora, merged = {}, dict(state)
    for n in range(SMALL.layers):
        name = f"transformer.encoder.layers.{n}.self_attention.query_key_value"
        down = torch.randn(rank, SMALL.hidden, generator=generator) * 0.1
        up = torch.randn(sum(SMALL.fused_rows), rank, generator=generator) * 0.1
        lora |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        merged[f"{name}.weight"] = state[f"{name}.weight"] + 2.0 * up @ down
    targets = glm.convert_targets(["query_key_value"])
    assert targets == ["k_proj", "q_proj", "v_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    model = get_peft_model(glm.assemble(SMALL, glm.convert(state, SMALL, "test")), config)
    result = set_peft_model_state_dict(model, glm.convert_lora(lora, SMALL))
    assert not result.unexpected_keys
    ids = torch.arange(60)
    with torch.no_grad():
        difference = model(ids[None]).logits[0] - reference_logits(merged, ids)
    assert difference.abs().max() <= 2e-4


def test_an_adapter_of_another_size_is_refused() -> None:
    """B with another number of rows belongs to another model."""
    name = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.lora_B.weight"
    with pytest.raises(InputError, match="another model"):
        glm.convert_lora({name: torch.zeros(5, 2)}, SMALL)


def sentencepiece_model(directory: Path) -> Path:
    """A SentencePiece model with byte fallback, trained on a few lines."""
    from sentencepiece import SentencePieceTrainer

    model = BytesIO()
    lines = ["hello world", "the quick brown fox", "你好 世界", "问：答：", "[Round 1]"] * 20
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        character_coverage=1.0,
        minloglevel=2,
    )
    path = directory / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def test_the_tokenizer_adds_the_prefix_and_skips_special_ids(tmp_path: Path) -> None:
    """[gMASK] sop come first, their ids follow the pieces, and decoding leaves out what is no piece."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(sentencepiece_model(tmp_path)))
    tokenizer = glm.load_tokenizer(tmp_path)
    size = pieces.get_piece_size()
    ids = tokenizer.encode("hello world")
    assert ids[:2] == [size + 1, size + 3]
    assert ids[2:] == pieces.encode("hello world")
    assert tokenizer.decode([*ids, tokenizer.eos, size + 4]) == "hello world"
    assert tokenizer.prompt("你好") == tokenizer.encode("[Round 1]\n\n问：你好\n\n答：")
    assert tokenizer.label.startswith("sha256:")


def test_special_ids_are_chatglm2s_at_its_number_of_pieces() -> None:
    """With 64,789 pieces the prefix is 64790 64792, as published."""

    class Pieces:
        def get_piece_size(self) -> int:
            return 64789

        def encode(self, text: str) -> list[int]:
            return [790, 30951]

    tokenizer = glm.Tokenizer(Pieces(), "fake")
    assert tokenizer.encode("x") == [64790, 64792, 790, 30951]
    assert tokenizer.vocab == 64794


def test_the_chat_format_repeats_the_history() -> None:
    """Earlier rounds stand before the question with their answers, numbered from 1."""
    assert glm.chat_prompt("b", [("q", "a")]) == "[Round 1]\n\n问：q\n\n答：a\n\n[Round 2]\n\n问：b\n\n答："


@given(st.text())
@settings(max_examples=30, deadline=None)
def test_the_byte_tokenizer_returns_every_text(text: str) -> None:
    """Without a model file any text is encoded and comes back."""
    tokenizer = glm.load_tokenizer(None)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_streamed_half_character_is_held_back() -> None:
    """While more ids follow, an unfinished character is not shown."""
    tokenizer = glm.load_tokenizer(None)
    ids = tokenizer.encode("a你", special=False)
    assert tokenizer.decode(ids[:-1], partial=True) == "a"
    assert tokenizer.decode(ids, partial=True) == "a你"


def test_the_loss_counts_label_tokens_only() -> None:
    """Changing prompt predictions leaves the loss; it equals the mean cross-entropy at the label ids."""
    module = glm.assemble(SMALL, glm.random_state(SMALL, 0, torch.float32))
    examples = [((3, 4, 5), (6, 7)), ((8,), (9, 10, 11, 12))]
    batch = glm.label_batch(examples)
    assert (batch["labels"] != glm.IGNORE).sum() == 6
    total = 0.0
    with torch.no_grad():
        for prompt, label in examples:
            logits = module(torch.tensor([[*prompt, *label]])).logits[0].log_softmax(-1)
            total -= sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(label))
        assert float(glm.label_loss(module, batch)) == pytest.approx(total / 6, abs=1e-4)


def answers(servable: Any, payloads: list[bytes]) -> list[dict[str, Any]]:
    batch = servable.to_device(servable.preprocess([servable.decode(payload) for payload in payloads]))
    output = servable.to_host(servable.forward(batch))
    return [json.loads(reply) for reply in servable.postprocess(output, len(payloads))]


def test_the_service_answers_a_batch_as_it_answers_alone() -> None:
    """Left padding does not change greedy tokens; the servable takes prompts and ids."""
    servable = plugin.serve("tiny", ModelOptions())
    payloads = [
        b'{"prompt": "hello", "max_new_tokens": 6}',
        b'{"ids": [5, 6, 7], "max_new_tokens": 9}',
        servable.example(),
    ]
    together = answers(servable, payloads)
    assert together == [answers(servable, [payload])[0] for payload in payloads]
    assert [len(reply["ids"]) for reply in together] == [6, 9, 32]
    assert len(set(together[2]["ids"])) > 5
    assert servable.info.weights == "random (preset tiny, seed 0)"
    assert servable.info.task == "generation"


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff",
        b"[]",
        b"{}",
        b'{"prompt": 3}',
        b'{"ids": []}',
        b'{"ids": [100000]}',
        b'{"prompt": "a", "max_new_tokens": 0}',
    ],
)
def test_bad_requests_are_value_errors(payload: bytes) -> None:
    """A request that is no prompt is refused with a sentence."""
    servable = plugin.serve("tiny", ModelOptions())
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        servable.decode(payload)


def test_wrong_options_are_listed() -> None:
    """Unknown options and wrong values are all named at once."""
    options = ModelOptions(weights="default", extra={"max_new_token": 3, "prompt_tokens": 0})
    with pytest.raises(InputError) as refused:
        plugin.serve("tiny", options)
    assert len(refused.value.problems) == 3


def test_the_four_sizes_are_listed() -> None:
    """tiny, small, mid and 6b are models of the registry."""
    assert [name for name in registry.models() if name.startswith("chatglm2-")] == [
        f"chatglm2-{preset}" for preset in glm.PRESETS
    ]
    assert replace(glm.PRESETS["6b"]) == glm.Shape(**asdict(glm.Shape()))


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40))
@settings(max_examples=60, deadline=None)
def test_a_streamed_text_adds_up(text: str) -> None:
    """Whatever the characters, what each id adds makes the text, and none of it is half a character."""
    tokenizer = glm.load_tokenizer(None)
    stream = glm.TextStream(tokenizer)
    added = [stream.add(token) for token in tokenizer.encode(text, special=False)]
    assert "".join(added) == text
    assert not any("\ufffd" in part for part in added)


def test_pieces_keep_their_spaces_when_streamed() -> None:
    """A piece decoded alone would lose its leading space; streamed it does not."""

    class Pieces:
        words = ("\u2581is", "\u2581it", "y", "\u2581a")

        def get_piece_size(self) -> int:
            return 10

        def decode(self, ids: list[int]) -> str:
            return "".join(self.words[i - 3] for i in ids).replace("\u2581", " ").removeprefix(" ")

    stream = glm.TextStream(glm.Tokenizer(Pieces(), "fake"))
    assert [stream.add(i) for i in (3, 4, 5, 6)] == ["is", " it", "y", " a"]
