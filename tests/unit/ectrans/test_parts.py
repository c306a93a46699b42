"""Splitting a model, joining it again, and refusing what was tampered with."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from corun.ectrans import build, parts, translate
from corun.ectrans.encode import sentence_bytes
from corun.ectrans.tokens import Tokenizer
from corun.errors import InputError

pytestmark = pytest.mark.timeout(600)  # a guard against hanging, wide enough for a machine with ten times the work
ROWS = [[5, 6, 7, 1], [9, 10, 11, 12, 13, 1], [20, 1]]
PACKAGE = Path(build.__file__).parent


@pytest.fixture(scope="module", params=build.ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model directory of each architecture."""
    out = tmp_path_factory.mktemp(request.param) / "model"
    return build.prepare("tiny", None, 300, out, architecture=request.param)


@pytest.fixture(scope="module")
def split(model: Path) -> Path:
    return parts.split(model, model.with_name("parts"))


@pytest.fixture
def copy(split: Path, tmp_path: Path) -> Path:
    """A copy of the parts that a test may damage."""
    return Path(shutil.copytree(split, tmp_path / "copy"))


def test_split_and_join_give_the_same_bytes(model: Path, split: Path, tmp_path: Path) -> None:
    """Weights that were split and joined are the file they were; the tokenizer too."""
    joined = parts.join(split, tmp_path / "joined")
    for name in (build.WEIGHTS_FILE, "tokenizer.model"):
        assert (joined / name).read_bytes() == (model / name).read_bytes()


def test_the_parts_give_the_whole_networks_logits(model: Path, split: Path) -> None:
    """Logits of encoder part and decoder part are bit-equal to those of transformers' own loading of the model."""
    parts.check(split)
    parts.check(split, model)
    whole = build.model_class(build.read_config(model)).from_pretrained(model).eval()
    hidden, mask = parts.load_encoder(split).encode(ROWS)
    answer = torch.tensor([[0, 4, 5], [0, 6, 7], [0, 8, 9]])
    ids = torch.tensor([row + [0] * (6 - len(row)) for row in ROWS])
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=mask, decoder_input_ids=answer).logits
    assert torch.equal(parts.load_decoder(split).logits(hidden, mask, answer), expected)


def test_another_models_parts_do_not_pass(split: Path, model: Path, tmp_path: Path) -> None:
    """`check` against a model directory fails when the parts are of other weights."""
    architecture = build.read_config(model).model_type
    other = build.prepare("tiny", None, 300, tmp_path / "other", seed=1, architecture=architecture)
    with pytest.raises(InputError, match="logits"):
        parts.check(split, other)


