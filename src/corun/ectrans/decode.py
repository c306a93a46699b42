"""The decoder half: hidden states to answers, a whole batch at a time or with rows that join and leave.

Static: transformers' `generate` with the encoder's output given; a batch ends with its longest answer. Without its
key-value cache (`cache=False`) it does what the published system did: the whole prefix anew at every step.

Continuous: rows leave when they end and newcomers take their slots, between two steps of one running batch::

    slot   0 1 2 3 4 5                      A and B run, C joined two steps ago
    A      a a a a a a    mask 1 1 1 1 1 1  C's keys and values are padded on the left with zeros that its mask hides;
    B      b b b b b b         1 1 1 1 1 1  keys and values over the source are padded on the right, hidden likewise
    C      . . . . c c         0 0 0 0 1 1

T5 sees only distances, so C's answer is what it would be alone. Marian adds the table of positions at the length of
the cache, 6 here, where C's next token is its own number 2; the difference is put into its input instead:

    x = embed(token) + (PE[own position] - PE[cache length]) / embed_scale

(transformers 5 multiplies given embeddings by embed_scale, 4 did not; a test pins it.) After rows left, the leading
slots nobody uses are dropped: the cache is never longer than the longest running answer, so positions never run out.

Answers are ids after the start sign, with the closing end sign where there is one: their number is that of the steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from corun.errors import InputError

if TYPE_CHECKING:
    import torch

KeysValues = tuple["torch.Tensor", "torch.Tensor"]
DEFAULT_MAX_NEW = 60


class Decoder:
    """One decoder part with the head on its device, shareable between processes.

    module: transformers' whole class with nothing where the encoder was.
    """

    def __init__(self, module: Any) -> None:
        from transformers import GenerationConfig

        self.module, self.config = module, module.config
        self.pad_id, self.eos_id = int(self.config.pad_token_id), int(self.config.eos_token_id)
        self.start_id = int(self.config.decoder_start_token_id)
        self.vocabulary = int(module.lm_head.weight.shape[0])
        module.generation_config = GenerationConfig(
            pad_token_id=self.pad_id, eos_token_id=self.eos_id, decoder_start_token_id=self.start_id
        )

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        found: torch.device = next(self.module.parameters()).device
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        found: torch.dtype = next(self.module.parameters()).dtype
        return found

    @property
    def max_positions(self) -> int | None:
        """Longest answer the table of positions allows; None = any (T5)."""
        return None if self.config.model_type == "t5" else int(self.config.max_position_embeddings)

    def share_memory(self) -> Decoder:
        """Move the weights to shared memory (CPU), so that children work on the same copy; returns itself."""
        self.module.share_memory()
        return self

    def logits(self, hidden: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits (n, T, vocabulary) after every prefix of `ids` (n, T), without any cache: the reference."""
        import torch

        with torch.no_grad():
            result: torch.Tensor = self.module(
                encoder_outputs=(hidden,), attention_mask=mask, decoder_input_ids=ids, use_cache=False
            ).logits
            return result

    def check_length(self, max_new: int) -> None:
        """InputError when answers of `max_new` tokens are none or do not fit the table of positions."""
        limit = self.max_positions
        if max_new < 1 or (limit is not None and max_new > limit):
            most = "" if limit is None else f" to {limit}, the length of the table of positions"
            raise InputError(f"max_new is {max_new}: give 1{most or ' or more'}")


