"""An engine answers prompts on a thread of its own: what is handed in, what comes back, and the static engine.

    submit ──▶ queue policy ──▶ dynamic batcher ──▶ generate ──▶ Ticket.result()
                                      ▲
                      publish ────────┘  a new adapter is written between two batches, never inside one

`static` is the classical baseline: a batch is padded to its longest prompt and runs until its longest answer ends.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

from corun.clock import NS_PER_S, now_ns
from corun.errors import InputError, RunFault
from corun.llm import adapters
from corun.llm.generate import Generated, Prompt, generate
from corun.serve.batcher import NEVER, Batcher
from corun.serve.policies import Edf, Fifo, Hrrn, HrrnStale, QueuePolicy, Ranking, Sjf

FOREVER_NS = sys.maxsize


class Ticket:
    """One prompt on its way: wait for `result`, or `cancel`.

    version: how many adapters had been published when its answer began; None before. on_done: told once it has its
    answer, on the engine's thread.
    """

    def __init__(self, prompt: Prompt, arrived_ns: int, on_done: Callable[[Ticket], None] | None = None) -> None:
        self._on_done = on_done
        self.prompt = prompt
        self.arrived_ns = arrived_ns
        self.version: int | None = None
        self.shown = 0
        self._done = threading.Event()
        self._cancelled = False
        self._result: Generated | None = None
        self._error: BaseException | None = None

    @property
    def cancelled(self) -> bool:
        """True once somebody gave it up, here or by the prompt's own `cancelled`."""
        return self._cancelled or self.prompt.cancelled()

    def cancel(self) -> None:
        """Give it up: no further token is made for it."""
        self._cancelled = True

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def result(self, timeout_s: float | None = None) -> Generated:
        """What was generated; RunFault when the engine failed or nothing came in time."""
        if not self._done.wait(timeout_s):
            raise RunFault(f"no answer within {timeout_s} s")
        if self._error is not None:
            raise RunFault(f"the engine failed: {self._error!r}") from self._error
        assert self._result is not None
        return self._result

    @property
    def outcome(self) -> Generated | BaseException | None:
        """The answer or the failure; None before."""
        return self._error if self._error is not None else self._result

    def resolve(self, result: Generated) -> None:
        """The engine's answer; only the first counts."""
        if not self._done.is_set():
            self._result = result
            self._tell()

    def fail(self, error: BaseException) -> None:
        """The engine's failure instead of an answer."""
        if not self._done.is_set():
            self._error = error
            self._tell()

    def _tell(self) -> None:
        self._done.set()
        if self._on_done is not None:
            self._on_done(self)

    def given_up(self, now: int) -> str:
        """Why no token shall be made at `now` any more: cancelled, deadline or ""."""
        if self.cancelled:
            return "cancelled"
        deadline = self.prompt.deadline_ns
        return "deadline" if deadline is not None and now >= deadline else ""


class Engine(Protocol):
    """What answers prompts with one adapter that can be replaced."""

    def start(self) -> None:
        """Begin to answer."""

    def submit(self, prompt: Prompt) -> Ticket:
        """Hand in a prompt; InputError when it can never be answered."""

    def publish(self, state: Mapping[str, Any], timeout_s: float = 60.0) -> int:
        """Serve with these adapter tensors from now on; returns the version. Blocks until they are in place."""

    def close(self) -> None:
        """Answer what was handed in, then end."""


def ranking(ticket: Ticket) -> Ranking:
    """Expected work of a prompt as its tokens in and out; no deadline ranks last."""
    prompt = ticket.prompt
    deadline = FOREVER_NS if prompt.deadline_ns is None else prompt.deadline_ns
    return Ranking(ticket.arrived_ns, len(prompt.ids) + prompt.max_new_tokens, deadline)


def ticket_policy(name: str) -> QueuePolicy[Ticket]:
    """A queue policy that ranks tickets."""
    from corun.serve.policies import make_policy

    ranked: dict[str, Callable[[], QueuePolicy[Ticket]]] = {
        "fifo": Fifo,
        "sjf": lambda: Sjf(ranking),
        "edf": lambda: Edf(ranking),
        "hrrn": lambda: Hrrn(ranking),
        "hrrn-stale": lambda: HrrnStale(ranking),
    }
    return ranked[name]() if name in ranked else make_policy(name)


