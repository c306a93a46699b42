"""The edge server: its data formats, what it refuses, and answering beside training from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from corun.errors import InputError
from corun.llm import adapters
from corun.llm.base import load_base, tree
from corun.llm.edge import DEFAULT_DATA, EdgeOptions, check, serve_and_learn
from corun.llm.generate import Prompt, generate
from corun.llm.items import Item, make_items, prompt_ids, read_items
from corun.llm.learn import LearnOptions, new_learner

pytestmark = pytest.mark.timeout(600)  # a guard against hanging, wide enough for a machine with ten times the work
ROOT = Path(__file__).resolve().parents[3]
FAST = EdgeOptions(new_tokens=5, sharing="thread", lr=0.05, epochs=3)
ITEMS = make_items([["hello"], ["hi"]], ["yes", "no"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[[["hello"], ["hi"]], ["yes", null]]'),
        ("b.json", '{"sentence": [["hello"], "hi"], "label": ["yes", null]}'),
        ("c.json", '[{"sentence": ["hello"], "label": "yes"}, {"sentence": "hi"}]'),
        ("d.jsonl", '{"sentence": "hello", "label": "yes"}\n\n{"sentence": ["hi"], "label": null}\n'),
    ],
)
def test_every_data_format_gives_the_same_items(tmp_path: Path, name: str, content: str) -> None:
    """Parallel lists, an object, a list of objects and JSON lines are read alike."""
    (tmp_path / name).write_text(content)
    assert read_items(tmp_path / name) == [Item(("hello",), "yes"), Item(("hi",), None)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no data"),
        ('{"sentence": 3}', "not a list"),
        ('{"sentence": [["a", "b"]]}', "sentence 0 is neither"),
        ('[["a", "b"], ["yes"]]', "2 sentences and 1 labels"),
        ('[{"sentence": "a", "labels": "b"}]', 'did you mean "label"'),
        ('[["a"], [3]]', "label 0 is neither"),
    ],
)
def test_wrong_data_say_what_is_wrong(tmp_path: Path, content: str, reason: str) -> None:
    """Each kind of mistake has its own sentence."""
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=reason):
        read_items(tmp_path / "a.json")


def test_a_null_label_is_an_error_when_training_only() -> None:
    """Training names the index of each null label; without training null is fine."""
    items = make_items([["hello"], ["hi"]], ["yes", None])
    with pytest.raises(InputError, match="label 1 is null"):
        check(items, EdgeOptions())
    check(items, EdgeOptions(train=False))


def test_options_that_make_no_sense_are_listed() -> None:
    """Nothing to do, an unknown engine and a batch of none are refused together."""
    with pytest.raises(InputError) as refused:
        check(ITEMS, EdgeOptions(train=False, infer=False, engine="statik", bs=0))
    assert len(refused.value.problems) == 3
    assert 'did you mean "static"' in str(refused.value)


def test_a_conversation_keeps_its_history() -> None:
    """Earlier turns become rounds of the prompt."""
    tokenizer = load_base().tokenizer
    assert prompt_ids(Item(("q", "a", "b")), tokenizer) == tokenizer.prompt("b", [("q", "a")])


@pytest.mark.parametrize("engine", ["static", "continuous"])
def test_answers_before_and_after_training_are_those_of_each_adapter(engine: str, tmp_path: Path) -> None:
    """Version 0 answers with the untrained adapter, version 1 with the saved one; losses equal training alone."""
    from dataclasses import replace

    result = serve_and_learn(ITEMS, replace(FAST, engine=engine), tmp_path)
    base = load_base()
    trained = adapters.attach(tree(base), "serve", base, tmp_path).eval()
    prompts = [Prompt(prompt_ids(item, base.tokenizer), 5) for item in ITEMS]
    texts = {
        version: [base.tokenizer.decode(generate(model, [prompt])[0].ids) for prompt in prompts]
        for version, model in ((0, tree(base)), (1, trained))
    }
    for version in (0, 1):
        assert [answer.text for answer in result.answers if answer.version == version] == texts[version]
    encode: Any = base.tokenizer.encode
    examples = [(prompt_ids(item, base.tokenizer), [*encode(item.label, False), 2]) for item in ITEMS]
    alone = new_learner(base, examples, LearnOptions(batch_size=2, lr=0.05))
    assert [step.loss for step in result.steps] == [alone.step().loss for _ in range(3)]
    assert all(answer.ttft_ms is not None and answer.tpot_ms is not None for answer in result.answers)
    assert "interpreter lock" in result.label


def test_either_side_can_be_left_out(tmp_path: Path) -> None:
    """Without training there are only answers, without answering only steps and an adapter."""
    from dataclasses import replace

    answered = serve_and_learn(list(DEFAULT_DATA), replace(FAST, train=False))
    assert (len(answered.answers), answered.steps) == (2, ())
    learned = serve_and_learn(list(DEFAULT_DATA), replace(FAST, infer=False), tmp_path)
    assert (learned.answers, len(learned.steps)) == ((), 3)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "src" / "edge_server.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_front_door_trains_beside_answering_in_a_process(tmp_path: Path) -> None:
    """The documented command line works with empty paths, and its adapter can be loaded again."""
    arguments = [
        "--glm_path",
        "",
        "--train_path",
        "",
        "--inference_path",
        "",
        "--train_tag",
        "1",
        "--inference_tag",
        "1",
    ]
    ran = run(*arguments, "--bs", "2", "--preset", "tiny", "--new_tokens", "3", "--out", str(tmp_path / "o"))
    assert ran.returncode == 0, ran.stderr
    assert "trained 1 steps" in ran.stdout
    answers = [json.loads(line) for line in (tmp_path / "o" / "answers.jsonl").read_text().splitlines()]
    assert [(answer["version"], answer["index"], answer["tokens"]) for answer in answers] == [
        (0, 0, 3),
        (0, 1, 3),
        (1, 0, 3),
        (1, 1, 3),
    ]
    base = load_base()
    loaded = adapters.attach(tree(base), "serve", base, tmp_path / "o" / "adapter")
    assert any(
        bool(torch.any(value != 0)) for key, value in adapters.snapshot(loaded, "serve").items() if "lora_B" in key
    )


def test_the_front_door_names_a_null_label(tmp_path: Path) -> None:
    """In training mode a null label ends with exit 2 and its index, before a network is built."""
    (tmp_path / "d.json").write_text('[[["hello"], ["hi"]], ["yes", null]]')
    ran = run("--data", str(tmp_path / "d.json"))
    assert ran.returncode == 2
    assert "label 1 is null" in ran.stderr
    assert "Traceback" not in ran.stderr