class StaticDecoder:
    """Whole batches by transformers' `generate`: greedy, or with `beam` > 1 beam search.

    cache False: historical mode, nothing is kept between steps, as in the published system.
    """

    def __init__(self, decoder: Decoder, max_new: int = DEFAULT_MAX_NEW, beam: int = 1, cache: bool = True) -> None:
        from transformers import GenerationConfig

        decoder.check_length(max_new)
        if beam < 1:
            raise InputError(f"beam is {beam}: give 1 or more")
        self.decoder, self.max_new, self.beam, self.cache = decoder, max_new, beam, cache
        self._how = GenerationConfig(
            max_new_tokens=max_new,
            num_beams=beam,
            do_sample=False,
            use_cache=cache,
            suppress_tokens=[decoder.pad_id],
            pad_token_id=decoder.pad_id,
            eos_token_id=decoder.eos_id,
            decoder_start_token_id=decoder.start_id,
        )

    def decode(self, hidden: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
        """Answers to n sentences in their order; hidden (n, L, d) and mask (n, L) as the encoder gave them."""
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        decoder = self.decoder
        states = BaseModelOutput(last_hidden_state=hidden.to(decoder.device, decoder.dtype))
        with torch.no_grad():
            table = decoder.module.generate(
                encoder_outputs=states, attention_mask=mask.to(decoder.device), generation_config=self._how
            )
        return [_answer(row[1:], decoder.eos_id) for row in table.tolist()]


def no_cache_decoder(decoder: Decoder, max_new: int = DEFAULT_MAX_NEW, beam: int = 1) -> StaticDecoder:
    """Historical mode: the whole prefix goes through the decoder at every step, as in the published system."""
    return StaticDecoder(decoder, max_new, beam, cache=False)


def _answer(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids


@dataclass
class Row:
    """One running answer; its own position is the number of its tokens."""

    key: Hashable
    ids: list[int] = field(default_factory=list)


class ContinuousDecoder:
    """Greedy decoding of at most `slots` rows that join and leave between steps. Not safe for several threads."""

    def __init__(self, decoder: Decoder, slots: int = 64, max_new: int = DEFAULT_MAX_NEW) -> None:
        decoder.check_length(max_new)
        if slots < 1:
            raise InputError(f"slots is {slots}: give 1 or more")
        self.decoder, self.slots, self.max_new = decoder, slots, max_new
        self.steps = 0
        self._rows: list[Row] = []
        self._cancelled: set[Hashable] = set()
        self._batch: Batch | None = None

    @property
    def free(self) -> int:
        """Rows that can be admitted now."""
        return self.slots - len(self._rows)

    @property
    def active(self) -> int:
        """Rows that the next step works on."""
        return len(self._rows)

    @property
    def cache_length(self) -> int:
        """Slots of the self-attention cache in use."""
        return 0 if self._batch is None else int(self._batch.self_mask.shape[1])

    def admit(self, hidden: torch.Tensor, mask: torch.Tensor, keys: Sequence[Hashable]) -> None:
        """Let n rows take part from the next step on; hidden (n, L, d), mask (n, L), one key a row.

        Raises InputError: more rows than `free`, or a key that is running.
        """
        running = {row.key for row in self._rows}
        if len(keys) > self.free or running & set(keys) or len(set(keys)) != len(keys) or len(keys) != len(hidden):
            raise InputError(f"cannot admit {len(keys)} rows: {self.free} slots are free, keys are used once")
        if not keys:
            return
        joined = newcomers(self.decoder, hidden, mask)
        self._batch = joined if self._batch is None else self._batch.joined(joined)
        self._rows += [Row(key) for key in keys]

    def cancel(self, key: Hashable) -> bool:
        """Drop a row before its answer is complete; False when no such row runs."""
        kept = [i for i, row in enumerate(self._rows) if row.key != key]
        found = len(kept) < len(self._rows)
        if found:
            self._keep(kept)
        return found

    def step(self) -> list[tuple[Hashable, list[int]]]:
        """One token for every row; (key, answer) of the rows that ended with it. Does nothing when there is none."""
        if self._batch is None:
            return []
        chosen = self._next(self._batch).tolist()
        self.steps += 1
        ended, kept = [], []
        for i, (row, token) in enumerate(zip(self._rows, chosen, strict=True)):
            row.ids.append(token)
            if token == self.decoder.eos_id or len(row.ids) >= self.max_new:
                ended.append((row.key, row.ids))
            else:
                kept.append(i)
        if ended:
            self._keep(kept)
        return ended

    def _next(self, batch: Batch) -> torch.Tensor:
        logits = self.logits(batch)
        logits[:, self.decoder.pad_id] = -float("inf")
        return logits.argmax(dim=-1)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits (n, vocabulary) of the next token; the batch's self-attention cache grows by one slot."""
        import torch

        decoder = self.decoder
        last = [row.ids[-1] if row.ids else decoder.start_id for row in self._rows]
        with torch.no_grad():
            inputs = self._inputs(torch.tensor(last, device=decoder.device)[:, None], batch.length)
            return batch.run(decoder.module, inputs)

    def _inputs(self, tokens: torch.Tensor, length: int) -> dict[str, Any]:
        """The step's tokens, as embeddings with corrected positions where a row's own differs from the cache's."""
        import torch

        offsets = [len(row.ids) for row in self._rows]
        if self.decoder.max_positions is None or all(own == length for own in offsets):
            return {"decoder_input_ids": tokens}
        stack = self.decoder.module.get_decoder()
        table = stack.embed_positions.weight
        own = table[torch.tensor(offsets, device=tokens.device)]
        correction = (own - table[length]) / stack.embed_scale
        return {"decoder_inputs_embeds": stack.embed_tokens(tokens) + correction[:, None]}

    def _keep(self, rows: list[int]) -> None:
        self._rows = [self._rows[i] for i in rows]
        assert self._batch is not None
        longest = max((len(row.ids) for row in self._rows), default=0)
        self._batch = self._batch.kept(rows, longest) if rows else None


@dataclass
class Batch:
    """Keys and values of the running rows: (n, heads, slots, width) each, per layer; masks (n, slots).

    own: over the answers so far, padded on the left. source: over the encoder's output, padded on the right.
    """

    own: list[KeysValues]
    source: list[KeysValues]
    self_mask: torch.Tensor
    source_mask: torch.Tensor

    @property
    def length(self) -> int:
        """Slots of the self-attention cache."""
        return int(self.self_mask.shape[1])

    def run(self, module: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """One decoder step: logits (n, vocabulary); the new keys and values are kept."""
        import torch
        from transformers import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(DynamicCache(self.own), DynamicCache(self.source))
        self.self_mask = torch.nn.functional.pad(self.self_mask, (0, 1), value=1)
        shape = (*self.source_mask.shape, 1)
        unread = self.source[0][0].new_zeros(1).expand(shape)
        result = module(
            encoder_outputs=(unread,),
            attention_mask=self.source_mask,
            decoder_attention_mask=self.self_mask,
            past_key_values=cache,
            use_cache=True,
            **inputs,
        )
        self.own = [(layer.keys, layer.values) for layer in cache.self_attention_cache.layers]
        logits: torch.Tensor = result.logits[:, -1].float()
        return logits

    def joined(self, new: Batch) -> Batch:
        """These rows, then the new ones, padded to each other."""
        slots = max(self.length, new.length)
        width = max(self.source_mask.shape[1], new.source_mask.shape[1])
        return Batch(
            [_stacked(a, b, slots, left=True) for a, b in zip(self.own, new.own, strict=True)],
            [_stacked(a, b, width, left=False) for a, b in zip(self.source, new.source, strict=True)],
            _rows_of(self.self_mask, new.self_mask, slots, left=True, dim=1),
            _rows_of(self.source_mask, new.source_mask, width, left=False, dim=1),
        )

    def kept(self, rows: list[int], longest: int) -> Batch:
        """Some of the rows, without the slots that none of them uses."""
        import torch

        index = torch.tensor(rows, device=self.self_mask.device)
        first = self.length - longest
        source_mask = self.source_mask[index]
        width = int(source_mask.sum(dim=1).max())
        return Batch(
            [(k[index, :, first:], v[index, :, first:]) for k, v in self.own],
            [(k[index, :, :width], v[index, :, :width]) for k, v in self.source],
            self.self_mask[index, first:],
            source_mask[:, :width],
        )


def newcomers(decoder: Decoder, hidden: torch.Tensor, mask: torch.Tensor) -> Batch:
    """Rows before their first step: an empty self-attention cache, and keys and values over the source."""
    import torch

    hidden, mask = hidden.to(decoder.device, decoder.dtype), mask.to(decoder.device)
    with torch.no_grad():
        source = [_source_keys_values(attention, hidden) for attention in _cross_attentions(decoder)]
    empty = [(keys[:, :, :0], values[:, :, :0]) for keys, values in source]
    return Batch(empty, source, mask[:, :0], mask)


def _cross_attentions(decoder: Decoder) -> list[tuple[Any, Any, int]]:
    """(projection of keys, projection of values, width of a head) of every layer."""
    stack = decoder.module.get_decoder()
    if decoder.config.model_type == "t5":
        attentions = [block.layer[1].EncDecAttention for block in stack.block]
        return [(attention.k, attention.v, attention.key_value_proj_dim) for attention in attentions]
    attentions = [layer.encoder_attn for layer in stack.layers]
    return [(attention.k_proj, attention.v_proj, attention.head_dim) for attention in attentions]


def _source_keys_values(attention: tuple[Any, Any, int], hidden: torch.Tensor) -> KeysValues:
    keys, values, width = attention
    shape = (*hidden.shape[:2], -1, width)
    return keys(hidden).view(shape).transpose(1, 2), values(hidden).view(shape).transpose(1, 2)


def _stacked(a: KeysValues, b: KeysValues, length: int, left: bool) -> KeysValues:
    return _rows_of(a[0], b[0], length, left, dim=2), _rows_of(a[1], b[1], length, left, dim=2)


def _rows_of(a: torch.Tensor, b: torch.Tensor, length: int, left: bool, dim: int) -> torch.Tensor:
    """Rows of `a`, then of `b`, both padded with zeros to `length` along `dim`."""
    import torch

    def full(tensor: torch.Tensor) -> torch.Tensor:
        missing = length - tensor.shape[dim]
        sides = (missing, 0) if left else (0, missing)
        return torch.nn.functional.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + list(sides))

    return torch.cat([full(a), full(b)])
