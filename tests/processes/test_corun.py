"""The co-run as a person runs it: main.py, multi_server.py and multi_client.py in real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.processes.tools import SRC, TRAIN, Ports, Start, WriteConfig, in_a_window, is_running, wait_until
from tests.processes.tools import manifest_of as _manifest
from tests.processes.tools import pids_of as _pids
from tests.processes.tools import rows_of as _rows
from tests.processes.tools import run_directory as _run_directory

from corun.launch.demo import DEMO

FAST = {"arch": "null", "rate": 40, "image_size": 32, "count": 4}
REAL = {"arch": "mobilenet_v3_small", "rate": 10, "image_size": 64, "count": 4}


def _measuring(root: Path) -> Path:
    """The run directory, once its window has rows of the trainer and of the service."""
    run = in_a_window(root)
    for table in (run / "train.csv", run / "infer_server" / "null.csv"):
        wait_until(lambda table=table: table.exists() and len(_rows(table)) > 2)
    return run


def test_a_grid_cell_from_config_to_table(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Two services, a trainer and the profiler in three arms: every promised file, row and figure is there."""
    config = write_config(
        {"train": [TRAIN], "infer": [[REAL, FAST]], "duration_s": 3, "port": free_port(2), "repeat": 1}
    )
    program = start(
        "main.py", "--config", config, "--no-report", "--no-calibrate", "--out", tmp_path / "result", "--json"
    )
    assert program.wait() == 0, program.output()
    answer = json.loads(program.output().splitlines()[-1])
    run = _run_directory(tmp_path / "result")

    assert set(answer["arms"]) == {"alone", "train", "corun"}
    for arm in ("alone", "corun"):
        service = answer["arms"][arm]["services"]["mobilenet_v3_small"]
        assert service["errors"] == 0
        assert service["requests"] > 10
        assert service["p50_ms"] > 0
        assert service["intended_rate"] == pytest.approx(service["requests"] / 3, abs=1e-3)
    assert answer["arms"]["train"]["train_samples_per_s"] > 0
    assert answer["ratios"]["train_x"] > 0
    assert isinstance(answer["valid"], bool)
    assert answer["valid"] == (not answer["reasons"])

    manifest = _manifest(run)
    assert manifest["status"] == "complete"
    assert manifest["threads"] == {
        "server mobilenet_v3_small": 1,
        "server null": 1,
        "trainer": 1,
        "client": 1,
        "profiler": 1,
    }
    clients = _rows(run / "infer_client" / "mobilenet_v3_small.csv")
    servers = _rows(run / "infer_server" / "mobilenet_v3_small.csv")
    assert len(clients) == sum(
        answer["arms"][arm]["services"]["mobilenet_v3_small"]["requests"] for arm in ("alone", "corun")
    )
    assert {(row["arm"], row["id"]) for row in clients} == {(row["arm"], row["id"]) for row in servers}
    assert all(float(row["latency"]) >= float(row["response_ms"]) for row in clients)
    steps = _rows(run / "train.csv")
    assert {row["arm"] for row in steps} == {"train", "corun"}
    roles = {row["role"] for row in _rows(run / "process.csv")}
    assert {"server", "client", "trainer", "profiler", "launcher"} <= roles
    ticks = _rows(run / "profile.csv")
    assert len(ticks) + sum(int(row["missed"]) for row in ticks) >= 9
    kinds = {row["kind"] for row in _rows(run / "events.csv")}
    assert {"window_start", "window_end", "ready", "stop"} <= kinds
    assert _rows(run / "summary.csv")
    assert not list((run / "infer_client").glob("*.ring"))


