"""Each policy: what it asks of processes, what it does to running ones, and why it is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError, RunFault
from corun.share.brakes import Mode
from corun.share.gates import GateOptions
from corun.share.host import IDLE_CLASS, NORMAL_CLASS
from corun.share.page import Page
from corun.share.policies import POLICIES
from corun.share.policies import green_context as green
from corun.share.policies.mig import Slice, parse_list
from corun.share.policy import Cast, Member, Rule, finest
from corun.share.sharing import Sharing, available, merge_rules, survey
from corun.share.spec import in_one_process, parse
from corun.share.start import Setup
from corun.testing.host import FakeHost

SERVICE = Member("server", "resnet18", threads=1, index=0)
SECOND = Member("server", "yolo", threads=2, index=1)
TRAINER = Member("trainer", "vgg", threads=3)
CPU = Cast((SERVICE,), TRAINER)
GPU = Cast((SERVICE,), TRAINER, frozenset({"cuda:0"}))
PIDS = {SERVICE: 10, TRAINER: 20}

DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build"

H100_SLICES = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11111111-aaaa-bbbb-cccc-000000000001)
  MIG 1g.10gb     Device  0: (UUID: MIG-11111111-0000-0000-0000-000000000001)
  MIG 3g.40gb     Device  1: (UUID: MIG-33333333-0000-0000-0000-000000000002)
  MIG 1c.3g.40gb  Device  2: (UUID: MIG-44444444-0000-0000-0000-000000000003)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-22222222-aaaa-bbbb-cccc-000000000002)
  MIG 2g.20gb     Device  0: (UUID: MIG-22222222-0000-0000-0000-000000000004)
"""
WHOLE = "GPU 0: NVIDIA H200 (UUID: GPU-99999999-aaaa-bbbb-cccc-000000000009)\n"


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """Four cores, a service of two threads and a trainer of three, one session, no GPU, no cgroups."""
    machine = FakeHost(tmp_path, {10: [10, 11], 20: [20, 21, 22]})
    machine.put("proc/sys/kernel/sched_autogroup_enabled", "1")
    for pid in (10, 20, os.getpid()):
        machine.put(f"proc/{pid}/cgroup", "0::/\n")
        machine.put(f"proc/{pid}/autogroup", "/autogroup-1 nice 0")
    return machine


def _gpu(host: FakeHost, listing: str = WHOLE) -> FakeHost:
    host.put("proc/driver/nvidia/version", DRIVER)

    def smi(argv: Sequence[str], environment: Mapping[str, str], stdin: str) -> str:
        return listing if "-L" in argv else "Default, Disabled\n"

    host.programs["nvidia-smi"] = smi
    return host


def _mps_daemon(host: FakeHost, starts: bool = True) -> None:
    def control(argv: Sequence[str], environment: Mapping[str, str], stdin: str) -> str:
        if "-d" in argv and not starts:
            raise OSError("nvidia-cuda-mps-control ended with 1: Cannot find MPS server")
        return "MPS version 580.95\n" if "-v" in argv else ""

    host.programs["nvidia-cuda-mps-control"] = control


# Specs


def test_every_policy_has_a_name_and_a_file_of_its_own() -> None:
    """The table is complete: a name, a summary and a kind each, one module per policy."""
    assert list(POLICIES) == [policy.name for policy in POLICIES.values()]
    modules = [policy.__module__ for policy in POLICIES.values()]
    assert len(set(modules)) == len(modules)
    assert {module.rpartition(".")[2] for module in modules} == set(POLICIES)
    assert all(policy.summary for policy in POLICIES.values())


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (None, ["none"]),
        ({}, ["none"]),
        ("idle", ["idle"]),
        ("idle+slo ", None),
        ({"policy": "idle+slo", "slo_ms": 100}, ["idle", "slo"]),
        ({"policy": "idle + preempt", "micro": 8, "passive": False}, ["idle", "preempt"]),
        (
            {"policy": "partition+throttle+memory_cap", "duty": 0.2, "memory_mib": 512},
            ["partition", "throttle", "memory_cap"],
        ),
    ],
)
def test_specs_name_policies_and_their_options(spec: Any, names: list[str] | None) -> None:
    """A spec is a name, names joined by +, or an object with options; a bound that is missing is asked for."""
    if names is None:
        with pytest.raises(InputError, match="slo_ms"):
            parse(spec)
    else:
        assert [policy.name for policy in parse(spec)] == names


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("idel", 'did you mean "idle"'),
        ("idle+nice", "idle and nice contradict each other"),
        ({"policy": "throttle+slo", "slo_ms": 5}, "contradict"),
        ("idle+idle", "stands twice"),
        ("none+idle", "leave it out"),
        ({"policy": "idle", "slo_ms": 5}, "belongs to slo, preempt"),
        ({"policy": "preempt", "micr": 5}, 'did you mean "micro"'),
        ({"policy": "preempt", "micro": "four"}, "preempt.micro"),
        ({"policy": "preempt", "micro": 0}, "micro is 0"),
        ({"policy": "nice", "nice": -5}, "nice is -5"),
        ({"policy": "throttle", "duty": 0}, "duty is 0"),
        ({"policy": "mps", "trainer_percent": 0}, "trainer_percent"),
        ({"policy": "partition", "service_cores": -1}, "service_cores"),
        ({"policy": "cgroup", "weight": 20000}, "weight"),
        ({"policy": "memory_cap", "memory_fraction": 2}, "memory_fraction"),
        ({"policy": "stream_priority", "service_priority": 3}, "service_priority"),
        ({"policy": "green_context", "service_sms": 0}, "service_sms"),
        ({"policy": "slo", "slo_ms": 5, "window_s": 0}, "window_s"),
        ({"policy": "predictive", "low": 0.9}, "headroom"),
    ],
)
def test_bad_specs_are_explained(spec: Any, sentence: str) -> None:
    """Unknown names and options, wrong types, impossible values and contradictions are bad input."""
    with pytest.raises(InputError, match=sentence):
        parse(spec)


