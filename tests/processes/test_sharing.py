"""Sharing policies with real processes: who gets the core, borders, a trainer held by a service, a service killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from corun.clock import now_ns
from corun.errors import InputError
from corun.process import thread_environment
from corun.registry import home
from corun.share.announce import Announcer
from corun.share.borders import border_between
from corun.share.host import Host
from corun.share.page import Page
from corun.share.policy import Cast, Member
from corun.share.selftest import BITES_FROM, Spinner, spin
from corun.share.sharing import Sharing
from corun.share.start import Setup
from corun.wire.channel import Channel
from corun.wire.messages import Arm, Drain, Start, Stats, Stop

SERVICE, TRAINER = Member("server", "s"), Member("trainer", "t")
CAST = Cast((SERVICE,), TRAINER)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(home() / "src")}
SELF_TEST_S = 2.0
PATIENCE_S = 300


def _spinner(setup: Setup | None = None, new_session: bool = False) -> Spinner:
    return Spinner(setup or Setup(), ENVIRONMENT, lambda pid: None, new_session)


def _sharing_or_skip(policy: str) -> Sharing:
    try:
        return Sharing.prepare(policy, CAST)
    except InputError as error:
        pytest.skip(f"{policy} cannot be had here: {error}")


def test_without_a_policy_two_spinners_share_the_core() -> None:
    """The self-test finds that nothing bites when there is nothing."""
    shares = spin(_spinner(), _spinner(), Host(), SELF_TEST_S)
    assert 0.3 < shares.service < 0.7
    assert not shares.bites
    assert "does NOT bite" in shares.sentence()


@pytest.mark.parametrize("policy", ["nice", "idle", "cgroup"])
def test_priority_policies_bite(policy: str) -> None:
    """Under each the service's spinner gets nearly the whole core from the trainer's."""
    with _sharing_or_skip(policy) as sharing:
        shares = sharing.self_test(SELF_TEST_S)
        assert shares is not None
        assert shares.service >= BITES_FROM, shares.sentence()
        assert sharing.describe()["self_test"] == shares.sentence()


def test_policies_that_are_not_about_a_core_have_no_self_test() -> None:
    """Cooperative policies are proved by their own gate."""
    with Sharing.prepare({"policy": "throttle"}, CAST) as sharing:
        assert sharing.self_test() is None


def _sleeper(**options: bool) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=ENVIRONMENT, **options)


@pytest.mark.skipif(
    Host().read("proc/sys/kernel/sched_autogroup_enabled") != "1", reason="the kernel's autogroup is off"
)
def test_a_session_border_cancels_idle_and_is_crossed() -> None:
    """A trainer in its own session is found; SCHED_IDLE means nothing there until its autogroup is made nice."""
    host, (service, trainer) = Host(), (_sleeper(), _sleeper(start_new_session=True))
    try:
        if border_between(service.pid, trainer.pid, host) is None:
            pytest.skip("this process is inside a cgroup, where sessions are no border")
        with Sharing.prepare("idle", CAST) as sharing:
            (sentence,) = sharing.started({SERVICE: service.pid, TRAINER: trainer.pid})
            assert "crossed: nice 19" in sentence
            assert sharing.describe()["in_force"]["processes"]["trainer t"]["autogroup_nice"] == 19
        cancelled = spin(_spinner(), _spinner(Setup(idle=True), new_session=True), host, SELF_TEST_S)
        assert not cancelled.bites
        crossed = spin(_spinner(), _spinner(Setup(idle=True, autogroup_nice=19), new_session=True), host, SELF_TEST_S)
        assert crossed.bites
    finally:
        for process in (service, trainer):
            process.kill()
            process.wait()


def test_what_is_in_force_is_read_back_from_running_processes() -> None:
    """Every thread of a running trainer has the class after `started`; the service keeps its own."""
    service, trainer = _sleeper(), _sleeper()
    try:
        with Sharing.prepare("idle", CAST) as sharing:
            assert sharing.started({SERVICE: service.pid, TRAINER: trainer.pid}) == []
            processes = sharing.describe()["in_force"]["processes"]
            assert processes["trainer t"]["class"] == "SCHED_IDLE"
            assert processes["server s"]["class"] == "SCHED_OTHER"
    finally:
        for process in (service, trainer):
            process.kill()
            process.wait()


class RunningTrainer:
    """A real trainer process under the gate of a sharing policy, and the launcher's end of its channel."""

    def __init__(self, sharing: Sharing, directory: Path, *flags: str) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(directory / "control.sock"))
        listener.listen()
        argv = [
            sys.executable,
            "-m",
            "corun.train",
            "--model",
            "resnet18",
            "--data",
            "synthetic",
            "--image-size",
            "32",
        ]
        argv += [
            "--batch-size",
            "8",
            "--count",
            "64",
            "--num-classes",
            "4",
            "--epochs",
            "0",
            "--threads",
            "1",
            *flags,
        ]
        argv += ["--out", str(directory), "--control", f"unix:{directory / 'control.sock'}", *sharing.flags(TRAINER)]
        environment = {**ENVIRONMENT, **thread_environment(1), **sharing.environment(TRAINER)}
        self.process = subprocess.Popen(sharing.command(TRAINER, argv), env=environment, cwd=home())
        listener.settimeout(PATIENCE_S)
        connection, _ = listener.accept()
        listener.close()
        self.channel = Channel(connection)
        received = self.channel.receive(PATIENCE_S)
        assert received is not None
        self.channel.reply(received[0])

    def window(self, seconds: float, segment: int = 0) -> None:
        """Arm and start a window that begins now."""
        now = now_ns()
        self.channel.request(Arm("corun", 0, segment, now, now + round(seconds * 1e9)), PATIENCE_S)
        self.channel.request(Start(segment), PATIENCE_S)

    def stats(self) -> dict[str, object]:
        return self.channel.request(Stats(), PATIENCE_S)

    def steps(self) -> int:
        return int(str(self.stats()["steps"]))

    def wait_for_steps(self, more_than: int) -> int:
        deadline = time.monotonic() + PATIENCE_S
        while (steps := self.steps()) <= more_than:
            assert time.monotonic() < deadline, "the trainer makes no steps"
            time.sleep(0.02)
        return steps

    def end(self) -> None:
        self.channel.close()
        self.process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningTrainer, Sharing]]:
    """One trainer under `preempt` for all tests of this file: starting one takes seconds."""
    with Sharing.prepare({"policy": "preempt", "micro": 2}, CAST) as sharing:
        trainer = RunningTrainer(sharing, tmp_path_factory.mktemp("trainer"))
        sharing.started({TRAINER: trainer.process.pid})
        yield trainer, sharing
        trainer.end()


