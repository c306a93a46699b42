"""The encoder half: token ids (or their embeddings) to hidden states.

What a client sends decides how much of it runs where:

    partition   the client sends     the server's encoder part
    text, ids   text or token ids    embedding table and layers
    embed       embeddings           layers only: the table stays with the client
    encoder     hidden states        nothing: the whole encoder runs with the client

At 32 tokens and width 512 a sentence is about 160 bytes of text, 128 of ids, 64 KiB of embeddings or hidden states in
fp32 (`sentence_bytes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PARTITIONS = ("text", "ids", "embed", "encoder")
ID_BYTES = 4


def padded(ids: Sequence[Sequence[int]], pad_id: int, device: Any = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both int64 (n, L) on `device`, padded on the right to the longest row."""
    import torch

    length = max(len(row) for row in ids)
    table = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    return table.to(device, non_blocking=True), mask.to(device, non_blocking=True)


class Embedding:
    """The encoder's embedding table alone: what a client needs for the partition `embed`."""

    def __init__(self, table: torch.Tensor, scale: float, pad_id: int) -> None:
        self.table, self.scale, self.pad_id = table, scale, pad_id

    def embed(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(embedded (n, L, d), mask (n, L)), scaled as the network's layers expect it."""
        table, mask = padded(ids, self.pad_id, self.table.device)
        return self.table[table] * self.scale, mask


class Encoder:
    """One encoder part on its device, shareable between processes.

    module: transformers' encoder. Without an embedding table (`partition="embed"`) only `encode_embedded` works.
    """

    def __init__(self, module: Any, config: Any, partition: str = "ids") -> None:
        self.module, self.config, self.partition = module, config, partition
        self.scale = float(getattr(module, "embed_scale", 1.0))
        self.pad_id = int(config.pad_token_id)
        self.width = int(config.d_model)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        found: torch.device = next(self.module.parameters()).device
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights and of the hidden states."""
        found: torch.dtype = next(self.module.parameters()).dtype
        return found

    def share_memory(self) -> Encoder:
        """Move the weights to shared memory (CPU), so that children work on the same copy; returns itself."""
        self.module.share_memory()
        return self

    def encode(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden (n, L, d), mask int64 (n, L)) of n sentences; rows are padded to the longest one."""
        return self.encode_padded(*padded(ids, self.pad_id, self.device))

    def encode_padded(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of rows that are padded already: ids and mask (n, L) on the encoder's device."""
        import torch

        with torch.no_grad():
            return self.module(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    def embed(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(embedded (n, L, d), mask (n, L)): the client's side of the partition `embed`."""
        return Embedding(self.module.embed_tokens.weight, self.scale, self.pad_id).embed(ids)

    def encode_embedded(self, embedded: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden (n, L, d), mask) of embeddings made by `embed`, wherever that ran."""
        import torch

        inputs, mask = embedded.to(self.device, self.dtype), mask.to(self.device)
        with torch.no_grad():
            return self.module(inputs_embeds=inputs, attention_mask=mask).last_hidden_state, mask


def sentence_bytes(partition: str, tokens: int, width: int, dtype: str = "float32", text: str = "") -> int:
    """Bytes one sentence of `tokens` ids costs on the wire: text, int32 ids, or `tokens` x `width` values of `dtype`."""
    if partition == "text":
        return len(text.encode())
    if partition == "ids":
        return ID_BYTES * tokens
    return tokens * width * value_bytes(dtype)


def value_bytes(dtype: str) -> int:
    """Bytes of one hidden value: 4 for float32, 2 for float16 and bfloat16."""
    return {"float32": 4, "fp32": 4, "float16": 2, "fp16": 2, "bfloat16": 2, "bf16": 2}[dtype]
