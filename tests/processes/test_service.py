"""server.py as a process under many clients: a real model, overload, large requests, and peers that let it down."""

from __future__ import annotations

import csv
import json
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.processes.tools import SRC, Program, wait_until

from corun.clock import now_ns
from corun.errors import PeerClosed, RunFault
from corun.wire import (
    Address,
    Frame,
    Kind,
    ReplyHeader,
    ReplyReader,
    Status,
    connect,
    pack_request,
)
from corun.wire.channel import Channel
from corun.wire.messages import Hello, Load, Stats, Stop

CLASSIFIER = "mobilenet_v3_small"
IMAGE_BYTES = 150_000
TIMEOUT_S = 180.0

pytestmark = pytest.mark.slow


class Client:
    """A connection with as many requests in flight as a test likes; replies are read when asked for."""

    def __init__(self, address: Address, receive_buffer: int = 0) -> None:
        self.sock = connect(address, TIMEOUT_S, retry=True)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(TIMEOUT_S)
        self._reader = ReplyReader()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def send(self, ids: range, payload: bytes = b"x") -> None:
        """All of them in one go."""
        now = now_ns()
        frames = (pack_request(Kind.INFER, 3, id, len(payload), now, now) + payload for id in ids)
        if len(payload) < 1000:
            self.sock.sendall(b"".join(frames))
            return
        for frame in frames:
            self.sock.sendall(frame)

    def replies(self, count: int) -> list[Frame]:
        """The next `count` replies."""
        frames: list[Frame] = []
        while len(frames) < count:
            frames += self._reader.receive(self.sock)
        assert len(frames) == count
        return frames

    def ask(self, payload: bytes = b"x") -> ReplyHeader:
        self.send(range(1), payload)
        return header(self.replies(1)[0])

    def closed(self) -> bool:
        """Wait for the server to close this connection."""
        try:
            while True:
                self._reader.receive(self.sock)
        except PeerClosed as error:
            return "timed out" not in str(error)


def header(frame: Frame) -> ReplyHeader:
    assert isinstance(frame.header, ReplyHeader)
    return frame.header


def statuses(frames: list[Frame]) -> Counter[int]:
    return Counter(header(frame).status for frame in frames)


class Service:
    """A running server; files under `out`."""

    def __init__(self, program: Program, address: Address, out: Path) -> None:
        self.program = program
        self.address = address
        self.out = out

    def client(self, receive_buffer: int = 0) -> Client:
        return Client(self.address, receive_buffer)

    def channel(self) -> Channel:
        return Channel(connect(self.address, TIMEOUT_S, retry=True))

    def ask(self, message: Any) -> dict[str, Any]:
        """One control message over a connection of its own."""
        channel = self.channel()
        try:
            return channel.request(message, TIMEOUT_S)
        finally:
            channel.close()

    def stats(self) -> dict[str, Any]:
        return self.ask(Stats())

    def stop(self) -> dict[str, Any]:
        """STOP it; it must end by itself and without an error."""
        body = self.ask(Stop("test"))
        assert self.program.wait() == 0, self.program.output()
        assert "Traceback" not in self.program.output()
        return body

    def rows(self) -> list[dict[str, str]]:
        return table(self.out / "infer_server" / "service.csv")

    def events(self) -> list[str]:
        return [f"{row['kind']}: {row['detail']}" for row in table(self.out / "events.csv")]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def until_ready(program: Program) -> None:
    wait_until(lambda: "ready on" in program.output() or program.popen.poll() is not None, TIMEOUT_S)
    assert program.popen.poll() is None, program.output()


@pytest.fixture
def serve(start: Callable[..., Program], free_port: Callable[[], int], tmp_path: Path) -> Callable[..., Service]:
    """Start server.py with a null model (model=None: with none) and wait until it is ready."""

    def run(*flags: object, model: str | None = "null", address: Address | None = None, **extra: object) -> Service:
        address = address or Address("tcp", "127.0.0.1", free_port())
        chosen = ["--model", model, "--extra", json.dumps(extra)] if model else []
        out = tmp_path / "out"
        program = start("server.py", *chosen, "--address", address, "--name", "service", "--out", out, *flags)
        until_ready(program)
        return Service(program, address, out)

    return run


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One real model for all tests that need one; each leaves it as it was."""
    directory = tmp_path_factory.mktemp("classifier")
    address, log = Address("unix", str(directory / "s")), directory / "output.txt"
    flags = ["--model", CLASSIFIER, "--image-size", 64, "--device", "cpu", "--warmup", 1, "--name", "service"]
    flags += ["--max-batch", 8, "--max-delay-ms", 50]
    with open(log, "w") as output:
        popen = subprocess.Popen(
            [sys.executable, str(SRC / "server.py"), *map(str, flags), "--address", str(address), "--out", directory],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    service = Service(Program(popen, log), address, directory)
    try:
        until_ready(service.program)
        yield service
    finally:
        popen.kill()
        popen.wait()


def jpeg() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (80, 60), (200, 30, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


# Requests and replies


def test_fifty_connections_over_a_unix_socket(serve: Callable[..., Service], tmp_path: Path) -> None:
    """Replies go to who asked; STATS counts the connections; the socket's file is gone afterwards."""
    path = tmp_path / "service.sock"
    service = serve(address=Address("unix", str(path)))
    clients = [service.client() for _ in range(50)]
    for number, client in enumerate(clients):
        client.send(range(number * 10, number * 10 + 4))
    for number, client in enumerate(clients):
        assert [header(frame).id for frame in client.replies(4)] == list(range(number * 10, number * 10 + 4))
    assert service.stats()["connections"] == 51
    for client in clients:
        client.sock.close()
    wait_until(lambda: service.stats()["connections"] == 1)
    assert service.stop()["completed"] == 200
    assert not path.exists()


