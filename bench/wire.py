"""What the harness itself costs: round trips and rates of its protocol against bare sockets, side by side.

    raw         blocking ping-pong, send and recv_into: the floor of Python on this socket
    ours        the same with protocol v1 on both ends: header, ten stamps, and the client's record of 160 B
    handoff     the same against src/server.py with the null model: io thread, queue, model thread
    reference   the message pattern of the original research code (load-generation 3.8), its options included

Every figure is a median over interleaved rounds, so a slow second of the machine hits all of them alike. All
exchanges are back to back (hot); a paced client adds the wake-up of an idle core to each. Replies are 1,024 B.

Round trips run with both ends pinned to one core: left alone, the scheduler puts them together or apart as it
likes, and the wake-up across cores (13 or 50 µs for the same bare exchange) drowns what is compared. Rates have
WINDOW requests in flight on one connection and all cores.

    python -m bench.wire [--quick] [--unix]
"""

from __future__ import annotations

import os
import pickle
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from bench.common import last_line, store
from corun.clock import NS_PER_S, now_ns
from corun.load.ring import Metadata, RingWriter
from corun.wire import (
    REQUEST_SIZE,
    STAMPS,
    Address,
    Kind,
    ReplyReader,
    RequestReader,
    Status,
    connect,
    listen,
    pack_reply,
    pack_request_into,
    tune,
)

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"1k": 1024, "150k": 153_600}
REPLY = bytes(1024)
WINDOW = 8
WARM = 50
JOIN_BELOW = 16 << 10
RING_SLOTS = 1 << 16
HELLO_LINE, ACK, CONTINUE = 64, b"ack.", b"continue"


@dataclass(frozen=True)
class Plan:
    """rounds of `seconds` each per measurement; unix: Unix sockets instead of TCP."""

    rounds: int
    seconds: float
    unix: bool


# The far end, one process per kind


def serve(kind: str, address: Address, size: int) -> None:
    """Answer one connection until it closes."""
    listener = listen(address)
    name = listener.getsockname()
    print(name if isinstance(name, str) else f"{name[0]}:{name[1]}", flush=True)
    sock, _ = listener.accept()
    if kind != "reference":
        tune(sock)
    {"raw": _serve_raw, "ours": _serve_ours, "reference": _serve_reference}[kind](sock, size)


def _serve_raw(sock: socket.socket, size: int) -> None:
    buffer = memoryview(bytearray(size))
    while _fill(sock, buffer):
        sock.sendall(REPLY)


def _fill(sock: socket.socket, buffer: memoryview) -> bool:
    filled = 0
    while filled < len(buffer):
        count = sock.recv_into(buffer[filled:])
        if not count:
            return False
        filled += count
    return True


def _serve_ours(sock: socket.socket, size: int) -> None:
    """Framing and ten real stamps in the receiving thread: what the server does without its hand-over."""
    reader = RequestReader()
    with ExitStack() as stack:
        stack.callback(sock.close)
        while True:
            try:
                frames = reader.receive(sock)
            except OSError:
                return
            for header, _, t_first, t_done in frames:
                stamps = [t_first, t_done, *[now_ns() for _ in STAMPS[2:]]]
                head = pack_reply(Kind.REPLY, header.stream, header.id, Status.OK, stamps, len(REPLY))
                sock.send(head + REPLY)