# CPU policies


def test_none_changes_nothing(host: FakeHost) -> None:
    """Naive time slicing starts the very command lines that were given."""
    with Sharing.prepare("none", CPU, host) as sharing:
        assert sharing.command(TRAINER, ["train"]) == ["train"]
        assert sharing.flags(TRAINER) == sharing.flags(SERVICE) == []
        assert sharing.environment(TRAINER) == {}
        assert (sharing.threads(SERVICE), sharing.threads(TRAINER)) == (1, 3)
        assert sharing.page is None


def test_default_gives_everybody_all_cores(host: FakeHost) -> None:
    """The stock default has explicit numbers too: all cores for every process that computes."""
    with Sharing.prepare("default", CPU, host) as sharing:
        assert (sharing.threads(SERVICE), sharing.threads(TRAINER), sharing.threads(Member("client"))) == (4, 4, 1)


@pytest.mark.parametrize(
    ("name", "field", "value", "back"),
    [("idle", "scheduling_class", IDLE_CLASS, NORMAL_CLASS), ("nice", "nice", 19, 0)],
)
def test_priorities_reach_every_thread_of_the_trainer_only(
    host: FakeHost, name: str, field: str, value: int, back: int
) -> None:
    """Threads that exist, and those of loader processes, are reached; the service's are not; detach undoes it."""
    host.add_process(20, [20, 21, 22], children=[30])
    host.add_process(30, [30])
    with Sharing.prepare(name, CPU, host) as sharing:
        assert sharing.started(PIDS) == []
        assert {tid: getattr(host.state[tid], field) for tid in (20, 21, 22, 30)} == dict.fromkeys(
            (20, 21, 22, 30), value
        )
        assert {getattr(host.state[tid], field) for tid in (10, 11)} == {back}
        for member, pid in PIDS.items():
            sharing.policies[0].detach(member, pid, host)
        assert {getattr(state, field) for state in host.state.values()} == {back}


def test_priorities_are_set_before_the_trainer_starts(host: FakeHost) -> None:
    """The wrapper gives the class to the first thread, so every pool thread inherits it; the server is not wrapped."""
    with Sharing.prepare({"policy": "nice", "nice": 10}, CPU, host) as sharing:
        assert sharing.command(TRAINER, ["train", "x"])[-5:] == ["--nice", "10", "--", "train", "x"]
        assert sharing.command(SERVICE, ["serve"]) == ["serve"]
    with Sharing.prepare("idle", CPU, host) as sharing:
        assert sharing.setup(TRAINER) == Setup(idle=True)
        assert sharing.environment(TRAINER) == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
        assert sharing.environment(SERVICE) == {}


def test_what_cannot_be_applied_is_told_not_hidden(host: FakeHost) -> None:
    """A call that the kernel refuses becomes a sentence with policy, process and reason."""
    host.forbidden = frozenset({"set_class"})
    with Sharing.prepare("idle", CPU, host) as sharing:
        (problem,) = sharing.started(PIDS)
        assert problem == "idle could not be applied to trainer vgg: Operation not permitted"
        assert sharing.describe()["problems"] == [problem]


