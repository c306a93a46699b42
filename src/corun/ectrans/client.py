"""The load of a translation server: requests sent at their instants, whatever has been answered; one thread.

Each request goes over the connection of its client; requests are dealt out to clients in turn. The time of a request
counts from the instant it was due, so a client that is late does not hide the server's delay.
"""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.ectrans import wire
from corun.ectrans.mixes import Arrival
from corun.ectrans.outputs import spread
from corun.errors import FrameError, PeerClosed, RunFault
from corun.wire import Address, Kind, ReplyReader, Status, connect, pack_request
from corun.wire.channel import Channel
from corun.wire.frames import request_flags
from corun.wire.messages import Drain, Stats, Stop, decode_body

MAX_CLIENTS = 256


@dataclass(frozen=True)
class Reply:
    """One request's outcome: answers are texts or ids in the order of its sentences. Times in ns, own clock."""

    number: int
    size: int
    due_ns: int
    sent_ns: int
    done_ns: int
    status: Status
    answers: tuple[Any, ...] = ()
    detail: str = ""
    head: wire.ReplyHead | None = None

    @property
    def sojourn_ms(self) -> float:
        """From the instant it was due to its reply."""
        return (self.done_ns - self.due_ns) / NS_PER_MS


@dataclass(frozen=True)
class Request:
    """What is to be sent, and when after the start."""

    at_ns: int
    sentences: wire.Sentences
    deadline_ms: int = 0


def requests_of(
    arrivals: Sequence[Arrival], texts: Sequence[str], make: Callable[[Sequence[str]], wire.Sentences]
) -> list[Request]:
    """A request for each arrival, its sentences taken from `texts` in turn; make: texts to what a partition sends."""
    taken, requests = 0, []
    for arrival in arrivals:
        chosen = [texts[(taken + i) % len(texts)] for i in range(arrival.size)]
        taken += arrival.size
        requests.append(Request(arrival.at_ns, make(chosen)))
    return requests


def maker(partition: str, parts: Path | None) -> Callable[[Sequence[str]], wire.Sentences]:
    """What the client does before it sends: nothing, token ids, embeddings, or the whole encoder."""
    if partition == wire.TEXT:
        return lambda texts: wire.Sentences(wire.TEXT, texts=tuple(texts))
    if parts is None:
        raise FrameError(f"partition {partition} needs --parts: the client has work to do")
    from corun.ectrans.tokens import Tokenizer

    encode = Tokenizer.load(parts).encode
    if partition == wire.IDS:
        return lambda texts: wire.Sentences(wire.IDS, ids=tuple(encode(text) for text in texts))
    from corun.ectrans.parts import load_embedding, load_encoder

    half = load_embedding(parts).embed if partition == wire.EMBED else load_encoder(parts).encode

    def values(texts: Sequence[str]) -> wire.Sentences:
        rows = [encode(text) for text in texts]
        hidden, _ = half(rows)
        return wire.Sentences(partition, values=tuple(hidden[i, : len(row)].numpy() for i, row in enumerate(rows)))

    return values


class _Peer:
    """One client's connection."""

    def __init__(self, address: Address) -> None:
        self.sock: socket.socket = connect(address, 10.0, retry=True)
        self.reader = ReplyReader()


def drive(
    address: Address, requests: Sequence[Request], clients: int = 0, dtype: str = "float32", timeout_s: float = 600.0
) -> list[Reply]:
    """Send every request at its instant and wait for all replies; in the order of the requests.

    clients: connections, 0 = one a request (at most MAX_CLIENTS). Requests that got no reply within timeout_s of the
    last instant, or whose connection broke, are LOST.
    """
    count = min(clients or len(requests), len(requests), MAX_CLIENTS)
    packed = [wire.pack_sentences(request.sentences, dtype) for request in requests]
    peers = [_Peer(address) for _ in range(count)]
    selector = selectors.DefaultSelector()
    for peer in peers:
        selector.register(peer.sock, selectors.EVENT_READ, peer)
    run = _Run(requests, packed, peers, now_ns() + 5 * NS_PER_MS)
    until = run.start_ns + max((request.at_ns for request in requests), default=0) + round(timeout_s * NS_PER_S)
    try:
        while run.missing and now_ns() < until:
            wait_s = run.send_due()
            for key, _ in selector.select(wait_s):
                if not run.receive(key.data):
                    selector.unregister(key.fileobj)
    finally:
        selector.close()
        for peer in peers:
            peer.sock.close()
    return run.replies()


