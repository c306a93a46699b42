"""Trains a translation model directory on sentence pairs, by teacher forcing with Adam.

A tiny network learns the made language (`datasets/pairs.py`) well enough for real ends and lengths in some hundred
steps; `trained_tiny` makes such a directory for tests and demonstrations, and keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from corun import torch_tools
from corun.ectrans import build, encode, tokens
from corun.errors import InputError
from corun.registry import load_plugin

BATCH = 32
WARM_UP_STEPS = 50
PEAK_LEARNING_RATE = 4e-3
LEAST_RATE_SHARE = 0.05
CLIP = 1.0

TINY_WORDS, TINY_LONGEST = 24, 9
TINY_PAIRS, TINY_STEPS = 4_000, 250

Pair = tuple[str, str]
Ids = tuple[list[int], list[int]]


def train(
    directory: Path,
    pairs: Sequence[Pair],
    steps: int,
    device: str = "cpu",
    seed: int = 0,
    batch_size: int = BATCH,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the model in `directory` for `steps` batches and write its weights back; returns the loss of each step.

    The learning rate rises for 50 steps and falls by a half cosine. Raises InputError: no model, no pairs.
    """
    import torch

    if not pairs or steps < 1:
        raise InputError(f"there is nothing to train: {len(pairs)} pairs, {steps} steps")
    tokenizer = tokens.Tokenizer.load(directory)
    model = build.made_trainable(build.read_model(directory)).train().to(torch_tools.torch_device(device))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, steps))
    encoded = [(tokenizer.encode(source), tokenizer.encode(target)) for source, target in pairs]
    losses = []
    for step, batch in enumerate(_batches(encoded, batch_size, steps, seed)):
        loss = pair_loss(model, batch, tokenizer.pad_id)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, CLIP)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if report:
            report(step + 1, losses[-1])
    build.write_model(model.eval(), directory)
    return losses


def rate_share(step: int, steps: int) -> float:
    """Learning rate of a step as a share of its peak."""
    rise = (step + 1) / WARM_UP_STEPS
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return min(rise, LEAST_RATE_SHARE + (1 - LEAST_RATE_SHARE) * fall)


def pair_loss(model: Any, batch: Sequence[Ids], pad_id: int) -> Any:
    """Mean over the pairs of the mean cross-entropy of a target's tokens; (source ids, target ids) each.

    A mean of means, so that a batch cut into parts makes the same update.
    """
    import torch

    device = next(model.parameters()).device
    ids, mask = encode.padded([source for source, _ in batch], pad_id, device)
    labels, counted = encode.padded([target for _, target in batch], pad_id, device)
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    logits = model(
        input_ids=ids, attention_mask=mask, decoder_input_ids=torch.cat([start, labels[:, :-1]], dim=1)
    ).logits
    each = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    return ((each * counted).sum(dim=1) / counted.sum(dim=1)).mean()


def _batches(encoded: Sequence[Ids], size: int, count: int, seed: int) -> Iterator[list[Ids]]:
    import torch

    drawn = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield [encoded[i] for i in torch.randint(len(encoded), (size,), generator=drawn).tolist()]


def trained_tiny(directory: Path, architecture: str = "marian", steps: int = TINY_STEPS) -> Path:
    """A tiny model directory that answers the made language with real ends and lengths; made once, then found again.

    Some seconds on one core. The directory is complete when it exists, so several processes may ask for it.
    """
    made = directory / f"tiny-{architecture}-{steps}"
    if made.is_dir():
        return made
    language = load_plugin("datasets", "pairs")
    pairs = language.made_pairs(TINY_PAIRS, seed=1, words=TINY_WORDS, longest=TINY_LONGEST)
    part = build.prepare("tiny", None, out=directory / f"{made.name}.part", architecture=architecture)
    train(part, pairs, steps)
    part.rename(made)
    return made


def tiny_sentences(count: int, seed: int = 7) -> list[str]:
    """Sentences in the part of the made language that `trained_tiny` knows, of mixed lengths."""
    language = load_plugin("datasets", "pairs")
    pairs = language.made_pairs(count, seed=seed, words=TINY_WORDS, longest=TINY_LONGEST)
    return [source for source, _ in pairs]
