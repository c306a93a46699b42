"""The ring between an encoder process and its decoder process: slots made once, a free list as back-pressure.

    encoder ── writes slot 2 ── (number, slot 2, n, L, lengths) ──▶ decoder
       ▲                                                              │ reads the slot where it lies
       └───────────────────────── slot 2 is free ◀────────────────────┘

No hidden state is ever copied into a message. An encoder that finds no free slot waits, so at most K packages are
between the two, however slow the decoder is. A slot holds `max_padded_tokens` rows of the model's width: a package of
any shape within the scheduler's limits fits.

On the CPU the slots are shared memory. On a GPU the encoder allocates one pool, exported once by CUDA IPC, with one
interprocess event a slot: the decoder's stream waits for it, no process does. The process that made the pool must
outlive the one that maps it (PyTorch's rule for CUDA IPC).
"""

from __future__ import annotations

from collections import deque
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING, Any

from corun.errors import RunFault

if TYPE_CHECKING:
    import torch

VALUE_BYTES = 4


class FreeList:
    """Free slots on the writer's side; slots come back over a pipe."""

    def __init__(self, slots: int, returned: Connection) -> None:
        self._free = deque(range(slots))
        self._returned = returned

    def take(self) -> int:
        """A free slot; waits until the reader returns one. EOFError when the reader is gone."""
        while self._returned.poll(0) or not self._free:
            self._free.append(self._returned.recv_bytes()[0])
        return self._free.popleft()


def give_back(slot: int, returned: Connection) -> None:
    """The reader is done with a slot; a writer that is gone needs none."""
    try:
        returned.send_bytes(bytes([slot]))
    except OSError as error:
        raise RunFault("the encoder process is gone") from error


class Ring:
    """K slots of float32 rows in shared memory; made by one process, opened by name in others."""

    def __init__(self, slots: int, rows: int, width: int, name: str | None = None) -> None:
        if not 1 <= slots <= 255:
            raise ValueError(f"a ring of {slots} slots: give 1 to 255")
        self.slots, self.rows, self.width = slots, rows, width
        self._owner = name is None
        size = slots * rows * width * VALUE_BYTES
        self._memory = SharedMemory(name=name, create=name is None, size=size if name is None else 0)

    @property
    def name(self) -> str:
        """What another process opens it by."""
        return self._memory.name

    def view(self, slot: int, count: int, length: int) -> torch.Tensor:
        """(count, length, width) in a slot, without a copy."""
        import torch

        if not 0 <= slot < self.slots or count * length > self.rows:
            raise RunFault(f"{count} x {length} rows do not fit slot {slot}: {self.slots} slots of {self.rows} rows")
        offset = slot * self.rows * self.width * VALUE_BYTES
        values = torch.frombuffer(
            self._memory.buf, dtype=torch.float32, count=count * length * self.width, offset=offset
        )
        return values.view(count, length, self.width)

    def write(self, slot: int, hidden: torch.Tensor) -> None:
        """Copy hidden states (n, L, width) into a slot."""
        self.view(slot, hidden.shape[0], hidden.shape[1]).copy_(hidden)

    def close(self) -> None:
        """Forget it; the maker also removes it. Views that still live keep the mapping, not the name."""
        import contextlib

        with contextlib.suppress(BufferError):
            self._memory.close()
        if self._owner:
            with contextlib.suppress(FileNotFoundError):
                self._memory.unlink()


class CudaRing:
    """The same on a GPU: `export` in the encoder's process, `open` in the decoder's with what it returned."""

    def __init__(self, pool: torch.Tensor, events: list[Any]) -> None:
        self._pool, self._events = pool, events

    @classmethod
    def make(cls, slots: int, rows: int, width: int, device: str, dtype: Any) -> CudaRing:
        """A pool (slots, rows, width) and one interprocess event a slot."""
        import torch

        pool = torch.empty((slots, rows, width), device=device, dtype=dtype)
        with torch.cuda.device(pool.device):
            events = [torch.cuda.Event(interprocess=True) for _ in range(slots)]
            for event in events:
                event.record()
        return cls(pool, events)

    def send(self, connection: Connection) -> None:
        """Export pool and events to the process at the other end."""
        import torch.multiprocessing  # noqa: F401 - registers how CUDA tensors travel

        connection.send(self._pool)
        connection.send([event.ipc_handle() for event in self._events])

    @classmethod
    def receive(cls, connection: Connection) -> CudaRing:
        """Map what `send` exported."""
        import torch
        import torch.multiprocessing

        pool = connection.recv()
        handles = connection.recv()
        return cls(pool, [torch.cuda.Event.from_ipc_handle(pool.device, handle) for handle in handles])

    def write(self, slot: int, hidden: torch.Tensor) -> None:
        """Copy into a slot on the current stream, and mark it there."""
        count, length, width = hidden.shape
        self._pool[slot].view(-1)[: count * length * width].view(count, length, width).copy_(hidden)
        self._events[slot].record()

    def view(self, slot: int, count: int, length: int) -> torch.Tensor:
        """(count, length, width) in a slot, once the current stream has reached its event."""
        self._events[slot].wait()
        width = self._pool.shape[2]
        return self._pool[slot].view(-1)[: count * length * width].view(count, length, width)

    def close(self) -> None:
        """Nothing to remove: the pool goes with its process."""
