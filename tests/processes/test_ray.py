"""A real cluster of two nodes: services on one, clients on the other, and what happens when a node goes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.processes import tools
from tests.processes.ray_nodes import Cluster, command_lines, make_cluster
from tests.processes.tools import SRC, TRAIN, Ports, Program, Start, WriteConfig, is_running, wait_until
from tests.processes.tools import in_a_window as _in_a_window
from tests.processes.tools import manifest_of as _manifest
from tests.processes.tools import pids_of as _pids
from tests.processes.tools import rows_of as _rows
from tests.processes.tools import run_directory as _run_directory

pytest.importorskip("ray", reason='Ray is not installed: pip install -e ".[ray]"')

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SERVICES = [
    {"arch": "null", "rate": 40, "image_size": 32, "count": 4},
    {"arch": "null", "name": "second", "rate": 20, "image_size": 32, "count": 4},
]
S = 1_000_000_000
SLACK_NS = S
"""Far more than any clock bound of a busy machine, far less than the offset that was set."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tools.PortBlocks() as ports:
        made = make_cluster(ports.take())
        print(
            "nodes in network namespaces" if made.clients.prefix else "nodes on the loopback: no network namespaces"
        )
        yield made
        made.close()


def _launch(cluster: Cluster, **placement: str) -> dict[str, Any]:
    roles = {"server": "servers", "client": "clients", **placement}
    wanted = {role: {"label": f"role={value}"} for role, value in roles.items()}
    return {"backend": "ray", "address": cluster.address, "placement": wanted}


def _main(start: Start, cluster: Cluster, config: Path, out: Path, *more: str) -> Program:
    words = ("--config", config, "--no-calibrate", "--out", out, *more)
    return start("main.py", *words, prefix=cluster.clients.prefix, **cluster.environment)


def _left(run: Path) -> list[str]:
    return [name for name, pid in _pids(run).items() if is_running(pid)]


