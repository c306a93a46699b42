"""Published weights: versions in a directory and a pointer to the one in service, safe against a kill at any instant.

    v0007.safetensors   the tensors, never changed once they are there
    v0007.json          its card: model, step, validation accuracy, size and sha256 of the file above
    current.json        the pointer: version, why (publish or rollback), when

Each file is written under another name, synchronised, and moved into place: tensors first, then the card, then the
pointer. Who dies in between leaves a version that nobody points to, and a draft that the next writer removes. One
process writes; any number read, and trust nothing that the digest does not confirm.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from corun.clock import now_ns
from corun.errors import InputError, RunFault

POINTER = "current.json"
KEEP = 5
PUBLISH, ROLLBACK = "publish", "rollback"
_TENSORS = re.compile(r"v(\d{4,})\.safetensors")
_DRAFT = ".draft-"


@dataclass(frozen=True)
class Card:
    """What is known of one version. accuracy: 0..1 on `samples` labelled arrivals, None when not measured."""

    version: int
    model: str
    step: int
    accuracy: float | None
    samples: int
    sha256: str
    size: int
    t_ns: int
    wall_s: float


@dataclass(frozen=True)
class Pointer:
    """Which version is in service, since when (CLOCK_MONOTONIC ns), and whether it came forward or back."""

    version: int
    why: str
    t_ns: int


class Versions:
    """The versions in one directory. Making one changes nothing on disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def tensors_path(self, version: int) -> Path:
        return self.directory / f"v{version:04d}.safetensors"

    def card_path(self, version: int) -> Path:
        return self.directory / f"v{version:04d}.json"

    @property
    def pointer_path(self) -> Path:
        return self.directory / POINTER

    # Reading

    def known(self) -> list[int]:
        """Versions whose tensors are there, ascending, whether or not anybody points to them."""
        found = [_TENSORS.fullmatch(path.name) for path in self.directory.glob("v*.safetensors")]
        return sorted(int(match[1]) for match in found if match)

    def current(self) -> Pointer | None:
        """The pointer, None before the first publication; InputError when it is damaged."""
        return _read(self.pointer_path, Pointer) if self.pointer_path.exists() else None

    def card(self, version: int) -> Card:
        """The card of a version; InputError when it is missing, damaged, or another version's."""
        card = _read(self.card_path(version), Card)
        if card.version != version:
            raise InputError(f"{self.card_path(version)} is the card of version {card.version}")
        return card

    def read(self, version: int) -> tuple[Card, dict[str, Any]]:
        """The card and the tensors, on the CPU; InputError unless size and sha256 are those of the card."""
        card, path = self.card(version), self.tensors_path(version)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
        if len(data) != card.size:
            raise InputError(f"{path} has {len(data)} bytes, its card says {card.size}: it is cut short or replaced")
        if hashlib.sha256(data).hexdigest() != card.sha256:
            raise InputError(f"{path} is damaged: its sha256 is not the one on its card")
        return card, _tensors(path, data)

    # Writing: one process

    def publish(
        self, state: Mapping[str, Any], model: str, step: int, accuracy: float | None = None, samples: int = 0
    ) -> Card:
        """Write the state as the next version and point to it; RunFault when the disk refuses."""
        from safetensors.torch import save

        self._clear_drafts()
        version = max([0, *self.known()]) + 1
        data = save({name: value.detach().cpu().contiguous().clone() for name, value in state.items()})
        digest = hashlib.sha256(data).hexdigest()
        card = Card(version, model, step, accuracy, samples, digest, len(data), now_ns(), time.time())
        self._place(self.tensors_path(version), data)
        self._place(self.card_path(version), _json(card))
        self._point(Pointer(version, PUBLISH, now_ns()))
        self._forget_old(version)
        return card

    def roll_back(self, version: int) -> Pointer:
        """Point to an earlier version; InputError when it is not there whole."""
        self.read(version)
        pointer = Pointer(version, ROLLBACK, now_ns())
        self._point(pointer)
        return pointer

    def _point(self, pointer: Pointer) -> None:
        self._place(self.pointer_path, _json(pointer))

    def _place(self, path: Path, data: bytes) -> None:
        """All of it under its name, on the disk, or nothing."""
        draft = path.with_name(f"{_DRAFT}{os.getpid()}-{path.name}")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
            _synchronise(self.directory)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise RunFault(f"cannot write {path}: {error.strerror or error}") from error

    def _forget_old(self, current: int) -> None:
        """Delete tensors of all but the KEEP newest versions; their cards stay."""
        for version in self.known()[:-KEEP]:
            if version != current:
                self.tensors_path(version).unlink(missing_ok=True)

    def _clear_drafts(self) -> None:
        for draft in self.directory.glob(f"{_DRAFT}*"):
            with suppress(OSError):
                draft.unlink()


def _json(value: Card | Pointer) -> bytes:
    return (json.dumps(asdict(value), indent=1) + "\n").encode()


Record = TypeVar("Record", Card, Pointer)


def _read(path: Path, kind: type[Record]) -> Record:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        made = kind(**value)
        whole = {"version", "step", "samples", "size", "t_ns"} & {item.name for item in fields(kind)}
        if not all(isinstance(getattr(made, name), int) for name in whole):
            raise ValueError("a number is missing")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return made


def _tensors(path: Path, data: bytes) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except SafetensorError as error:
        raise InputError(f"{path} is not safetensors: {error}") from None


def _synchronise(directory: Path) -> None:
    """Have a rename survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
