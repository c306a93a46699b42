"""Scheduling-group borders, the start wrapper and what is read back, on a fake machine and on this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun.errors import InputError, RunFault
from corun.share.borders import (
    AUTOGROUP_ENABLED,
    Border,
    border_between,
    cpu_cgroup,
    cross,
    group_of,
    set_autogroup_nice,
)
from corun.share.host import IDLE_CLASS, Host
from corun.share.observed import observe
from corun.share.start import Setup, apply, parse
from corun.testing.host import FakeHost

V1 = "9:name=systemd:/\n4:memory:/user\n1:cpu,cpuacct:{}\n0::/\n"
V2 = "0::{}\n"
SERVICE, TRAINER = 10, 20


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """A machine with autogroup on, both processes in the root cgroup and one session."""
    machine = FakeHost(tmp_path, {SERVICE: [10, 11], TRAINER: [20, 21, 22]})
    machine.put(AUTOGROUP_ENABLED, "1\n")
    for pid in (SERVICE, TRAINER):
        machine.put(f"proc/{pid}/cgroup", V1.format("/"))
        machine.put(f"proc/{pid}/autogroup", "/autogroup-7 nice 0\n")
    return machine


def test_one_session_and_one_cgroup_have_no_border(host: FakeHost) -> None:
    """Siblings of one launcher share a scheduling group."""
    assert border_between(SERVICE, TRAINER, host) is None
    assert group_of(SERVICE, host).autogroup == "/autogroup-7"


def test_a_new_session_is_a_border_while_autogroup_is_on(host: FakeHost) -> None:
    """Another autogroup is a border, unless autogroup is switched off."""
    host.put(f"proc/{TRAINER}/autogroup", "/autogroup-9 nice 0\n")
    border = border_between(SERVICE, TRAINER, host)
    assert border is not None
    assert border.kind == "autogroup"
    host.put(AUTOGROUP_ENABLED, "0\n")
    assert border_between(SERVICE, TRAINER, host) is None


def test_autogroups_do_not_count_inside_a_cgroup(host: FakeHost) -> None:
    """Below the root cgroup the kernel has no autogroups: sessions are no border there."""
    host.put(f"proc/{TRAINER}/autogroup", "/autogroup-9 nice 0\n")
    for pid in (SERVICE, TRAINER):
        host.put(f"proc/{pid}/cgroup", V2.format("/box"))
    assert border_between(SERVICE, TRAINER, host) is None


@pytest.mark.parametrize(("text", "expected"), [(V1, ("/a", 1)), (V2, ("/a", 2)), ("1:name=systemd:/\n{}", ("", 0))])
def test_the_cpu_controllers_cgroup_is_found(host: FakeHost, text: str, expected: tuple[str, int]) -> None:
    """v1 names the controller, v2 has one line for all; a kernel that says nothing gives nothing."""
    host.put("proc/30/cgroup", text.format("/a"))
    assert cpu_cgroup(30, host) == expected


def test_an_autogroup_border_is_crossed_by_its_nice_value(host: FakeHost) -> None:
    """The trainer's whole autogroup gets nice 19; where that is forbidden the border says why."""
    border = Border("autogroup", "x")
    crossed = cross(border, TRAINER, host)
    assert crossed.crossed
    assert host.read(f"proc/{TRAINER}/autogroup") == "19"
    (host.root / f"proc/{TRAINER}/autogroup").unlink()
    failed = cross(border, TRAINER, host)
    assert failed.crossed is None
    assert "NOT crossed" in failed.sentence()


def test_writing_an_autogroup_is_tried_again(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's limit of ten writes a second is waited out, a few times."""
    tries: list[int] = []

    def busy_once(path: str, text: str) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise BlockingIOError

    monkeypatch.setattr(host, "write", busy_once)
    set_autogroup_nice(TRAINER, 19, host)
    assert len(tries) == 2


@pytest.mark.parametrize(
    ("file", "done"), [("cpu.idle", "cpu.idle=1"), ("cpu.weight", "cpu.weight=1"), ("cpu.shares", "cpu.shares=2")]
)
def test_a_cgroup_border_is_crossed_where_the_trainer_is_alone(host: FakeHost, file: str, done: str) -> None:
    """The trainer's own cgroup becomes idle, or as light as the kernel allows."""
    host.put(f"proc/{TRAINER}/cgroup", V2.format("/box/train"))
    host.put("sys/fs/cgroup/box/train/cgroup.procs", f"{TRAINER}\n")
    host.put(f"sys/fs/cgroup/box/train/{file}", "0")
    border = border_between(SERVICE, TRAINER, host)
    assert border is not None
    assert border.kind == "cgroup"
    assert done in (cross(border, TRAINER, host).crossed or "")


def test_other_peoples_cgroups_are_left_alone(host: FakeHost) -> None:
    """A cgroup that holds anybody else is not slowed down, and one that is not there is said to be so."""
    border = Border("cgroup", "x")
    host.put(f"proc/{TRAINER}/cgroup", V2.format("/box"))
    assert "not visible" in cross(border, TRAINER, host).sentence()
    host.put("sys/fs/cgroup/box/cgroup.procs", f"{TRAINER}\n99\n")
    host.put("sys/fs/cgroup/box/cpu.idle", "0")
    assert "other processes" in cross(border, TRAINER, host).sentence()
    assert host.read("sys/fs/cgroup/box/cpu.idle") == "0"
    host.put("sys/fs/cgroup/box/cgroup.procs", f"{TRAINER}\n")
    (host.root / "sys/fs/cgroup/box/cpu.idle").unlink()
    assert "cannot be made light" in cross(border, TRAINER, host).sentence()


def test_a_process_is_seen_with_its_children(host: FakeHost) -> None:
    """Loader workers of the trainer belong to it; a process that is gone is said to be gone."""
    host.add_process(TRAINER, [20, 21], children=[30])
    host.add_process(30, [30, 31])
    assert host.descendants_of(TRAINER) == [20, 30]
    assert host.all_threads_of(TRAINER) == [20, 21, 22, 30, 31]
    with pytest.raises(ProcessLookupError):
        host.all_threads_of(77)


def test_what_is_in_force_is_counted_by_thread(host: FakeHost) -> None:
    """A thread that was missed shows: values that differ are counted."""
    host.put(f"proc/{TRAINER}/environ", "OMP_WAIT_POLICY=PASSIVE\0HOME=/x\0CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=40\0")
    for tid in (20, 21):
        host.set_class(tid, IDLE_CLASS)
    found = observe(TRAINER, host)
    assert found["class"] == {"SCHED_IDLE": 2, "SCHED_OTHER": 1}
    assert found["nice"] == "0"
    assert found["autogroup_nice"] == 0
    assert found["environment"] == {"OMP_WAIT_POLICY": "PASSIVE", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "40"}
    assert observe(77, host) == {}


setups = st.builds(
    Setup,
    nice=st.none() | st.integers(-20, 19),
    idle=st.booleans(),
    cores=st.lists(st.integers(0, 500), max_size=4, unique=True).map(tuple),
    cgroup=st.none() | st.just("/sys/fs/cgroup/a b"),
    autogroup_nice=st.none() | st.integers(0, 19),
    data_limit_mib=st.none() | st.integers(1, 10**6),
)


@given(
    setups, st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=4).filter(lambda words: words[-1] != "--")
)
def test_a_setup_survives_its_command_line(setup: Setup, command: list[str]) -> None:
    """What the wrapper is told is what it does, whatever stands behind the divider."""
    argv = setup.command(command)
    if not setup.flags():
        assert argv == command
        return
    assert argv[:3] == [sys.executable, "-m", "corun.share.start"]
    assert parse(argv[3:]) == (setup, command)


