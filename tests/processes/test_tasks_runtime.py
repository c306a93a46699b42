"""Replicas as processes and as containers: real servers, real limits, a real container engine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.processes.engine import BASE_IMAGE, TEST_S, engine_host
from tests.processes.tools import ROOT, is_running, wait_until

from corun.errors import InputError, RunFault
from corun.tasks.docker_runtime import DockerRuntime, Source
from corun.tasks.process_runtime import ProcessRuntime
from corun.tasks.runtime import Handle, Limits, ReplicaSpec, Runtime
from corun.testing.ask import Asker
from corun.testing.host import FakeHost

pytestmark = pytest.mark.timeout(TEST_S)


@pytest.fixture(scope="module")
def docker_host() -> Iterator[str]:
    """The engine of this module's tests, as DOCKER_HOST."""
    with pytest.MonkeyPatch.context() as patch:
        host = engine_host()
        patch.setenv("DOCKER_HOST", host)
        yield host


@pytest.fixture
def containers(docker_host: str, tmp_path: Path) -> Iterator[DockerRuntime]:
    """A runtime for containers with this checkout; whatever it started is gone afterwards."""
    runtime = DockerRuntime(Source.checkout(BASE_IMAGE), owner=str(tmp_path))
    yield runtime
    runtime.sweep()
    runtime.close()


@pytest.fixture
def spec(tmp_path: Path, free_port: Callable[..., int]) -> Callable[..., ReplicaSpec]:
    """A replica of the null model; keywords replace its settings."""

    def make(**values: object) -> ReplicaSpec:
        settings: dict[str, object] = {
            "task_id": "t",
            "index": 0,
            "model": "null",
            "weights": None,
            "port": free_port(),
            "log_path": tmp_path / "replica.log",
        }
        return ReplicaSpec(**{**settings, **values})  # type: ignore[arg-type]

    return make


@pytest.fixture
def started() -> Iterator[Callable[[Runtime, ReplicaSpec], Handle]]:
    """Start a replica and wait until it is healthy; it is killed afterwards."""
    handles: list[Handle] = []

    def start(runtime: Runtime, spec: ReplicaSpec) -> Handle:
        handle = runtime.start(spec)
        handles.append(handle)
        wait_until(lambda: handle.healthy(5.0) or not handle.alive())
        assert handle.alive(), handle.how_it_ended()
        return handle

    yield start
    for handle in handles:
        handle.kill()


Start = Callable[[Runtime, ReplicaSpec], Handle]
Spec = Callable[..., ReplicaSpec]


def _answers(handle: Handle) -> bytes:
    with Asker(handle.address) as asker:
        answer = asker.ask(b"anything")
    assert answer.status == 0
    return answer.payload


def test_a_process_replica_lives_and_ends_as_its_handle_says(spec: Spec, started: Start) -> None:
    """A started process becomes healthy, answers, is counted, and after stop is gone with its log kept."""
    handle = started(ProcessRuntime(), spec(model="null:reply_bytes=7"))
    assert _answers(handle) == bytes(7)
    usage = handle.usage()
    assert usage.cpu_s > 0
    assert usage.rss_mib is not None
    assert usage.rss_mib > 5
    assert handle.pid is not None
    assert os.getpgid(handle.pid) == handle.pid
    handle.stop()
    assert not handle.alive()
    assert not handle.healthy(0.2)
    assert not is_running(handle.pid)
    assert handle.how_it_ended().startswith("exited with 0")
    assert "1 completed" in handle.logs()
    assert handle.logs(1).count("\n") == 0


def test_a_stop_lets_a_replica_finish_and_a_kill_does_not(spec: Spec, started: Start) -> None:
    """stop is SIGTERM first: the server counts what it finished; kill is SIGKILL and says so."""
    handle = started(ProcessRuntime(), spec())
    handle.kill()
    assert handle.how_it_ended() == "was killed by SIGKILL"
    handle.stop()
    assert handle.usage().rss_mib == 0


