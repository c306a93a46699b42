"""The server as a client sees it before it sends anything: its model, and its clock.

Asked over a connection of its own that is closed again, so nothing of it is ever on the connection that is
measured. Servers on this host share our CLOCK_MONOTONIC; for others the four-stamp handshake is done before
and after each segment, never during it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from corun import __version__
from corun.clock import now_ns
from corun.errors import FrameError, InputError, PeerClosed, RunFault
from corun.process import clock_id
from corun.wire import Address, connect
from corun.wire.channel import Channel
from corun.wire.messages import Hello, Load

ANSWER_S = 10.0
LOAD_S = 600.0
LOOK_EVERY_S = 0.1
GENERATION = "generation"
LOOPBACK = ("127.", "::1", "localhost")


@dataclass(frozen=True)
class Target:
    """What a server answered to HELLO; same_clock: its stamps are on our CLOCK_MONOTONIC."""

    address: Address
    model: str
    device: str
    image_size: int | None
    same_clock: bool
    body: Mapping[str, Any]

    @property
    def task(self) -> str:
        """What its model does, "" when it did not say."""
        info = self.body.get("info")
        return str(info.get("task") or "") if isinstance(info, Mapping) else ""

    @property
    def generates(self) -> bool:
        """Whether its model makes an answer token by token."""
        return self.task == GENERATION


def find(address: Address, model: str = "", options: Mapping[str, Any] | None = None, wait_s: float = 0.0) -> Target:
    """The server at `address`, made to serve `model` if it has another one or none; "" takes what it has.

    wait_s: how long a server that is just starting is waited for. Raises PeerClosed when nobody is there and
    InputError when the server cannot load the model, or has none and none is asked for.
    """
    patience = time.monotonic() + wait_s
    channel = Channel(connect(address, max(wait_s, ANSWER_S), retry=wait_s > 0))
    try:
        body = _hello(channel)
        while not model and not body.get("model") and time.monotonic() < patience:
            time.sleep(LOOK_EVERY_S)
            body = _hello(channel)
        if model and body.get("model") != model:
            _load(channel, address, model, options or {})
            body = _hello(channel)
    except PeerClosed as error:
        raise PeerClosed(f"the server at {address} does not answer: {error}") from error
    except FrameError as error:
        raise PeerClosed(f"what listens at {address} is not a corun server: {error}") from error
    finally:
        channel.close()
    if not body.get("model"):
        raise InputError(f"the server at {address} has no model; give --model")
    return _target(address, body)


def _hello(channel: Channel) -> dict[str, Any]:
    hello = Hello(role="client", pid=os.getpid(), version=__version__, clock_ns=now_ns(), host=socket.gethostname())
    return channel.request(hello, ANSWER_S)


def _load(channel: Channel, address: Address, model: str, options: Mapping[str, Any]) -> None:
    try:
        channel.request(Load(model, dict(options)), LOAD_S)
    except RunFault as error:
        raise InputError(f'the server at {address} cannot load "{model}": {error}') from error


def _target(address: Address, body: Mapping[str, Any]) -> Target:
    size = _image_size(body)
    return Target(
        address=address,
        model=str(body.get("model") or ""),
        device=str(body.get("device") or ""),
        image_size=size,
        same_clock=_same_clock(address, body),
        body=body,
    )


def _same_clock(address: Address, body: Mapping[str, Any]) -> bool:
    """By the clock the server names; of one that names none, by its address and its host's name."""
    named = body["info"].get("clock") if isinstance(body.get("info"), Mapping) else None
    if named:
        return bool(named == clock_id())
    local = address.scheme == "unix" or address.host.startswith(LOOPBACK)
    return local or body.get("host") == socket.gethostname()


def _image_size(body: Mapping[str, Any]) -> int | None:
    for part in (body, body.get("shapes"), body.get("info")):
        if isinstance(part, Mapping) and isinstance(part.get("image_size"), int):
            return int(part["image_size"])
    return None


def clock_offset(address: Address) -> dict[str, int]:
    """The server's clock minus ours by 16 probes: {"t_ns", "offset_ns", "bound_ns", "rtt_ns"}."""
    channel = Channel(connect(address, ANSWER_S))
    try:
        offset = channel.clock_offset()
    finally:
        channel.close()
    return {
        "t_ns": now_ns(),
        "offset_ns": offset.offset_ns,
        "bound_ns": offset.bound_ns,
        "rtt_ns": offset.rtt_ns,
    }
