"""Replicas on paper: back-off, command lines, cgroups of a machine made of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError
from corun.tasks.cgroups import box
from corun.tasks.docker_runtime import DockerRuntime, Source
from corun.tasks.health import address_in
from corun.tasks.runtime import Backoff, Limits, ReplicaSpec, last_words, server_command, tail_of
from corun.tasks.runtimes import make_runtime
from corun.testing.host import FakeHost

ROOT = Path(__file__).resolve().parents[3]


def spec(**values: object) -> ReplicaSpec:
    """Replica 0 of task t."""
    given = {"task_id": "t", "index": 0, "model": "null", "weights": None, "port": 5000, "log_path": Path("log")}
    return ReplicaSpec(**{**given, **values})  # type: ignore[arg-type]


def test_quick_ends_wait_twice_as_long_each_time_up_to_the_most() -> None:
    """0.5, 1, 2 ... 30 s, in virtual time; an end after a stable life begins anew."""
    backoff, now, waits = Backoff(), 100.0, []
    for _ in range(9):
        backoff = backoff.ended(now, ran_s=1.0)
        waits.append(backoff.due_s - now)
        assert not backoff.due(now)
        now = backoff.due_s
        assert backoff.due(now)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert backoff.ended(now, ran_s=60.0).due_s == now + 0.5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=80), st.floats(0, 1e6))
def test_a_wait_is_never_less_than_the_first_nor_more_than_the_most(lives: list[float], now: float) -> None:
    """Whatever lives replicas lead, a restart comes within the limits of the back-off and never in the past."""
    backoff = Backoff()
    for ran_s in lives:
        backoff = backoff.ended(now, ran_s)
        assert 0.499 <= backoff.due_s - now <= 30.001
        now = backoff.due_s + ran_s


@pytest.mark.parametrize("given", [{"first_s": 0}, {"factor": 0.5}, {"most_s": 0.1}, {"stable_s": 0}])
def test_a_backoff_that_makes_no_sense_is_refused(given: dict[str, float]) -> None:
    """It could spin or wait for ever."""
    with pytest.raises(InputError, match="back-off"):
        Backoff(**given)  # type: ignore[arg-type]


def test_a_replica_is_a_command_a_person_could_type() -> None:
    """Model, options, place and limits stand on the command line; threads and the GPU in the environment."""
    argv, environment = server_command(
        spec(model="resnet18:image_size=96", weights="default", max_batch=4, threads=2, limits=Limits(gpu=1)), 77
    )
    text = " ".join(argv[1:])
    assert text.endswith("--parent 77")
    for part in ("server.py --model resnet18 --weights default --image-size 96", "--name t-0", "--max-batch 4"):
        assert part in text
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"


def test_last_words_are_the_error_or_the_last_line() -> None:
    """What a program printed after `error:` says why it ended."""
    assert last_words("a\nerror: bad\n  - this\n") == "error: bad\n  - this"
    assert last_words("a\nb\n") == "b"
    assert last_words("") == ""
    assert tail_of("a\nb\nc\n", 2) == "b\nc"
    assert tail_of("a", 0) == ""


def test_runtimes_have_names() -> None:
    """A runtime is asked for by its name; another one gets the near miss."""
    assert make_runtime("process").name == "process"
    with pytest.raises(InputError, match='did you mean "docker"'):
        make_runtime("dokcer")


# Cgroups on a machine made of files


def _v1(root: Path) -> FakeHost:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("4:memory:/own\n1:cpu,cpuacct:/\n0::/\n")
    for directory in ("memory/own", "cpu,cpuacct"):
        (root / "sys/fs/cgroup" / directory).mkdir(parents=True)
    return _Kernel(root)


def _v2(root: Path, controllers: str) -> FakeHost:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/slice/own\n")
    (root / "sys/fs/cgroup/slice/own").mkdir(parents=True)
    (root / "sys/fs/cgroup/slice/cgroup.subtree_control").write_text(controllers)
    return _Kernel(root)


class _Kernel(FakeHost):
    """Makes the files of a cgroup when its directory is made, as the kernel does."""

    def make_directory(self, path: str) -> None:
        super().make_directory(path)
        for name in ("cpu.max", "memory.max", "cpu.cfs_period_us", "cpu.cfs_quota_us", "memory.limit_in_bytes"):
            (self.root / path / name).touch()

    def remove_directory(self, path: str) -> None:
        for file in (self.root / path).glob("*"):
            file.unlink()
        super().remove_directory(path)


def test_v1_groups_stand_in_their_hierarchies(tmp_path: Path) -> None:
    """Cores and memory are limited each in its own hierarchy below the own group; removal leaves nothing."""
    made = box("t-0", Limits(cpu=1.5, memory_mib=100), _v1(tmp_path), owner=1)
    cpu = tmp_path / "sys/fs/cgroup/cpu,cpuacct/corun-replica-1-t-0"
    memory = tmp_path / "sys/fs/cgroup/memory/own/corun-replica-1-t-0"
    assert (cpu / "cpu.cfs_quota_us").read_text() == "150000"
    assert (memory / "memory.limit_in_bytes").read_text() == str(100 << 20)
    assert [setup.cgroup for setup in made.setups] == [f"/{path.relative_to(tmp_path)}" for path in (cpu, memory)]
    assert made.in_force == {"cpu": "1.5 cores (cgroup v1)", "memory": "100 MiB (cgroup v1)"}
    made.remove()
    assert not cpu.exists()
    assert not memory.exists()


def test_v2_groups_are_siblings_where_the_parent_hands_controllers_down(tmp_path: Path) -> None:
    """One group beside the own one carries both limits; a controller that is off has its fall-back, said aloud."""
    made = box("t-0", Limits(cpu=0.5, memory_mib=64), _v2(tmp_path / "both", "cpu memory"), owner=1)
    group = tmp_path / "both/sys/fs/cgroup/slice/corun-replica-1-t-0"
    assert (group / "cpu.max").read_text() == "50000 100000"
    assert (group / "memory.max").read_text() == str(64 << 20)
    assert len(made.setups) == 1
    half = box("t-0", Limits(cpu=0.5, memory_mib=64), _v2(tmp_path / "half", "cpu"), owner=1)
    assert "cgroup v2" in half.in_force["cpu"]
    assert "RLIMIT_DATA" in half.in_force["memory"]


def test_a_gpu_replica_is_never_put_under_a_data_limit(tmp_path: Path) -> None:
    """CUDA maps more address space than any limit: without a cgroup its host memory has none, and that is said."""
    made = box("t-0", Limits(memory_mib=64, gpu=0), FakeHost(tmp_path), owner=1)
    assert made.setups == []
    assert made.in_force["memory"].startswith("none:")


def test_groups_of_dead_supervisors_are_removed(tmp_path: Path) -> None:
    """What a killed supervisor left behind goes at the next start; a living one's groups stay."""
    host = _v1(tmp_path)
    left = tmp_path / "sys/fs/cgroup/memory/own/corun-replica-99999999-t-0"
    living = tmp_path / "sys/fs/cgroup/memory/own/corun-replica-1-t-0"
    left.mkdir()
    living.mkdir()
    box("t-1", Limits(memory_mib=64), host, owner=2)
    assert not left.exists()
    assert living.exists()


