"""What a router can be told while it runs: one JSON object per line, one line back, over a Unix socket of its own.

    {"do": "add", "name": "a", "address": "127.0.0.1:54101"}     ▶  {"ok": true}
    {"do": "stats", "since": 120}                                ▶  {"ok": true, "stats": {...}}

The data port has no such commands: who may send requests may not thereby redirect them.
"""

from __future__ import annotations

import contextlib
import socket

import msgspec

from corun.errors import PeerClosed, RunFault
from corun.wire import Address

__all__ = ["Add", "Drain", "Finish", "Remove", "ReplicaFigures", "RouterControl", "RouterFigures", "Stats", "Told"]

RECEIVE_SIZE = 64 << 10


class Add(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="add"):
    """Send requests to this server too, from the moment it accepts a connection."""

    name: str
    address: str


class Drain(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="drain"):
    """Send nothing more to this replica; once it has answered everything it is forgotten."""

    name: str


class Remove(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="remove"):
    """Forget this replica now; what it has not answered goes to another one."""

    name: str


class Stats(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="stats"):
    """Figures; `since`: number of the first latency wanted, as the last answer's `next_latency` said."""

    since: int = 0


class Finish(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="finish"):
    """Turn new requests away (DRAINING) from now on; what is open is answered."""


Command = Add | Drain | Remove | Stats | Finish


class ReplicaFigures(msgspec.Struct, frozen=True):
    """One replica; busy_ns: time with something outstanding, since it was added. lost: taken from it unanswered."""

    name: str
    address: str
    state: str
    connected: bool
    outstanding: int
    answered: int
    lost: int
    busy_ns: int


class RouterFigures(msgspec.Struct, frozen=True):
    """A router at one instant.

    received: requests since its start = the sum of `answered` (by wire status) + outstanding + waiting.
    latencies_us: from the last byte of a request to its OK reply, numbered; of those asked for, the newest.
    """

    now_ns: int
    pid: int
    address: str
    received: int
    answered: dict[int, int]
    retried: int
    strays: int
    waiting: int
    outstanding: int
    payload_bytes: int
    clients: int
    latencies_us: list[int]
    next_latency: int
    replicas: list[ReplicaFigures]


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """The line back."""

    ok: bool
    error: str = ""
    stats: RouterFigures | None = None


encode = msgspec.json.encode
_command = msgspec.json.Decoder(Command)
_told = msgspec.json.Decoder(Told)


def decode_command(line: bytes) -> Command:
    """The command of one line; RunFault says what is wrong with it."""
    try:
        return _command.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RunFault(f"not a command: {error}") from error


class RouterControl:
    """The other end of a router's control socket; one command at a time, connected when first needed.

    Every call raises PeerClosed when the router is not there, and RunFault with its sentence when it refuses.
    """

    def __init__(self, address: Address, timeout_s: float = 2.0) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._sock: socket.socket | None = None

    def add(self, name: str, address: Address) -> None:
        self._tell(Add(name, str(address)))

    def drain(self, name: str) -> None:
        self._tell(Drain(name))

    def remove(self, name: str) -> None:
        self._tell(Remove(name))

    def stats(self, since: int = 0) -> RouterFigures:
        told = self._tell(Stats(since)).stats
        if told is None:
            raise PeerClosed(f"the router at {self.address} answered without its figures")
        return told

    def finish(self) -> None:
        self._tell(Finish())

    def close(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.close()

    def _tell(self, command: Command) -> Told:
        try:
            told = self._exchange(command)
        except (OSError, msgspec.DecodeError) as error:
            self.close()
            raise PeerClosed(f"the router at {self.address} does not answer: {error}") from error
        if not told.ok:
            raise RunFault(told.error)
        return told

    def _exchange(self, command: Command) -> Told:
        if self._sock is None:
            sock = socket.socket(self.address.family, socket.SOCK_STREAM)
            sock.settimeout(self._timeout_s)
            self._sock = sock
            sock.connect(self.address.target)
        self._sock.sendall(encode(command) + b"\n")
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            part = self._sock.recv(RECEIVE_SIZE)
            if not part:
                raise ConnectionResetError("it closed the connection")
            parts.append(part)
        return _told.decode(b"".join(parts))