@pytest.fixture
def preempted(running: tuple[RunningTrainer, Sharing]) -> tuple[RunningTrainer, Sharing]:
    """The trainer armed for a fresh window, training, and nobody pending."""
    trainer, sharing = running
    trainer.channel.request(Drain(), PATIENCE_S)
    sharing.enter("corun")
    trainer.window(600)
    trainer.wait_for_steps(0)
    return trainer, sharing


def _page(sharing: Sharing) -> Page:
    assert sharing.page is not None
    return sharing.page


@pytest.mark.slow
def test_a_pending_request_holds_a_real_trainer_and_its_reply_frees_it(
    preempted: tuple[RunningTrainer, Sharing],
) -> None:
    """While a request is pending no step ends; questions are still answered; after the reply training goes on."""
    trainer, sharing = preempted
    service = Announcer(_page(sharing), 0)
    stops = int(str(trainer.stats()["gate_stops"]))
    service.on_request()
    deadline = time.monotonic() + PATIENCE_S
    while int(str(trainer.stats()["gate_stops"])) == stops:
        assert time.monotonic() < deadline, "the trainer does not stop at its gate"
        time.sleep(0.02)
    settled = trainer.steps()
    for _ in range(5):
        time.sleep(0.1)
        assert trainer.steps() == settled
    service.on_reply()
    trainer.wait_for_steps(settled)
    stats = trainer.stats()
    assert stats["micro"] == 2
    assert float(str(stats["gate_held_ms"])) > 300
    service.close()


