"""ChatGLM2-6B: a text service that answers greedily token by token, and a LoRA training job.

A request is a JSON object, its reply another one; who asks for it gets each token in a part of its own before::

    {"prompt": "你好", "max_new_tokens": 32}        or   {"ids": [64790, 64792, ...], "max_new_tokens": 32}
    {"ids": [5], "text": "..."}                             a part: one more token
    {"ids": [...], "text": "...", "stopped": "eos"}       the reply; stopped: eos or length

A prompt may also be a list of turns: question, answer, ..., question. `chatglm2` is the checkpoint in `weights` or,
without one, the size named by the option `preset`; the names with a size are that size. Without a checkpoint weights
are random and answers never stop early.

Options of a service (`extra`): max_new_tokens, of a request that does not say (32); limit, the most a request may ask
for (1024); prompt_tokens, of the warm-up prompt (32); adapter, a LoRA directory; engine, `static` (a batch at a time)
or `continuous` (requests join and leave a running batch of up to max_running, with a cache of cache_tokens).
Options of a training job: rank, alpha and dropout of a new adapter, or adapter, a directory to go on from. The
optimiser is the trainer's (`adamw` suits), the checkpoint holds the adapter alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from corun import torch_tools
from corun.errors import InputError, suggest
from corun.registry import Model, ModelOptions, ServableInfo, load_plugin

if TYPE_CHECKING:
    import torch

STATIC, CONTINUOUS = ENGINES = ("static", "continuous")
SERVING: Mapping[str, Any] = {
    "max_new_tokens": 32,
    "limit": 1024,
    "prompt_tokens": 32,
    "adapter": "",
    "engine": STATIC,
    "max_running": 16,
    "cache_tokens": 16384,
}
TRAINING: Mapping[str, Any] = {"rank": 8, "alpha": 16, "dropout": 0.0, "adapter": ""}
PAGE = 32
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
    """A Glm network, plain or with an adapter, that answers prompts greedily.

    stops: whether eos ends an answer; with random weights it would end them at random.
    """

    def __init__(
        self, base: Any, module: Any, options: ModelOptions, name: str, settings: Mapping[str, Any] = SERVING
    ) -> None:
        self.glm = parts()
        self.base, self.tokenizer, self.shape = base, base.tokenizer, base.shape
        self.limit, self.default = settings["limit"], min(settings["max_new_tokens"], settings["limit"])
        self.prompt_tokens = settings["prompt_tokens"]
        self.eos = self.tokenizer.eos if options.weights else None
        self.module = module
        self.device = torch_tools.torch_device(options.device)
        if options.compile:
            self.module.compile()
        self.continuous = settings["engine"] == CONTINUOUS
        self._engine = _continuous(module, settings) if self.continuous else None
        self.info = ServableInfo(
            model=name,
            task="generation",
            params=base.params,
            image_size=0,
            weights=base.label,
            precision=options.precision,
            device=options.device,
            notes=f"tokenizer {self.tokenizer.label}, {settings['engine']} batching",
        )

    def decode(self, payload: bytes) -> Sample:
        """One request's JSON; ValueError says what is wrong with it."""
        try:
            request = json.loads(payload)
        except ValueError:
            raise ValueError('the request is not JSON, e.g. {"prompt": "hello"}') from None
        if not isinstance(request, dict) or ("prompt" in request) == ("ids" in request):
            raise ValueError('the request is not an object with either "prompt" or "ids"')
        count = request.get("max_new_tokens", self.default)
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= self.limit:
            raise ValueError(f"max_new_tokens is {count!r}: give 1 to {self.limit}")
        return Sample(self._fitting(self._ids(request), count), count)

    def _ids(self, request: dict[str, Any]) -> tuple[int, ...]:
        if "prompt" in request:
            ids = self._prompt_ids(request["prompt"])
            if max(ids) >= self.shape.vocab:
                raise ValueError("this network's table is too small for its tokenizer: send ids")
            return ids
        ids = request["ids"]
        whole = isinstance(ids, list) and all(isinstance(i, int) and 0 <= i < self.shape.vocab for i in ids)
        if not whole or not ids:
            raise ValueError(f"ids is not a list of whole numbers from 0 to {self.shape.vocab - 1}")
        return tuple(ids)

    def _prompt_ids(self, prompt: Any) -> tuple[int, ...]:
        from corun.llm.items import Item, prompt_ids

        turns = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(turns, list) or len(turns) % 2 == 0 or not all(isinstance(turn, str) for turn in turns):
            raise ValueError("the prompt is neither a string nor an odd number of turns")
        return tuple(prompt_ids(Item(tuple(turns)), self.tokenizer))

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
        return self.generate(batch, [None] * len(batch[2]))

    def generate(self, batch: Any, watches: Sequence[Any]) -> list[Any]:
        """The same, told to and asked of one watch per sample (corun.serve.generation)."""
        from corun.llm.generate import generate_padded

        ids, mask, samples = batch
        prompts = [self._prompt(sample, watch) for sample, watch in zip(samples, watches, strict=True)]
        if self._engine is not None:
            return [ticket.result() for ticket in [self._engine.submit(prompt) for prompt in prompts]]
        return generate_padded(self.module, prompts, ids, mask)

    def _prompt(self, sample: Sample, watch: Any) -> Any:
        from corun.llm.generate import Prompt

        if watch is None:
            return Prompt(sample.ids, sample.max_new_tokens, self.eos)
        return Prompt(sample.ids, sample.max_new_tokens, self.eos, watch.deadline_ns, watch.cancelled, watch.token)

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

    # What makes tokens besides: corun.serve.generation.Generator

    def tokens_in(self, sample: Sample) -> int:
        """Tokens of a prompt."""
        return len(sample.ids)

    def texts(self) -> Callable[[int], str]:
        """A decoder of one answer's ids as they come."""
        add: Callable[[int], str] = self.glm.TextStream(self.tokenizer).add
        return add

    @property
    def has_room(self) -> bool:
        """Whether one more prompt would be computed at once."""
        return self._engine is None or self._engine.has_room

    def submit(self, sample: Sample, watch: Any, done: Callable[[Any], None]) -> None:
        """Hand a prompt to the running batch; ValueError when its cache could never hold it."""
        assert self._engine is not None
        try:
            self._engine.submit(self._prompt(sample, watch), lambda ticket: done(ticket.outcome))
        except InputError as error:
            raise ValueError(str(error)) from None

    def publish(self, state: Mapping[str, Any]) -> None:
        """Answer with these tensors of the adapter from now on: between two batches, or two steps of a running one."""
        from corun.llm import adapters

        if self._engine is not None:
            self._engine.publish(state)
        else:
            adapters.replace(self.module, adapters.SERVE, state)

    def close(self) -> None:
        """End the running batch, once its answers are complete or nobody wants them."""
        if self._engine is not None:
            self._engine.close()


