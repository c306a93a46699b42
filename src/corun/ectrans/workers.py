"""What runs inside the child processes of an executor; messages are msgpack over pipes, hidden states never are.

    pool       main ── Work ──▶ worker (both halves) ── Answers ──▶ main
    pipeline   main ── Work ──▶ encoder ── Handoff, ring slot ──▶ decoder ── Answers ──▶ main

A child that meets an error it did not expect dies with its traceback; the server sends its packages to another, once.
A child ends when its pipe closes, and dies with the process it was forked from.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from corun.clock import NS_PER_MS, now_ns
from corun.ectrans.engines import Answers, Decoding, Encoded, Encoding, Model, Work, make_decoding, mask_of, warm_up
from corun.ectrans.ring import CudaRing, FreeList, Ring, give_back
from corun.process import die_with_parent, set_threads

encode = msgspec.msgpack.encode


class Ready(msgspec.Struct, array_like=True, tag=True):
    """A child has loaded its part and run it a few times."""

    pid: int
    load_ms: float
    warm_ms: float


class Handoff(msgspec.Struct, array_like=True):
    """A package that lies in a ring slot."""

    number: int
    slot: int
    lengths: list[int]
    enc0_ns: int
    enc1_ns: int


Message = Ready | Answers


@dataclass(frozen=True)
class Slots:
    """The ring of a pipeline: how many slots of how many rows, and its name (CPU)."""

    count: int
    rows: int
    width: int
    name: str = ""


def pool_main(model: Model, width: int, main: Connection, parent_pid: int | None) -> None:
    """Both halves in one process."""
    _begin(model, parent_pid)
    began = now_ns()
    encoding, decoding = Encoding(model), make_decoding(model)
    _ready(main, began, lambda: warm_up(encoding, decoding, width, model.partition))
    decode_work = msgspec.msgpack.Decoder(Work).decode
    try:
        while True:
            while not decoding.busy or main.poll(0):
                decoding.admit(encoding.encode(decode_work(main.recv_bytes())))
            _send(main, decoding)
    except (EOFError, OSError):
        return


def encoder_main(
    model: Model, slots: Slots, main: Connection, decoder: Connection, free: Connection, parent_pid: int
) -> None:
    """The encoder half: a package into a slot, then word of it to the decoder."""
    _begin(model, parent_pid)
    began = now_ns()
    encoding = Encoding(model)
    ring = _writer(model, slots, decoder)
    _ready(main, began, lambda: warm_up(encoding, None, slots.width, model.partition))
    decode_work = msgspec.msgpack.Decoder(Work).decode
    available = FreeList(slots.count, free)
    try:
        while True:
            work = decode_work(main.recv_bytes())
            slot = available.take()
            encoded = encoding.encode(work)
            ring.write(slot, encoded.hidden)
            handoff = Handoff(work.number, slot, work.lengths, encoded.enc0_ns, now_ns())
            decoder.send_bytes(encode(handoff))
    except (EOFError, OSError):
        return
    finally:
        ring.close()


def decoder_main(
    model: Model, slots: Slots, main: Connection, encoder: Connection, free: Connection, parent_pid: int
) -> None:
    """The decoder half: packages where they lie in the ring."""
    _begin(model, parent_pid)
    began = now_ns()
    decoding = make_decoding(model)
    ring = _reader(model, slots, encoder)
    _ready(main, began, lambda: warm_up(None, decoding, slots.width, model.partition))
    decode_handoff = msgspec.msgpack.Decoder(Handoff).decode
    try:
        while True:
            while not decoding.busy or encoder.poll(0):
                decoding.admit(_from_slot(decode_handoff(encoder.recv_bytes()), ring, model, free))
            _send(main, decoding)
    except (EOFError, OSError):
        return
    finally:
        ring.close()


def _from_slot(handoff: Handoff, ring: Ring | CudaRing, model: Model, free: Connection) -> Encoded:
    count, length = len(handoff.lengths), max(handoff.lengths)
    hidden = ring.view(handoff.slot, count, length)
    mask = mask_of(handoff.lengths).to(model.device)

    def release() -> None:
        _settle(model.device)
        give_back(handoff.slot, free)

    return Encoded(handoff.number, hidden, mask, handoff.enc0_ns, handoff.enc1_ns, release, left=count)


def _settle(device: str) -> None:
    """Wait until the GPU has read what was handed to it; the encoder may then write over it."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.current_stream(device).synchronize()


def _writer(model: Model, slots: Slots, decoder: Connection) -> Ring | CudaRing:
    if not model.device.startswith("cuda"):
        return Ring(slots.count, slots.rows, slots.width, slots.name)
    from corun import torch_tools

    ring = CudaRing.make(slots.count, slots.rows, slots.width, model.device, torch_tools.torch_dtype(model.dtype))
    ring.send(decoder)
    return ring


def _reader(model: Model, slots: Slots, encoder: Connection) -> Ring | CudaRing:
    if model.device.startswith("cuda"):
        return CudaRing.receive(encoder)
    return Ring(slots.count, slots.rows, slots.width, slots.name)


def _begin(model: Model, parent_pid: int | None) -> None:
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    set_threads(model.threads)
    import torch

    torch.set_num_threads(model.threads)


def _ready(main: Connection, began: int, warm: Callable[[], Any]) -> None:
    import gc
    import os

    loaded = now_ns()
    warm()
    gc.collect()
    warmed = now_ns()
    main.send_bytes(encode(Ready(os.getpid(), (loaded - began) / NS_PER_MS, (warmed - loaded) / NS_PER_MS)))


def _send(main: Connection, decoding: Decoding) -> None:
    for answers in decoding.step():
        main.send_bytes(encode(answers))