def test_a_border_is_looked_for_and_crossed(host: FakeHost) -> None:
    """A trainer in another session is found before anything is measured, and its autogroup made nice."""
    host.put("proc/20/autogroup", "/autogroup-2 nice 0")
    with Sharing.prepare("idle", CPU, host) as sharing:
        (sentence,) = sharing.started(PIDS)
        assert "autogroup border" in sentence
        assert "crossed: nice 19" in sentence
        assert host.read("proc/20/autogroup") == "19"
    with Sharing.prepare("throttle", CPU, host) as sharing:
        assert sharing.started(PIDS) == []


def test_partition_divides_the_cores(host: FakeHost) -> None:
    """Services get as many cores as they have threads, the trainer the rest; together they are all, never shared."""
    cast = Cast((SERVICE, SECOND), TRAINER)
    with Sharing.prepare("partition", cast, host) as sharing:
        service, trainer = sharing.setup(SERVICE).cores, sharing.setup(TRAINER).cores
        assert (service, trainer) == ((0, 1, 2), (3,))
        assert sharing.setup(SECOND).cores == service
        assert sharing.setup(Member("client")).cores == ()
        assert (sharing.threads(SECOND), sharing.threads(TRAINER)) == (2, 1)
    with Sharing.prepare({"policy": "partition", "service_cores": 2}, cast, host) as sharing:
        sharing.started({SERVICE: 10, TRAINER: 20})
        assert {host.state[tid].cores for tid in (10, 11)} == {(0, 1)}
        assert {host.state[tid].cores for tid in (20, 21, 22)} == {(2, 3)}


def test_partition_gives_the_cores_back_outside_corun(host: FakeHost) -> None:
    """`train` is measured with all cores and its configured threads; `corun` with its share of both."""
    with Sharing.prepare({"policy": "partition", "service_cores": 3}, CPU, host, always_page=True) as sharing:
        sharing.started(PIDS)
        assert sharing.page is not None
        for arm, cores, threads in (("train", (0, 1, 2, 3), 3), ("corun", (3,), 1), ("alone", (0, 1, 2, 3), 3)):
            sharing.enter(arm)
            assert {host.state[tid].cores for tid in (20, 21, 22)} == {cores}
            assert sharing.page.knobs.threads == threads


def test_partition_needs_two_cores(host: FakeHost) -> None:
    """One core cannot be divided, and the services cannot have all of them."""
    host.machine_cores = (0,)
    with pytest.raises(InputError, match="one core only"):
        Sharing.prepare("partition", CPU, host)
    host.machine_cores = (0, 1)
    with pytest.raises(InputError, match="needs at least one core"):
        Sharing.prepare({"policy": "partition", "service_cores": 2}, CPU, host)


def _cgroup(host: FakeHost, version: int, *files: str, own: str = "/") -> None:
    mount = "sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/cpu"
    line = f"0::{own}\n" if version == 2 else f"1:cpu:{own}\n"
    host.put(f"proc/{os.getpid()}/cgroup", line)
    parent = mount if own == "/" or version == 1 else f"{mount}{own}".rpartition("/")[0]
    host.put(f"{parent}/cgroup.subtree_control", "cpu memory")
    for name in ("cgroup.procs", *files):
        host.put(f"{parent}/template.{name}")
    host.put(f"{mount}{own}".rstrip("/") + "/cgroup.procs", "")


@pytest.mark.parametrize(
    ("version", "files", "weight", "done"),
    [
        (2, ("cpu.idle", "cpu.weight"), 0, "cpu.idle=1"),
        (2, ("cpu.weight",), 0, "cpu.weight=1"),
        (2, ("cpu.idle", "cpu.weight"), 5, "cpu.weight=5"),
        (1, ("cpu.idle", "cpu.shares"), 0, "cpu.idle=1"),
        (1, ("cpu.shares",), 0, "cpu.shares=2"),
        (1, ("cpu.shares",), 100, "cpu.shares=1024"),
    ],
)
def test_the_trainer_gets_a_cgroup_and_leaves_it(
    host: FakeHost, version: int, files: tuple[str, ...], weight: int, done: str
) -> None:
    """v1 and v2: a group is made, set, entered by wrapper and attach, and removed at the end."""
    _cgroup(host, version, *files)
    home = "sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/cpu"
    with Sharing.prepare({"policy": "cgroup", "weight": weight}, CPU, host) as sharing:
        directory = sharing.setup(TRAINER).cgroup
        assert directory is not None
        assert directory.startswith(f"/{home}/corun-train-{os.getpid()}-")
        name, _, value = done.partition("=")
        assert host.read(f"{directory}/{name}") == value
        sharing.started(PIDS)
        assert host.read(f"{directory}/cgroup.procs") == "20"
        assert sharing.describe()["in_force"]["cgroup"]["set"] == done
    assert not host.exists(directory)
    assert host.read(f"{home}/cgroup.procs") == "20"


