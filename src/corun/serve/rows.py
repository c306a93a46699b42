"""Server rows on disk (INFER_SERVER): made outside the hot path, whole even after kill -9.

The model thread only appends the answered request to a deque. The io thread turns requests into lines, a few at a
time, and hands each slice to the kernel in one write(2): a killed server keeps every row but those of its last
second, and its last row is whole.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from corun.clock import NS_PER_MS, NS_PER_S, Anchor
from corun.errors import RunFault
from corun.run.records import INFER_SERVER, names
from corun.serve.queue import Request
from corun.wire import Status

SLICE = 32
CHUNK = 64 << 10
_STATUS_NAMES = {int(status): status.name for status in Status}
_QUOTED = frozenset(',"\r\n')


class RowLog:
    """Appends to `<directory>/<service>.csv`; `add` from any thread, the rest from one."""

    def __init__(self, directory: Path, service: str, anchor: Anchor) -> None:
        self.path = directory / f"{service}.csv"
        self.written = 0
        self._service = _cell(service)
        self._anchor = anchor
        self._pending: deque[Request] = deque()
        self.add = self._pending.append
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            _end_whole(self._fd)
            if os.fstat(self._fd).st_size == 0:
                self._write((",".join(names(INFER_SERVER)) + "\n").encode())
        except OSError as error:
            raise self._fault(error) from error

    def __len__(self) -> int:
        return len(self._pending)

    def flush(self, limit: int | None = SLICE) -> None:
        """Write up to `limit` pending rows (None = all that wait now) in slices of one write each.

        Raises RunFault when the disk refuses them.
        """
        left = len(self._pending) if limit is None else min(limit, len(self._pending))
        while left > 0:
            count = min(left, SLICE)
            lines = [self._line(self._pending.popleft()) for _ in range(count)]
            try:
                self._write("".join(lines).encode())
            except OSError as error:
                raise self._fault(error) from error
            self.written += count
            left -= count

    def close(self) -> None:
        """Write everything and close."""
        self.flush(None)
        os.close(self._fd)

    def _fault(self, error: OSError) -> RunFault:
        return RunFault(f"cannot write {self.path}: {error.strerror or error}")

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def _line(self, request: Request) -> str:
        header, segment, stamps, info = request.header, request.segment, request.stamps, request.info
        cells = ",".join(
            (
                self._wall(request),
                *(
                    (_cell(info.model), "", str(info.image_size or ""), _cell(info.device))
                    if info
                    else ("", "", "", "")
                ),
                "",
                f"{(stamps[-1] - stamps[1]) / NS_PER_MS:.6f}" if stamps[-1] else "",
                self._service,
                _cell(segment.arm),
                "" if segment.repeat is None else str(segment.repeat),
                "" if segment.index is None else str(segment.index),
                str(header.stream),
                str(header.id),
                _STATUS_NAMES[request.status],
                str(header.payload_len),
                str(len(request.reply)),
                str(request.batch or ""),
                str(request.queue_len),
                *[str(stamp) if stamp else "" for stamp in stamps],
                _cell(request.detail),
                "" if info is None or info.version is None else str(info.version),
                *_token_cells(request),
            )
        )
        return cells + "\n"

    def _wall(self, request: Request) -> str:
        """Wall clock of the intended send time; only a client on this host has our monotonic clock."""
        intended_ns = request.header.t_intended
        if not intended_ns or not request.connection.local:
            return ""
        return f"{self._anchor.wall_at(intended_ns) / NS_PER_S:.6f}"


def _token_cells(request: Request) -> tuple[str, str, str, str]:
    """tokens_in, tokens_out, ttft_ms, tpot_ms; empty for a model that makes no tokens."""
    tokens = request.tokens
    if tokens is None:
        return "", "", "", ""
    times = (tokens.ttft_ms(request.t_done), tokens.tpot_ms)
    ttft, tpot = ("" if ms is None else f"{ms:.6f}" for ms in times)
    return str(tokens.into), str(tokens.out), ttft, tpot


def _cell(text: str) -> str:
    """Text as one CSV cell (RFC 4180)."""
    if _QUOTED.isdisjoint(text):
        return text
    escaped = text.replace('"', '""')
    return f'"{escaped}"'


def _end_whole(fd: int) -> None:
    """Cut off what follows the last newline, so that new rows begin on a line of their own."""
    whole = size = os.fstat(fd).st_size
    while whole:
        start = max(0, whole - CHUNK)
        newline = os.pread(fd, whole - start, start).rfind(b"\n")
        whole = start + newline + 1 if newline >= 0 else start
        if newline >= 0:
            break
    if whole < size:
        os.ftruncate(fd, whole)