def _serve_reference(sock: socket.socket, size: int) -> None:
    """Receives ask for half the total each time and concatenate; the result is pickled."""
    result = pickle.dumps(REPLY)
    hello, acknowledgement, go_on = (memoryview(bytearray(n)) for n in (HELLO_LINE, len(ACK), len(CONTINUE)))
    while _fill(sock, hello):
        sock.sendall(ACK)
        data = b""
        while len(data) < size:
            part = sock.recv(size // 2)
            if not part:
                return
            data += part
        sock.sendall(str(len(result)).encode().ljust(HELLO_LINE))
        if not _fill(sock, acknowledgement):
            return
        sock.sendall(result)
        if not _fill(sock, go_on):
            return


# The near end


Exchange = Callable[[], None]


def raw_exchange(sock: socket.socket, size: int) -> Exchange:
    """One bare round trip."""
    payload, reply = bytes(size), memoryview(bytearray(len(REPLY)))

    def exchange() -> None:
        sock.sendall(payload)
        _fill(sock, reply)

    return exchange


def send_frame(sock: socket.socket, header: bytearray, payload: memoryview) -> None:
    """One frame to a blocking socket; joining small parts is cheaper than gathering them."""
    size = REQUEST_SIZE + len(payload)
    sent = sock.send(header + payload) if size < JOIN_BELOW else sock.sendmsg((header, payload))
    if sent < size:
        sock.sendall(bytes(header + payload)[sent:])


def our_exchange(sock: socket.socket, size: int, ring: RingWriter) -> Exchange:
    """One round trip as the client makes it: header, payload, reply, record."""
    payload, header, reader = memoryview(bytes(size)), bytearray(REQUEST_SIZE), ReplyReader()
    count = 0

    def exchange() -> None:
        nonlocal count
        slot, count = count % RING_SLOTS, count + 1
        start = now_ns()
        pack_request_into(header, Kind.INFER, 0, count, size, start, start)
        send_frame(sock, header, payload)
        ring.tx(slot, start, start, now_ns())
        while not (frames := reader.receive(sock)):
            pass
        reply: Any
        reply, body, _, t_done = frames[0]
        ring.rx(slot, reply.status, reply.batch, t_done, len(body), reply.stamps)

    return exchange


def reference_exchange(sock: socket.socket, size: int) -> Exchange:
    """One request as the original sends it."""
    first, second = bytes(size // 2), bytes(size - size // 2)
    hello = f"{size} image.jpg".encode().ljust(HELLO_LINE)
    ack, line = memoryview(bytearray(len(ACK))), memoryview(bytearray(HELLO_LINE))

    def exchange() -> None:
        sock.sendall(hello)
        _fill(sock, ack)
        sock.sendall(first)
        sock.sendall(second)
        _fill(sock, line)
        sock.sendall(ACK)
        total, data = int(bytes(line)), b""
        while len(data) < total:
            data += sock.recv(total // 2)
        pickle.loads(data)
        sock.sendall(CONTINUE)

    return exchange


def round_trips_us(exchange: Exchange, seconds: float, warm: int = WARM) -> list[float]:
    """Durations of as many exchanges as fit into `seconds`."""
    for _ in range(warm):
        exchange()
    taken: list[float] = []
    end = now_ns() + round(seconds * NS_PER_S)
    while (start := now_ns()) < end:
        exchange()
        taken.append((now_ns() - start) / 1000)
    return taken


class Pipeline:
    """WINDOW requests in flight on one connection; each reply is recorded and lets the next request go."""

    def __init__(self, sock: socket.socket, size: int, ring: RingWriter) -> None:
        self._sock, self._ring = sock, ring
        self._payload, self._header = memoryview(bytes(size)), bytearray(REQUEST_SIZE)
        self._size = size
        self._reader = ReplyReader()
        self._next = 0

    def _send(self) -> None:
        id, self._next = self._next, self._next + 1
        start = now_ns()
        pack_request_into(self._header, Kind.INFER, 0, id, self._size, start, start)
        send_frame(self._sock, self._header, self._payload)
        self._ring.tx(id % RING_SLOTS, start, start, now_ns())

    def _receive(self) -> int:
        frames: list[Any] = self._reader.receive(self._sock)
        for header, body, _, t_done in frames:
            self._ring.rx(header.id % RING_SLOTS, header.status, header.batch, t_done, len(body), header.stamps)
        return len(frames)

    def rate(self, seconds: float) -> float:
        """Replies per second."""
        for _ in range(WINDOW):
            self._send()
        answered, start = 0, now_ns()
        end = start + round(seconds * NS_PER_S)
        while now_ns() < end:
            got = self._receive()
            answered += got
            for _ in range(got):
                self._send()
        elapsed = now_ns() - start
        left = WINDOW
        while left:
            left -= self._receive()
        return answered * NS_PER_S / elapsed


# Putting it together


class FarEnd(NamedTuple):
    """A listening child."""

    address: Address
    pid: int


@contextmanager
def pinned(*pids: int) -> Iterator[None]:
    """Keep every thread of these processes on one core meanwhile."""
    allowed = os.sched_getaffinity(0)
    core = {max(allowed)}
    try:
        _place(pids, core)
        yield
    finally:
        _place(pids, allowed)


def _place(pids: Sequence[int], cores: set[int]) -> None:
    for pid in pids:
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), cores)


@contextmanager
def far_end(kind: str, size: int, unix: bool, directory: Path) -> Iterator[FarEnd]:
    """A child process of that kind, listening."""
    where = f"unix:{directory}/{kind}-{size}.sock" if unix else "127.0.0.1:0"
    if kind == "handoff":
        script = [str(ROOT / "src" / "server.py"), "--model", "null", "--extra", '{"reply_bytes": 1024}']
        argv = [*script, *(("--address", where) if unix else ("--port", "0"))]
    else:
        argv = ["-m", "bench.wire", "--serve", kind, "--size", str(size), "--address", where]
    child = subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=_environment())
    assert child.stdout is not None
    try:
        line = child.stdout.readline().strip()
        shown = line.split(" ready on ")[-1].split(",")[0] if kind == "handoff" else _address(line, unix)
        yield FarEnd(Address.parse(shown), child.pid)
    finally:
        child.terminate()
        child.wait()


def _address(line: str, unix: bool) -> str:
    return f"unix:{line}" if unix else line


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def open_plain(address: Address) -> socket.socket:
    """A connection without any option, as the original has it."""
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    sock.connect(address.target)
    return sock