# Containers on paper


class _Client:
    """An engine that answers pings and nothing else."""

    def ping(self) -> bool:
        return True


def test_a_container_gets_image_mounts_and_limits(tmp_path: Path) -> None:
    """The project's image runs its own Python; a checkout mounts this one's read-only; limits are the engine's."""
    image = DockerRuntime(client=_Client(), owner="o")
    settings = image.settings(spec(limits=Limits(cpu=0.5, memory_mib=100, gpu=1), out=tmp_path / "out"))
    assert settings["command"][:2] == ["python", "/app/src/server.py"]
    assert settings["nano_cpus"] == 500_000_000
    assert settings["mem_limit"] == 100 << 20
    assert settings["device_requests"][0]["DeviceIDs"] == ["1"]
    assert "CUDA_VISIBLE_DEVICES" not in settings["environment"]
    assert [bind["mode"] for bind in settings["volumes"].values()] == ["rw"]
    mounted = DockerRuntime(Source.checkout("base:1"), client=_Client())
    settings = mounted.settings(spec())
    assert settings["image"] == "base:1"
    assert all(bind["mode"] == "ro" for bind in settings["volumes"].values())
    assert settings["network_mode"] == "host"


def test_a_gpu_task_and_its_weights_reach_the_container() -> None:
    """A replica on CUDA gets a device without being told which; a weights file is mounted where it lies."""
    runtime = DockerRuntime(client=_Client())
    settings = runtime.settings(spec(device="cuda", weights="/data/a.pt", model="resnet18:weights=/data/b.pt"))
    assert settings["device_requests"][0]["DeviceIDs"] == ["0"]
    assert {path: bind["bind"] for path, bind in settings["volumes"].items()} == {
        "/data/a.pt": "/data/a.pt",
        "/data/b.pt": "/data/b.pt",
    }


# The Dockerfile


def test_the_dockerfile_copies_what_is_there_and_runs_what_it_copied() -> None:
    """Each COPY source exists and is let through by .dockerignore; commands name files and modules of the project."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"
    }
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source in allowed, source
    commands = [json.loads(line[line.index("[") :]) for line in lines if "CMD [" in line]
    assert ["python", "-m", "corun.tasks.health"] in commands
    assert (ROOT / "src/corun/tasks/health.py").exists()
    for command in commands:
        assert all((ROOT / word).exists() for word in command if word.endswith(".py"))


@pytest.mark.parametrize(
    ("argv", "address"),
    [
        (["python", "src/server.py", "--host", "0.0.0.0", "--port", "54100"], "127.0.0.1:54100"),
        (["python", "src/server.py", "--port", "7", "--model", "null"], "127.0.0.1:7"),
        (["python", "src/server.py"], "127.0.0.1:54100"),
        (["python", "src/server.py", "--address", "unix:/tmp/a.sock"], "unix:/tmp/a.sock"),
    ],
)
def test_a_container_finds_the_server_it_runs(argv: list[str], address: str) -> None:
    """The image's health check asks where the server's own command line says it listens."""
    assert str(address_in(argv)) == address


def test_mounts_do_not_repeat_what_another_one_holds() -> None:
    """A directory below a mounted one is not mounted again."""
    mounts = Source.checkout("base:1").mounts
    assert not [one for one in mounts for other in mounts if one != other and one.startswith(f"{other}/")]