def check_fits(prompt: Prompt, max_length: int) -> None:
    """InputError when a prompt is empty, asks for nothing, or is longer with its answer than `max_length` tokens."""
    if not len(prompt.ids) or prompt.max_new_tokens < 1:
        raise InputError("a prompt needs one token or more, and one new token or more")
    total = len(prompt.ids) + prompt.max_new_tokens
    if total > max_length:
        raise InputError(
            f"{len(prompt.ids)} prompt and {prompt.max_new_tokens} new tokens are more than {max_length}"
        )


class StaticEngine:
    """Left-padded batches of up to `batcher.max_batch` prompts, one after another.

    model: a PeftModel with adapter `name`, or a plain network. On CUDA its work runs on a stream of its own.
    """

    def __init__(
        self,
        model: Any,
        batcher: Batcher | None = None,
        policy: str = "fifo",
        name: str = adapters.SERVE,
        threads: int = 1,
    ) -> None:
        self.model = model.eval()
        self.name = name
        self.version = 0
        self._batcher = batcher or Batcher()
        self._policy = ticket_policy(policy)
        self._threads = threads
        self._limit = int(model.config.max_position_embeddings)
        self._changed = threading.Condition()
        self._publication: tuple[Mapping[str, Any], threading.Event] | None = None
        self._publish_error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="static-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, prompt: Prompt) -> Ticket:
        """Queue a prompt; InputError when it is too long for the network, RunFault once closed."""
        check_fits(prompt, self._limit)
        ticket = Ticket(prompt, now_ns())
        with self._changed:
            if self._closed:
                raise RunFault("the engine is closed")
            self._policy.push(ticket)
            self._changed.notify()
        return ticket

    def publish(self, state: Mapping[str, Any], timeout_s: float = 60.0) -> int:
        """Write adapter tensors between two batches and wait for it; InputError when they do not fit."""
        written = threading.Event()
        with self._changed:
            if self._closed:
                raise RunFault("the engine is closed")
            self._publish_error = None
            self._publication = (state, written)
            self._changed.notify()
        if not written.wait(timeout_s):
            with self._changed:
                self._publication = None
            if not written.is_set():
                raise RunFault(f"the adapter was not taken within {timeout_s} s: a batch is still running")
        if self._publish_error is not None:
            raise self._publish_error
        return self.version

    def close(self) -> None:
        """Answer everything queued, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        import torch

        torch.set_num_threads(self._threads)
        with own_stream(next(self.model.parameters()).device):
            while (batch := self._take()) is not None:
                self._answer(batch)

    def _take(self) -> list[Ticket] | None:
        """The next batch; writes a publication first. None once closed and empty."""
        held: list[Ticket] = []
        with self._changed:
            while True:
                self._write_publication()
                oldest = min((ticket.arrived_ns for ticket in held), default=0)
                take, close, until_ns = self._batcher.decide(len(held), len(self._policy), oldest, now_ns())
                held += [self._policy.pop(now_ns()) for _ in range(take)]
                if held and (close or self._closed):
                    return held
                if self._closed and not held:
                    return None
                if not take:
                    self._changed.wait(None if until_ns == NEVER else max(0, until_ns - now_ns()) / NS_PER_S)

    def _write_publication(self) -> None:
        if self._publication is None:
            return
        state, written = self._publication
        self._publication = None
        try:
            adapters.replace(self.model, self.name, state)
            self.version += 1
        except (InputError, RuntimeError) as error:
            self._publish_error = error
        written.set()

    def _answer(self, batch: list[Ticket]) -> None:
        now, live = now_ns(), []
        for ticket in batch:
            if why := ticket.given_up(now):
                ticket.resolve(Generated((), (), why))
            else:
                ticket.version = self.version
                live.append(ticket)
        if not live:
            return
        try:
            prompts = [_watched(ticket) for ticket in live]
            for ticket, done in zip(live, generate(self.model, prompts), strict=True):
                ticket.resolve(done)
        except Exception as error:  # noqa: BLE001 - top of the thread: every ticket of the batch gets the reason
            for ticket in live:
                ticket.fail(error)


def _watched(ticket: Ticket) -> Prompt:
    return replace(ticket.prompt, cancelled=lambda: ticket.cancelled)


def own_stream(device: Any) -> AbstractContextManager[Any]:
    """On CUDA a stream of its own for the calling thread; elsewhere nothing."""
    import torch

    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    context: AbstractContextManager[Any] = torch.cuda.stream(stream)
    return context