def test_a_v2_group_is_a_sibling_of_ours(host: FakeHost) -> None:
    """Only leaves may hold processes in v2, so the trainer's group is made beside the services'."""
    _cgroup(host, 2, "cpu.idle", own="/user/session")
    with Sharing.prepare("cgroup", CPU, host) as sharing:
        directory = Path(sharing.setup(TRAINER).cgroup or "")
        assert directory.parent == Path("/sys/fs/cgroup/user")
        with Sharing.prepare("cgroup", CPU, host) as other:
            assert other.setup(TRAINER).cgroup != str(directory)
        assert host.exists(str(directory))


def test_a_cgroup_that_cannot_be_had_is_refused_with_the_reason(host: FakeHost) -> None:
    """No hierarchy, a controller that is off, a directory that is not ours: each is said."""
    with pytest.raises(InputError, match="no cgroup hierarchy"):
        Sharing.prepare("cgroup", CPU, host)
    _cgroup(host, 2, "cpu.idle")
    host.put("sys/fs/cgroup/cgroup.subtree_control", "memory")
    with pytest.raises(InputError, match="not switched on"):
        Sharing.prepare("cgroup", CPU, host)
    host.put("sys/fs/cgroup/cgroup.subtree_control", "cpu")
    host.writable = lambda path: False  # type: ignore[method-assign]
    with pytest.raises(InputError, match="root or a delegated cgroup"):
        Sharing.prepare("cgroup", CPU, host)


def test_a_cgroup_that_cannot_be_set_is_removed_again(host: FakeHost) -> None:
    """When the kernel has no file for it the half-made group is taken away."""
    _cgroup(host, 2)
    with pytest.raises(RunFault, match=r"neither cpu\.idle nor cpu\.weight"):
        Sharing.prepare("cgroup", CPU, host)
    assert not [name for name in os.listdir(host.root / "sys/fs/cgroup") if name.startswith("corun-train")]


# Cooperative policies


def test_elastic_tells_the_gate_who_computes_with_how_many_threads(host: FakeHost) -> None:
    """Cores of the machine, threads of each service by its slot, and stops between layers; nothing of it by `layers` off."""
    with Sharing.prepare("idle+elastic", Cast((SERVICE, SECOND), TRAINER), host) as sharing:
        flags = sharing.flags(TRAINER)
        given = json.loads(flags[flags.index("--gate-options") + 1])
        assert (given["cores"], given["service_threads"]) == (4, [1, 2])
        assert "--layer-gate" in flags
        sharing.enter("corun")
        assert sharing.page is not None
        assert sharing.page.mode == Mode.ELASTIC
    with Sharing.prepare({"policy": "elastic", "layers": False}, CPU, host) as sharing:
        assert "--layer-gate" not in sharing.flags(TRAINER)


@pytest.mark.parametrize(
    ("cast", "reason"),
    [
        (GPU, "computes on a GPU"),
        (replace(CPU, one_process=True), "no process of its own"),
        (Cast((SERVICE,), None), "nobody trains"),
    ],
)
def test_elastic_is_refused_where_there_is_no_thread_to_give_up(host: FakeHost, cast: Cast, reason: str) -> None:
    """On a GPU, inside one process, without a trainer, and on a machine of one core."""
    with pytest.raises(InputError, match=reason):
        Sharing.prepare("elastic", cast, host)
    host.machine_cores = (0,)
    with pytest.raises(InputError, match="one core only"):
        Sharing.prepare("elastic", CPU, host)


@pytest.mark.parametrize(("options", "threads"), [({}, 4), ({"trainer_threads": 2}, 2)])
def test_an_elastic_trainer_has_the_cores_it_gives_up(host: FakeHost, options: dict[str, int], threads: int) -> None:
    """All cores or those asked for, though the job was to leave the services theirs; alone it has no fewer."""
    cast = Cast((SERVICE,), replace(TRAINER, threads=1))
    with Sharing.prepare({"policy": "elastic", **options}, cast, host) as sharing:
        assert sharing.page is not None
        assert sharing.threads(cast.members[-1]) == threads
        for arm in ("corun", "train"):
            sharing.enter(arm)
            assert sharing.page.knobs.threads == threads
    with pytest.raises(InputError, match="2 or more"):
        Sharing.prepare({"policy": "elastic", "trainer_threads": 1}, cast, host)


