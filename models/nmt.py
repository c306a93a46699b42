"""Translation by an encoder-decoder Transformer: Marian or T5, as one service of this harness and as a training job.

A request is UTF-8 text, one sentence a line; the reply has the same number of lines. Three sizes are listed; without
`weights` they have random weights, whose answers mean nothing and seldom end by themselves. `weights` is a model
directory of `src/ectrans.py prepare` and `train`, of transformers (safetensors, with its SentencePiece files), or a
parts directory of `src/ectrans.py split`.

Options (`extra`): max_new, the longest answer in tokens (60); max_tokens, the longest sentence (256); beam (1 =
greedy); cache, false for decoding without key-value cache as the published system did. Training needs the data set
`pairs`. The pipeline of encoder and decoder processes around the same network is `src/ectrans.py serve`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corun import torch_tools
from corun.errors import InputError, suggest
from corun.registry import Model, ModelOptions, ServableInfo

if TYPE_CHECKING:
    import torch

EXTRAS: Mapping[str, int | bool] = {"max_new": 60, "max_tokens": 256, "beam": 1, "cache": True}
EXAMPLE_SENTENCES = 1
CODE_LICENCE = "Apache-2.0 (transformers)"
WEIGHTS_LICENCE = "of the directory given; none included"

Rows = tuple[tuple[int, ...], ...]
Pair = tuple[str, str]


@dataclass(frozen=True)
class Network:
    """A network with its tokenizer and a name for its weights."""

    module: Any
    tokenizer: Any
    label: str


class Nmt:
    """A translation network that answers lines of text."""

    def __init__(self, name: str, preset: str, architecture: str, options: ModelOptions) -> None:
        from corun.ectrans import build
        from corun.ectrans.decode import Decoder, StaticDecoder
        from corun.ectrans.encode import Encoder

        extra = _checked(name, options)
        network = load_network(name, preset, architecture, options)
        self.module = torch_tools.place_for_serving(network.module, options)
        self.tokenizer, self.max_tokens = network.tokenizer, int(extra["max_tokens"])
        self.encoder = Encoder(build.encoder_of(self.module), self.module.config)
        decoder = Decoder(self.module)
        self.decoder = StaticDecoder(decoder, int(extra["max_new"]), int(extra["beam"]), bool(extra["cache"]))
        if decoder.max_positions is not None:
            self.max_tokens = min(self.max_tokens, decoder.max_positions)
        self.info = _info(name, network, options, "" if extra["cache"] else "historical: no key-value cache")

    def decode(self, payload: bytes) -> Rows:
        """Token ids of every line, none for a blank one; ValueError when the text is not UTF-8, blank or too long."""
        try:
            lines = payload.decode("utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"the request is not UTF-8 text: {error.reason} at byte {error.start}") from None
        rows = tuple(tuple(self.tokenizer.encode(line)) if line.strip() else () for line in lines)
        if not any(rows):
            raise ValueError("the request has no sentence: send UTF-8 text, one sentence a line")
        longest = max(map(len, rows))
        if longest > self.max_tokens:
            raise ValueError(f"a sentence has {longest} tokens, more than {self.max_tokens}: send shorter ones")
        return rows

    def preprocess(self, samples: list[Rows]) -> tuple[torch.Tensor, torch.Tensor, list[Rows]]:
        """(ids, mask) (n, L) of all sentences of the batch, and the samples."""
        from corun.ectrans.encode import padded

        return (*padded([row for rows in samples for row in rows if row], self.encoder.pad_id), samples)

    def to_device(self, batch: Any) -> Any:
        """Ids and mask on the device."""
        ids, mask, samples = batch
        device = self.encoder.device
        return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True), samples

    def forward(self, batch: Any) -> Any:
        """Answers of all sentences; one host synchronisation per token."""
        ids, mask, samples = batch
        return self.decoder.decode(*self.encoder.encode_padded(ids, mask)), samples

    def to_host(self, output: Any) -> Any:
        """The same: tokens reach the host one by one."""
        return output

    def postprocess(self, output: Any, count: int) -> list[bytes]:
        """One text per request, with a line for each of its lines."""
        answers, samples = output
        texts = iter([self.tokenizer.decode(ids) for ids in answers])
        return ["\n".join(next(texts) if row else "" for row in rows).encode() for rows in samples[:count]]

    def example(self) -> bytes:
        """A sentence of the made language."""
        from corun.registry import load_plugin

        pairs: list[Pair] = load_plugin("datasets", "pairs").made_pairs(EXAMPLE_SENTENCES)
        return "\n".join(source for source, _ in pairs).encode()


class NmtTraining:
    """The same network learning from sentence pairs, which arrive as text: its own tokenizer makes the ids."""

    min_batch = 1

    def __init__(self, name: str, preset: str, architecture: str, options: ModelOptions) -> None:
        from corun.ectrans import build

        _checked(name, options)
        network = load_network(name, preset, architecture, options)
        self.module = torch_tools.place_for_training(build.made_trainable(network.module), options)
        self.tokenizer = network.tokenizer
        self.info = _info(name, network, options)
        self._ids: dict[str, list[int]] = {}

    def loss(self, batch: Sequence[Pair]) -> Any:
        """Mean over the pairs of the mean cross-entropy of a target's tokens."""
        from corun.ectrans.training import pair_loss

        encoded = [(self._encoded(source), self._encoded(target)) for source, target in batch]
        return pair_loss(self.module, encoded, self.tokenizer.pad_id)

    def split(self, batch: Sequence[Pair], sizes: Sequence[int]) -> list[Sequence[Pair]]:
        """The batch as parts of these sizes, in order."""
        begins = [sum(sizes[:i]) for i in range(len(sizes))]
        return [batch[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]

    def _encoded(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer.encode(text)
        return self._ids[text]


def load_network(name: str, preset: str, architecture: str, options: ModelOptions) -> Network:
    """The network of a preset with random weights, or that of a model or parts directory."""
    from corun.ectrans import build, parts
    from corun.ectrans.tokens import Tokenizer

    if options.weights is None:
        module = build.random_model(preset, architecture, options.seed)
        return Network(module, Tokenizer.from_bytes(build.made_tokenizer(preset)), "random")
    directory = Path(options.weights).expanduser()
    if (directory / parts.MANIFEST).is_file():
        label = torch_tools.sha256_label(directory / parts.MANIFEST)
        return Network(parts.joined(directory), Tokenizer.load(directory), label)
    if not directory.is_dir():
        raise InputError(
            f"{name}: {directory} is not a directory",
            ["give a model directory; src/ectrans.py prepare makes one"],
        )
    module, tokenizer = build.read_model(directory), Tokenizer.load(directory)
    return Network(module, tokenizer, torch_tools.sha256_label(directory / build.WEIGHTS_FILE))


def _info(name: str, network: Network, options: ModelOptions, notes: str = "") -> ServableInfo:
    size = f"{network.module.config.model_type}, d_model {network.module.config.d_model}"
    return ServableInfo(
        model=name,
        task="translation",
        params=torch_tools.count_params(network.module),
        image_size=0,
        weights=network.label,
        precision=options.precision,
        device=options.device,
        notes=f"{size}; {notes}" if notes else size,
    )


def _checked(name: str, options: ModelOptions) -> dict[str, int | bool]:
    problems = [f'option "{key}" is unknown{suggest(key, EXTRAS)}' for key in options.extra if key not in EXTRAS]
    extra = {**EXTRAS, **options.extra}
    for key in ("max_new", "max_tokens", "beam"):
        if isinstance(extra[key], bool) or not isinstance(extra[key], int) or extra[key] < 1:
            problems.append(f"{key} is {extra[key]!r}: give a whole number from 1")
    if not isinstance(extra["cache"], bool):
        problems.append(f"cache is {extra['cache']!r}: give true or false")
    if options.weights == "default":
        problems.append("there are no default weights: give a model directory")
    if options.compile:
        problems.append("it is not compiled: every step of an answer has another shape")
    if problems:
        raise InputError(f"{name} cannot be built", problems)
    return extra


def _model(name: str, preset: str, architecture: str, notes: str) -> Model:
    return Model(
        name=name,
        family="nmt",
        task="translation",
        image_size=0,
        serve=partial(Nmt, name, preset, architecture),
        train=partial(NmtTraining, name, preset, architecture),
        code_licence=CODE_LICENCE,
        weights_licence=WEIGHTS_LICENCE,
        notes=notes,
    )


MODELS = (
    _model("nmt", "tiny", "marian", "Marian, 2+2 layers x 64, 0.2 M"),
    _model("nmt-base", "base", "marian", "Marian, 6+6 layers x 512, 60 M"),
    _model("nmt-t5", "tiny", "t5", "T5, 2+2 layers x 64, 0.2 M"),
)
