"""src/server.py as a process of its own: started, asked, misused, stopped and killed."""

from __future__ import annotations

import csv
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.processes.tools import SRC, Program, is_running, wait_until

from corun import images
from corun.clock import now_ns
from corun.errors import PeerClosed, RunFault
from corun.testing.ask import Asker
from corun.wire import Address, Kind, ReplyReader, Status, connect, pack_request
from corun.wire.channel import Channel
from corun.wire.messages import Arm, Drain, Hello, Load, Message, Stats, Stop

Start = Callable[..., Program]


def serve(start: Start, *arguments: object, **environment: str) -> tuple[Program, Address]:
    """Start a server on a free port and wait until it says that it is ready."""
    program = start("server.py", "--port", 0, *arguments, **environment)

    def shown() -> re.Match[str] | None:
        assert program.popen.poll() is None, program.output()
        return re.search(r"ready on (\S+?)(,| without)", program.output())

    return program, Address.parse(wait_until(shown)[1])


def flood(address: Address, count: int, size: int = 1) -> socket.socket:
    """`count` requests in one go; the connection they were sent over."""
    sock = connect(address)
    now = now_ns()
    sock.sendall(b"".join(pack_request(Kind.INFER, 0, id, size, now, now) + bytes(size) for id in range(count)))
    return sock


def replies(sock: socket.socket, count: int) -> list[Any]:
    """The headers of the next `count` replies."""
    reader, headers = ReplyReader(), []
    sock.settimeout(180)
    while len(headers) < count:
        headers += [frame.header for frame in reader.receive(sock)]
    return headers


def ask(address: Address, message: Message, timeout_s: float = 180.0) -> dict[str, Any]:
    """One control message over a connection of its own."""
    channel = Channel(connect(address))
    try:
        return channel.request(message, timeout_s)
    finally:
        channel.close()


