"""ChatGLM2-6B as a text service: greedy answers to prompts, batched by left padding.

A request is a JSON object, a reply another one::

    {"prompt": "你好", "max_new_tokens": 32}        or   {"ids": [64790, 64792, ...], "max_new_tokens": 32}
    {"ids": [...], "text": "...", "stopped": "eos"}       stopped: eos or length

Four sizes are listed; without `weights` (the directory of an original checkpoint) they have random weights and
never stop early. Options (`extra`): max_new_tokens, the default and the limit of a request (32); prompt_tokens, the
length of the warm-up prompt (32). Training is LoRA on a shared base: `src/edge_server.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from corun import torch_tools
from corun.errors import InputError, suggest
from corun.registry import Model, ModelOptions, ServableInfo, load_plugin

if TYPE_CHECKING:
    import torch

EXTRAS = {"max_new_tokens": 32, "prompt_tokens": 32}
CODE_LICENCE = "Apache-2.0 (transformers; the original's code is not used)"
WEIGHTS_LICENCE = "ChatGLM2-6B licence: no military or illegal use, commercial use after registration"


def parts() -> ModuleType:
    """The network's conversion and tokenizer, `models/_chatglm.py`."""
    return load_plugin("models", "_chatglm")


@dataclass(frozen=True)
class Sample:
    """One decoded request."""

    ids: tuple[int, ...]
    max_new_tokens: int


class ChatGlm:
    """A Glm network that answers prompts greedily."""

    def __init__(self, preset: str, options: ModelOptions) -> None:
        extra = _checked(preset, options)
        self.glm = parts()
        base = self.glm.load_base(options.weights, preset, options.precision, options.device, options.seed)
        self.tokenizer = base.tokenizer
        self.limit, self.prompt_tokens = extra["max_new_tokens"], extra["prompt_tokens"]
        self.shape = base.shape
        self.eos = self.tokenizer.eos if options.weights else None
        self.module = self.glm.assemble(base.shape, base.state)
        self.device = torch_tools.torch_device(options.device)
        if options.compile:
            self.module.compile()
        self.info = ServableInfo(
            model=f"chatglm2-{preset}",
            task="generation",
            params=base.params,
            image_size=0,
            weights=base.label,
            precision=options.precision,
            device=options.device,
            notes=f"tokenizer {self.tokenizer.label}",
        )

    def decode(self, payload: bytes) -> Sample:
        """One request's JSON; ValueError says what is wrong with it."""
        try:
            request = json.loads(payload)
        except ValueError:
            raise ValueError('the request is not JSON, e.g. {"prompt": "hello"}') from None
        if not isinstance(request, dict) or ("prompt" in request) == ("ids" in request):
            raise ValueError('the request is not an object with either "prompt" or "ids"')
        count = request.get("max_new_tokens", self.limit)
        if not isinstance(count, int) or not 1 <= count <= self.limit:
            raise ValueError(f"max_new_tokens is {count!r}: give 1 to {self.limit}")
        return Sample(self._fitting(self._ids(request), count), count)

    def _ids(self, request: dict[str, Any]) -> tuple[int, ...]:
        if "prompt" in request:
            if not isinstance(request["prompt"], str):
                raise ValueError("the prompt is not a string")
            ids = self.tokenizer.prompt(request["prompt"])
            if max(ids) >= self.shape.vocab:
                raise ValueError("this network's table is too small for its tokenizer: send ids")
            return tuple(ids)
        ids = request["ids"]
        whole = isinstance(ids, list) and all(isinstance(i, int) and 0 <= i < self.shape.vocab for i in ids)
        if not whole or not ids:
            raise ValueError(f"ids is not a list of whole numbers from 0 to {self.shape.vocab - 1}")
        return tuple(ids)

    def _fitting(self, ids: tuple[int, ...], count: int) -> tuple[int, ...]:
        if len(ids) + count > self.shape.max_length:
            raise ValueError(f"{len(ids)} prompt and {count} new tokens are more than {self.shape.max_length}")
        return ids

    def preprocess(self, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, list[Sample]]:
        """(ids, attention mask), left-padded (B, T), and the samples."""
        return (*self.glm.left_padded([sample.ids for sample in samples]), samples)

    def to_device(self, batch: Any) -> Any:
        """Ids and mask on the device."""
        ids, mask, samples = batch
        return ids.to(self.device), mask.to(self.device), samples

    def forward(self, batch: Any) -> Any:
        """Every new token of the batch; one host synchronisation per token."""
        from corun.llm.generate import Prompt, generate_padded

        ids, mask, samples = batch
        prompts = [Prompt(sample.ids, sample.max_new_tokens, eos=self.eos) for sample in samples]
        return generate_padded(self.module, prompts, ids, mask)

    def to_host(self, output: Any) -> Any:
        """The same: tokens reach the host one by one."""
        return output

    def postprocess(self, output: Any, count: int) -> list[bytes]:
        """One JSON reply per request."""
        return [
            json.dumps(
                {"ids": list(done.ids), "text": self.tokenizer.decode(done.ids), "stopped": done.stopped},
                ensure_ascii=False,
            ).encode()
            for done in output[:count]
        ]

    def example(self) -> bytes:
        """A prompt of `prompt_tokens` made ids."""
        return json.dumps({"ids": [3 + i % 200 for i in range(self.prompt_tokens)]}).encode()


def _checked(preset: str, options: ModelOptions) -> dict[str, int]:
    problems = [f'option "{key}" is unknown{suggest(key, EXTRAS)}' for key in options.extra if key not in EXTRAS]
    extra = {**EXTRAS, **options.extra}
    problems += [
        f"{key} is {extra[key]!r}: give a whole number from 1"
        for key in EXTRAS
        if isinstance(extra[key], bool) or not isinstance(extra[key], int) or extra[key] < 1
    ]
    if options.weights == "default":
        problems.append("there are no default weights: give the directory of a ChatGLM2-6B checkpoint")
    if problems:
        raise InputError(f"chatglm2-{preset} cannot be built", problems)
    return extra


MODELS = tuple(
    Model(
        name=f"chatglm2-{preset}",
        family="llm",
        task="generation",
        image_size=0,
        serve=partial(ChatGlm, preset),
        train=None,
        code_licence=CODE_LICENCE,
        weights_licence=WEIGHTS_LICENCE,
        notes=notes,
    )
    for preset, notes in (
        ("tiny", "3 layers x 128, for tests"),
        ("small", "8 layers x 512, 93 M"),
        ("mid", "12 layers x 1024, 288 M"),
        ("6b", "28 layers x 4096, 6.24 G"),
    )
)
