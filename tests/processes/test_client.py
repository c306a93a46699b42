"""client.py and client_async.py as processes: by hand, under a launcher, killed, and given nonsense."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from corun import arrivals
from corun.arrivals import Poisson, Stream
from corun.clock import NS_PER_S, now_ns
from corun.load.ring import open_ring, read_ring
from corun.run.records import INFER_CLIENT, names
from corun.testing.echo import Behaviour, EchoServer
from corun.wire import Address, Status, listen
from corun.wire.channel import Channel
from corun.wire.messages import Arm, Drain, Hello, Start, Stop

ROOT = Path(__file__).resolve().parents[2]
OPEN, CLOSED = "client_async.py", "client.py"

DATA = """
from corun.registry import Dataset, Payload
def requests(options):
    return [Payload(f"{i}.jpg", bytes([i]) * (100 + i)) for i in range(options.count)]
DATASETS = (Dataset("tiny", frozenset(), "bytes for tests", requests, None),)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A checkout of its own with one small data set, so no test depends on what the real one lists."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "tiny.py").write_text(DATA)
    return tmp_path


@pytest.fixture
def server() -> Iterator[EchoServer]:
    with EchoServer() as running:
        yield running


def command(script: str, address: Address | str, *flags: object) -> list[str]:
    fixed = ["--address", str(address), "--data", "tiny", "--count", "5"]
    return [sys.executable, str(ROOT / "src" / script), *fixed, *map(str, flags)]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "CORUN_HOME": str(home), "CORUN_RESULT": str(home / "result")}


def run(home: Path, script: str, address: Address | str, *flags: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(script, address, *flags), env=environment(home), capture_output=True, text=True, timeout=300
    )