def rows(directory: Path, name: str = "null") -> list[dict[str, str]]:
    with open(directory / "infer_server" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_service_from_its_first_line_to_its_last(start: Start, tmp_path: Path) -> None:
    """One line when ready, requests answered, STOP answered with the counts, one line at the end, exit 0."""
    program, address = serve(start, "--model", "null", "--extra", '{"reply_bytes": 9}', "--out", tmp_path / "out")
    assert re.search(
        rf"^null ready on {address}, cpu, fp32, no weights, 1 thread, pid {program.pid}$", program.output()
    )
    with Asker(address) as asker:
        for _ in range(5):
            answer = asker.ask(b"anything")
            assert (answer.status, answer.payload) == (Status.OK, bytes(9))
    hello = ask(address, Hello("test"))
    assert (hello["pid"], hello["model"], hello["role"]) == (program.pid, "null", "server")
    body = ask(address, Stop("the test is over"))
    assert (body["completed"], body["rows"]) == (5, 5)
    assert program.wait() == 0
    assert "null stopped: 5 received, 5 completed; rows in " in program.output()
    assert [row["status"] for row in rows(tmp_path / "out")] == ["OK"] * 5
    assert "the test is over" in (tmp_path / "out" / "events.csv").read_text()


def test_no_files_without_out(start: Start, tmp_path: Path) -> None:
    """A server started by hand without --out writes nothing."""
    program, address = serve(start, "--model", "null")
    with Asker(address) as asker:
        asker.ask(b"x")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output-0.txt"]


def test_a_unix_socket(start: Start, tmp_path: Path) -> None:
    """--address unix:/path serves there."""
    address = Address("unix", str(tmp_path / "null.sock"))
    program = start("server.py", "--model", "null", "--address", address)
    with Asker(address, timeout_s=180.0) as asker:
        assert asker.ask(b"x").status == Status.OK
    program.signal(signal.SIGINT)
    assert program.wait() == 0
    assert not Path(address.host).exists()


def test_a_null_service_never_imports_torch(start: Start) -> None:
    """What the harness itself costs is measured without a framework in the process."""
    program, _ = serve(start, "--model", "null", "--device", "auto")
    assert "libtorch" not in Path(f"/proc/{program.pid}/maps").read_text()


def test_a_full_queue_rejects_at_once(start: Start) -> None:
    """With room for three behind a slow model, the rest is REJECTED before the first is done, and counted."""
    _, address = serve(start, "--model", "null", "--extra", '{"service_ms": 1000}', "--queue-limit", 3)
    with flood(address, 10) as sock:
        headers = replies(sock, 10)
    kinds = [header.status for header in headers]
    assert kinds.count(Status.REJECTED) in (6, 7)
    assert kinds.count(Status.OK) == 10 - kinds.count(Status.REJECTED)
    assert kinds.index(Status.OK) >= 6
    assert ask(address, Stats())["rejected"] == kinds.count(Status.REJECTED)


def test_the_batcher_shares_a_service_time(start: Start) -> None:
    """Sixteen requests on a model with a fixed time per batch run in batches of eight, not one by one."""
    _, address = serve(
        start, "--model", "null", "--extra", '{"service_ms": 20}', "--max-batch", 8, "--max-delay-ms", 60_000
    )
    with flood(address, 16) as sock:
        headers = replies(sock, 16)
    assert [header.batch for header in headers] == [8] * 16
    assert [header.id for header in headers] == list(range(16))
    for header in headers:
        stamps = dict(zip(("first", "done", "picked", "batched"), header.stamps, strict=False))
        assert stamps["batched"] - stamps["done"] < 60_000_000_000


def test_a_stopped_server_finishes_what_it_has(start: Start, tmp_path: Path) -> None:
    """SIGTERM while requests wait: all are answered, their rows are on disk, exit 0."""
    program, address = serve(start, "--model", "null", "--extra", '{"service_ms": 50}', "--out", tmp_path / "out")
    with flood(address, 10) as sock:
        replies(sock, 1)
        program.signal(signal.SIGTERM)
        assert {header.status for header in replies(sock, 9)} == {Status.OK}
    assert program.wait() == 0
    assert "10 received, 10 completed" in program.output()
    assert len(rows(tmp_path / "out")) == 10


def test_a_second_interrupt_kills(start: Start) -> None:
    """The first Ctrl-C waits for a slow model, the second does not."""
    program, address = serve(start, "--model", "null", "--extra", '{"service_ms": 60000}', "--warmup", 0)
    sock = flood(address, 1)
    wait_until(lambda: ask(address, Stats())["in_flight"] == 1)
    program.signal(signal.SIGINT)

    def refusing() -> bool:
        with connect(address) as probe:
            probe.sendall(pack_request(Kind.INFER, 0, 0, 0))
            probe.settimeout(0.5)
            try:
                return bool(ReplyReader().receive(probe)[0].header.status == Status.DRAINING)
            except (PeerClosed, IndexError):
                return False

    wait_until(refusing)
    program.signal(signal.SIGINT)
    assert program.wait() == 130
    sock.close()


def test_a_killed_server_leaves_whole_rows(start: Start, tmp_path: Path) -> None:
    """kill -9 under load: every line on disk is a whole row, in order, and all but the last second is there."""
    program, address = serve(start, "--model", "null", "--out", tmp_path / "out")
    path = tmp_path / "out" / "infer_server" / "null.csv"
    with Asker(address) as asker:
        while path.read_bytes().count(b"\n") < 50:
            asker.ask(b"x")
        program.signal(signal.SIGKILL)
        program.wait()
    assert path.read_bytes().endswith(b"\n")
    written = rows(tmp_path / "out")
    assert [int(row["id"]) for row in written] == list(range(len(written)))
    assert all(row["detail"] == "" and row["s_tx_ns"] for row in written)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "resnet81"], 'unknown model "resnet81"; did you mean "resnet18"?'),
        (["--model", "null", "--policy", "fifi"], 'unknown queue policy "fifi"; did you mean "fifo"?'),
        (["--model", "null", "--extra", "{"], "--extra is not JSON"),
        (["--model", "null", "--extra", "[1]"], "--extra is not a JSON object"),
        (["--model", "null", "--extra", '{"service": 1}'], 'did you mean "service_ms"?'),
        (["--model", "null", "--address", "nowhere"], 'bad address "nowhere"'),
        (["--model", "null", "--out", "/proc/nothing"], "/proc/nothing"),
    ],
    ids=["model", "policy", "json", "object", "option", "address", "out"],
)
def test_bad_input_is_one_clear_error(start: Start, arguments: list[str], words: str) -> None:
    """Exit 2 with a sentence and no traceback, before anything is served."""
    program = start("server.py", "--port", 0, *arguments)
    assert program.wait() == 2
    assert words in program.output()
    assert "Traceback" not in program.output()


