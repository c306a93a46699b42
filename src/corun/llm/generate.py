"""Greedy generation for a batch of prompts, one token per row and step, every token stamped.

    prompts, left-padded          ░░ a b c │ x y z          every row ends in the same column, so one position of
                                  d e f g h │ u v ■          the cache is written per step; ░ is masked, ■ is eos

A row ends at its eos, at its own length, when its deadline has passed or when it was cancelled; both are looked
at between two tokens. Rows that have ended are computed along until the last one ends: that is what static
batching costs, and what `corun.llm.continuous` avoids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from corun.clock import NS_PER_MS, now_ns


def never() -> bool:
    """A prompt nobody cancels."""
    return False


@dataclass(frozen=True)
class Prompt:
    """One text to continue. deadline_ns: no token is made after it. eos None: only the length ends it.

    on_token: told each new id and when it reached the host (ns), on the thread that computes.
    """

    ids: Sequence[int]
    max_new_tokens: int
    eos: int | None = None
    deadline_ns: int | None = None
    cancelled: Callable[[], bool] = never
    on_token: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class Generated:
    """The new ids of one prompt and when each reached the host (ns); stopped: eos, length, deadline or cancelled."""

    ids: tuple[int, ...]
    stamps_ns: tuple[int, ...]
    stopped: str

    def ttft_ms(self, arrived_ns: int) -> float | None:
        """Time to the first token; None when there is none."""
        return (self.stamps_ns[0] - arrived_ns) / NS_PER_MS if self.stamps_ns else None

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token after the first; None with fewer than two."""
        if len(self.stamps_ns) < 2:
            return None
        return (self.stamps_ns[-1] - self.stamps_ns[0]) / NS_PER_MS / (len(self.stamps_ns) - 1)


@dataclass
class _Row:
    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    stamps_ns: list[int] = field(default_factory=list)
    stopped: str = ""

    def check(self, now: int) -> None:
        """End the row if its owner has given up or its time is over."""
        if self.stopped:
            return
        if self.prompt.cancelled():
            self.stopped = "cancelled"
        elif self.prompt.deadline_ns is not None and now >= self.prompt.deadline_ns:
            self.stopped = "deadline"

    def add(self, token: int, now: int) -> None:
        """Append one token of a row that still runs."""
        if self.stopped:
            return
        self.ids.append(token)
        self.stamps_ns.append(now)
        if self.prompt.on_token is not None:
            self.prompt.on_token(token, now)
        if token == self.prompt.eos:
            self.stopped = "eos"
        elif len(self.ids) >= self.prompt.max_new_tokens:
            self.stopped = "length"


def generate(module: Any, prompts: Sequence[Prompt], clock: Callable[[], int] = now_ns) -> list[Generated]:
    """Continue all prompts in one batch; results in their order.

    module: a causal language model of transformers, on any device. Cancelling and deadlines end single rows.
    """
    import torch

    device = next(module.parameters()).device
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.ids) :] = torch.tensor(list(prompt.ids))
        mask[row, longest - len(prompt.ids) :] = 1
    return generate_padded(module, prompts, ids.to(device), mask.to(device), clock)


def generate_padded(
    module: Any, prompts: Sequence[Prompt], ids: Any, mask: Any, clock: Callable[[], int] = now_ns
) -> list[Generated]:
    """`generate` for ids and mask (B, T), left-padded and on the device already."""
    import torch
    from transformers import DynamicCache

    rows = [_Row(prompt) for prompt in prompts]
    cache = DynamicCache()
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    with torch.inference_mode():
        while _running(rows, clock()):
            logits = module(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            tokens = ids.flatten().tolist()
            now = clock()
            for row, token in zip(rows, tokens, strict=True):
                row.add(token, now)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            positions = positions[:, -1:] + 1
    return [Generated(tuple(row.ids), tuple(row.stamps_ns), row.stopped) for row in rows]


def _running(rows: Sequence[_Row], now: int) -> bool:
    for row in rows:
        row.check(now)
    return any(not row.stopped for row in rows)
