"""Where packages are translated: four ways to lay one model over processes, behind one interface.

    multitask      N processes, each with weights of its own                 the published baseline
    multiprocess   N processes that map the same weight files                the weights once in memory
    pipeline       N pairs: encoder process ── ring ──▶ decoder process      a package encoded ahead of its decoding
    streams        one process: an encoder thread, a decoder thread          on a GPU one context and two streams

An executor has lanes; each takes packages while it has room and gives back answers as they are made. A lane whose
process died reports its packages as lost and is started anew, up to MAX_RESTARTS times.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from corun.clock import NS_PER_MS, now_ns
from corun.ectrans.engines import (
    CONTINUOUS,
    Answers,
    Encoded,
    Encoding,
    Model,
    Work,
    make_decoding,
    warm_up,
    width_of,
)
from corun.ectrans.ring import Ring
from corun.ectrans.workers import Message, Ready, Slots, decoder_main, encode, encoder_main, pool_main
from corun.errors import InputError, RunFault, suggest

MULTITASK, MULTIPROCESS, PIPELINE, STREAMS = "multitask", "multiprocess", "pipeline", "streams"
EXECUTORS = (MULTITASK, MULTIPROCESS, PIPELINE, STREAMS)
SPAWN, FORKSERVER = "spawn", "forkserver"
PRELOAD = "corun.ectrans.preload"
MAX_RESTARTS = 3
JOIN_S = 5.0
START_S = 120.0
_decode: Callable[[bytes], Message] = msgspec.msgpack.Decoder(Message).decode  # type: ignore[arg-type]


@dataclass(frozen=True)
class Lost:
    """A lane died with these packages; `again`: it is being started anew."""

    numbers: tuple[int, ...]
    detail: str
    again: bool


Event = Answers | Lost


@dataclass(frozen=True)
class Shape:
    """How an executor is laid out. depth: packages a lane may hold. max_items, max_padded_tokens: of a package.

    start: "spawn" begins every child from nothing, as the baselines did; "forkserver" forks them from one process
    that has imported torch, so that they start sooner and share the pages of the libraries.
    """

    executor: str = STREAMS
    workers: int = 1
    depth: int = 2
    max_items: int = 64
    max_padded_tokens: int = 4096
    start: str = SPAWN

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            near = suggest(self.executor, EXECUTORS)
            raise InputError(f'executor "{self.executor}" is not one of {", ".join(EXECUTORS)}{near}')
        if self.start not in (SPAWN, FORKSERVER):
            raise InputError(f'start "{self.start}" is neither {SPAWN} nor {FORKSERVER}')
        if min(self.workers, self.depth) < 1:
            raise InputError("workers and depth must be 1 or more")


class Lane:
    """Accounting of one lane: which packages are out, how many of their rows are missing."""

    def __init__(self, model: Model, shape: Shape) -> None:
        self._model, self._shape = model, shape
        self.out: dict[int, int] = {}
        self.ready: list[Ready] = []
        self.alive = True

    @property
    def started(self) -> bool:
        """It has loaded and warmed up."""
        raise NotImplementedError

    @property
    def idle(self) -> bool:
        """Nothing is out."""
        return not self.out

    @property
    def room(self) -> int:
        """Items it can take now."""
        if not (self.alive and self.started):
            return 0
        if self._model.decoder != CONTINUOUS:
            deep = self._shape.depth if self._shape.executor in (PIPELINE, STREAMS) else 1
            return self._shape.max_items if len(self.out) < deep else 0
        slots = self._model.slots
        free = slots + slots // 2 - sum(self.out.values())
        return min(free, self._shape.max_items) if free >= max(1, slots // 4) else 0

    def settle(self, answers: Answers) -> None:
        """Some rows are back."""
        left = self.out.get(answers.number, 0) - len(answers.rows)
        if answers.last or left <= 0:
            self.out.pop(answers.number, None)
        else:
            self.out[answers.number] = left


class ProcessLane(Lane):
    """A lane of child processes; `_spawn` starts them and gives the pipes to read from."""

    def __init__(self, model: Model, shape: Shape, width: int) -> None:
        super().__init__(model, shape)
        self._context: Any = get_context(shape.start)
        self._parent_pid = os.getpid() if shape.start == SPAWN else None
        if shape.start == FORKSERVER:
            self._context.set_forkserver_preload([PRELOAD])
        self._width = width
        self.children: list[Any] = []
        self.pipes: list[Connection] = []
        self.restarts = 0
        self._spawn()

    def _spawn(self) -> None:
        raise NotImplementedError

    def _process(self, target: Callable[..., None], *arguments: Any) -> None:
        child = self._context.Process(target=target, args=(*arguments, self._parent_pid), daemon=True)
        child.start()
        self.children.append(child)

    @property
    def started(self) -> bool:
        return len(self.ready) == len(self.children)

    def submit(self, work: Work) -> None:
        """Hand in a package; a lane that is dying loses it, which `poll` reports."""
        self.out[work.number] = len(work.lengths)
        with suppress(OSError):
            self.pipes[0].send_bytes(encode(work))

    def poll(self, pipe: Connection) -> list[Event]:
        """What came through one pipe."""
        events: list[Event] = []
        try:
            while self.alive and pipe in self.pipes and pipe.poll(0):
                message = _decode(pipe.recv_bytes())
                if isinstance(message, Ready):
                    self.ready.append(message)
                else:
                    self.settle(message)
                    events.append(message)
        except (EOFError, OSError):
            events.append(self._died())
        return events

    def _died(self) -> Lost:
        numbers = tuple(self.out)
        codes = ", ".join(str(child.exitcode) for child in self.children if child.exitcode is not None) or "unknown"
        self.stop(0.2)
        self.out, self.ready = {}, []
        again = self.restarts < MAX_RESTARTS
        if again:
            self.restarts += 1
            self._spawn()
        else:
            self.alive = False
        return Lost(numbers, f"a worker process died (exit code {codes})", again)

    def stop(self, timeout_s: float = JOIN_S) -> None:
        """Close the pipes and wait for the children; kill what does not end."""
        for pipe in self.pipes:
            pipe.close()
        for child in self.children:
            child.join(timeout_s)
            if child.is_alive():
                child.kill()
                child.join(JOIN_S)
        self.pipes, self.children = [], []

    def pids(self) -> list[int]:
        return [child.pid for child in self.children if child.pid is not None]


class PoolLane(ProcessLane):
    """One process with both halves."""

    def _spawn(self) -> None:
        ours, theirs = self._context.Pipe()
        self._process(pool_main, self._model, self._width, theirs)
        theirs.close()
        self.pipes = [ours]


class PipelineLane(ProcessLane):
    """An encoder process and a decoder process with a ring between; pipes: the encoder's, the decoder's."""

    def __init__(self, model: Model, shape: Shape, width: int) -> None:
        self._ring: Ring | None = None
        super().__init__(model, shape, width)

    def _spawn(self) -> None:
        pipe, shape = self._context.Pipe, self._shape
        slots = Slots(shape.depth + 1, shape.max_padded_tokens, self._width)
        if not self._model.device.startswith("cuda"):
            self._drop_ring()
            self._ring = Ring(slots.count, slots.rows, slots.width)
            slots = replace(slots, name=self._ring.name)
        (to_encoder, encoder_end), (to_decoder, decoder_end) = pipe(), pipe()
        work_in, work_out = pipe(duplex=False)
        free_in, free_out = pipe(duplex=False)
        self._process(encoder_main, self._model, slots, encoder_end, work_out, free_in)
        self._process(decoder_main, self._model, slots, decoder_end, work_in, free_out)
        for end in (encoder_end, decoder_end, work_in, work_out, free_in, free_out):
            end.close()
        self.pipes = [to_encoder, to_decoder]

    def stop(self, timeout_s: float = JOIN_S) -> None:
        super().stop(timeout_s)
        self._drop_ring()

    def _drop_ring(self) -> None:
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.close()


class Processes:
    """multitask, multiprocess and pipeline."""

    def __init__(self, model: Model, shape: Shape) -> None:
        kind = PipelineLane if shape.executor == PIPELINE else PoolLane
        model = replace(model, own=shape.executor == MULTITASK)
        width = width_of(model.parts)
        self.lanes: Sequence[ProcessLane] = [kind(model, shape, width) for _ in range(shape.workers)]

    def fds(self) -> dict[int, tuple[ProcessLane, Connection]]:
        """Descriptors that become readable when there is something to poll; they change when a lane restarts."""
        return {pipe.fileno(): (lane, pipe) for lane in self.lanes for pipe in lane.pipes}

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Return when every lane has loaded; RunFault when one cannot."""
        from multiprocessing.connection import wait

        until = now_ns() + round(timeout_s * 1e9)
        while not all(lane.started for lane in self.lanes):
            left_s = (until - now_ns()) / 1e9
            if left_s <= 0:
                raise RunFault(f"the workers were not ready within {timeout_s:g} s")
            wait([pipe for lane in self.lanes for pipe in lane.pipes], left_s)
            for lane, pipe in self.fds().values():
                lost = [event for event in lane.poll(pipe) if isinstance(event, Lost)]
                if lost:
                    raise RunFault(f"{lost[0].detail} while loading; its own message is above")

    def poll(self) -> list[Event]:
        """Every answer and every loss since the last call."""
        return [event for lane, pipe in self.fds().values() for event in lane.poll(pipe)]

    def submit(self, lane: int, work: Work) -> None:
        self.lanes[lane].submit(work)

    def ready(self) -> list[Ready]:
        return [ready for lane in self.lanes for ready in lane.ready]

    def pids(self) -> list[int]:
        """Child processes."""
        return [pid for lane in self.lanes for pid in lane.pids()]

    def close(self) -> None:
        """End every child."""
        for lane in self.lanes:
            for pipe in lane.pipes:
                pipe.close()
        for lane in self.lanes:
            lane.stop()


