"""What it costs to hand one encoder output, 64 x 40 x 512 fp32 (5 MiB), to another process.

    json     nested lists as text, as the published system sent it     27 MB
    pickle   the array's bytes through a pipe
    shm      written into a ring slot, read where it lies

Each time runs from the sender's tensor to the receiver's word that it has read every value.
"""

from __future__ import annotations

import json
import os
import pickle
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from corun.clock import NS_PER_MS, now_ns
from corun.ectrans.ring import Ring
from corun.process import die_with_parent

SHAPE = (64, 40, 512)
JSON, PICKLE, SHM = "json", "pickle", "shm"


def handoff_ms(repeats: int = 5, shape: tuple[int, int, int] = SHAPE) -> dict[str, list[float]]:
    """ms of each way, `repeats` times in turns, after one unrecorded round."""
    import torch

    hidden = torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32))
    ring = Ring(1, shape[0] * shape[1], shape[2])
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_reader, args=(ring.name, shape, theirs, os.getpid()), daemon=True)
    child.start()
    theirs.close()
    taken: dict[str, list[float]] = {JSON: [], PICKLE: [], SHM: []}
    try:
        ours.recv_bytes()
        for repeat in range(repeats + 1):
            for way in taken if repeat % 2 else reversed(list(taken)):
                began = now_ns()
                _send(way, hidden, ring, ours)
                ours.recv_bytes()
                if repeat:
                    taken[way].append((now_ns() - began) / NS_PER_MS)
    finally:
        ours.close()
        child.join(10)
        ring.close()
    return taken


def _send(way: str, hidden: Any, ring: Ring, pipe: Connection) -> None:
    pipe.send_bytes(way.encode())
    if way == JSON:
        pipe.send_bytes(json.dumps(hidden.tolist()).encode())
    elif way == PICKLE:
        pipe.send_bytes(pickle.dumps(hidden.numpy(), protocol=5))
    else:
        ring.write(0, hidden)
        pipe.send_bytes(b"0")


def _reader(name: str, shape: tuple[int, int, int], pipe: Connection, parent_pid: int) -> None:
    die_with_parent(parent_pid)
    import torch

    ring = Ring(1, shape[0] * shape[1], shape[2], name)
    pipe.send_bytes(b"ready")
    try:
        while True:
            way, body = pipe.recv_bytes().decode(), pipe.recv_bytes()
            if way == JSON:
                hidden = torch.tensor(json.loads(body))
            elif way == PICKLE:
                hidden = torch.from_numpy(pickle.loads(body))
            else:
                hidden = ring.view(int(body), shape[0], shape[1])
            pipe.send_bytes(str(float(hidden.sum())).encode())
            del hidden
    except EOFError:
        ring.close()
