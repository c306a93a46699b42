"""Translation on a CUDA device gives the answers of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from corun import registry
from corun.ectrans import parts, training, translate
from corun.ectrans.decode import ContinuousDecoder
from corun.ectrans.tokens import Tokenizer
from corun.registry import ModelOptions
from corun.serve.engine import ServableEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SENTENCES = 12


@pytest.fixture(scope="module")
def trained_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny trained model, split."""
    trained = training.trained_tiny(tmp_path_factory.getbasetemp())
    return parts.split(trained, trained.with_name("gpu-parts"))


def test_static_and_continuous_answers_are_the_cpus(trained_parts: Path) -> None:
    """Greedy fp32 answers on the device are the CPU's, in static batches and for rows that join one by one."""
    sentences = training.tiny_sentences(SENTENCES)
    expected = translate.load(trained_parts, max_new=20).translate(sentences)
    assert translate.load(trained_parts, "cuda", max_new=20).translate(sentences) == expected

    tokenizer = Tokenizer.load(trained_parts)
    encoder = parts.load_encoder(trained_parts, "cuda")
    continuous = ContinuousDecoder(parts.load_decoder(trained_parts, "cuda"), 4, 20)
    answers: dict[object, list[int]] = {}
    waiting = list(enumerate(sentences))
    while waiting or continuous.active:
        if waiting and continuous.free:
            index, sentence = waiting.pop(0)
            continuous.admit(*encoder.encode([tokenizer.encode(sentence)]), [index])
        answers |= dict(continuous.step())
    assert [tokenizer.decode(answers[i]) for i in range(SENTENCES)] == expected


@pytest.mark.parametrize("precision", registry.PRECISIONS)
def test_the_engine_serves_it(precision: str, trained_parts: Path) -> None:
    """The model runs on the device in every precision, with stamped stages."""
    options = ModelOptions(weights=str(trained_parts), device="cuda", precision=precision, extra={"max_new": 20})
    engine = ServableEngine(registry.model("nmt").serve(options))
    assert len(engine.warm_up(2, 3)) == 4