@pytest.mark.parametrize(("cast", "least"), [(CPU, 1), (GPU, 0), (replace(CPU, one_process=True), 0)])
def test_feedback_may_take_threads_where_they_compute(host: FakeHost, cast: Cast, least: int) -> None:
    """slo gives up cores before it rests, but only those of a trainer with a process of its own on a CPU."""
    with Sharing.prepare({"policy": "slo", "slo_ms": 9}, cast, host) as sharing:
        flags = sharing.flags(TRAINER)
        assert json.loads(flags[flags.index("--gate-options") + 1])["least_threads"] == least


def test_cooperative_policies_share_a_page_with_trainer_and_services(host: FakeHost) -> None:
    """The servers announce on it, the trainer's gate reads it, and its options are those the gate knows."""
    spec = {"policy": "idle+preempt+slo", "slo_ms": 80, "micro": 4, "layers": True, "controller": "pi"}
    with Sharing.prepare(spec, Cast((SERVICE, SECOND), TRAINER), host) as sharing:
        assert sharing.page is not None
        path = sharing.page.path
        assert sharing.flags(SECOND) == ["--announce", f"{path}:1"]
        flags = sharing.flags(TRAINER)
        assert flags[:2] == ["--gate", "corun.share.gates:from_options"]
        assert flags[-1] == "--layer-gate"
        options = json.loads(flags[flags.index("--gate-options") + 1])
        assert set(options) <= set(GateOptions.__dataclass_fields__)
        assert options["page"] == str(path)
        assert (options["slo_ms"], options["controller"]) == (80, "pi")
    assert not path.exists()


def test_the_gate_is_open_outside_corun(host: FakeHost) -> None:
    """`alone` and `train` are measured without the policy: no mode, no split, full duty."""
    with Sharing.prepare({"policy": "preempt+throttle", "micro": 8, "duty": 0.5}, CPU, host) as sharing:
        sharing.started(PIDS)
        page = sharing.page
        assert page is not None
        sharing.enter("corun")
        assert (page.mode, page.knobs.micro, page.knobs.duty) == (Mode.PREEMPT, 8, 0.5)
        for arm in ("alone", "train"):
            sharing.enter(arm)
            assert (page.mode, page.knobs.micro, page.knobs.duty) == (0, 1, 1.0)


def test_rules_of_several_policies_add_up() -> None:
    """Modes are united, the finest split and the smallest duty count, and the finest that may be asked for covers it."""
    rules = [Rule(1, {"a": 1}, 4, 0.9), None, Rule(2, {"micro_max": 2}, 1, 0.5, layers=True)]
    assert merge_rules(rules) == Rule(3, {"a": 1, "micro_max": 4}, 4, 0.5, True)
    assert merge_rules([None]) is None


@pytest.mark.parametrize(
    ("spec", "on_cpu", "on_gpu"),
    [
        ({"policy": "slo", "slo_ms": 9}, 1, 8),
        ({"policy": "slo", "slo_ms": 9, "micro_max": 4}, 4, 4),
        ({"policy": "preempt+slo", "slo_ms": 9}, 16, 16),
        ({"policy": "preempt+predictive", "micro": 4}, 8, 8),
        ({"policy": "preempt", "micro": 12}, 12, 12),
        ({"policy": "throttle"}, 1, 1),
    ],
)
def test_steps_are_cut_where_that_shortens_a_wait(spec: dict[str, Any], on_cpu: int, on_gpu: int) -> None:
    """A kernel preempts a step whatever its length: there it is cut only for a trainer that looks between the parts."""
    rule = merge_rules(policy.rule() for policy in parse(spec))
    assert rule is not None
    assert (finest(rule, preempts=True), finest(rule, preempts=False)) == (on_cpu, on_gpu)


@pytest.mark.parametrize(
    ("spec", "mode"),
    [
        ({"policy": "throttle"}, Mode.FREE),
        ({"policy": "slo", "slo_ms": 9}, Mode.SLO),
        ({"policy": "preempt"}, Mode.PREEMPT),
        ({"policy": "preempt", "slo_ms": 9}, Mode.PREEMPT | Mode.SLACK),
        ({"policy": "predictive"}, Mode.PREDICTIVE),
        ({"policy": "slo+predictive+preempt", "slo_ms": 9}, Mode.PREEMPT | Mode.SLACK | Mode.SLO | Mode.PREDICTIVE),
    ],
)
def test_cooperative_policies_set_their_mode(spec: dict[str, Any], mode: Mode) -> None:
    """Each cooperative policy is a bit of the page's mode, or a knob."""
    rule = merge_rules(policy.rule() for policy in parse(spec))
    assert rule is not None
    assert rule.mode == mode


# GPU policies