def start(home: Path, script: str, address: Address | str, *flags: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(script, address, *flags),
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def wait_for_requests(server: EchoServer, count: int) -> None:
    deadline = time.monotonic() + 120
    while server.infers < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.infers >= count


def answers(ring: Path) -> int:
    """How many requests a ring has a good reply to."""
    return int((read_ring(ring)["status"] == Status.OK).sum())


def test_an_open_loop_client_by_hand_leaves_a_table_and_one_line(home: Path, server: EchoServer) -> None:
    """A fresh result directory with one row per scheduled request, and a summary; the ring is gone."""
    done = run(home, OPEN, server.address, "--rate", 200, "--duration", 1, "--seed", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    for word in ("sent", "asked 200/s", "sojourn p50", "response p50", "slip p50", "0 errors, 0 lost"):
        assert word in done.stdout
    (path,) = (home / "result").glob("*/infer_client/null.csv")
    rows = table(path)
    assert tuple(rows[0]) == names(INFER_CLIENT)
    expected = arrivals.make([Stream(0, Poisson(200), 5)], 1.0, 3)
    intended = np.array([int(row["t_intended_ns"]) for row in rows])
    assert (np.diff(intended) == np.diff(expected.intended_ns)).all()
    assert [row["file_name"] for row in rows] == [f"{index}.jpg" for index in expected.rows["payload"]]
    assert {row["status"] for row in rows} == {"OK"}
    assert not list(path.parent.glob("*.ring"))


def test_a_second_client_appends_to_the_table_of_the_first(home: Path, server: EchoServer) -> None:
    """With --out given twice the rows of both runs stand in one file under one header."""
    for _ in range(2):
        done = run(
            home, OPEN, server.address, "--process", "constant", "--rate", 50, "--duration", 0.2, "--out", home / "o"
        )
        assert done.returncode == 0, done.stderr
    assert len(table(home / "o/infer_client/null.csv")) == 20


@pytest.mark.parametrize(
    ("flags", "rest"),
    [
        (["--rate", 100], None),
        (["--rate", 100, "--after-reply"], "gaps"),
        (["--process", "closed"], 0),
        (["--process", "closed", "--think", 0.05], 50_000_000),
    ],
    ids=["paced", "after-reply", "closed", "think"],
)
def test_the_closed_client_runs_in_each_of_its_ways(
    home: Path, server: EchoServer, flags: list[object], rest: int | str | None
) -> None:
    """Paced by a schedule, resting its gaps after replies, back to back, or with a fixed rest."""
    done = run(home, CLOSED, server.address, "--duration", 1.5, "--seed", 3, "--out", home / "o", *flags)
    assert done.returncode == 0, done.stderr
    rows = table(home / "o/infer_client/null.csv")
    planned = arrivals.make([Stream(0, Poisson(100), 5)], 1.5, 3).intended_ns
    assert len(rows) == len(planned) if rest is None else len(rows) > 1
    sent = [int(row["t_tx_start_ns"]) for row in rows]
    answered = [int(row["t_rx_ns"]) for row in rows]
    assert all(reply <= next_sent for reply, next_sent in zip(answered[:-1], sent[1:], strict=True))
    intended = [int(row["t_intended_ns"]) for row in rows]
    gaps = [due - reply for due, reply in zip(intended[1:], answered[:-1], strict=True)]
    if rest is None:
        assert np.diff(intended).tolist() == np.diff(planned).tolist()
    elif rest == "gaps":
        assert gaps == np.diff(planned)[: len(gaps)].tolist()
    else:
        assert set(gaps) == {rest}


def test_a_unix_socket_and_a_model_to_be_loaded(home: Path, tmp_path: Path) -> None:
    """--address unix:... connects, and --model makes the server load what it does not have yet."""
    with EchoServer(address=Address("unix", str(tmp_path / "s"))) as server:
        done = run(
            home, OPEN, server.address, "--model", "other", "--rate", 50, "--duration", 0.2, "--out", home / "o"
        )
        assert done.returncode == 0, done.stderr
        assert server.loads == ["other"]
    assert table(home / "o/infer_client/other.csv")[0]["infer_model_name"] == "other"


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--data", "tinny"], 2, 'did you mean "tiny"'),
        (["--model", "nonsense"], 2, 'unknown model "nonsense"'),
        (["--process", "posson"], 2, 'did you mean "poisson"'),
        (["--process", "closed"], 2, "client.py"),
        (["--process", "gamma:rate=10,shap=1"], 2, 'did you mean "shape"'),
        (["--schedule", "/nowhere.npy"], 2, "cannot be read"),
        (["--control", "127.0.0.1:1"], 2, "--schedule and --out"),
        (["--name", "a/b"], 2, "file name"),
        (["--priority", "high"], 2, "none, auto, fifo"),
        (["--cores", "x"], 2, "core numbers"),
        (["--cores", "4000"], 2, "may use"),
        (["--address", "here"], 2, "host:port"),
        (["--rate", "-1"], 2, "--rate"),
        (["--out", "/proc/nowhere"], 1, "cannot make the record file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_gets_one_error_and_no_traceback(
    home: Path, server: EchoServer, flags: list[str], code: int, words: str
) -> None:
    """What the user can correct is said in words with its exit code."""
    done = run(home, OPEN, server.address, "--duration", 0.2, *flags)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_no_server_is_said_in_one_line(home: Path) -> None:
    """A port nobody listens on: exit 1 and what to check."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        done = run(home, OPEN, f"127.0.0.1:{port}")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"error: cannot connect to 127.0.0.1:{port}: Connection refused; is the server running there?"
    ]


def test_a_server_that_breaks_off_leaves_rows_and_a_reason(home: Path) -> None:
    """Replies before the break and LOST rows after it are in the table; exit 1 with the counts."""
    with EchoServer(Behaviour(close_at=20), Address("unix", str(home / "s"))) as server:
        done = run(
            home, OPEN, server.address, "--rate", 100, "--process", "constant", "--duration", 0.5, "--out", home / "o"
        )
    assert done.returncode == 1
    assert "recorded as LOST" in done.stderr
    assert "Traceback" not in done.stderr
    status = [row["status"] for row in table(home / "o/infer_client/null.csv")]
    assert (status.count("OK"), status.count("LOST")) == (19, 31)


def test_one_interrupt_ends_the_run_and_keeps_what_was_measured(home: Path, server: EchoServer) -> None:
    """Ctrl-C: nothing new is sent, the table has every answered request, the exit code is 130."""
    child = start(home, OPEN, server.address, "--rate", 100, "--duration", 100, "--out", home / "o")
    wait_for_requests(server, 20)
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 130, errors
    assert "0 errors, 0 lost" in output
    assert len(table(home / "o/infer_client/null.csv")) == server.infers


def test_a_killed_client_leaves_a_ring_that_becomes_a_table(home: Path, server: EchoServer) -> None:
    """SIGKILL: every answered request is in the ring, and `python -m corun.load` writes its rows."""
    child = start(home, OPEN, server.address, "--rate", 200, "--duration", 100, "--out", home / "o")
    wait_for_requests(server, 50)
    ring = home / "o/infer_client/null.0.ring"
    while (seen := answers(ring)) < 50:
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.communicate(timeout=300)
    recording = open_ring(ring)
    answered = answers(ring)
    assert seen <= answered <= server.infers
    assert len(recording.records) > 10_000, "requests not sent yet are still known"
    done = subprocess.run(
        [sys.executable, "-m", "corun.load", str(ring), "--csv", str(home / "t.csv")],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"rows of {ring}" in done.stdout
    assert sum(row["status"] == "OK" for row in table(home / "t.csv")) == answered


def test_many_client_processes_together_are_poisson(home: Path, server: EchoServer) -> None:
    """4 processes with one schedule start on one instant; their merged instants pass the arrival validator."""
    streams, rate, duration_s = 4, 150.0, 3.0
    schedule = arrivals.make([Stream(number, Poisson(rate), 5) for number in range(streams)], duration_s, 11)
    arrivals.save(schedule, home / "schedule.npy")
    listener = listen(Address("unix", str(home / "c")))
    listener.settimeout(300)
    children = [
        start(home, OPEN, server.address, "--name", f"s{number}", "--stream", number, "--schedule", home / "schedule.npy",
              "--out", home / "o", "--control", f"unix:{home / 'c'}")
        for number in range(streams)
    ]  # fmt: skip
    channels = [accept(listener) for _ in children]
    begin = now_ns() + NS_PER_S // 2
    arm = Arm("alone", 0, 0, begin, begin + round(duration_s * NS_PER_S), 0, len(schedule))
    for message in (arm, Start()):
        for channel in channels:
            channel.request(message, 300.0)
    time.sleep(max(0, arm.stop_at_ns - now_ns()) / NS_PER_S)
    counts = [channel.request(Drain(60_000), 300.0) for channel in channels]
    for channel in channels:
        channel.request(Stop())
        channel.close()
    listener.close()
    for child in children:
        _, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors
    assert sum(count["sent"] for count in counts) == len(schedule)
    stamps = np.concatenate([read_ring(str(count["ring"]))["t_intended"] for count in counts]) - begin
    assert np.array_equal(np.sort(stamps), schedule.intended_ns)
    report = arrivals.validate(stamps, Poisson(rate * streams), duration_s)
    assert report.passed, report.reasons


def accept(listener: socket.socket) -> Channel:
    sock, _ = listener.accept()
    channel = Channel(sock)
    received = channel.receive(60.0)
    assert received is not None
    assert isinstance(received[1], Hello)
    channel.reply(received[0])
    return channel


def test_a_client_process_loads_no_heavy_library() -> None:
    """What is measured beside a client is not slowed by imports the client does not need."""
    heavy = {"torch", "pandas", "matplotlib", "pyarrow", "pydantic", "sklearn", "ultralytics"}
    program = "import sys, corun.load.door; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "src", capture_output=True, text=True, check=True
    )
    assert not heavy & set(done.stdout.split())