def test_arms_of_one_repeat_send_the_same_requests(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """alone and corun of one repeat have the same intended instants, counted from their windows' start."""
    config = write_config(
        {"train": [TRAIN], "infer": [FAST], "duration_s": 1, "port": free_port(), "arms": ["alone", "corun"]}
    )
    program = start("main.py", "--config", config, "--no-report", "--no-calibrate", "--out", tmp_path / "result")
    assert program.wait() == 0, program.output()
    run = _run_directory(tmp_path / "result")
    starts = {segment["arm"]: segment["start_ns"] for segment in _manifest(run)["segments"]}
    due: dict[str, list[int]] = {"alone": [], "corun": []}
    for row in _rows(run / "infer_client" / "null.csv"):
        due[row["arm"]].append(int(row["t_intended_ns"]) - starts[row["arm"]])
    assert due["alone"] == due["corun"] != []


@pytest.mark.parametrize("victim", ["server null", "client null", "trainer squeezenet1_1_8", "profiler profiler"])
def test_kill_9_of_a_process_is_reported_and_survived(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path, victim: str
) -> None:
    """A killed process ends the cell as failed with its name; rows so far stay and nothing is left running."""
    config = write_config(
        {"train": [TRAIN], "infer": [FAST], "duration_s": 10, "port": free_port(), "arms": ["corun"]}
    )
    program = start("main.py", "--config", config, "--no-report", "--no-calibrate", "--out", tmp_path / "result")
    run = _measuring(tmp_path / "result")
    pids = _pids(run)
    os.kill(pids[victim], signal.SIGKILL)
    assert program.wait() == 1, program.output()
    manifest = _manifest(run)
    assert manifest["status"] == "failed"
    assert any(victim in fault and "SIGKILL" in fault for fault in manifest["faults"]), manifest["faults"]
    assert "Traceback" not in program.output()
    assert _rows(run / "infer_client" / "null.csv")
    assert len(_rows(run / "train.csv")) > 1
    assert _rows(run / "summary.csv")
    assert not [name for name, pid in pids.items() if name != "launcher launcher" and is_running(pid)]
    if victim.startswith("server"):
        assert "LOST" in {row["status"] for row in _rows(run / "infer_client" / "null.csv")}


def test_children_die_with_a_killed_launcher(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """kill -9 of the launcher takes every child with it; the run directory says running and keeps its rows."""
    config = write_config(
        {"train": [TRAIN], "infer": [FAST], "duration_s": 600, "port": free_port(), "arms": ["corun"]}
    )
    program = start("main.py", "--config", config, "--no-report", "--no-calibrate", "--out", tmp_path / "result")
    run = _measuring(tmp_path / "result")
    pids = _pids(run)
    program.signal(signal.SIGKILL)
    program.wait()
    wait_until(lambda: not [pid for pid in pids.values() if is_running(pid)])
    assert _manifest(run)["status"] == "running"
    assert len(_rows(run / "train.csv")) > 1


def test_ctrl_c_drains_and_saves(start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path) -> None:
    """The first Ctrl-C ends the window, keeps its rows, writes the summary and exits with 130."""
    config = write_config(
        {"train": [TRAIN], "infer": [FAST], "duration_s": 600, "port": free_port(), "arms": ["corun"]}
    )
    program = start("main.py", "--config", config, "--no-report", "--no-calibrate", "--out", tmp_path / "result")
    run = _measuring(tmp_path / "result")
    program.signal(signal.SIGINT)
    assert program.wait() == 130, program.output()
    assert _manifest(run)["status"] == "interrupted"
    assert _rows(run / "infer_client" / "null.csv")
    assert _rows(run / "summary.csv")


def test_a_failed_pair_is_a_row_and_the_grid_goes_on(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """A pair whose data is missing fails with its reason in the index; the others are measured."""
    missing = {**FAST, "data": str(tmp_path / "nowhere")}
    config = write_config({"infer": [missing, FAST], "duration_s": 0.5, "port": free_port()})
    program = start("main.py", "--config", config, "--no-report", "--no-calibrate", "--out", tmp_path / "result")
    assert program.wait() == 1, program.output()
    (index,) = (tmp_path / "result").glob("sweep-*/index.csv")
    rows = _rows(index)
    assert [row["status"] for row in rows] == ["failed", "complete"]
    assert "nowhere" in rows[0]["reason"]


def test_a_sharing_policy_is_in_force_and_recorded(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """idle+preempt: the trainer runs in SCHED_IDLE under a gate, the self-test says so, and no page is left behind."""
    sharing = {"policy": "idle+preempt"}
    config = write_config(
        {"train": [TRAIN], "infer": [FAST], "duration_s": 2, "port": free_port(), "sharing": sharing}
    )
    program = start("main.py", "--config", config, "--no-report", "--out", tmp_path / "result")
    assert program.wait() == 0, program.output()
    run = _run_directory(tmp_path / "result")
    said = _manifest(run)["sharing"]
    assert said["policy"] == "idle+preempt"
    assert "bites" in said["self_test"]
    assert "mps" in said["refused"]
    log = (run / "logs" / "trainer-squeezenet1_1_8.log").read_text()
    assert "corun.share.start" in log
    assert "--gate" in log
    page = log.partition('"page": "')[2].partition('"')[0]
    assert page
    assert not Path(page).exists()
    gated = [entry for entry in _manifest(run)["counts"] if entry["role"] == "trainer"]
    arms = {segment["index"]: segment["arm"] for segment in _manifest(run)["segments"]}
    assert [arms[entry["segment"]] for entry in gated] == ["train", "corun"]
    assert all("gate_stops" in entry for entry in gated), "each window's counts have the gate's"


def test_a_policy_that_cannot_be_had_is_refused_with_reasons(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """mig without an NVIDIA driver fails the cell and says why; an unknown policy is bad input."""
    config = write_config({"train": [TRAIN], "infer": [FAST], "duration_s": 1, "port": free_port()})
    program = start("main.py", "--config", config, "--no-report", "--policy", "mig", "--out", tmp_path / "result")
    assert program.wait() == 1
    assert "cannot be had here" in program.output()
    program = start("main.py", "--config", config, "--policy", "idel")
    assert program.wait() == 2
    assert 'did you mean "idle"?' in program.output()


def test_bad_input_ends_at_once_with_every_problem(start: Start, write_config: WriteConfig) -> None:
    """Unknown keys, models and data sets are all listed, with exit code 2 and no traceback."""
    config = write_config(
        {"train": [{"arch": "resnet81"}], "infer": [{"arch": "nul", "data": "smaple", "process": "poison"}]}
    )
    program = start("main.py", "--config", config)
    assert program.wait() == 2
    for sentence in ('did you mean "resnet18"', 'unknown model "nul"', '"sample"', '"poisson"'):
        assert sentence in program.output()
    assert "Traceback" not in program.output()
    program = start("main.py", "--config", "nowhere.json")
    assert program.wait() == 2
    assert "cannot read nowhere.json" in program.output()


def test_dry_run_shows_the_cells_without_torch(start: Start, write_config: WriteConfig) -> None:
    """--dry-run lists cells, ports and wall time, and imports no torch."""
    config = write_config({"train": [TRAIN, {"arch": "none"}], "infer": [[REAL, FAST]]})
    program = start("main.py", "--config", config, "--dry-run", PYTHONPROFILEIMPORTTIME="1")
    assert program.wait() == 0
    assert "2 cells, about" in program.output()
    assert "| torch\n" not in program.output()


def test_a_port_in_use_is_one_clear_failure(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """A foreign server on the port fails the cell with the address, not with a hang."""
    port = free_port()
    blocker = start("server.py", "--model", "null", "--port", port)
    wait_until(lambda: "ready" in blocker.output())
    config = write_config({"infer": [FAST], "duration_s": 0.5, "port": port})
    program = start("main.py", "--config", config, "--no-report", "--no-calibrate", "--out", tmp_path / "result")
    assert program.wait() == 1
    assert f"127.0.0.1:{port}" in program.output()
    assert "Traceback" not in program.output()


def _servers_ready(directory: Path, count: int) -> None:
    """Until so many servers have said in their logs that they are."""

    def ready() -> bool:
        return sum("ready" in log.read_text() for log in (directory / "logs").glob("*.log")) == count

    wait_until(ready)


def test_multi_server_and_multi_client_measure_and_resume(start: Start, free_port: Ports, tmp_path: Path) -> None:
    """Empty servers load what the clients ask for; a second start of the same sweep measures nothing again."""
    port = free_port(2)
    servers = start("multi_server.py", "--num", 2, "--port", port, "--out", tmp_path / "servers")
    arguments = (
        "--models",
        "null",
        "mobilenet_v3_small",
        "--comb",
        1,
        2,
        "--rates",
        20,
        "--duration",
        1,
        "--port",
        port,
    )
    arguments += ("--image-size", 64, "--train-model", "resnet50_16", "--out", tmp_path / "result")
    _servers_ready(tmp_path / "servers", 2)
    first = start("multi_client.py", *arguments)
    assert first.wait() == 0, first.output() + servers.output()
    (sweep,) = (tmp_path / "result").glob("sweep-*")
    rows = _rows(sweep / "index.csv")
    assert [row["status"] for row in rows] == ["complete"] * 3
    manifests = {path: path.stat().st_mtime_ns for path in sweep.glob("*/manifest.json")}
    assert len(manifests) == 3
    clients = _rows(next(sweep.glob("*/infer_client/mobilenet_v3_small.csv")))
    assert {row["train_model_name"] for row in clients} == {"resnet50_16"}
    assert {row["status"] for row in clients} == {"OK"}
    second = start("multi_client.py", *arguments)
    assert second.wait() == 0
    assert second.output().count("done before") == 3
    assert {path: path.stat().st_mtime_ns for path in manifests} == manifests
    servers.signal(signal.SIGINT)
    assert servers.wait() == 0, servers.output()
    assert list((tmp_path / "servers" / "infer_server").glob("*.csv"))


def test_servers_die_with_a_killed_multi_server(start: Start, free_port: Ports, tmp_path: Path) -> None:
    """kill -9 of multi_server.py leaves no server behind."""
    servers = start("multi_server.py", "--num", 2, "--port", free_port(2), "--out", tmp_path / "servers")
    wait_until(lambda: "servers starting" in servers.output())
    _servers_ready(tmp_path / "servers", 2)
    pids = _pids(tmp_path / "servers")
    servers.signal(signal.SIGKILL)
    wait_until(lambda: not [name for name, pid in pids.items() if is_running(pid)])


def test_multi_server_names_the_server_that_dies(start: Start, free_port: Ports, tmp_path: Path) -> None:
    """kill -9 of one server is reported with its address; the other goes on answering."""
    port = free_port(2)
    servers = start("multi_server.py", "--models", "null", "null", "--port", port, "--out", tmp_path / "servers")
    wait_until(lambda: "servers starting" in servers.output())
    _servers_ready(tmp_path / "servers", 2)
    pids = _pids(tmp_path / "servers")
    os.kill(pids["server null"], signal.SIGKILL)
    wait_until(lambda: "SIGKILL" in servers.output())
    client = start("client.py", "--port", port + 1, "--duration", 0.5, "--rate", 20, "--out", tmp_path / "one")
    assert client.wait() == 0, client.output()
    servers.signal(signal.SIGTERM)
    assert servers.wait() == 1


@pytest.mark.skipif(
    shutil.which("ip") is None or os.geteuid() != 0, reason="needs root and iproute2 for network namespaces"
)
def test_two_hosts_in_two_network_namespaces(start: Start, tmp_path: Path) -> None:
    """Servers in one network namespace, clients in another: a measured run over the link, clock offset recorded."""
    names = (f"corun-a{os.getpid()}", f"corun-b{os.getpid()}")
    try:
        _namespaces(names)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr}")
    try:
        inside = [("ip", "netns", "exec", name) for name in names]
        servers = start(
            "multi_server.py",
            *("--models", "null", "--host", "10.77.0.1", "--port", 54100, "--out", tmp_path / "servers"),
            prefix=inside[0],
        )
        _servers_ready(tmp_path / "servers", 1)
        arguments = (
            "--models",
            "null",
            "--host",
            "10.77.0.1",
            "--rates",
            50,
            "--duration",
            1,
            "--out",
            tmp_path / "result",
        )
        clients = start("multi_client.py", *arguments, prefix=inside[1])
        assert clients.wait() == 0, clients.output() + servers.output()
        rows = _rows(next((tmp_path / "result").glob("sweep-*/*/infer_client/null.csv")))
        assert {row["status"] for row in rows} == {"OK"}
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _namespaces(names: tuple[str, str]) -> None:
    """Two namespaces joined by a veth pair, 10.77.0.1 and 10.77.0.2."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    for name in names:
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    link = f"v{os.getpid()}"
    ip("link", "add", f"{link}a", "netns", names[0], "type", "veth", "peer", "name", f"{link}b", "netns", names[1])
    for index, (name, end) in enumerate(zip(names, ("a", "b"), strict=True), 1):
        ip("-n", name, "addr", "add", f"10.77.0.{index}/24", "dev", f"{link}{end}")
        ip("-n", name, "link", "set", f"{link}{end}", "up")


def test_the_loss_falls_on_the_demo_data(tmp_path: Path) -> None:
    """The demo's training job learns the handwritten digits, in its own process."""
    (job,) = DEMO["train"]
    flags = [word for key, value in job.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command = [
        sys.executable,
        "-m",
        "corun.train",
        "--epochs",
        "2",
        "--steps",
        "60",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
    ]
    flags[flags.index("--arch")] = "--model"
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    subprocess.run([*command, *flags], check=True, env=environment, stdout=subprocess.DEVNULL, timeout=500)
    losses = [float(row["loss"]) for row in _rows(tmp_path / "train.csv")]
    assert len(losses) == 60
    assert sum(losses[-10:]) / 10 < 0.5 * sum(losses[:5]) / 5