class Bench:
    """All far ends at once, so that rounds can be interleaved; `samples` collects one number per round."""

    def __init__(self, plan: Plan, stack: ExitStack) -> None:
        self.plan = plan
        self._stack = stack
        self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corun-bench-")))
        self._ring = RingWriter(self._directory / "record.ring", RING_SLOTS, Metadata())
        self.steps: list[tuple[str, Callable[[], float]]] = []
        self.samples: dict[str, list[float]] = {}

    def _far_end(self, kind: str, size: int) -> FarEnd:
        return self._stack.enter_context(far_end(kind, size, self.plan.unix, self._directory))

    def build(self) -> None:
        """One connection and one step per measurement."""
        for label, size in SIZES.items():
            ends = {kind: self._far_end(kind, size) for kind in ("raw", "ours", "handoff")}
            socks = {kind: connect(end.address) for kind, end in ends.items()}
            self._add_round_trip(f"raw_{label}", raw_exchange(socks["raw"], size), ends["raw"])
            for kind, suffix in (("ours", ""), ("handoff", "handoff_")):
                exchange = our_exchange(socks[kind], size, self._ring)
                self._add_round_trip(f"ours_{suffix}{label}", exchange, ends[kind])
                self._add_rate(f"rate_{suffix}{label}", Pipeline(socks[kind], size, self._ring))
        reference = self._far_end("reference", SIZES["150k"])
        self._add_reference(reference_exchange(open_plain(reference.address), SIZES["150k"]))

    def _add_round_trip(self, label: str, exchange: Exchange, end: FarEnd) -> None:
        def step() -> float:
            with pinned(os.getpid(), end.pid):
                return statistics.median(round_trips_us(exchange, self.plan.seconds))

        self.steps.append((label, step))

    def _add_rate(self, label: str, pipeline: Pipeline) -> None:
        self.steps.append((label, lambda: pipeline.rate(self.plan.seconds)))

    def _add_reference(self, exchange: Exchange) -> None:
        def step() -> float:
            taken = round_trips_us(exchange, self.plan.seconds, warm=1)
            self.samples.setdefault("reference_rate", []).append(1e6 * len(taken) / sum(taken))
            return statistics.median(taken)

        self.steps.append(("reference_p50_us", step))

    def run(self) -> None:
        """Every step once a round."""
        for _ in range(self.plan.rounds):
            for label, step in self.steps:
                self.samples.setdefault(label, []).append(step())

    def median(self, label: str) -> float:
        return round(statistics.median(self.samples[label]), 2)

    def overhead(self, ours: str, raw: str) -> float:
        """Median over rounds of ours minus raw of the same round."""
        pairs = zip(self.samples[ours], self.samples[raw], strict=True)
        return round(statistics.median(a - b for a, b in pairs), 2)

    def results(self) -> dict[str, Any]:
        """The figures of the last line."""
        trips = ("raw_1k", "ours_1k", "raw_150k", "ours_150k", "ours_handoff_1k", "ours_handoff_150k")
        return {
            "rtt_us": {label: self.median(label) for label in trips},
            "overhead_us": {label: self.overhead(f"ours_{label}", f"raw_{label}") for label in SIZES}
            | {f"handoff_{label}": self.overhead(f"ours_handoff_{label}", f"raw_{label}") for label in SIZES},
            "max_rate": {label: round(self.median(f"rate_{label}")) for label in SIZES}
            | {f"handoff_{label}": round(self.median(f"rate_handoff_{label}")) for label in SIZES},
            "reference_pattern": {"rate": self.median("reference_rate"), "p50_us": self.median("reference_p50_us")},
        }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help="5 rounds of 0.15 s instead of 7 of 0.5 s")] = False,
    unix: Annotated[bool, typer.Option("--unix", help="Unix sockets instead of TCP over loopback")] = False,
    serve_kind: Annotated[str | None, typer.Option("--serve", hidden=True)] = None,
    size: Annotated[int, typer.Option(hidden=True)] = 1024,
    address: Annotated[str, typer.Option(hidden=True)] = "127.0.0.1:0",
) -> None:
    """Measure and store; the last line is one JSON object."""
    if serve_kind:
        serve(serve_kind, Address.parse(address), size)
        return
    plan = Plan(rounds=5, seconds=0.15, unix=unix) if quick else Plan(rounds=7, seconds=0.5, unix=unix)
    with ExitStack() as stack:
        bench = Bench(plan, stack)
        bench.build()
        bench.run()
    for label, values in bench.samples.items():
        print(f"{label:20} median {statistics.median(values):12.1f}   rounds {min(values):.1f} .. {max(values):.1f}")
    results = bench.results()
    store("wire-unix" if unix else "wire", results, {"samples": bench.samples, "window": WINDOW})
    last_line(results)


if __name__ == "__main__":
    app()