def test_tied_tensors_are_stored_once(split: Path) -> None:
    """The decoder's file has the embedding and the head as one tensor, and the manifest says under which names."""
    manifest = parts.read_manifest(split)
    width, vocabulary = 64, 1000
    for name in (parts.ENCODER, parts.DECODER):
        with safe_open(split / name, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        assert list(shapes.values()).count((vocabulary, width)) == 1
        assert manifest["files"][name]["bytes"] == (split / name).stat().st_size
    assert "lm_head.weight" in {*manifest["tied"][parts.DECODER], *manifest["tied"][parts.DECODER].values()}


def test_the_loaded_decoder_is_tied(split: Path) -> None:
    """One tensor is in memory for embedding and head, so sharing and moving it keep one copy."""
    module = parts.load_decoder(split).share_memory().module
    table = module.get_decoder().embed_tokens.weight
    assert module.lm_head.weight is table
    assert table.is_shared()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


TAMPERINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a weight": (lambda p: _flip(p / parts.DECODER), "is not the file"),
    "the encoder": (lambda p: _flip(p / parts.ENCODER), "is not the file"),
    "the tokenizer": (lambda p: _flip(p / "device/tokenizer.model"), "is not the file"),
    "the configuration": (lambda p: (p / "config.json").write_text("{}"), "is not the file"),
    "a longer file": (lambda p: (p / parts.DECODER).write_bytes(b"0" * 10**6), "is not the file"),
    "no file": (lambda p: (p / parts.ENCODER).unlink(), "is missing"),
    "a hash": (lambda p: _edit(p / parts.MANIFEST, lambda m: m["files"].popitem()), "was changed"),
    "the type": (lambda p: _edit(p / parts.MANIFEST, lambda m: m.update(dtype="float16")), "was changed"),
    "the format": (lambda p: _edit(p / parts.MANIFEST, lambda m: m.update(format="2")), "has the format"),
    "the digest": (lambda p: _edit(p / parts.MANIFEST, lambda m: m.pop("digest")), "is not a manifest"),
    "no manifest": (lambda p: (p / parts.MANIFEST).unlink(), "is not a parts directory"),
    "no JSON": (lambda p: (p / parts.MANIFEST).write_text("\x80"), "is not a manifest"),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_tampering_is_rejected(what: str, copy: Path) -> None:
    """A changed, missing or replaced file and a changed manifest are refused with the path and the reason."""
    tamper, reason = TAMPERINGS[what]
    tamper(copy)
    with pytest.raises(InputError, match=reason):
        parts.check(copy)


def test_a_damaged_part_is_refused_where_it_is_used(copy: Path) -> None:
    """Loading a part checks that part's file, not only `check` does."""
    _flip(copy / parts.ENCODER)
    parts.load_decoder(copy)
    with pytest.raises(InputError, match=r"encoder\.safetensors"):
        parts.load_encoder(copy)


def test_nothing_is_ever_unpickled(model: Path, split: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Splitting, checking, loading and joining work with every unpickler disabled, and the package imports none."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    parts.join(parts.split(model, tmp_path / "parts"), tmp_path / "joined")
    parts.check(tmp_path / "parts")
    own = [PACKAGE / f"{name}.py" for name in ("build", "tokens", "parts", "encode", "decode", "training")]
    for path in own:
        imported = {node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)}
        assert not {alias.name for node in imported for alias in node.names} & {"pickle", "marshal", "shelve"}


def test_a_pickled_model_is_not_read(model: Path, tmp_path: Path) -> None:
    """A directory with pytorch_model.bin and no safetensors is refused, with the reason."""
    directory = Path(shutil.copytree(model, tmp_path / "model"))
    (directory / build.WEIGHTS_FILE).rename(directory / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        parts.split(directory, tmp_path / "parts")


@pytest.mark.parametrize("embedding", [False, True])
def test_the_clients_share_of_the_work(model: Path, tmp_path: Path, embedding: bool) -> None:
    """Embeddings made by a client with the table alone give the hidden states of the whole encoder."""
    split = parts.split(model, tmp_path / "parts", embedding)
    assert (split / parts.EMBEDDING).is_file() == embedding
    hidden, mask = parts.load_encoder(split).encode(ROWS)
    layers = parts.load_encoder(split, partition="embed")
    assert layers.module.embed_tokens is None
    found, found_mask = layers.encode_embedded(*parts.load_embedding(split).embed(ROWS))
    assert torch.equal(found, hidden)
    assert torch.equal(found_mask, mask)
    assert torch.equal(parts.load_encoder(split).embed(ROWS)[0], parts.load_embedding(split).embed(ROWS)[0])


def test_separate_tables_of_the_two_languages(tmp_path: Path) -> None:
    """A Marian model with a table for each language splits and joins as well."""
    config = build.configuration("tiny")
    config.share_encoder_decoder_embeddings = False
    config.decoder_vocab_size = 500
    directory = build.prepare("tiny", None, 300, tmp_path / "model")
    torch.manual_seed(0)
    network = build.model_class(config)(config).eval()
    build.write_model(network, directory)
    split = parts.split(directory, tmp_path / "parts")
    parts.check(split, directory)
    assert parts.load_decoder(split).vocabulary == 500


def test_wrong_choices_are_refused(split: Path, model: Path, tmp_path: Path) -> None:
    """Unknown partition, preset, architecture, a directory in use and weights of another shape are named."""
    with pytest.raises(InputError, match='did you mean "embed"'):
        parts.load_encoder(split, partition="embd")
    with pytest.raises(InputError, match="preset"):
        build.prepare("huge", out=tmp_path / "x")
    with pytest.raises(InputError, match="architecture"):
        build.random_model("tiny", "bart")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        parts.split(model, tmp_path / "full")
    directory = Path(shutil.copytree(model, tmp_path / "model"))
    save_file({"lm_head.weight": torch.zeros(3, 3)}, directory / build.WEIGHTS_FILE)
    with pytest.raises(InputError, match="do not fit"):
        parts.split(directory, tmp_path / "parts")


def test_half_precision(split: Path) -> None:
    """Parts load in the type asked for, whatever the file's."""
    encoder, decoder = parts.load_encoder(split, dtype="bf16"), parts.load_decoder(split, dtype="bf16")
    hidden, mask = encoder.encode(ROWS)
    assert hidden.dtype == encoder.dtype == decoder.dtype == torch.bfloat16
    assert decoder.logits(hidden, mask, torch.zeros(3, 1, dtype=torch.long)).dtype == torch.bfloat16


def test_bytes_of_a_sentence() -> None:
    """At 32 tokens and width 512: ids 128 bytes, embedding or hidden states 64 KiB in fp32 and 32 KiB in fp16."""
    assert sentence_bytes("text", 32, 512, text="é") == 2
    assert sentence_bytes("ids", 32, 512) == 128
    assert sentence_bytes("embed", 32, 512) == sentence_bytes("encoder", 32, 512) == 64 * 1024
    assert sentence_bytes("encoder", 32, 512, "float16") == 32 * 1024


def test_the_reference_translator(trained_parts: Path) -> None:
    """Trained, split and loaded, the network translates the made language; an empty batch is no batch."""
    translator = translate.load(trained_parts)
    assert translator.translate([]) == []
    assert translator.tokenizer is Tokenizer.load(trained_parts)
    answers = translator.translate(["go tuni", "tuni go"])
    assert len(set(answers)) == 2


def test_tables_of_positions_are_constants(model: Path) -> None:
    """Training leaves the tables of positions alone: a file does not hold them, they are made anew."""
    network = build.made_trainable(build.read_model(model))
    frozen = [name for name, value in network.named_parameters() if not value.requires_grad]
    assert all(name.endswith(build.POSITIONS_SUFFIX) for name in frozen)
    assert len(frozen) == (2 if network.config.model_type == "marian" else 0)


def test_marians_table_of_positions() -> None:
    """The table made here is transformers' own, bit for bit."""
    own = build.random_model("tiny").get_encoder().embed_positions.weight
    assert torch.equal(build.sinusoids(*own.shape), own)