def test_a_replica_that_cannot_start_says_why(spec: Spec) -> None:
    """The error a server prints is the end of its handle's sentence; a later start of the same log does not see it."""
    runtime = ProcessRuntime()
    handle = runtime.start(spec(model="null:nonsense=1"))
    wait_until(lambda: not handle.alive())
    assert handle.how_it_ended().startswith("exited with 2: error:")
    assert "nonsense" in handle.how_it_ended()
    again = runtime.start(spec())
    again.kill()
    assert "nonsense" not in again.how_it_ended()


def test_health_is_the_replicas_own(spec: Spec, started: Start) -> None:
    """A replica is not healthy because another server answers at its port."""
    runtime = ProcessRuntime()
    first = started(runtime, spec())
    second = runtime.start(spec(port=first.spec.port))
    assert not second.healthy(5.0)
    wait_until(lambda: not second.alive())
    assert "cannot listen" in second.how_it_ended()


def test_the_replica_dies_with_its_supervisor(spec: Spec, tmp_path: Path) -> None:
    """When the process that started a replica is killed, the replica does not outlive it."""
    settings = spec()
    code = (
        "import sys, time; from pathlib import Path; from corun.tasks.process_runtime import ProcessRuntime\n"
        "from corun.tasks.runtime import ReplicaSpec\n"
        f"h = ProcessRuntime().start(ReplicaSpec('t', 0, 'null', None, {settings.port}, Path({str(tmp_path / 'l')!r})))\n"
        "while not h.healthy(): time.sleep(0.05)\n"
        "print(h.pid, flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert parent.stdout is not None
        with parent.stdout:
            pid = int(parent.stdout.readline())
        assert is_running(pid)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not is_running(pid))


def _may_make_groups() -> bool:
    from corun.share.host import Host
    from corun.tasks.cgroups import _place

    return all(_place(Host(), controller, os.getpid()) for controller in ("cpu", "memory"))


def test_the_kernel_holds_a_process_replica_to_its_limits(spec: Spec, started: Start) -> None:
    """Where cgroups may be made a replica stands in groups with its cores and memory, which go when it ends."""
    if not _may_make_groups():
        pytest.skip("this user may not make cgroups here")
    handle = started(ProcessRuntime(), spec(limits=Limits(cpu=0.5, memory_mib=300), nice=5))
    assert "0.5 cores (cgroup" in handle.limits_in_force["cpu"]
    assert "300 MiB (cgroup" in handle.limits_in_force["memory"]
    assert handle.pid is not None
    groups = Path(f"/proc/{handle.pid}/cgroup").read_text()
    assert f"corun-replica-{os.getpid()}-t-0" in groups
    assert os.getpriority(os.PRIO_PROCESS, handle.pid) == 5
    left = list(Path("/sys/fs/cgroup").glob(f"**/corun-replica-{os.getpid()}-*"))
    assert left
    handle.stop()
    assert not [path for path in left if path.exists()]


def test_a_replica_that_needs_more_memory_than_it_has_is_ended_by_its_limit(spec: Spec) -> None:
    """A limit too small for the program ends it, with the limit in the sentence where the kernel says so."""
    if not _may_make_groups():
        pytest.skip("this user may not make cgroups here")
    handle = ProcessRuntime().start(spec(limits=Limits(memory_mib=12)))
    wait_until(lambda: not handle.alive())
    ended = handle.how_it_ended()
    handle.kill()
    assert ended.startswith(("was killed by SIGKILL", "exited with"))
    if "SIGKILL" in ended:
        assert "more than its 12 MiB" in ended


def test_without_cgroups_a_process_limits_itself(spec: Spec, started: Start, tmp_path: Path) -> None:
    """Where no group may be made, cores are limited by affinity and memory by RLIMIT_DATA, and that is said."""
    runtime = ProcessRuntime(FakeHost(tmp_path, machine_cores=tuple(sorted(os.sched_getaffinity(0)))))
    handle = started(runtime, spec(limits=Limits(cpu=1, memory_mib=2000)))
    assert "by affinity" in handle.limits_in_force["cpu"]
    assert "RLIMIT_DATA" in handle.limits_in_force["memory"]
    assert handle.pid is not None
    assert len(os.sched_getaffinity(handle.pid)) == 1
    assert "2097152000" in next(
        line for line in Path(f"/proc/{handle.pid}/limits").read_text().splitlines() if line.startswith("Max data")
    )