@pytest.mark.slow
def test_a_killed_service_does_not_hold_the_trainer(preempted: tuple[RunningTrainer, Sharing]) -> None:
    """kill -9 with a request pending: the trainer notices the missing beat and goes on."""
    trainer, sharing = preempted
    code = (
        "import sys, time; from corun.share.announce import parse\n"
        "service = parse(sys.argv[1]); service.on_request(); print('pending', flush=True); time.sleep(600)"
    )
    service = subprocess.Popen(
        [sys.executable, "-c", code, f"{_page(sharing).path}:3"], env=ENVIRONMENT, stdout=subprocess.PIPE
    )
    assert service.stdout is not None
    assert service.stdout.readline() == b"pending\n"
    assert _page(sharing).pending(3) == 1
    service.send_signal(signal.SIGKILL)
    service.wait()
    service.stdout.close()
    trainer.wait_for_steps(trainer.steps() + 1)
    assert _page(sharing).pending(3) == 1
    assert int(str(trainer.stats()["gate_stale"])) > 0


@pytest.mark.slow
def test_a_running_trainer_follows_its_knobs(preempted: tuple[RunningTrainer, Sharing]) -> None:
    """Micro-steps and duty that are written on the page take effect without a restart."""
    trainer, sharing = preempted
    page = _page(sharing)
    page.set_knobs(replace(page.knobs, micro=4, duty=0.5))
    trainer.wait_for_steps(trainer.steps() + 2)
    stats = trainer.stats()
    assert (stats["micro"], stats["duty"]) == (4, 0.5)
    before = float(str(stats["gate_held_ms"]))
    trainer.wait_for_steps(trainer.steps() + 2)
    assert float(str(trainer.stats()["gate_held_ms"])) > before


@pytest.mark.slow
def test_drain_and_stop_reach_a_held_trainer(preempted: tuple[RunningTrainer, Sharing]) -> None:
    """The end of a window does not wait for the services: the step is finished, then the process ends."""
    trainer, sharing = preempted
    service = Announcer(_page(sharing), 0)
    service.on_request()
    assert trainer.channel.request(Drain(), PATIENCE_S)["steps"] >= 1
    trainer.channel.request(Stop(), PATIENCE_S)
    assert trainer.process.wait(PATIENCE_S) == 0
    service.close()


@pytest.mark.slow
def test_an_elastic_trainer_goes_on_with_fewer_threads_beside_a_request(tmp_path: Path) -> None:
    """Steps are made while a request is pending, with a thread less; the thread is back when it is answered."""
    trains = replace(TRAINER, threads=2)
    with Sharing.prepare("elastic", replace(CAST, trainer=trains)) as sharing:
        trainer = RunningTrainer(sharing, tmp_path, "--threads", "2")
        sharing.started({trains: trainer.process.pid})
        sharing.enter("corun")
        trainer.window(600)
        trainer.wait_for_steps(1)
        assert trainer.stats()["gate_fewer_threads"] == 0
        service = Announcer(_page(sharing), 0)
        service.on_request()
        trainer.wait_for_steps(trainer.steps() + 2)
        assert int(str(trainer.stats()["gate_fewer_threads"])) > 0
        service.on_reply()
        trainer.wait_for_steps(trainer.steps() + 1)
        settled = trainer.stats()["gate_fewer_threads"]
        trainer.wait_for_steps(trainer.steps() + 2)
        assert trainer.stats()["gate_fewer_threads"] == settled
        service.close()
        trainer.end()


@pytest.mark.slow
def test_a_trainer_started_by_hand_says_what_is_wrong_with_its_gate(tmp_path: Path) -> None:
    """A page that is gone ends with a sentence and exit code 2, not a traceback."""
    base = [sys.executable, "-m", "corun.train", "--model", "resnet18", "--data", "synthetic", "--steps", "1"]
    options = json.dumps({"page": str(tmp_path / "gone")})
    argv = [*base, "--gate", "corun.share.gates:from_options", "--gate-options", options]
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, check=False, cwd=home())
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot open the shared page")
    assert "Traceback" not in done.stderr
