"""Adapters and their training: only the adapter learns, steps repeat, checkpoints continue, files are peft's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from corun.errors import InputError
from corun.llm import adapters
from corun.llm.adapters import AdapterOptions
from corun.llm.base import glm, load_base, share, tree
from corun.llm.learn import Learner, LearnOptions, new_learner

EXAMPLES = [([3 + i, 4, 5 + i], [10 + i, 11, 12 + i][: 1 + i % 3]) for i in range(8)]
FAST = LearnOptions(batch_size=2, lr=1e-2)


def test_training_changes_the_adapter_and_nothing_else(base: Any) -> None:
    """The loss falls, adapter tensors move, and the base's tensors keep every bit."""
    before = {name: value.clone() for name, value in base.state.items()}
    learner = new_learner(base, EXAMPLES, FAST)
    first = learner.adapter()
    losses = [learner.step().loss for _ in range(24)]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert any(not torch.equal(first[key], value) for key, value in learner.adapter().items())
    assert all(torch.equal(before[name], value) for name, value in base.state.items())


def test_two_trees_share_every_base_tensor(base: Any) -> None:
    """Both trees' parameters lie in the base's memory, as different Parameter objects."""
    one, two = tree(base), tree(base)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert a is not b
        assert a.data_ptr() == b.data_ptr() == base.state[name].data_ptr()


def test_accumulated_micro_batches_equal_one_batch(base: Any) -> None:
    """Two micro-batches of 2, with labels of different lengths, make the step of one batch of 4."""
    one = new_learner(base, EXAMPLES, LearnOptions(batch_size=4, lr=1e-2))
    two = new_learner(base, EXAMPLES, LearnOptions(batch_size=2, accumulate=2, lr=1e-2))
    for _ in range(2):
        a, b = one.step(), two.step()
        assert a.loss == pytest.approx(b.loss, abs=1e-5)
        assert (a.tokens, a.samples) == (b.tokens, b.samples)


def test_a_resumed_run_has_the_losses_of_one_that_ran_through(base: Any, tmp_path: Path) -> None:
    """Stopped in mid-epoch and resumed in a new learner, every later loss is bit-equal."""
    through = new_learner(base, EXAMPLES, FAST)
    expected = [through.step().loss for _ in range(7)]
    stopped = new_learner(base, EXAMPLES, FAST)
    for _ in range(3):
        stopped.step()
    stopped.save(tmp_path / "c.pt")
    resumed = new_learner(base, EXAMPLES, FAST, adapter=AdapterOptions(seed=5))
    resumed.resume(tmp_path / "c.pt")
    assert [resumed.step().loss for _ in range(4)] == expected[3:]
    assert resumed.steps_done == 7


def test_checkpoints_that_do_not_fit_are_refused(base: Any, tmp_path: Path) -> None:
    """No file, garbage, and another number of examples are InputErrors."""
    learner = new_learner(base, EXAMPLES, FAST)
    with pytest.raises(InputError, match="no checkpoint"):
        learner.resume(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"bad")
    with pytest.raises(InputError, match="cannot resume"):
        learner.resume(tmp_path / "bad.pt")
    learner.save(tmp_path / "c.pt")
    with pytest.raises(InputError, match="8 examples"):
        new_learner(base, EXAMPLES[:4], FAST).resume(tmp_path / "c.pt")


def test_what_cannot_be_trained_is_refused(base: Any) -> None:
    """An example without a label is named by its index; too few examples are counted."""
    with pytest.raises(InputError, match="example 1 has no label"):
        new_learner(base, [([3], [4]), ([3], [])])
    with pytest.raises(InputError, match="1 examples are fewer than one batch of 2"):
        new_learner(base, EXAMPLES[:1])


def test_a_saved_adapter_is_pefts_and_comes_back(base: Any, tmp_path: Path) -> None:
    """peft itself loads the directory, and so does attach, with the learner's logits."""
    learner = new_learner(base, EXAMPLES, FAST)
    for _ in range(3):
        learner.step()
    learner.save_adapter(tmp_path)
    ids = torch.arange(3, 30)[None]
    learner.model.eval()
    with torch.no_grad():
        expected = learner.model(ids).logits
        assert torch.equal(adapters.attach(tree(base), "serve", base, tmp_path)(ids).logits, expected)
        assert torch.equal(PeftModel.from_pretrained(tree(base), str(tmp_path))(ids).logits, expected)