@pytest.mark.parametrize("name", ["mps", "mig", "stream_priority", "green_context"])
def test_gpu_policies_are_refused_on_a_cpu_with_the_reason(host: FakeHost, name: str) -> None:
    """Skipped with a reason, never replaced."""
    with pytest.raises(InputError, match="not on a GPU") as error:
        Sharing.prepare(name, CPU, host)
    assert "no NVIDIA driver" in str(error.value)


def test_mps_starts_a_private_daemon_and_ends_it(host: FakeHost) -> None:
    """The daemon gets directories of its own, every process the same ones, the trainer its cap; then it is quit."""
    _mps_daemon(_gpu(host))
    spec = {"policy": "mps", "trainer_percent": 30, "trainer_memory": "6G"}
    with Sharing.prepare(spec, GPU, host) as sharing:
        daemon = next(ran for ran in host.ran if "-d" in ran.argv)
        service, trainer = sharing.environment(SERVICE), sharing.environment(TRAINER)
        assert service == daemon.environment
        assert trainer == {
            **service,
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30",
            "CUDA_MPS_CLIENT_PRIORITY": "1",
            "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=6G",
        }
        assert sharing.environment(Member("client")) == {}
        assert sharing.describe()["in_force"]["mps"]["mps_version"] == "MPS version 580.95"
        directory = Path(service["CUDA_MPS_PIPE_DIRECTORY"]).parent
        assert directory.is_dir()
    assert host.ran[-1].stdin == "quit\n"
    assert host.ran[-1].environment == service
    assert not directory.exists()


def test_an_mps_daemon_that_does_not_start_is_a_fault(host: FakeHost) -> None:
    """Its reason is passed on and nothing is left behind."""
    _mps_daemon(_gpu(host), starts=False)
    with pytest.raises(RunFault, match="Cannot find MPS server"):
        Sharing.prepare("mps", GPU, host)


@pytest.mark.parametrize(
    ("mode", "user", "sentence"),
    [
        ("Prohibited", 0, "compute mode Prohibited"),
        ("Exclusive_Process", 1000, "another user's MPS server"),
        (None, 0, "cannot be read"),
    ],
)
def test_mps_is_refused_where_it_cannot_work(host: FakeHost, mode: str | None, user: int, sentence: str) -> None:
    """Compute modes and rights are asked before anything is started."""
    _mps_daemon(_gpu(host))
    host.user = user

    def smi(argv: Sequence[str], environment: Mapping[str, str], stdin: str) -> str:
        if mode is None:
            raise OSError("nvidia-smi ended with 9")
        return f"{mode}, Disabled\n"

    host.programs["nvidia-smi"] = smi
    with pytest.raises(InputError, match=sentence):
        Sharing.prepare("mps", GPU, host)
    del host.programs["nvidia-cuda-mps-control"]
    with pytest.raises(InputError, match="not installed"):
        Sharing.prepare("mps", GPU, host)


def test_mig_slices_are_read_from_recorded_text() -> None:
    """Slices of several GPUs with their profiles, sizes and ids; a GPU without MIG has none."""
    slices = parse_list(H100_SLICES)
    assert slices[1] == Slice(0, "3g.40gb", "MIG-33333333-0000-0000-0000-000000000002")
    assert [(item.gpu, item.size) for item in slices] == [(0, (1, 10)), (0, (3, 40)), (0, (1, 40)), (1, (2, 20))]
    assert parse_list(WHOLE) == parse_list("") == parse_list("garbage\n  MIG\n") == []


def test_mig_gives_everybody_a_slice_of_his_own(host: FakeHost) -> None:
    """The trainer gets the largest, services the next; profiles that are asked for are kept to."""
    _gpu(host, H100_SLICES)
    cast = replace(GPU, services=(SERVICE, SECOND))
    with Sharing.prepare("mig", cast, host) as sharing:
        ids = [sharing.environment(member)["CUDA_VISIBLE_DEVICES"] for member in (TRAINER, SERVICE, SECOND)]
        assert [uuid[:12] for uuid in ids] == ["MIG-33333333", "MIG-22222222", "MIG-44444444"]
    with Sharing.prepare({"policy": "mig", "trainer_profile": "1g.10gb"}, GPU, host) as sharing:
        assert sharing.environment(TRAINER)["CUDA_VISIBLE_DEVICES"].startswith("MIG-11111111")


