"""Sentences in, answers out: one base, one adapter, batches of a given size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corun.errors import InputError
from corun.llm import adapters
from corun.llm.base import load_base, tree
from corun.llm.generate import Generated, Prompt, generate


@dataclass(frozen=True)
class Predictor:
    """A network and its tokenizer. eos None: answers always have `new_tokens` tokens (random weights never stop)."""

    model: Any
    tokenizer: Any
    label: str
    new_tokens: int = 32
    eos: int | None = None

    def prompt(self, sentence: str) -> Prompt:
        """A sentence as a question in the chat format."""
        ids = self.tokenizer.prompt(sentence)
        if max(ids) >= self.model.config.vocab_size:
            raise InputError(
                "the network's table is too small for the tokenizer: is tokenizer.model in its directory?"
            )
        return Prompt(ids, self.new_tokens, self.eos)

    def text(self, done: Generated) -> str:
        """The answer's text."""
        answer: str = self.tokenizer.decode(done.ids)
        return answer


def is_preset(model: str) -> bool:
    """True for the name of a size, False for a path."""
    from corun.llm.base import glm

    return model in glm().PRESETS


def load_predictor(
    model: str = "tiny",
    adapter: Path | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    new_tokens: int = 32,
    seed: int = 0,
) -> Predictor:
    """A predictor from a preset's name (random weights) or the directory of a checkpoint, with an adapter if given."""
    preset = is_preset(model)
    base = load_base(None if preset else model, model if preset else "6b", precision, device, seed)
    network = tree(base)
    if adapter is not None:
        network = adapters.attach(network, adapters.SERVE, base, adapter).eval()
    eos = None if preset else base.tokenizer.eos
    return Predictor(network, base.tokenizer, base.label, new_tokens, eos)


def glm_predict(predictor: Predictor, sentences: Sequence[str], batch_size_predict: int = 16) -> list[str]:
    """Greedy answers to all sentences, in their order, in batches of `batch_size_predict`."""
    if batch_size_predict < 1:
        raise InputError(f"batch_size_predict is {batch_size_predict}: give 1 or more")
    prompts = [predictor.prompt(sentence) for sentence in sentences]
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size_predict):
        done = generate(predictor.model, prompts[start : start + batch_size_predict])
        answers += [predictor.text(one) for one in done]
    return answers