def test_no_delay_is_set_from_both_sides(serve: Callable[..., Service]) -> None:
    """TCP_NODELAY holds on the client; the server reports the buffers it was granted for this connection."""
    service = serve()
    with service.client() as client:
        assert client.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
    buffers = service.ask(Hello("client"))["info"]["buffers"]
    assert buffers["sndbuf"] > 0
    assert buffers["rcvbuf"] > 0


# Control


def test_hello_says_what_is_served_and_how(classifier: Service) -> None:
    """Model, input shape, version, pid, device, clock and the settings that matter to a measurement."""
    from corun import __version__

    before = now_ns()
    hello = classifier.ask(Hello("client"))
    assert before <= hello.pop("clock_ns") <= now_ns()
    info = hello.pop("info")
    assert hello == {
        "role": "server",
        "name": "service",
        "pid": classifier.program.pid,
        "version": __version__,
        "model": CLASSIFIER,
        "device": "cpu",
        "shapes": {"image_size": 64},
        "host": socket.gethostname(),
    }
    assert info["params"] > 10**6
    assert info["task"] == "classification"
    expected = {"precision": "fp32", "weights": "random", "threads": 1, "queue_limit": 1024, "policy": "fifo"}
    assert expected.items() <= info.items()
    assert (info["max_batch"], info["max_delay_ms"]) == (8, 50.0)
    assert info["torch"]