@pytest.mark.parametrize(
    ("listing", "spec"), [(WHOLE, "mig"), (H100_SLICES, {"policy": "mig", "service_profile": "7g.80gb"})]
)
def test_mig_never_makes_slices(host: FakeHost, listing: str, spec: Any) -> None:
    """Where slices are missing it is refused with what there is; only `nvidia-smi -L` was ever run."""
    _gpu(host, listing)
    with pytest.raises(InputError, match="no MIG slice left"):
        Sharing.prepare(spec, GPU, host)
    assert {ran.argv for ran in host.ran} == {("nvidia-smi", "-L")}


def test_memory_caps_are_flags_on_a_gpu_and_limits_on_a_cpu(host: FakeHost) -> None:
    """The trainer alone is limited, by the means of its device."""
    with Sharing.prepare({"policy": "memory_cap", "memory_fraction": 0.3}, GPU, host) as sharing:
        assert sharing.flags(TRAINER) == ["--memory-fraction", "0.3"]
        assert sharing.setup(TRAINER) == Setup()
    with Sharing.prepare({"policy": "memory_cap", "memory_mib": 700}, CPU, host) as sharing:
        assert sharing.flags(TRAINER) == []
        assert sharing.setup(TRAINER) == Setup(data_limit_mib=700)
        assert "MALLOC_MMAP_THRESHOLD_" in sharing.environment(TRAINER)
        assert sharing.environment(SERVICE) == {}
        assert sharing.setup(SERVICE) == Setup()
    with pytest.raises(InputError, match="memory_mib must say"):
        Sharing.prepare("memory_cap", CPU, host)


@pytest.mark.parametrize("name", ["stream_priority", "green_context"])
def test_in_process_policies_make_one_process_of_all(host: FakeHost, name: str) -> None:
    """Asking for them asks for one process; without a trainer or a service to share it they are refused."""
    _gpu(host)
    with Sharing.prepare(name, GPU, host) as sharing:
        assert sharing.cast.one_process
        assert sharing.lanes == POLICIES[name]().lanes()
        assert sharing.describe()["one_process"] is True
    with pytest.raises(InputError, match=r"one_process.* true"):
        parse({"policy": name, "one_process": False})
    for cast in (replace(GPU, trainer=None), replace(GPU, services=())):
        with pytest.raises(InputError, match="a trainer and a service"):
            Sharing.prepare(name, cast, host)
    assert "separate processes" in " ".join(POLICIES[name]().refusals(host, GPU))


def test_what_the_process_says_of_its_lanes_is_in_the_manifest(host: FakeHost) -> None:
    """Read back values stand under in_force; one that is not what was asked for is a problem with both numbers."""
    _gpu(host)
    with Sharing.prepare("stream_priority", GPU, host) as sharing:
        assert sharing.heard({"service_priority": -5, "trainer_priority": 0}) == []
        assert sharing.describe()["in_force"]["lanes"] == {"service_priority": -5, "trainer_priority": 0}
        (note,) = sharing.heard({"service_priority": -2, "trainer_priority": 0})
        assert "-5" in note
        assert "-2" in note
        assert note in sharing.describe()["problems"]
    with Sharing.prepare({"policy": "green_context", "service_sms": 30}, GPU, host) as sharing:
        assert sharing.heard({}) == ["service_sms was to be 30 and is not known"]


@pytest.mark.parametrize("name", ["nice", "idle", "cgroup", "partition", "mps", "mig", "memory_cap"])
def test_policies_of_whole_processes_are_refused_in_one(host: FakeHost, name: str) -> None:
    """Where trainer and services are threads, whatever acts on a process says so instead of doing half of it."""
    _mps_daemon(_gpu(host, H100_SLICES))
    with pytest.raises(InputError, match=r"one process|no process of its own|a process sees one slice"):
        Sharing.prepare({"policy": name, "one_process": True}, GPU, host)


@pytest.mark.parametrize(
    "spec", ["none", "default", "throttle", "preempt", {"policy": "slo", "slo_ms": 9}, "predictive"]
)
def test_policies_of_the_gate_can_be_had_in_one_process(host: FakeHost, spec: Any) -> None:
    """Cooperative policies do not care in which process the trainer is, and processes are started bare."""
    given = {"policy": spec} if isinstance(spec, str) else spec
    with Sharing.prepare({**given, "one_process": True}, CPU, host) as sharing:
        assert sharing.cast.one_process
        assert sharing.lanes == {}
        for member in sharing.cast.members:
            assert sharing.command(member, ["x"]) == ["x"]
            assert sharing.environment(member) == {}
    with Sharing.prepare(given, CPU, host) as sharing:
        assert not sharing.cast.one_process
        assert "one_process" not in sharing.describe()


