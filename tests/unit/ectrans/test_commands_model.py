"""The commands that make, train, split and try a model, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from corun.ectrans import commands_model

pytestmark = pytest.mark.timeout(600)  # a guard against hanging, wide enough for a machine with ten times the work
app = typer.Typer(pretty_exceptions_enable=False)
commands_model.register(app)


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands_model, "set_threads", lambda count: None)


def call(*arguments: object, code: int = 0, stdin: str = "") -> str:
    """Output of one command that ends with `code`."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def test_from_nothing_to_a_translation(tmp_path: Path) -> None:
    """prepare, train, split, check, predict, join: each does its step and says so."""
    model, parts = tmp_path / "model", tmp_path / "parts"
    assert "random weights" in call("prepare", "--out", model, "--synthetic", 300)
    before = (model / "model.safetensors").read_bytes()
    said = call("train", "--model", model, "--steps", 50, "--synthetic", 100, "--batch", 4)
    assert "step 50: loss" in said
    assert "is trained" in said
    assert (model / "model.safetensors").read_bytes() != before
    assert "decoder.safetensors" in call("split", "--model", model, "--out", parts)
    assert "logits are equal" in call("check", "--parts", parts, "--model", model)
    said = call("predict", "--parts", parts, "--max-new", 5, "--batch-size", 1, "ba ruto", "go")
    assert len(said.splitlines()) == 2
    assert call("predict", "--parts", parts, "--max-new", 5, stdin="ba ruto\n\ngo\n") == said
    assert call("predict", "--parts", parts, "--max-new", 5, "--no-cache", "ba ruto", "go") == said
    call("join", "--parts", parts, "--out", tmp_path / "joined")
    assert (tmp_path / "joined" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_users_own_text_and_pairs(tmp_path: Path) -> None:
    """The tokenizer is trained on a file of text, the network on a file of pairs, and a file is translated."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"source": f"a{i} b{i}", "target": f"c{i}"} for i in range(30)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = tmp_path / "text.txt"
    text.write_text("one sentence\nand another\n")
    model, parts = tmp_path / "model", tmp_path / "parts"
    call("prepare", "--out", model, "--text", pairs, "--architecture", "t5")
    call("train", "--model", model, "--steps", 2, "--pairs", pairs)
    call("split", "--model", model, "--out", parts)
    said = call("predict", "--parts", parts, "--datafile", text, "--max-new", 3)
    assert said.count("\n") == 2


def test_bad_input(tmp_path: Path) -> None:
    """What is missing or wrong ends with exit code 2."""
    call("split", "--model", tmp_path, "--out", tmp_path / "parts", code=2)
    call("check", "--parts", tmp_path, code=2)
    call("prepare", "--out", tmp_path / "model", "--preset", "huge", code=2)
    call("prepare", "--out", tmp_path / "model", "--text", tmp_path / "none.txt", code=2)
    call("prepare", "--out", tmp_path / "model", "--synthetic", 50)
    (tmp_path / "bad.jsonl").write_text('{"source": 3}\n')
    call("train", "--model", tmp_path / "model", "--pairs", tmp_path / "bad.jsonl", code=2)