def _continuous(module: Any, settings: Mapping[str, Any]) -> Any:
    from corun.llm.continuous import ContinuousEngine

    engine = ContinuousEngine(
        module, blocks=max(1, settings["cache_tokens"] // PAGE), page=PAGE, max_batch=settings["max_running"]
    )
    engine.start()
    return engine


def serve(preset: str | None, options: ModelOptions) -> ChatGlm:
    """A service of one size, or of the checkpoint or size that the options name."""
    settings, size, name = _settings(preset, options, SERVING)
    from corun.llm import adapters

    plugin = parts()
    base = plugin.load_base(options.weights, size, options.precision, options.device, options.seed)
    module = plugin.assemble(base.shape, base.state)
    if settings["adapter"]:
        module = adapters.attach(module, adapters.SERVE, base, Path(settings["adapter"]).expanduser()).eval()
    return ChatGlm(base, module, options, name, settings)


class LoraTraining:
    """Trains a LoRA adapter on conversations; the loss counts label tokens only.

    The base is never written and has the precision asked for, the adapter is float32.
    """

    min_batch = 1

    def __init__(self, preset: str | None, options: ModelOptions) -> None:
        settings, size, name = _settings(preset, options, TRAINING)
        from corun.llm import adapters

        self.glm = parts()
        base = self.glm.load_base(options.weights, size, options.precision, options.device, options.seed)
        path = Path(settings["adapter"]).expanduser() if settings["adapter"] else None
        new = adapters.AdapterOptions(settings["rank"], settings["alpha"], settings["dropout"], seed=options.seed)
        network = adapters.attach(self.glm.assemble(base.shape, base.state), adapters.LEARNER, base, path, new)
        for parameter in adapters.parameters(network, adapters.LEARNER).values():
            parameter.requires_grad_(True)
        self.module = _adapted(network.train())
        self.tokenizer, self.device = base.tokenizer, torch_tools.torch_device(options.device)
        self.info = ServableInfo(
            model=name,
            task="generation",
            params=base.params,
            image_size=0,
            weights=base.label,
            precision=options.precision,
            device=options.device,
            notes=f"LoRA, tokenizer {self.tokenizer.label}",
        )

    def _examples(self, batch: Mapping[str, Any]) -> list[Any]:
        from corun.llm.items import Item, example

        pairs = zip(batch["turns"], batch["label"], strict=True)
        return [example(Item(tuple(turns), label), self.tokenizer) for turns, label in pairs]

    def loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Mean cross-entropy of the label tokens; a part of a batch is weighted by the label tokens it has."""
        examples = self._examples(batch)
        tensors = {name: value.to(self.device) for name, value in self.glm.label_batch(examples).items()}
        loss: torch.Tensor = self.glm.label_loss(self.module, tensors)
        return loss * batch["weight"] if "weight" in batch else loss

    def split(self, batch: Mapping[str, Any], sizes: Sequence[int]) -> list[dict[str, Any]]:
        """Micro-batches; weighted so that the trainer's mean over samples is the batch's mean over label tokens."""
        found, first, whole = [], 0, _label_tokens(self._examples(batch))
        for size in sizes:
            part = {name: batch[name][first : first + size] for name in ("turns", "label")}
            share = _label_tokens(self._examples(part)) / whole
            found.append({**part, "weight": share * sum(sizes) / size})
            first += size
        return found


def _label_tokens(examples: Sequence[Any]) -> int:
    return sum(len(label) for _, label in examples)


def _adapted(network: Any) -> Any:
    """A module whose state is the adapter alone: checkpoints do not repeat the base."""
    import torch

    from corun.llm import adapters

    class Adapted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, **inputs: Any) -> Any:
            return self.network(**inputs)

        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return adapters.snapshot(self.network, adapters.LEARNER)

        def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
            try:
                adapters.replace(self.network, adapters.LEARNER, state)
            except InputError as error:
                raise RuntimeError(str(error)) from error

    return Adapted()


def _settings(preset: str | None, options: ModelOptions, known: Mapping[str, Any]) -> tuple[dict[str, Any], str, str]:
    """(options with their defaults, size, name); InputError lists every wrong one."""
    known = {**known, "preset": "tiny"} if preset is None else known
    problems = [f'option "{key}" is unknown{suggest(key, known)}' for key in options.extra if key not in known]
    found = {**known, **options.extra}
    problems += [problem for key in known if (problem := _problem(key, found[key], known[key]))]
    if "engine" in known and found["engine"] not in ENGINES:
        problems.append(f'engine is "{found["engine"]}": one of {", ".join(ENGINES)}')
    if options.weights == "default":
        problems.append("there are no default weights: give the directory of a ChatGLM2-6B checkpoint")
    name = "chatglm2" if preset is None else f"chatglm2-{preset}"
    if problems:
        raise InputError(f"{name} cannot be built", problems)
    size = preset or found["preset"]
    parts().preset_shape(size)
    return found, size, name


def _problem(key: str, value: Any, default: Any) -> str:
    """What is wrong with one option, judged by its default; "" = nothing."""
    if isinstance(default, str):
        return "" if isinstance(value, str) else f"{key} is {value!r}: give a text"
    if isinstance(default, float):
        fits = not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < 1
        return "" if fits else f"{key} is {value!r}: give a number from 0 to 1"
    fits = not isinstance(value, bool) and isinstance(value, int) and value >= 1
    return "" if fits else f"{key} is {value!r}: give a whole number from 1"


MODELS = tuple(
    Model(
        name="chatglm2" if preset is None else f"chatglm2-{preset}",
        family="llm",
        task="generation",
        image_size=0,
        serve=partial(serve, preset),
        train=partial(LoraTraining, preset),
        code_licence=CODE_LICENCE,
        weights_licence=WEIGHTS_LICENCE,
        notes=notes,
    )
    for preset, notes in (
        (None, "a checkpoint, or the size in its option preset"),
        ("tiny", "3 layers x 128, for tests"),
        ("small", "8 layers x 512, 93 M"),
        ("mid", "12 layers x 1024, 288 M"),
        ("6b", "28 layers x 4096, 6.24 G"),
    )
)