@given(
    names=st.lists(st.sampled_from(sorted(POLICIES)), min_size=1, max_size=3, unique=True),
    asked=st.sampled_from([None, True, False, "yes"]),
)
@settings(max_examples=80)
def test_one_process_is_asked_for_or_implied(names: list[str], asked: Any) -> None:
    """It is one process when the spec says true or a policy in it acts inside one; false beside such a policy, and
    what is neither true nor false, are refused."""
    spec: dict[str, Any] = {"policy": "+".join(names)} | ({} if asked is None else {"one_process": asked})
    if "slo" in names:
        spec["slo_ms"] = 50
    inside = any(POLICIES[name].one_process for name in names)
    assert in_one_process(spec) == (asked is True or inside)
    kinds = [POLICIES[name].kind for name in names]
    if len(set(kinds)) < len(kinds) or ("base" in kinds and len(kinds) > 1):
        return
    if asked is None or asked is True or (asked is False and not inside):
        assert [policy.name for policy in parse(spec)] == names
    else:
        with pytest.raises(InputError, match="one_process"):
            parse(spec)


def test_policies_of_the_gate_are_switched_on_running_processes(host: FakeHost) -> None:
    """One gate is started for all of them; what takes a restart, or another option of that gate, is refused."""
    also = [{"policy": "throttle", "duty": 0.5}, {"policy": "slo", "slo_ms": 80}]
    with Sharing.prepare("none", CPU, host, also=also) as sharing:
        page = sharing.page
        assert page is not None
        options = json.loads(sharing.flags(TRAINER)[3])
        assert options["slo_ms"] == 80
        sharing.switch(also[0])
        sharing.enter("corun")
        assert page.knobs.duty == 0.5
        sharing.switch(also[1])
        sharing.enter("corun")
        assert (page.mode, page.knobs.duty) == (Mode.SLO, 1.0)
        sharing.switch("none")
        sharing.enter("corun")
        assert page.mode == Mode.FREE
        for spec in ("idle", {"policy": "preempt", "layers": True}):
            with pytest.raises(InputError, match="started under"):
                sharing.switch(spec)
    with pytest.raises(InputError, match="one gate"):
        Sharing.prepare({"policy": "slo", "slo_ms": 90}, CPU, host, also=also)
    with Sharing.prepare("idle", CPU, host) as sharing:
        sharing.switch("idle")
        with pytest.raises(InputError, match="these were under idle"):
            sharing.switch("idle+preempt")


def test_green_contexts_need_driver_and_torch(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old driver or an old torch is named."""
    _gpu(host).put("proc/driver/nvidia/version", DRIVER.replace("580", "535"))
    monkeypatch.setattr(green, "torch_version", lambda: (2, 9))
    with pytest.raises(InputError) as error:
        Sharing.prepare("green_context", replace(GPU, one_process=True), host)
    assert "driver is 535" in str(error.value)
    assert "came with 2.12" in str(error.value)


def test_the_installed_torch_is_known_without_importing_it() -> None:
    """The version comes from the package's metadata."""
    assert green.torch_version() >= (2, 10)


# All of them


def test_the_survey_says_why_each_other_policy_is_not_to_be_had(host: FakeHost) -> None:
    """Everything that is refused has a reason; everything else is available."""
    refused = survey(CPU, host)
    assert set(refused) == {"mps", "mig", "stream_priority", "green_context", "cgroup", "memory_cap"}
    assert all(refused.values())
    assert set(available(CPU, host)) == set(POLICIES) - set(refused)


def test_the_manifest_entry_is_plain_json(host: FakeHost) -> None:
    """What was asked, what is in force and what was refused can be stored as it is."""
    with Sharing.prepare({"policy": "idle+preempt", "micro": 8}, CPU, host) as sharing:
        sharing.started(PIDS)
        entry = json.loads(json.dumps(sharing.describe()))
    assert entry["policy"] == "idle+preempt"
    assert entry["options"]["preempt"]["micro"] == 8
    assert entry["in_force"]["processes"]["trainer vgg"]["class"] == "SCHED_IDLE"
    assert entry["in_force"]["processes"]["server resnet18"]["class"] == "SCHED_OTHER"
    assert entry["in_force"]["gate"]["mode"] == Mode.PREEMPT
    assert entry["threads"] == {"server resnet18": 1, "trainer vgg": 3}
    assert "mps" in entry["refused"]


def test_a_policy_without_a_page_can_be_given_one(host: FakeHost) -> None:
    """`always_page` keeps gate and announcements, so that policies can be switched on a running trainer."""
    with Sharing.prepare("none", CPU, host, always_page=True) as sharing:
        assert sharing.page is not None
        assert "--gate" in sharing.flags(TRAINER)
        with Page.open(sharing.page.path) as page:
            assert page.mode == 0