def test_a_corrupt_image_is_that_requests_fault_alone(classifier: Service) -> None:
    """BAD_REQUEST with a sentence for it, OK with 40 bytes for its batch mates."""
    good = jpeg()
    payloads = [good, good[: len(good) // 2], b"", b"not an image", good]
    with classifier.client() as client:
        for id, payload in enumerate(payloads):
            client.send(range(id, id + 1), payload)
        frames = client.replies(len(payloads))
    bad, ok = Status.BAD_REQUEST, Status.OK
    assert [header(frame).status for frame in frames] == [ok, bad, bad, bad, ok]
    assert [len(frames[0].payload), len(frames[4].payload)] == [40, 40]
    assert all(header(frame).batch <= 2 for frame in frames)
    for frame in frames[1:4]:
        assert json.loads(frame.payload)["error"]


def test_load_switches_the_model_and_a_failed_load_changes_nothing(classifier: Service) -> None:
    """Unknown models, unknown options and bad weights are answered with the reason; the old model serves on."""
    for load, words in [
        (Load("mobilenet_v3_smal"), 'did you mean "mobilenet_v3_small"'),
        (Load(CLASSIFIER, {"image_sise": 64}), 'did you mean "image_size"'),
        (Load(CLASSIFIER, {"weights": "/nowhere.pt"}), "nowhere.pt"),
        (Load(CLASSIFIER, {"image_size": "big"}), "image_size"),
        (Load("null", {"extra": {"service_ms": -1}}), "service_ms"),
    ]:
        with pytest.raises(RunFault, match=words):
            classifier.ask(load)
        with classifier.client() as client:
            assert client.ask(jpeg()).status == Status.OK
    assert classifier.ask(Hello("client"))["model"] == CLASSIFIER
    assert classifier.ask(Load("null", {"extra": {"reply_bytes": 5}}))["model"] == "null"
    with classifier.client() as client:
        client.send(range(1), b"not an image")
        assert client.replies(1)[0].payload == bytes(5)
    assert classifier.ask(Load(CLASSIFIER, {"image_size": 64}))["device"] == "cpu"
    assert any(event.startswith("fault: LOAD failed") for event in classifier.events())


def test_stop_cancels_what_waits_and_keeps_all_rows(serve: Callable[..., Service]) -> None:
    """Every request is answered, OK or CANCELLED, counted and on disk; the process ends with 0."""
    service = serve(service_ms=500)
    with service.client() as client:
        client.send(range(20))
        wait_until(lambda: service.stats()["completed"] >= 1)
        body = service.stop()
        found = statuses(client.replies(20))
    assert set(found) == {Status.OK, Status.CANCELLED}
    assert (body["completed"], body["cancelled"]) == (found[Status.OK], found[Status.CANCELLED])
    assert Counter(row["status"] for row in service.rows()) == {Status(key).name: n for key, n in found.items()}
    assert "stopped: 20 received" in service.program.output()


# Overload


def test_a_full_queue_rejects_at_once_and_counts(serve: Callable[..., Service]) -> None:
    """Beyond the limit requests are answered REJECTED before the model is done; replies, STATS and rows agree."""
    service = serve("--queue-limit", 4, service_ms=800)
    with service.client() as client:
        client.send(range(30))
        frames = client.replies(30)
    found = statuses(frames)
    assert set(found) == {Status.OK, Status.REJECTED}
    assert found[Status.OK] >= 4
    first = frames[0]
    assert header(first).status == Status.REJECTED
    assert json.loads(first.payload) == {"error": "the queue is full"}
    stats = service.stats()
    assert (stats["rejected"], stats["completed"]) == (found[Status.REJECTED], found[Status.OK])
    service.stop()
    rows = service.rows()
    assert Counter(row["status"] for row in rows) == {"OK": found[Status.OK], "REJECTED": found[Status.REJECTED]}
    assert max(int(row["queue_len"]) for row in rows) == 4
    assert {row["detail"] for row in rows if row["status"] == "REJECTED"} == {"the queue is full"}


def test_the_batcher_joins_requests_up_to_its_limit(serve: Callable[..., Service]) -> None:
    """With max batch 4 and a delay, requests that come together are answered together, in order, once each."""
    service = serve("--max-batch", 4, "--max-delay-ms", 20, service_ms=5)
    with service.client() as client:
        client.send(range(21))
        answers = [header(frame) for frame in client.replies(21)]
    assert [answer.id for answer in answers] == list(range(21))
    sizes = Counter(answer.batch for answer in answers)
    assert max(sizes) == 4
    assert all(count % size == 0 for size, count in sizes.items())
    service.stop()
    assert [int(row["batch"]) for row in service.rows()] == [answer.batch for answer in answers]


def test_a_model_that_stands_still_never_stops_the_reading(serve: Callable[..., Service]) -> None:
    """200 images of 150 KB, seven times the socket buffers, are all taken in while the first is being answered."""
    service = serve(service_ms=1000)
    with service.client() as client:
        client.send(range(200), bytes(IMAGE_BYTES))
        stats = wait_until(lambda: (found := service.stats())["received"] == 200 and found)
        assert stats["completed"] < 100
        assert stats["queue_len"] + stats["in_flight"] + stats["completed"] == 200
        service.stop()


# Clients that misbehave


def test_a_client_that_vanishes_takes_nothing_with_it(serve: Callable[..., Service]) -> None:
    """Gone in mid-request it leaves an event; gone with requests waiting they are CANCELLED; others are served."""
    service = serve(service_ms=500)
    with service.client() as good:
        with service.client() as half:
            half.sock.sendall(pack_request(Kind.INFER, 3, 1, IMAGE_BYTES) + bytes(1000))
            wait_until(lambda: service.stats()["connections"] == 3)
        wait_until(lambda: any("in the middle of a frame" in event for event in service.events()))
        with service.client() as hasty:
            hasty.send(range(100, 110))
            wait_until(lambda: service.stats()["received"] == 10)
            hasty.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert good.ask().status == Status.OK
    body = service.stop()
    assert body["received"] == 11
    assert body["cancelled"] >= 1
    assert body["completed"] + body["cancelled"] == 11
    assert Counter(row["status"] for row in service.rows())["CANCELLED"] == body["cancelled"]


def test_a_client_that_does_not_read_blocks_nobody(serve: Callable[..., Service]) -> None:
    """Its replies wait, whole and in order, while others are served; past the limit it is cut off with a reason."""
    service = serve(reply_bytes=1 << 20)
    with service.client() as good, service.client() as late, service.client(receive_buffer=4096) as deaf:
        late.send(range(40))
        wait_until(lambda: service.stats()["completed"] == 40)
        assert service.stats()["backlog_bytes"] > 16 << 20
        assert good.ask().status == Status.OK
        frames = late.replies(40)
        assert [header(frame).id for frame in frames] == list(range(40))
        assert all(frame.payload == bytes(1 << 20) for frame in frames)
        deaf.send(range(100))
        wait_until(lambda: any("does not read its replies" in event for event in service.events()))
        assert good.ask().status == Status.OK
        wait_until(lambda: service.stats()["backlog_bytes"] == 0)
    service.stop()
