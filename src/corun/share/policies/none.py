"""Naive time slicing: two processes with their configured threads, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corun.share.policy import Kind, Policy


@dataclass
class Nothing(Policy):
    """The kernel (or the GPU's time slicer) treats trainer and services alike."""

    name: ClassVar[str] = "none"
    kind: ClassVar[Kind] = "base"
    summary: ClassVar[str] = "naive time slicing, thread counts as configured"
    live: ClassVar[bool] = True