def test_a_port_in_use_is_one_clear_error(start: Start) -> None:
    """The second server on a port exits 2 and says which port; the first serves on."""
    _, address = serve(start, "--model", "null")
    second = start("server.py", "--model", "null", "--port", address.port)
    assert second.wait() == 2
    assert f"cannot listen on {address}" in second.output()
    assert "Traceback" not in second.output()
    with Asker(address) as asker:
        assert asker.ask(b"x").status == Status.OK


def test_a_server_ends_with_its_parent(start: Start, tmp_path: Path) -> None:
    """--parent: when that process is killed, the server does not outlive it."""
    script = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, {str(SRC / 'server.py')!r}, '--model', 'null', '--port', '0',"
        " '--parent', str(os.getpid())], stdout=subprocess.PIPE, text=True)\n"
        "print(child.stdout.readline().rsplit(' ', 1)[1], flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_running(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not is_running(pid))


def test_frames_from_hell_do_not_end_the_server(start: Start, tmp_path: Path) -> None:
    """Random bytes, HTTP, half frames, vanishing peers: each is logged with a reason, and the next one is served."""
    program, address = serve(start, "--model", "null", "--out", tmp_path / "out")
    frames = (
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".ljust(64),
        os.urandom(1000),
        pack_request(Kind.INFER, 0, 0, 1 << 20) + bytes(1000),
        b"\x00" * 64,
        b"CRUN",
    )
    with Asker(address) as good:
        for data in frames:
            with connect(address) as sock:
                sock.sendall(data)
            assert good.ask(b"x").status == Status.OK
    events = tmp_path / "out" / "events.csv"
    wait_until(lambda: events.read_text().count("closed the connection") == 5)
    body = ask(address, Stats())
    assert (body["completed"], body["bad_frames"]) == (5, 3)
    assert program.popen.poll() is None


def test_a_real_model_is_loaded_replaced_and_survives_bad_pictures(start: Start, tmp_path: Path) -> None:
    """LOAD into an empty server; a failed LOAD keeps the model; a corrupt JPEG is that request's business alone."""
    program, address = serve(start, "--out", tmp_path / "out", "--name", "classifier")
    assert "without a model: waiting for LOAD" in program.output()
    with Asker(address) as asker:
        assert asker.ask(b"x").status == Status.NOT_LOADED
        body = ask(address, Load("squeezenet1_1", {"image_size": 64}))
        assert (body["model"], body["weights"], body["device"]) == ("squeezenet1_1", "random", "cpu")
        with pytest.raises(RunFault, match='did you mean "squeezenet1_1"'):
            ask(address, Load("squeezenet11"))
        with pytest.raises(RunFault, match="image_size"):
            ask(address, Load("squeezenet1_1", {"image_size": 4}))
        ask(address, Arm("alone", 0, 0, 0, 0))
        jpeg = images.encode_jpeg(images.made_image(1, 80, 80))
        statuses = [asker.ask(payload).status for payload in (jpeg, jpeg[: len(jpeg) // 2], b"no picture", jpeg)]
    assert statuses == [Status.OK, Status.BAD_REQUEST, Status.BAD_REQUEST, Status.OK]
    counts = ask(address, Drain())
    assert (counts["received"], counts["completed"], counts["bad"]) == (4, 2, 2)
    assert ask(address, Load("null"))["model"] == "null"
    ask(address, Stop())
    assert program.wait() == 0
    table = rows(tmp_path / "out", "classifier")
    assert [row["status"] for row in table] == ["NOT_LOADED", "OK", "BAD_REQUEST", "BAD_REQUEST", "OK"]
    assert [row["image_size"] for row in table] == ["", "64", "64", "64", "64"]
    assert "not a readable image" in table[2]["detail"]


def test_cuda_without_cuda_is_one_clear_error(start: Start) -> None:
    """--device cuda on a machine without: exit 2 with a sentence, not a traceback."""
    program = start("server.py", "--model", "squeezenet1_1", "--port", 0, "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert program.wait() == 2
    assert 'device "cuda" is not there' in program.output()
    assert "Traceback" not in program.output()
