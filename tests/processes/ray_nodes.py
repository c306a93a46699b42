"""A Ray cluster of several nodes on this machine: in network namespaces where they can be had, else on the loopback.

Where namespaces can be had the second node also gets a monotonic clock of its own, so that what is said about clocks
is tested against a known offset. On the loopback the nodes are 127.0.0.2 and 127.0.0.3: Ray takes 127.0.0.1 for a
machine that cannot have a second node. Everything is ended by process group and namespace: other people's clusters stay.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes.tools import wait_until

RAY = Path(sys.executable).parent / "ray"
AHEAD_S = 5000
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True)
class Spot:
    """Where a node runs: the words before its command line, its address, how far its clock is ahead."""

    prefix: tuple[str, ...]
    address: str
    ahead_s: int = 0
    namespace: str = ""


@dataclass
class Cluster:
    """Nodes that were started; `clients` holds the head, `servers` the second spot."""

    clients: Spot
    servers: Spot
    port: int
    environment: dict[str, str]
    folder: Path
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.clients.address}:{self.port}"

    def start(self, spot: Spot, name: str, role: str, head: bool = False) -> subprocess.Popen[bytes]:
        """Start a node and wait until it says that it runs; its process group is its own."""
        joining = (
            ["--head", "--port", str(self.port), "--include-dashboard=false", "--temp-dir", str(self.folder)]
            if head
            else ["--address", self.address]
        )
        own_clock = ["unshare", "--time", "--monotonic", str(spot.ahead_s), "--fork"] if spot.ahead_s else []
        # fmt: off
        command = [
            *spot.prefix, *own_clock, str(RAY), "start", "--block", *joining, "--node-ip-address", spot.address,
            "--node-name", name, "--labels", f"role={role}", "--num-cpus", "1", "--object-store-memory", "80000000",
            "--disable-usage-stats",
        ]
        # fmt: on
        log = self.folder / f"{name}.log"
        with open(log, "wb") as output:
            node = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        self.running.append(node)
        wait_until(lambda: node.poll() is not None or b"Ray runtime started" in log.read_bytes(), 300)
        assert node.poll() is None, log.read_text()
        return node

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """End a node as a power cut does: all of Ray's processes of it at once."""
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def close(self) -> None:
        for node in reversed(self.running):
            self.kill(node)
        for spot in (self.clients, self.servers):
            if spot.namespace:
                _end_namespace(spot.namespace)
        shutil.rmtree(self.folder, ignore_errors=True)


def make_cluster(free_port: int) -> Cluster:
    """Two running nodes, `role=clients` (the head) and `role=servers`."""
    spots = _namespaces() or (Spot((), "127.0.0.2"), Spot((), "127.0.0.3"))
    folder = Path(tempfile.mkdtemp(prefix="cr-", dir="/tmp"))
    cluster = Cluster(*spots, free_port, ENVIRONMENT | {"TMPDIR": str(folder)}, folder)
    try:
        cluster.start(cluster.clients, "clients-node", "clients", head=True)
        cluster.start(cluster.servers, "servers-node", "servers")
    except BaseException:
        cluster.close()
        raise
    return cluster


def _namespaces() -> tuple[Spot, Spot] | None:
    """Two network namespaces joined by a virtual cable, or None where this user cannot have them."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        return None
    names = [f"corun-{os.getpid()}-{end}" for end in "ab"]
    cables = [f"cr{os.getpid()}{end}" for end in "ab"]
    addresses = ["10.213.7.1", "10.213.7.2"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        for name, cable, address in zip(names, cables, addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            for device in ("lo", cable):
                _ip("-n", name, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError):
        for name in names:
            _end_namespace(name)
        return None
    ahead = [0, AHEAD_S if _can_set_clocks() else 0]
    first, second = (
        Spot(("ip", "netns", "exec", name), address, ahead_s, name)
        for name, address, ahead_s in zip(names, addresses, ahead, strict=True)
    )
    return first, second


def _can_set_clocks() -> bool:
    words = ("unshare", "--time", "--monotonic", "1", "--fork", "true")
    return bool(shutil.which("unshare")) and subprocess.run(words, capture_output=True).returncode == 0


def _end_namespace(name: str) -> None:
    """Kill what still runs in a namespace of ours and remove it."""
    pids = subprocess.run(("ip", "netns", "pids", name), capture_output=True, text=True).stdout.split()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    time.sleep(0.1 if pids else 0.0)
    subprocess.run(("ip", "netns", "del", name), capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True, capture_output=True)


def command_lines(words: Sequence[str]) -> list[str]:
    """Command lines of running processes that contain all of `words`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            text = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if all(word in text for word in words):
                found.append(text)
    return found
