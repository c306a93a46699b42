"""Rules of src/profiler.py as a process: rows, stop signals, sudden death, control and a real NVML library."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corun.clock import NS_PER_S, now_ns
from corun.profile.tables import PROCESS, PROFILE
from corun.run.records import names
from corun.wire.channel import Channel
from corun.wire.messages import Arm, Drain, Hello, Start, Stats, Stop
from corun.wire.sockets import Address, listen

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, str(ROOT / "src" / "profiler.py")]
PATIENCE_S = 180.0


def start(out: Path, *flags: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """The profiler as a child, with a short period."""
    command = [*PROGRAM, "--out", str(out), "--period", "0.05", *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | (environment or {})
    )


def table(path: Path) -> list[dict[str, str]]:
    """A CSV file as rows of text; a row that is not whole has a None in it."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def until(condition: Callable[[], Any]) -> None:
    """Wait for something another process does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def ticks(out: Path) -> int:
    """Rows of profile.csv so far."""
    path = out / "profile.csv"
    return len(table(path)) if path.exists() else 0


def finish(child: subprocess.Popen[str]) -> str:
    """What the child printed, once it has ended."""
    return child.communicate(timeout=PATIENCE_S)[0]


def test_three_ticks_by_hand(tmp_path: Path) -> None:
    """--count 3 writes three rows of each table, says what is there and where the files are, and ends with 0."""
    child = start(tmp_path, "--count", "3", "--pid", f"server:me={os.getpid()}")
    printed = finish(child)
    assert child.returncode == 0, printed
    rows = table(tmp_path / "profile.csv")
    assert list(rows[0])[: len(PROFILE)] == list(names(PROFILE))
    numbers = [int(row["tick"]) for row in rows]
    assert len(numbers) == 3
    assert numbers[-1] == 2 + sum(int(row["missed"]) for row in rows)
    assert all(int(row["cpu_user_ns"]) > 0 for row in rows)
    processes = table(tmp_path / "process.csv")
    assert list(processes[0]) == list(names(PROCESS))
    assert {row["role"] for row in processes} >= {"server", "profiler"}
    own = [row for row in processes if row["role"] == "profiler"]
    assert [row["pid"] for row in own] == [str(child.pid)] * 3
    assert "cpu: available" in printed
    assert str(tmp_path) in printed.splitlines()[-1]


def test_sigterm_stops_cleanly(tmp_path: Path) -> None:
    """A polite stop ends with code 0, whole rows and a stop event."""
    child = start(tmp_path)
    until(lambda: ticks(tmp_path) >= 2)
    child.terminate()
    printed = finish(child)
    assert child.returncode == 0, printed
    assert all(None not in row.values() for row in table(tmp_path / "profile.csv"))
    assert table(tmp_path / "events.csv")[-1]["detail"] == "stop signal"


def test_sudden_death_leaves_whole_rows(tmp_path: Path) -> None:
    """kill -9 loses nothing that was written: each file ends with a whole row and a line end."""
    child = start(tmp_path)
    until(lambda: ticks(tmp_path) >= 3)
    child.send_signal(signal.SIGKILL)
    finish(child)
    assert child.returncode == -signal.SIGKILL
    for name in ("profile.csv", "process.csv"):
        assert (tmp_path / name).read_bytes().endswith(b"\n")
        rows = table(tmp_path / name)
        assert len(rows) >= 3
        assert all(None not in row.values() for row in rows)


def test_the_launchers_file_and_messages_steer_it(tmp_path: Path) -> None:
    """HELLO first; rows inside the armed window carry the arm; processes named later are followed; STOP ends it."""
    listener = listen(Address.parse(f"unix:{tmp_path}/control"))
    watch = tmp_path / "processes.jsonl"
    child = start(tmp_path, "--control", f"unix:{tmp_path}/control", "--watch", str(watch))
    listener.settimeout(PATIENCE_S)
    channel = Channel(listener.accept()[0])
    received = channel.receive(PATIENCE_S)
    assert received is not None
    header, hello = received
    assert isinstance(hello, Hello)
    assert (hello.role, hello.pid) == ("profiler", child.pid)
    channel.reply(header)
    watch.write_text(f'{{"pid": {os.getpid()}, "role": "launcher", "name": "test"}}\n')
    until(lambda: ticks(tmp_path) >= 1)
    begin = now_ns() + 100_000_000
    assert channel.request(Arm("corun", 1, 3, begin, begin + 600 * NS_PER_S)) == {"ready": True}
    channel.request(Start(3))
    started = now_ns()
    until(lambda: [row["arm"] for row in table(tmp_path / "profile.csv")].count("corun") >= 3)
    until(lambda: "launcher" in (tmp_path / "process.csv").read_text())
    drained = now_ns()
    assert channel.request(Drain())["missed"] >= 0
    over, seen = now_ns(), ticks(tmp_path)
    until(lambda: ticks(tmp_path) > seen + 1)
    assert channel.request(Stats())["ticks"] >= 6
    assert channel.request(Stop())["ticks"] >= 6
    printed = finish(child)
    assert child.returncode == 0, printed
    rows = table(tmp_path / "profile.csv")
    labels = {(row["arm"], row["repeat"], row["segment"]) for row in rows}
    assert labels == {("corun", "1", "3"), ("idle", "", "")}
    armed = [int(row["t_ns"]) for row in rows if row["arm"] == "corun"]
    idle = [int(row["t_ns"]) for row in rows if row["arm"] == "idle"]
    assert all(begin <= t_ns < over for t_ns in armed)
    assert not [t_ns for t_ns in idle if max(begin, started) <= t_ns < drained]
    assert min(idle) < begin
    assert max(idle) > drained
    assert "launcher" in {row["role"] for row in table(tmp_path / "process.csv")}
    channel.close()
    listener.close()


def test_it_dies_with_its_launcher(tmp_path: Path) -> None:
    """With --control the profiler is a child that does not outlive its parent."""
    listener = listen(Address.parse(f"unix:{tmp_path}/control"))
    command = [*PROGRAM, "--out", str(tmp_path), "--control", f"unix:{tmp_path}/control"]
    code = f"import subprocess, time; print(subprocess.Popen({command!r}).pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    listener.settimeout(PATIENCE_S)
    peer, _ = listener.accept()
    parent.kill()
    parent.wait()
    pidless = Path(f"/proc/{pid}/stat")
    until(lambda: not pidless.exists() or pidless.read_text().rpartition(")")[2].split()[0] == "Z")
    parent.stdout.close()
    peer.close()
    listener.close()


def test_mistakes_are_one_message_and_code_2(tmp_path: Path) -> None:
    """Bad flags end before anything is made: every mistake listed, no traceback."""
    (tmp_path / "device.json").write_text('{"readings": [{"colum": "a"}]}')
    child = start(tmp_path / "out", "--device-file", str(tmp_path / "device.json"), "--count", "1")
    printed = finish(child)
    assert child.returncode == 2
    assert "readings[0].colum: unknown key" in printed
    assert "readings[0].path: is missing" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out" / "profile.csv").exists()


def test_it_stays_a_light_process() -> None:
    """The profiler is measured itself: no pydantic, numpy, torch or pandas is loaded to sample."""
    code = "import sys; sys.path.insert(0, 'src'); import corun.profile.session; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"pydantic", "numpy", "torch", "pandas", "psutil", "matplotlib"}


STUB = """
#include <string.h>
typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } process_t;
typedef struct { unsigned pid; unsigned long long stamp; unsigned sm, mem, enc, dec; } sample_t;
static unsigned long long energy = 1000;
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)1; return 0; }
int nvmlDeviceGetName(void *device, char *name, unsigned size) { strncpy(name, "Stub", size); return 0; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *mw) { *mw = 123456; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *mj) { *mj = energy += 10; return 0; }
int nvmlDeviceGetUtilizationRates(void *device, unsigned rates[2]) { rates[0] = 70; rates[1] = 30; return 0; }
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process_t *out) {
  if (!out) { *count = 1; return 7; }
  out[0].pid = PID; out[0].used = 1 << 20; *count = 1; return 0;
}
int nvmlDeviceGetProcessUtilization(void *d, sample_t *out, unsigned *count, unsigned long long since) { return 3; }
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to build a library that stands in for NVML")
def test_a_real_shared_library_is_loaded_and_read(tmp_path: Path) -> None:
    """Through the dynamic loader, in a child: what the library has is read, what it lacks is named and empty."""
    source = tmp_path / "stub.c"
    source.write_text(STUB.replace("PID", str(os.getpid())))
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", str(library), str(source)], check=True)
    out = tmp_path / "out"
    flags = ("--count", "3", "--pid", f"trainer:me={os.getpid()}")
    child = start(out, *flags, environment={"LD_LIBRARY_PATH": str(tmp_path)})
    printed = finish(child)
    assert child.returncode == 0, printed
    assert "nvml: available" in printed
    rows = table(out / "gpu.csv")
    assert [(row["gpu"], row["power_mw"], row["util_gpu_pct"]) for row in rows] == [("0", "123456", "70")] * 3
    energies = [int(row["energy_mj"]) for row in rows]
    assert energies == sorted(set(energies))
    assert {(row["mem_used_mib"], row["temp_c"], row["pcie_tx_bytes"]) for row in rows} == {("", "", "")}
    [mine, *_] = [row for row in table(out / "process.csv") if row["role"] == "trainer"]
    assert (mine["gpu_attr"], mine["gpu_sm_pct"], mine["gpu_mem_mib"]) == ("exclusive", "70", "1.0")
