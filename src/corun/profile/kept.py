"""Files under /proc and /sys that are opened once and read again every tick with pread(2).

A `cat` in a child process costs about a millisecond, a pread of a kept descriptor under ten microseconds.
A kept descriptor of /proc/PID also stays bound to that very process: when the number is used again, reading
fails with ESRCH instead of showing a stranger.
"""

from __future__ import annotations

import os
from pathlib import Path

PAGE = 4096


def under(root: Path, path: str) -> Path:
    """An absolute path looked up below `root`: ("/fake", "/proc/stat") is /fake/proc/stat."""
    return root / path.lstrip("/")


class KeptFile:
    """One small file; OSError from the constructor when it is absent or may not be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, size: int = PAGE) -> bytes:
        """The first `size` bytes as they are now."""
        return os.pread(self._fd, size, 0)

    def read_all(self) -> bytes:
        """The whole file; the kernel hands long tables out in pieces of a page."""
        pieces = [os.pread(self._fd, PAGE * 4, 0)]
        offset = len(pieces[0])
        while piece := os.pread(self._fd, PAGE * 4, offset):
            pieces.append(piece)
            offset += len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        os.close(self._fd)


def read_text(path: Path) -> str | None:
    """The stripped text of a small file, or None when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\x00\n\r\t ")
    except OSError:
        return None