def test_a_log_that_cannot_be_written_is_a_fault(spec: Spec, tmp_path: Path) -> None:
    """A log path below a file is refused with the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFault, match="cannot start t-0"):
        ProcessRuntime().start(spec(log_path=tmp_path / "file" / "replica.log"))


# Containers


def test_a_container_serves_within_its_limits_and_leaves_only_its_log(
    containers: DockerRuntime, spec: Spec, started: Start
) -> None:
    """A container answers over the wire, is counted, has the limits the engine was asked for, and is removed by stop."""
    handle = started(containers, spec(model="null:reply_bytes=9", limits=Limits(cpu=1, memory_mib=512)))
    assert _answers(handle) == bytes(9)
    usage = handle.usage()
    assert usage.cpu_s > 0
    assert usage.rss_mib
    container = containers._client.containers.get(handle.id)
    assert container.attrs["HostConfig"]["Memory"] == 512 << 20
    assert container.attrs["HostConfig"]["NanoCpus"] == 10**9
    assert container.labels["corun.task"] == "t"
    assert "null ready" in handle.logs()
    handle.stop()
    assert not handle.alive()
    assert handle.how_it_ended().startswith("exited with 0")
    assert "1 completed" in handle.logs()
    assert containers.sweep() == 0


def test_a_container_cannot_write_what_it_was_lent(containers: DockerRuntime, spec: Spec, started: Start) -> None:
    """The checkout and the host's Python are read-only inside."""
    handle = started(containers, spec())
    assert handle.pid is not None
    mounts = [line.split() for line in Path(f"/proc/{handle.pid}/mountinfo").read_text().splitlines()]
    options = {fields[4]: fields[5].split(",") for fields in mounts}
    for path in containers.source.mounts:
        assert "ro" in options[path], path


def test_a_killed_container_is_gone_and_says_so(containers: DockerRuntime, spec: Spec, started: Start) -> None:
    """Somebody else's kill shows as the end of the replica; kill removes what is left."""
    handle = started(containers, spec())
    containers._client.containers.get(handle.id).kill()
    wait_until(lambda: not handle.alive())
    assert not handle.healthy(0.2)
    assert "exited with 137" in handle.how_it_ended()
    handle.kill()
    handle.kill()
    assert containers.sweep() == 0


def test_a_container_that_cannot_start_says_why(containers: DockerRuntime, spec: Spec) -> None:
    """What a server prints before it ends is the reason of its container's handle."""
    handle = containers.start(spec(model="null:nonsense=1"))
    wait_until(lambda: not handle.alive())
    assert "nonsense" in handle.how_it_ended()
    handle.kill()
    assert "nonsense" in handle.how_it_ended()


def test_an_image_that_is_not_there_is_bad_input(docker_host: str, spec: Spec) -> None:
    """The user is told how to build the image."""
    source = Source("localhost/corun-no-such-image:0")
    with closing(DockerRuntime(source)) as runtime, pytest.raises(InputError, match="docker build"):
        runtime.start(spec())


def test_sweep_removes_only_its_owners_containers(containers: DockerRuntime, spec: Spec, started: Start) -> None:
    """What an earlier supervisor left is removed by its registry's name; others' containers stay."""
    handle = started(containers, spec())
    with closing(DockerRuntime(containers.source, owner="somebody else")) as other:
        assert other.sweep() == 0
    assert handle.alive()
    assert containers.sweep() == 1
    assert not handle.alive()
    assert handle.how_it_ended() == "was removed by somebody else"


def test_without_an_engine_the_runtime_says_where_it_looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No engine at DOCKER_HOST is bad input with the address."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(InputError, match="no container engine answers"):
        DockerRuntime()
