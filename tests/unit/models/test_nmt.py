"""Translation as a model of the harness: text lines in, text lines out, and a training job from text pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.serve.tools import request

from corun import registry
from corun.ectrans import build, parts, translate
from corun.errors import InputError
from corun.registry import DataOptions, ModelOptions
from corun.serve.engine import ServableEngine, load_engine
from corun.train.options import TrainOptions
from corun.train.trainer import Trainer
from corun.wire import Status
from corun.wire.messages import Load

OPTIONS = ModelOptions(extra={"max_new": 6})
NAMES = ("nmt", "nmt-t5")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def random() -> Any:
    """The default: tiny Marian with random weights."""
    return registry.model("nmt").serve(OPTIONS)


def answers(servable: Any, *payloads: bytes) -> list[bytes]:
    """All stages, as the engine calls them."""
    batch = servable.to_device(servable.preprocess([servable.decode(payload) for payload in payloads]))
    replies: list[bytes] = servable.postprocess(servable.to_host(servable.forward(batch)), len(payloads))
    return replies


@pytest.mark.parametrize("name", NAMES)
def test_a_request_is_lines_and_so_is_its_reply(name: str) -> None:
    """Each request of a batch gets a line for each of its lines, blank ones included, as if it had come alone."""
    servable = registry.model(name).serve(OPTIONS)
    payloads = [b"ba ruto", b"go\n\ntuni ba ba", servable.example(), "čaj é".encode()]
    replies = answers(servable, *payloads)
    assert replies == [answers(servable, payload)[0] for payload in payloads]
    assert [reply.count(b"\n") for reply in replies] == [0, 2, 0, 0]
    assert replies[1].split(b"\n")[1] == b""


def test_a_directory_and_its_parts_answer_the_same(tmp_path: Path) -> None:
    """`weights` is a model directory or a parts directory; either answers as the reference translator, and is named."""
    directory = build.prepare("tiny", None, 300, tmp_path / "model", seed=5)
    split = parts.split(directory, tmp_path / "parts")
    expected = translate.load(split, max_new=6).translate(["ba ruto", "go"])
    for weights in (directory, split):
        servable = registry.model("nmt").serve(replace(OPTIONS, weights=str(weights)))
        assert answers(servable, b"ba ruto\ngo")[0].decode().split("\n") == expected
        assert servable.info.weights.startswith("sha256:")
        assert str(weights) in servable.info.weights


def test_what_it_says_about_itself(random: Any) -> None:
    """The task is translation, parameters are counted once, random weights are called so, history is labelled."""
    assert (random.info.task, random.info.weights, random.info.model) == ("translation", "random", "nmt")
    assert random.info.params == sum(p.numel() for p in random.module.parameters())
    historical = registry.model("nmt").serve(replace(OPTIONS, extra={"cache": False, "max_new": 6}))
    assert "historical" in historical.info.notes
    assert answers(historical, b"ba ruto") == answers(random, b"ba ruto")


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"", "no sentence"),
        (b" \n ", "no sentence"),
        (b"ba " * 2000, "tokens, more than"),
    ],
)
def test_a_bad_request_is_refused_alone(random: Any, payload: bytes, reason: str) -> None:
    """Bytes that are no text, blank text and a sentence too long are that request's error, not its batch mates'."""
    requests = [request(payload, 0), request(b"ba ruto", 1)]
    ServableEngine(random).run(requests)
    assert (requests[0].status, requests[1].status) == (Status.BAD_REQUEST, Status.OK)
    assert reason in requests[0].detail


def test_wrong_options_are_all_named(tmp_path: Path) -> None:
    """Unknown and impossible options, missing directories, default weights and compiling are refused together."""
    with pytest.raises(InputError) as caught:
        registry.model("nmt").serve(
            ModelOptions(weights="default", compile=True, extra={"beams": 3, "max_new": 0, "cache": 1})
        )
    text = "\n".join(caught.value.problems)
    assert all(word in text for word in ('did you mean "beam"', "max_new is 0", "cache is 1", "default", "compiled"))
    with pytest.raises(InputError, match="is not a directory"):
        registry.model("nmt").serve(ModelOptions(weights=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="table of positions"):
        registry.model("nmt").serve(ModelOptions(extra={"max_new": 513}))


def test_load_builds_it_from_a_message() -> None:
    """A LOAD message names and builds it like any other model."""
    engine = load_engine(Load("nmt", {"extra": {"max_new": 2}}), ModelOptions())
    assert engine.info.task == "translation"
    assert len(engine.warm_up(1, 2)) == 2


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_in_the_trainer(name: str) -> None:
    """The ordinary trainer lowers its loss on the data set `pairs`, and only on data sets of its task."""
    options = TrainOptions(name, data="pairs", batch_size=8, count=64, optimizer="adam", lr=3e-3)
    trainer = Trainer(options)
    losses = [trainer.step().loss for _ in range(12)]
    assert losses[-1] < losses[0] - 0.5
    with pytest.raises(InputError, match="cannot train"):
        Trainer(replace(options, data="digits"))


def test_micro_batches_make_the_same_update() -> None:
    """A batch of sentences of mixed lengths cut into parts has the loss and the gradients of the whole batch."""
    trainable = registry.model("nmt").train(ModelOptions())
    batch = list(registry.dataset("pairs").training(DataOptions(count=6, task="translation")).entries)
    sizes = [1, 3, 2]
    whole = trainable.loss(batch)
    whole.backward()
    expected = [p.grad.clone() for p in trainable.module.parameters() if p.grad is not None]
    trainable.module.zero_grad()
    total = 0.0
    for part, size in zip(trainable.split(batch, sizes), sizes, strict=True):
        loss = trainable.loss(part) * size / 6
        loss.backward()
        total += float(loss.detach())
    found = [p.grad for p in trainable.module.parameters() if p.grad is not None]
    assert total == pytest.approx(float(whole.detach()), rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, found, strict=True))