def test_an_adapter_on_the_originals_names_is_loaded(base: Any, tmp_path: Path) -> None:
    """A directory with `query_key_value` targets gives the logits of its own product added to q, k and v."""
    rows, generator = sum(base.shape.fused_rows), torch.Generator().manual_seed(0)
    state, merged = {}, dict(base.state)
    for n in range(base.shape.layers):
        name = f"base_model.model.transformer.encoder.layers.{n}.self_attention.query_key_value"
        down = torch.randn(4, base.shape.hidden, generator=generator) * 0.1
        up = torch.randn(rows, 4, generator=generator) * 0.1
        state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        for part, added in zip(glm().SPLIT, (up @ down * 8).split(base.shape.fused_rows), strict=True):
            key = f"model.layers.{n}.{part}.weight"
            merged[key] = merged[key] + added
    save_file(state, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 32,
        "target_modules": ["query_key_value"],
        "task_type": "CAUSAL_LM",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = adapters.attach(tree(base), "serve", base, tmp_path)(ids).logits
        expected = glm().assemble(base.shape, merged)(ids).logits
    assert (logits - expected).abs().max() < 5e-4


def test_directories_that_are_no_lora_are_refused(base: Any, tmp_path: Path) -> None:
    """A missing config, another kind of adapter and missing weights are named."""
    with pytest.raises(InputError, match="no adapter"):
        adapters.attach(tree(base), "serve", base, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(InputError, match="PREFIX_TUNING"):
        adapters.attach(tree(base), "serve", base, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match="no adapter weights"):
        adapters.attach(tree(base), "serve", base, tmp_path)


def test_replacing_by_another_form_writes_nothing(base: Any) -> None:
    """An adapter of another rank is refused and the one in use keeps its tensors."""
    model = adapters.attach(tree(base), "serve", base)
    other = adapters.attach(tree(base), "learner", base, options=AdapterOptions(rank=4))
    before = adapters.snapshot(model, "serve")
    with pytest.raises(InputError, match="same form"):
        adapters.replace(model, "serve", adapters.snapshot(other, "learner"))
    assert all(torch.equal(before[key], value) for key, value in adapters.snapshot(model, "serve").items())


def test_a_stored_base_opens_bit_equal(base: Any, tmp_path: Path) -> None:
    """A base written for other processes comes back with the same tensors, sizes and label."""
    opened = share(base, tmp_path).open()
    assert opened.shape == base.shape
    assert opened.label == base.label
    assert all(torch.equal(base.state[name], value) for name, value in opened.state.items())


def test_a_checkpoint_in_its_own_precision_is_shared_by_its_own_files(tmp_path: Path) -> None:
    """Nothing is stored for an fp32 checkpoint used in fp32; used in bf16 one file is."""
    plugin = glm()
    shape = plugin.Shape(layers=1, hidden=32, ffn=48, heads=4, head_dim=8, vocab=300, max_length=64)
    names = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "kv_channels": 8}
    names |= {"multi_query_group_num": 2, "padded_vocab_size": 300, "seq_length": 64, "layernorm_epsilon": 1e-5}
    source = tmp_path / "checkpoint"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(names))
    save_file({name: torch.randn(size) for name, size in shape.original().items()}, source / "model.safetensors")
    for precision, stored in (("fp32", False), ("bf16", True)):
        base = load_base(str(source), precision=precision)
        shared = share(base, tmp_path / precision, str(source))
        assert (shared.path is not None) == stored
        opened = shared.open()
        assert all(torch.equal(base.state[name], value) for name, value in opened.state.items())


def test_half_precision_bases_train_float32_adapters() -> None:
    """On a bf16 base the adapter's tensors are float32 and the loss is finite."""
    learner = new_learner(load_base(precision="bf16"), EXAMPLES, FAST)
    assert {value.dtype for value in learner.adapter().values()} == {torch.float32}
    assert isinstance(learner, Learner)
    assert 0 < learner.step().loss < 50
