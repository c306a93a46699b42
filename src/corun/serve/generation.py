"""Engines for models that make their answer token by token: each token is stamped, and can be sent as it is made.

    GeneratingEngine    a batch at a time: padded to its longest prompt, done when its longest answer is
    SubmittingEngine    answers later: requests join and leave a running batch one by one (continuous batching)

Between two tokens a `Watch` is asked whether the request's sender still wants the answer: a CANCEL, a connection that
closed or a deadline that passed ends that answer alone. Tokens that were sent stay sent; the reply then says
CANCELLED or EXPIRED.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, cast

from corun.clock import NS_PER_MS, now_ns
from corun.registry import Servable
from corun.serve.engine import D2H, DEVICE, H2D, PREPROCESSED, ServableEngine, reason_of
from corun.serve.queue import Request
from corun.wire import STAMPS, STREAM, Kind, Status, pack_reply, reply_flags

TX = STAMPS.index("tx")
CANCELLED = "cancelled by its client"
EXPIRED = "its deadline has passed"
ENDINGS = {"cancelled": (Status.CANCELLED, CANCELLED), "deadline": (Status.EXPIRED, EXPIRED)}

Finished = Callable[[Request], None]


class Tokens:
    """Tokens of one request: of its prompt, made so far, and when the first and the last of them reached the host."""

    __slots__ = ("first_ns", "into", "last_ns", "out")

    def __init__(self, into: int) -> None:
        self.into = into
        self.out = 0
        self.first_ns = 0
        self.last_ns = 0

    def ttft_ms(self, arrived_ns: int) -> float | None:
        """Arrival to first token; None without one."""
        return (self.first_ns - arrived_ns) / NS_PER_MS if self.out else None

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token after the first; None with fewer than two."""
        return (self.last_ns - self.first_ns) / NS_PER_MS / (self.out - 1) if self.out > 1 else None


class Watch:
    """One request as those who make its tokens see it; `text` makes a token's part of the text."""

    def __init__(self, request: Request, into: int, text: Callable[[int], str]) -> None:
        self.tokens = request.tokens = Tokens(into)
        self.deadline_ns = request.deadline_ns or None
        self._request = request
        self._text = text if request.header.flags & STREAM else None

    def cancelled(self) -> bool:
        """True once nobody wants further tokens."""
        request = self._request
        connection = request.connection
        return request.given_up or (connection is not None and connection.closed)

    def token(self, token: int, at_ns: int) -> None:
        """One more token reached the host at at_ns; sent at once where the sender asked for it."""
        tokens = self.tokens
        if not tokens.out:
            tokens.first_ns = at_ns
        tokens.out += 1
        tokens.last_ns = at_ns
        if self._text is not None:
            self._send(token, at_ns, self._text(token))

    def _send(self, token: int, at_ns: int, text: str) -> None:
        request, header = self._request, self._request.header
        payload = json.dumps({"ids": [token], "text": text}, ensure_ascii=False).encode()
        stamps = list(request.stamps)
        stamps[D2H], stamps[TX] = at_ns, now_ns()
        flags = reply_flags(self.tokens.out, part=True)
        packed = pack_reply(Kind.REPLY, header.stream, header.id, Status.OK, stamps, len(payload), 0, flags)
        request.connection.send(packed, payload)


class Result(Protocol):
    """One answer; stopped: eos, length, cancelled or deadline."""

    @property
    def stopped(self) -> str: ...


class Generator(Protocol):
    """What a Servable offers besides when it makes tokens; `continuous` says which of the two ways it wants."""

    continuous: bool

    def tokens_in(self, sample: Any) -> int:
        """Tokens of a decoded prompt."""

    def texts(self) -> Callable[[int], str]:
        """A fresh decoder of one answer: each token's part of the text, "" while a character is unfinished."""

    def generate(self, batch: Any, watches: Sequence[Watch]) -> list[Result]:
        """Answer a batch that is on the device, telling each watch its tokens and asking it between two of them."""

    # continuous only

    @property
    def has_room(self) -> bool:
        """Whether one more prompt would be computed at once."""

    def submit(self, sample: Any, watch: Watch, done: Callable[[Any], None]) -> None:
        """Answer later: `done` gets the Result, or the exception, on another thread; ValueError when it never can."""

    def close(self) -> None:
        """End what computes; prompts nobody watches for any more are dropped."""


class GeneratingEngine(ServableEngine):
    """Batches of prompts, one batch after another."""

    def __init__(self, servable: Servable) -> None:
        super().__init__(servable)
        self._generator = cast(Generator, servable)

    def _watch(self, request: Request, sample: Any) -> Watch:
        return Watch(request, self._generator.tokens_in(sample), self._generator.texts())

    def _compute(self, requests: list[Request], samples: list[Any]) -> list[bytes]:
        watches = [self._watch(*pair) for pair in zip(requests, samples, strict=True)]
        host = self._servable.preprocess(samples)
        preprocessed = now_ns()
        batch = self._servable.to_device(host)
        h2d = now_ns()
        results = self._generator.generate(batch, watches)
        made = now_ns()
        for request, result in zip(requests, results, strict=True):
            request.stamps[PREPROCESSED : D2H + 1] = (preprocessed, h2d, made, made)
            self._judge(request, result)
        return self._replies(results, len(requests))

    def _judge(self, request: Request, result: Result) -> None:
        if result.stopped in ENDINGS:
            request.end(*ENDINGS[result.stopped])


class SubmittingEngine(GeneratingEngine):
    """Requests join a running batch; at most as many as the generator has room for are in it."""

    @property
    def has_room(self) -> bool:
        """Whether another request would be computed at once."""
        return self._generator.has_room

    def submit(self, batch: Sequence[Request], finished: Finished) -> list[Request]:
        """Begin to answer; those that will be `finished` later, the others have their answer."""
        for request in batch:
            request.info = self._servable.info
        kept = []
        for request, sample in zip(*self._decode(batch), strict=True):
            request.stamps[PREPROCESSED] = request.stamps[H2D] = now_ns()
            try:
                self._generator.submit(sample, self._watch(request, sample), partial(self._end, request, finished))
            except ValueError as error:
                request.end(Status.BAD_REQUEST, reason_of(error, named=False))
            except Exception as error:  # noqa: BLE001 - a plug-in may raise anything; the request gets the reason
                request.end(Status.FAILED, reason_of(error))
            else:
                kept.append(request)
        return kept

    def _end(self, request: Request, finished: Finished, result: Any) -> None:
        request.stamps[DEVICE] = request.stamps[D2H] = now_ns()
        if isinstance(result, BaseException):
            request.end(Status.FAILED, reason_of(result))
        else:
            self._judge(request, result)
            request.reply, request.batch = self._replies([result], 1)[0], 1
        finished(request)

    def run(self, batch: Sequence[Request]) -> None:
        """Answer a batch and wait for it, where nobody can be answered later."""
        done = threading.Semaphore(0)
        for _ in self.submit(batch, lambda request: done.release()):
            done.acquire()

    def close(self) -> None:
        """End what computes."""
        self._generator.close()


def engine_for(servable: Servable) -> ServableEngine:
    """The engine a servable wants: by stages, by batches of tokens, or with answers that come later."""
    if not hasattr(servable, "generate"):
        return ServableEngine(servable)
    return (SubmittingEngine if cast(Generator, servable).continuous else GeneratingEngine)(servable)