class ThreadLane(Lane):
    """The lane of `streams`."""

    started = True

    def pids(self) -> list[int]:
        return []


class Streams:
    """One process: packages pass from an encoder thread through a bounded queue to a decoder thread.

    On a GPU the encoder works on a stream of low priority, the decoder on one of high priority; an event orders them.
    """

    def __init__(self, model: Model, shape: Shape) -> None:
        from corun.process import set_threads

        set_threads(model.threads)
        import torch

        torch.set_num_threads(model.threads)
        self._model = model
        self._torch = torch
        self._cuda = model.device.startswith("cuda")
        began = now_ns()
        self._encoding, self._decoding = Encoding(model), make_decoding(model)
        loaded = now_ns()
        self._low = torch.cuda.Stream(model.device, priority=0) if self._cuda else None
        self._high = torch.cuda.Stream(model.device, priority=-1) if self._cuda else None
        self._begun = (began, loaded)
        self.lanes = [ThreadLane(model, replace(shape, workers=1))]
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._encoded: queue.Queue[tuple[Encoded, Any] | None] = queue.Queue(maxsize=shape.depth)
        self._events: deque[Event] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._encode, "encoder"), (self._decode_all, "decoder"))
        ]

    def fds(self) -> dict[int, None]:
        return {self._wake_fd: None}

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Warm up, then start the threads."""
        with self._on(self._high):
            warm_up(self._encoding, self._decoding, width_of(self._model.parts), self._model.partition)
        began, loaded = self._begun
        self.lanes[0].ready = [Ready(os.getpid(), (loaded - began) / NS_PER_MS, (now_ns() - loaded) / NS_PER_MS)]
        for thread in self._threads:
            thread.start()

    def _on(self, stream: Any) -> Any:
        return self._torch.cuda.stream(stream)

    def _encode(self) -> None:
        with self._on(self._low):
            while (work := self._work.get()) is not None:
                try:
                    encoded = self._encoding.encode(work)
                except Exception as error:  # noqa: BLE001 - top of the thread: the package is answered with the reason
                    self._tell(Lost((work.number,), _reason(error), again=True))
                    continue
                event = self._low.record_event() if self._low else None
                self._encoded.put((encoded, event))
        self._encoded.put(None)

    def _decode_all(self) -> None:
        with self._on(self._high):
            while True:
                try:
                    if not self._decode_until_closed():
                        return
                except Exception as error:  # noqa: BLE001 - top of the thread: what runs is answered with the reason
                    self._decoding = make_decoding(self._model)
                    self._tell(Lost((), _reason(error), again=True))

    def _decode_until_closed(self) -> bool:
        """Work until the encoder thread ends; False then."""
        while True:
            while not self._decoding.busy or not self._encoded.empty():
                item = self._encoded.get()
                if item is None:
                    return False
                encoded, event = item
                if event is not None:
                    event.wait(self._high)
                    encoded.hidden.record_stream(self._high)
                    encoded.mask.record_stream(self._high)
                self._decoding.admit(encoded)
            for answers in self._decoding.step():
                self._tell(answers)

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        os.eventfd_write(self._wake_fd, 1)

    def poll(self) -> list[Event]:
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        events: list[Event] = []
        while self._events:
            event = self._events.popleft()
            lane = self.lanes[0]
            if isinstance(event, Answers):
                lane.settle(event)
            else:
                event = replace(event, numbers=event.numbers or tuple(lane.out))
                for number in event.numbers:
                    lane.out.pop(number, None)
            events.append(event)
        return events

    def submit(self, lane: int, work: Work) -> None:
        self.lanes[lane].out[work.number] = len(work.lengths)
        self._work.put(work)

    def ready(self) -> list[Ready]:
        return self.lanes[0].ready

    def pids(self) -> list[int]:
        """No child processes."""
        return []

    def close(self) -> None:
        """End the threads after the package they are in."""
        self._work.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(JOIN_S)
        os.close(self._wake_fd)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


Executor = Processes | Streams


def make_executor(model: Model, shape: Shape) -> Executor:
    """Start an executor; call wait_ready before the first package."""
    return Streams(model, shape) if shape.executor == STREAMS else Processes(model, shape)
