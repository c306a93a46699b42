"""GPU time per process from DRM fdinfo: amdgpu, xe, i915, panfrost, panthor ...; no vendor library.

The kernel writes `drm-engine-<engine>: <ns> ns` into /proc/PID/fdinfo/FD of every open DRM device
(Documentation/gpu/drm-usage-stats.rst). Descriptors that were duplicated show the same drm-client-id and
count once. What a closed client had used is kept, so the sum never goes down.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from corun.profile.kept import KeptFile, under
from corun.profile.source import Status

_RESCAN_EVERY = 10
_DEVICES = "/dev/dri"


@dataclass(frozen=True)
class DrmUse:
    """Engine time (counter) and memory of one process over all its DRM clients."""

    busy_ns: int
    memory_mib: float | None


@dataclass(frozen=True)
class _Client:
    key: tuple[bytes, bytes]
    busy_ns: int
    memory_kib: int | None


def probe(root: Path) -> Status:
    """Whether this machine has DRM devices at all."""
    found = under(root, _DEVICES).is_dir()
    return Status("fdinfo", "" if found else f"no {_DEVICES}: no DRM device on this machine")


class DrmClients:
    """The DRM descriptors of one process; looked for at once and at every tenth reading.

    OSError from the constructor when the process' descriptors may not be listed (another user's process).
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, KeptFile] = {}
        self._busy: dict[tuple[bytes, bytes], int] = {}
        self._until_rescan = _RESCAN_EVERY
        self._rescan()

    def read(self) -> DrmUse | None:
        """Use so far, or None for a process that never had a DRM device open."""
        if self._until_rescan == 0:
            self._rescan()
            self._until_rescan = _RESCAN_EVERY
        self._until_rescan -= 1
        clients = {client.key: client for client in map(self._read_one, list(self._files)) if client}
        for client in clients.values():
            self._busy[client.key] = max(client.busy_ns, self._busy.get(client.key, 0))
        if not self._busy:
            return None
        memory = [client.memory_kib for client in clients.values() if client.memory_kib is not None]
        return DrmUse(sum(self._busy.values()), round(sum(memory) / 1024, 3) if memory else None)

    def _rescan(self) -> None:
        for name in os.listdir(self._directory / "fd"):
            if name in self._files:
                continue
            try:
                if os.readlink(self._directory / "fd" / name).startswith(_DEVICES + "/"):
                    self._files[name] = KeptFile(self._directory / "fdinfo" / name)
            except (FileNotFoundError, ProcessLookupError):
                continue

    def _read_one(self, name: str) -> _Client | None:
        try:
            return parse(self._files[name].read())
        except (FileNotFoundError, ProcessLookupError):
            self._files.pop(name).close()
            return None

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def parse(text: bytes) -> _Client | None:
    """One fdinfo file, or None when it has no engine times."""
    fields: dict[bytes, list[bytes]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(b":")
        if key.startswith(b"drm-") and value.split():
            fields[key] = value.split()
    engines = [
        int(words[0])
        for key, words in fields.items()
        if key.startswith(b"drm-engine-") and not key.startswith(b"drm-engine-capacity-")
    ]
    if not engines:
        return None
    identity = fields.get(b"drm-pdev", [b""])[0], fields.get(b"drm-client-id", [b""])[0]
    return _Client(identity, sum(engines), _memory_kib(fields))


def _memory_kib(fields: dict[bytes, list[bytes]]) -> int | None:
    """Resident memory over all regions; older drivers call it drm-memory, some print both."""
    for prefix in (b"drm-resident-", b"drm-memory-"):
        regions = [_kib(words) for key, words in fields.items() if key.startswith(prefix)]
        if regions:
            return sum(regions)
    return None


def _kib(words: list[bytes]) -> int:
    """`4 MiB`, `128 KiB` or bytes without a unit as KiB."""
    unit = words[1] if len(words) > 1 else b""
    return int(words[0]) * {b"KiB": 1024, b"MiB": 1024**2, b"GiB": 1024**3}.get(unit, 1) // 1024