def test_a_corun_over_two_nodes(
    cluster: Cluster, start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Services, trainer and their sharing policy on one node, clients on the other: one run, one clock, one report."""
    config = write_config(
        {
            "train": [TRAIN],
            "infer": [SERVICES],
            "duration_s": 4,
            "port": free_port(2),
            "sharing": {"policy": "idle+slo", "slo_ms": 500},
            "launch": _launch(cluster),
        }
    )
    program = _main(start, cluster, config, tmp_path / "result", "--json")
    assert program.wait() == 0, program.output()
    run = _run_directory(tmp_path / "result")
    answer = json.loads(program.output().splitlines()[-1])
    assert set(answer["arms"]) == {"alone", "train", "corun"}
    assert answer["arms"]["corun"]["services"]["null"]["errors"] == 0
    assert answer["arms"]["corun"]["train_samples_per_s"] > 0

    manifest = _manifest(run)
    assert manifest["status"] == "complete"
    nodes = manifest["nodes"]
    assert set(nodes["servers-node"]["roles"]) == {"server", "trainer", "profiler"}
    assert set(nodes["clients-node"]["roles"]) == {"client", "profiler"}
    assert nodes["servers-node"]["measured"]
    assert {entry["role"]: entry["node"] for entry in manifest["processes"]}["client"] == "clients-node"
    _check_clock(cluster, manifest)
    _check_rows(run, manifest)
    _check_addresses(cluster, run)
    _check_policy(manifest)

    assert (run / "report.html").stat().st_size > 10_000
    assert {"server", "trainer"} <= {row["role"] for row in _rows(run / "process.csv")}
    assert "client" in {row["role"] for row in _rows(run / "nodes" / "clients-node" / "process.csv")}
    assert not _left(run)
    assert not command_lines(["corun-node-", str(run.name)])
    for child in map(json.loads, (run / "processes.jsonl").read_text().splitlines()):
        for word in child["argv"]:
            assert "corun-node-" not in word or not Path(word).exists()


def _check_clock(cluster: Cluster, manifest: dict[str, Any]) -> None:
    """The offset that was set is found to within its bound, at every comparison, before and after each window."""
    clock = manifest["nodes"]["servers-node"]["clock"]
    assert clock["same_as_launcher"] == (not cluster.servers.ahead_s)
    if not clock["same_as_launcher"]:
        assert [one["when"] for one in clock["comparisons"]].count("before") == len(manifest["segments"])
        for one in clock["comparisons"]:
            assert abs(one["offset_ns"] - cluster.servers.ahead_s * S) <= one["bound_ns"] + 1
    assert manifest["nodes"]["clients-node"]["clock"]["same_as_launcher"]


def _check_rows(run: Path, manifest: dict[str, Any]) -> None:
    """Rows of every node lie in the windows they belong to, and a request's stamps are in order over both nodes."""
    windows = {segment["index"]: (segment["start_ns"], segment["stop_ns"]) for segment in manifest["segments"]}
    for name in ("null", "second"):
        clients, servers = (_rows(run / folder / f"{name}.csv") for folder in ("infer_client", "infer_server"))
        assert {(row["arm"], row["id"]) for row in clients} == {(row["arm"], row["id"]) for row in servers}
        for row in clients:
            begin, end = windows[int(row["segment"])]
            assert begin - SLACK_NS <= int(row["t_intended_ns"]) <= end + SLACK_NS
            stamps = [int(row[key]) for key in ("t_tx_start_ns", "s_rx_first_ns", "s_tx_ns", "t_rx_ns")]
            assert all(later - earlier > -SLACK_NS for earlier, later in itertools.pairwise(stamps))
        for row in servers:
            assert windows[int(row["segment"])][0] - SLACK_NS <= int(row["s_rx_done_ns"])
    for row in _rows(run / "train.csv"):
        begin, end = windows[int(row["segment"])]
        assert begin - SLACK_NS <= int(row["t_start_ns"]) <= end + SLACK_NS
    for name in ("profile.csv", "nodes/clients-node/profile.csv"):
        for row in (row for row in _rows(run / name) if row["segment"]):
            begin, end = windows[int(row["segment"])]
            assert begin - S <= int(row["t_ns"]) <= end + S


def _check_addresses(cluster: Cluster, run: Path) -> None:
    """Clients name the address of the services' node, and every process reports to the launcher's."""
    for child in map(json.loads, (run / "processes.jsonl").read_text().splitlines()):
        argv = child["argv"]
        if child["role"] in ("server", "client"):
            assert argv[argv.index("--host") + 1] == cluster.servers.address
        if "--control" in argv:
            assert argv[argv.index("--control") + 1].startswith(cluster.clients.address)


def _check_policy(manifest: dict[str, Any]) -> None:
    """The policy is in force on the trainer's node, and no process kept the niceness of a Ray worker."""
    states = manifest["sharing"]["in_force"]["processes"]
    assert {state["class"] for name, state in states.items() if name.startswith("trainer")} == {"SCHED_IDLE"}
    assert {state["nice"] for state in states.values()} == {str(os.nice(0))}


def test_a_lost_node_is_named_and_the_rest_is_kept(
    cluster: Cluster, start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """When a node dies the run fails with its name and its roles; rows brought so far and the other node's stay."""
    doomed = cluster.start(cluster.servers, "doomed-node", "doomed")
    config = write_config(
        {
            "train": [TRAIN],
            "infer": [SERVICES],
            "arms": ["corun"],
            "duration_s": 15,
            "port": free_port(2),
            "launch": {**_launch(cluster, server="doomed"), "collect_s": 1},
        }
    )
    program = _main(start, cluster, config, tmp_path / "result", "--no-report")
    run = _in_a_window(tmp_path / "result")
    wait_until(lambda: (run / "train.csv").exists() and len(_rows(run / "train.csv")) > 1)
    cluster.kill(doomed)
    assert program.wait() == 1, program.output()
    assert "Traceback" not in program.output()
    manifest = _manifest(run)
    assert manifest["status"] == "failed"
    for role in ("server null on node doomed-node", "trainer squeezenet1_1_8 on node doomed-node"):
        assert any(role in fault for fault in manifest["faults"]), manifest["faults"]
    assert "was lost" in manifest["nodes"]["doomed-node"]["lost"]
    assert {row["status"] for row in _rows(run / "infer_client" / "null.csv")} >= {"OK"}
    assert _rows(run / "infer_server" / "null.csv")
    assert len(_rows(run / "train.csv")) > 1
    assert _rows(run / "nodes" / "clients-node" / "process.csv")
    assert _rows(run / "summary.csv")
    assert not _left(run)


def test_ctrl_c_stops_every_node(
    cluster: Cluster, start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """One Ctrl-C drains, brings the rows and ends the processes of all nodes; kill -9 ends them too."""
    config = write_config(
        {"train": [], "infer": [SERVICES], "duration_s": 600, "port": free_port(2), "launch": _launch(cluster)}
    )
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        root = tmp_path / number.name
        program = _main(start, cluster, config, root, "--no-report")
        run = _in_a_window(root)
        program.signal(number)
        assert program.wait() == code, program.output()
        wait_until(lambda run=run: not _left(run))
        if number == signal.SIGINT:
            assert _manifest(run)["status"] == "interrupted"
            assert _rows(run / "infer_server" / "null.csv") or _rows(run / "infer_client" / "null.csv") == []


def test_what_cannot_be_had_is_refused_with_its_reason(
    cluster: Cluster, start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """A sharing policy across nodes, a label nobody has and an address nobody answers at end in one clear error."""
    cell = {"train": [TRAIN], "infer": [SERVICES], "arms": ["corun"], "duration_s": 1, "port": free_port(2)}
    nobody = {**_launch(cluster), "address": f"{cluster.clients.address}:1"}
    for more, words in (
        (
            {"sharing": "nice", "launch": _launch(cluster, trainer="clients")},
            ["nice: trainer and services", "one node"],
        ),
        ({"launch": _launch(cluster, client="users")}, ["client: no node has label role=users", "servers-node ("]),
        ({"launch": nobody}, ["no Ray cluster answers", "ray start --head"]),
    ):
        program = _main(start, cluster, write_config({**cell, **more}), tmp_path / words[0][:4], "--no-report")
        assert program.wait() == 1, program.output()
        said = " ".join(program.output().split())
        assert "Traceback" not in said
        for word in words:
            assert word in said


def test_servers_and_clients_by_hand(cluster: Cluster, start: Start, free_port: Ports, tmp_path: Path) -> None:
    """multi_server.py and multi_client.py with the same `--launch` meet on the nodes it names."""
    launch, port = json.dumps(_launch(cluster)), free_port(2)
    shared = {"prefix": cluster.clients.prefix, **cluster.environment}
    words = ("--models", "null", "null", "--port", port, "--launch", launch, "--out", tmp_path / "servers")
    servers = start("multi_server.py", *words, **shared)
    wait_until(lambda: "2 servers starting" in servers.output())
    words = ("--models", "null", "--rates", 30, "--duration", 1, "--port", port, "--launch", launch)
    clients = start("multi_client.py", *words, "--out", tmp_path / "result", **shared)
    assert clients.wait() == 0, clients.output()
    servers.signal(signal.SIGINT)
    assert servers.wait() == 0, servers.output()
    (asked,) = (_rows(path) for path in (tmp_path / "result").glob("*/*/infer_client/null.csv"))
    served = _rows(tmp_path / "servers" / "infer_server" / "null.csv")
    assert [row["id"] for row in asked] == [row["id"] for row in served] != []
    late = [int(mine["s_tx_ns"]) - int(theirs["s_tx_ns"]) for mine, theirs in zip(asked, served, strict=True)]
    assert max(map(abs, late)) < S


REPLICAS = """
import json, os, sys, time
from pathlib import Path
from corun.launch.ray_runtime import RayRuntime
from corun.run import config
from corun.tasks.runtime import ReplicaSpec

launch = config.parse({"launch": json.loads(sys.argv[1])}).launch
runtime = RayRuntime(launch)
spec = ReplicaSpec("task", 0, "null", None, int(sys.argv[2]), Path("unused.log"))
handle = runtime.start(spec)
while not handle.healthy():
    assert handle.alive(), handle.how_it_ended()
    time.sleep(0.1)
print(handle.address, handle.how_it_ended(), handle.usage().rss_mib > 1, "null" in handle.logs(), flush=True)
handle.stop(10.0)
print(handle.alive(), handle.how_it_ended(), flush=True)
second = runtime.start(spec)
second.kill()
print(second.how_it_ended(), flush=True)
runtime.close()
"""


def test_replicas_of_the_control_plane_run_on_nodes(cluster: Cluster, free_port: Ports) -> None:
    """A replica on another node is started, watched, stopped and killed as the runtime `process` does it here."""
    done = subprocess.run(
        [*cluster.clients.prefix, sys.executable, "-c", REPLICAS, json.dumps(_launch(cluster)), str(free_port())],
        env={**os.environ, **cluster.environment, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    running, stopped, killed = done.stdout.splitlines()
    assert running.startswith(cluster.servers.address)
    assert running.endswith("is running True True")
    assert stopped.startswith("False exited with 0")
    assert killed == "was killed by SIGKILL"


def test_tasks_are_served_on_the_nodes(cluster: Cluster, start: Start, tmp_path: Path) -> None:
    """`tasks.py up --launch` keeps the replicas on the placed node; they are asked through the router here."""
    environment = {**cluster.environment, "CORUN_TASKS": str(tmp_path / "tasks.sqlite")}
    shared = {"prefix": cluster.clients.prefix, **environment}

    def tasks(*words: object) -> str:
        done = start("tasks.py", *words, **shared)
        assert done.wait() == 0, done.output()
        return done.output()

    tasks("register", "echo", "--kind", "null", "--model", "null")
    supervisor = start("tasks.py", "up", "--launch", json.dumps(_launch(cluster)), **shared)
    wait_until(lambda: '"state": "ready"' in tasks("status", "--json") or supervisor.popen.poll() is not None)
    assert "OK" in tasks("infer", "echo"), supervisor.output()
    assert cluster.servers.address in tasks("status", "--json")
    tasks("down")
    assert supervisor.wait() == 0, supervisor.output()