class _Run:
    def __init__(
        self, requests: Sequence[Request], packed: Sequence[bytes], peers: Sequence[_Peer], start_ns: int
    ) -> None:
        self.start_ns = start_ns
        self._requests, self._packed, self._peers = requests, packed, peers
        self._order = sorted(range(len(requests)), key=lambda i: requests[i].at_ns)
        self._next = 0
        self._sent = [0] * len(requests)
        self._replies: dict[int, Reply] = {}
        self._broken: set[int] = set()

    @property
    def missing(self) -> bool:
        """Some request that can still be answered has not been."""
        return len(self._replies) < len(self._requests)

    def send_due(self) -> float:
        """Send what is due; seconds until the next is."""
        while self._next < len(self._order):
            number = self._order[self._next]
            request = self._requests[number]
            wait_ns = self.start_ns + request.at_ns - now_ns()
            if wait_ns > 0:
                return wait_ns / NS_PER_S
            self._next += 1
            self._send(number, request)
        return 1.0

    def _send(self, number: int, request: Request) -> None:
        payload, now = self._packed[number], now_ns()
        flags = request_flags(deadline_ms=request.deadline_ms)
        header = pack_request(
            Kind.INFER, 0, number, len(payload), self.start_ns + request.at_ns, now, len(request.sentences), flags
        )
        self._sent[number] = now
        peer = number % len(self._peers)
        try:
            self._peers[peer].sock.sendall(header + payload)
        except OSError as error:
            self._lose([number], str(error))

    def receive(self, peer: _Peer) -> bool:
        """Take what a connection has; False when it broke."""
        try:
            frames = peer.reader.receive(peer.sock)
        except (PeerClosed, FrameError) as error:
            mine = self._peers.index(peer)
            self._lose([i for i in range(len(self._requests)) if i % len(self._peers) == mine], str(error))
            return False
        for frame in frames:
            header: Any = frame.header
            self._answered(header.id, Status(header.status), frame.payload, frame.t_done_ns)
        return True

    def _lose(self, numbers: Sequence[int], detail: str) -> None:
        for number in numbers:
            if number not in self._replies:
                self._put(number, now_ns(), Status.LOST, detail=detail)

    def _answered(self, number: int, status: Status, payload: bytes | bytearray, done_ns: int) -> None:
        if status == Status.OK:
            head, answers = wire.unpack_answers(payload)
            self._put(number, done_ns, status, tuple(answers), head=head)
        else:
            self._put(number, done_ns, status, detail=str(decode_body(payload).get("error", "")))

    def _put(
        self,
        number: int,
        done_ns: int,
        status: Status,
        answers: tuple[Any, ...] = (),
        detail: str = "",
        head: wire.ReplyHead | None = None,
    ) -> None:
        request = self._requests[number]
        due_ns = self.start_ns + request.at_ns
        size = len(request.sentences)
        self._replies[number] = Reply(
            number, size, due_ns, self._sent[number], done_ns, status, answers, detail, head
        )

    def replies(self) -> list[Reply]:
        self._lose(range(len(self._requests)), "no reply came in time")
        return [self._replies[number] for number in range(len(self._requests))]


def summary(replies: Sequence[Reply]) -> dict[str, Any]:
    """Throughput and sojourn times of a load, as one JSON object."""
    good = [reply for reply in replies if reply.status == Status.OK]
    statuses: dict[str, int] = {}
    for reply in replies:
        statuses[reply.status.name] = statuses.get(reply.status.name, 0) + 1
    span_s = total_s(replies)
    sentences = sum(reply.size for reply in good)
    return {
        "requests": statuses,
        "sentences": sentences,
        "total_s": round(span_s, 4),
        "sentences_per_s": round(sentences / span_s, 2) if span_s else None,
        "sojourn_ms": spread([reply.sojourn_ms for reply in good]),
        "errors": sorted({reply.detail for reply in replies if reply.detail})[:5],
    }


def total_s(replies: Sequence[Reply]) -> float:
    """From the first instant to the last reply."""
    if not replies:
        return 0.0
    return (max(reply.done_ns for reply in replies) - min(reply.due_ns for reply in replies)) / NS_PER_S


class Admin:
    """Control of a running server."""

    def __init__(self, address: Address, timeout_s: float = 60.0) -> None:
        self._channel = Channel(connect(address, timeout_s, retry=True))

    def statistics(self) -> dict[str, Any]:
        """Its tally so far, with memory now."""
        return self._channel.request(Stats())

    def drain(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """Wait until it is empty; its tally, which then begins anew."""
        return self._channel.request(Drain(round(timeout_s * 1000)), timeout_s + 5)

    def stop(self) -> None:
        """Ask it to end."""
        try:
            self._channel.request(Stop())
        except PeerClosed:
            return
        finally:
            self.close()

    def close(self) -> None:
        self._channel.sock.close()


def checked(replies: Sequence[Reply]) -> list[Reply]:
    """The replies; RunFault names the first that is not OK."""
    for reply in replies:
        if reply.status != Status.OK:
            raise RunFault(f"request {reply.number} ended {reply.status.name}: {reply.detail}")
    return list(replies)
