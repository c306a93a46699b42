"""Batches without end, in an order that depends only on the seed and the position.

The order of epoch e is the permutation drawn from seed + e, so a job resumed at batch b of epoch e sees the
same samples as one that was never stopped. Decoding is timed inside the data set, in whichever process does
it, and travels with the batch; waiting for the batch is the trainer's own measurement.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate


class TimedDataset(Dataset[Any]):
    """Items of another data set with the nanoseconds it took to make each."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        begin = time.monotonic_ns()
        item = self._inner[index]
        return item, time.monotonic_ns() - begin


class _Collate:
    """Collate the items, add up their decode times (a class, so that worker processes can receive it)."""

    def __init__(self, collate: Any) -> None:
        self._collate = collate

    def __call__(self, items: list[tuple[Any, int]]) -> tuple[Any, int]:
        return self._collate([item for item, _ in items]), sum(decode_ns for _, decode_ns in items)


class Batches:
    """An endless stream of (batch, decode_ns) with a position that can be saved and set.

    The last, smaller batch of an epoch is dropped, so every step has the same size.
    """

    def __init__(self, data: Any, batch_size: int, seed: int, workers: int = 0, pin_memory: bool = False) -> None:
        self._data = TimedDataset(data)
        self._collate = _Collate(getattr(data, "collate", None) or default_collate)
        self._batch_size = batch_size
        self._seed = seed
        self._workers = workers
        self._pin_memory = pin_memory
        self.epoch = 0
        self.index = 0
        self.per_epoch = len(self._data) // batch_size
        self._iterator: Iterator[tuple[Any, int]] | None = None

    def seek(self, epoch: int, index: int) -> None:
        """Go on at batch `index` of `epoch`."""
        self.epoch, self.index = epoch, index
        self._iterator = None

    def next(self) -> tuple[Any, int]:
        """The next batch and its decode time in ns; moves to the next epoch when this one is used up."""
        if self.index >= self.per_epoch:
            self.seek(self.epoch + 1, 0)
        if self._iterator is None:
            self._iterator = iter(self._loader())
        self.index += 1
        return next(self._iterator)

    def _loader(self) -> DataLoader[Any]:
        order = torch.randperm(len(self._data), generator=torch.Generator().manual_seed(self._seed + self.epoch))
        first = self.index * self._batch_size
        return DataLoader(
            self._data,
            batch_size=self._batch_size,
            sampler=order[first:].tolist(),
            num_workers=self._workers,
            collate_fn=self._collate,
            drop_last=True,
            pin_memory=self._pin_memory,
            multiprocessing_context="spawn" if self._workers else None,
            prefetch_factor=2 if self._workers else None,
        )