@given(setups, setups)
def test_merging_keeps_what_either_says(one: Setup, other: Setup) -> None:
    """The other's word wins; what it leaves open stays."""
    both = one.merged(other)
    assert both.nice == (one.nice if other.nice is None else other.nice)
    assert both.idle == (one.idle or other.idle)
    assert both.cores == (other.cores or one.cores)


@pytest.mark.parametrize(
    "argv", [[], ["--idle"], ["--idle", "--"], ["--what", "1", "--", "ls"], ["--nice", "x", "--", "ls"]]
)
def test_a_bad_wrapper_line_is_explained(argv: list[str]) -> None:
    """No command, unknown flags and bad numbers are bad input."""
    with pytest.raises(InputError):
        parse(argv)


def test_what_the_kernel_refuses_is_a_fault(host: FakeHost) -> None:
    """A setup that cannot be had does not start the command without it."""
    host.forbidden = frozenset({"set_class"})
    with pytest.raises(RunFault, match="SCHED_IDLE"):
        apply(Setup(idle=True), host)
    with pytest.raises(RunFault, match="cgroup"):
        apply(Setup(cgroup="/nowhere"), host)


def _started(setup: Setup, code: str) -> str:
    source = str(Path(__file__).resolve().parents[3] / "src")
    argv = setup.command([sys.executable, "-I", "-S", "-c", code])
    environment = {**os.environ, "PYTHONPATH": source}
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.timeout(900)
def test_a_wrapped_process_has_the_setup_in_every_thread() -> None:
    """On this machine: class, nice, cores and memory limit hold in the command and in threads it makes.

    Beside busy neighbours SCHED_IDLE gets a thousandth of its core: a short program, and much patience.
    """
    core = Host().cores[-1]
    code = (
        "import os, threading, resource; out = []\n"
        "def look(): out.append((os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)))\n"
        "thread = threading.Thread(target=look); thread.start(); thread.join(); look()\n"
        "print(out[0] == out[1], *out[0], resource.getrlimit(resource.RLIMIT_DATA)[0] >> 20)"
    )
    setup = Setup(nice=7, idle=True, cores=(core,), data_limit_mib=4096)
    assert _started(setup, code) == f"True {os.SCHED_IDLE} 7 {{{core}}} 4096"


def test_a_command_that_is_not_there_is_bad_input() -> None:
    """The wrapper names a command it cannot start and exits with 2."""
    argv = Setup(nice=1).command(["/no/such/program"])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3] / "src")}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "/no/such/program" in done.stderr
    assert "Traceback" not in done.stderr


def test_this_process_is_observed() -> None:
    """The real /proc gives the state of this very process."""
    found = observe(os.getpid(), Host())
    assert found["threads"] >= 1
    assert "SCHED_" in str(found["class"])


def test_commands_that_fail_say_why(tmp_path: Path) -> None:
    """A failing or missing command raises OSError with its last line."""
    host = Host()
    assert host.command(["sh", "-c", "read x; echo $x$A"], {"A": "1"}, stdin="in\n").strip() == "in1"
    with pytest.raises(OSError, match="ended with 3: no"):
        host.command(["sh", "-c", "echo no >&2; exit 3"])
    with pytest.raises(FileNotFoundError):
        host.command([str(tmp_path / "missing")])


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12",
            (550, 54, 15),
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build", (580, 95, 5)),
        ("no version here", None),
    ],
)
def test_the_drivers_version_is_read(host: FakeHost, text: str, version: tuple[int, ...] | None) -> None:
    """/proc/driver/nvidia/version of both kernel modules; nothing on a machine without one."""
    assert host.driver_version is None
    host.put("proc/driver/nvidia/version", text)
    assert host.driver_version == version
