"""Programs as threads of one process: command lines, who is in which lane, and what ends when."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from corun.errors import InputError, RunFault
from corun.launch import commands, together
from corun.launch.together import Part, Together, check, parse, run
from corun.process import StopFlag
from corun.registry import home
from corun.run import config
from corun.share.in_process import NO_LANES, Lanes
from corun.train.options import TrainOptions
from corun.train.program import Training
from corun.wire.channel import Channel
from corun.wire.messages import Hello, Stop
from corun.wire.sockets import Address, connect

PATIENCE_S = 30.0
SERVER = ["python", "src/server.py", "--model", "null"]
TRAINER = ["python", "-m", "corun.train", "--model", "resnet18"]


def _argv(*parts: list[str], lanes: str = "") -> list[str]:
    return [*(["--lanes", lanes] if lanes else []), *(word for part in parts for word in ("--", *part))]


# Command lines


def test_command_lines_of_the_launcher_are_read_back(tmp_path: Path) -> None:
    """What a server and a trainer get as processes is what they get as threads, flags of the policy included."""
    pair = config.pairs(
        config.parse(
            {
                "train": [{"arch": "resnet18", "batch_size": 8, "threads": 3}],
                "infer": [[{"arch": "null", "name": "a", "extra": {"service_ms": 2}}, {"arch": "null", "name": "b"}]],
            }
        )
    )[0]
    assert pair.train is not None
    address, control = Address("tcp", "127.0.0.1", 54100), Address("unix", "/tmp/c.sock")
    parts = [commands.server(service, address, tmp_path, 7)[0] for service in pair.services]
    parts[0] = [*parts[0], "--announce", "/dev/shm/x:0"]
    parts.append(commands.trainer(pair.train, 3, 5, tmp_path, control)[0])
    lanes = {"kind": "priority", "service_priority": -5}
    argv, environment = commands.together(parts, lanes, 3)
    assert argv[1:3] == ["-m", "corun.launch.together"]
    assert environment["OMP_NUM_THREADS"] == "3"
    read = parse(argv[3:])
    assert read.lanes == lanes
    assert read.labels == ["server a", "server b", "trainer resnet18"]
    assert [service.parent for service in read.services] == [7, 7]
    assert read.services[0].model_options["extra"] == {"service_ms": 2}
    assert read.services[0].announce == "/dev/shm/x:0"
    assert read.trainer is not None
    assert (read.trainer.control, read.trainer.options.seed, read.threads) == ("unix:/tmp/c.sock", 5, 3)


def test_all_problems_are_listed() -> None:
    """Each command's mistake, an unknown program, a service or trainer too many and bad lanes come in one error."""
    argv = _argv(
        [*SERVER, "--prt", "5"],
        [*SERVER, "--name", "a"],
        [*SERVER, "--name", "a"],
        TRAINER,
        TRAINER,
        ["python", "-m", "corun.train"],
        ["bash"],
        [],
        lanes='{"kind": "wide"}',
    )
    with pytest.raises(InputError) as error:
        parse(argv)
    text = "\n".join(error.value.problems)
    for part in (
        "--prt",
        "service a stands twice",
        "2 trainers",
        "--model",
        "bash: neither server.py nor -m corun.train",
        "an empty command",
        "--lanes: lanes are",
    ):
        assert part in text, part


def test_unknown_models_are_all_named() -> None:
    """Before any part is built, with the part and the nearest name of each."""
    names = [["src/server.py", "--model", model, "--name", name] for name, model in (("a", "nul"), ("b", "resnet81"))]
    with pytest.raises(InputError) as error:
        check(parse(_argv(*names, SERVER)))
    assert [problem.partition(":")[0] for problem in error.value.problems] == ["server a", "server b"]
    assert 'did you mean "null"' in error.value.problems[0]
    check(parse(_argv(SERVER)))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "no command"),
        (["--lane", "{}"], "before the first"),
        (["--lanes", "{"], "not JSON"),
        (["--lanes", "[]"], "not a JSON object"),
    ],
)
def test_what_stands_before_the_commands_is_checked(argv: list[str], sentence: str) -> None:
    """Nothing is started by a command line without commands or with lanes that are none."""
    with pytest.raises(InputError, match="cannot be one process") as error:
        parse(argv)
    assert sentence in str(error.value)


def test_lanes_need_one_cuda_device() -> None:
    """Streams belong to a device: parts on the CPU, or on several devices, cannot share lanes."""
    asked = parse(_argv([*SERVER, "--device", "cpu"], lanes=json.dumps({"kind": "green", "service_sms": 8})))
    with pytest.raises(InputError, match="one CUDA device"):
        together.lanes_of(asked)
    assert together.lanes_of(Together(asked.services, None, {})) is NO_LANES


# Parts


@pytest.fixture
def bell() -> int:
    """Not closed at the end: a part rings after it has ended, when nobody may be waiting for it any more."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


class Recorded:
    """Lanes that note who entered and left them."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str, str]] = []
        self.lanes = Lanes(lambda: self._lane("service"), lambda: self._lane("trainer"), {"service_priority": -5})

    @contextmanager
    def _lane(self, side: str) -> Iterator[None]:
        thread = threading.current_thread().name
        self.log.append(("enter", side, thread))
        yield
        self.log.append(("leave", side, thread))

    def of(self, side: str) -> list[tuple[str, str]]:
        return [(what, thread) for what, which, thread in self.log if which == side]


def test_each_side_is_in_its_lane_in_the_thread_that_issues_its_work(
    bell: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service's model thread is in the services' lane before it loads and until it ends, its io thread never; the
    trainer's thread is in the trainer's lane while it builds and trains. HELLO tells the lanes."""
    seen: dict[str, list[tuple[str, str]]] = {}
    recorded = Recorded()
    load = "corun.serve.program.load_engine"
    from corun.serve.engine import load_engine

    def loading(*given: Any) -> Any:
        seen["loading"] = list(recorded.of("service"))
        return load_engine(*given)

    def training(job: Training, stop: StopFlag, ready: Any, facts: Any) -> None:
        seen["training"] = [*recorded.of("trainer"), ("in", threading.current_thread().name)]
        assert facts["lanes"] == {"service_priority": -5}
        ready()

    monkeypatch.setattr(load, loading)
    monkeypatch.setattr(together.training, "run", training)
    path = tmp_path / "a.sock"
    asked = parse(_argv([*SERVER, "--name", "a", "--address", f"unix:{path}"], TRAINER))
    facts = {"one_process": asked.labels, "lanes": recorded.lanes.in_force}
    server = together.server_part(asked.services[0], recorded.lanes, facts, bell)
    assert asked.trainer is not None
    trainer = together.trainer_part(asked.trainer, recorded.lanes, facts, bell)
    server.start(StopFlag())
    trainer.start(StopFlag())
    assert trainer.join(PATIENCE_S)
    channel = Channel(connect(Address.parse(f"unix:{path}")))
    info = channel.request(Hello("test"), PATIENCE_S)["info"]
    assert info["lanes"] == {"service_priority": -5}
    assert info["one_process"] == ["server a", "trainer resnet18"]
    channel.request(Stop(), PATIENCE_S)
    channel.close()
    assert server.join(PATIENCE_S)
    assert seen["loading"] == [("enter", "model")]
    assert seen["training"] == [("enter", "trainer resnet18"), ("in", "trainer resnet18")]
    assert recorded.of("service") == [("enter", "model"), ("leave", "model")]
    assert recorded.of("trainer")[-1] == ("leave", "trainer resnet18")


def test_an_engine_with_a_thread_of_its_own_is_refused_in_a_lane() -> None:
    """Its kernels would run outside the lane; the refusal names the model, and without lanes it is served."""
    from corun.serve import program
    from corun.serve.generation import SubmittingEngine
    from corun.wire.messages import Load

    closed: list[bool] = []
    engine = SubmittingEngine.__new__(SubmittingEngine)
    engine._servable = type("Info", (), {"info": type("I", (), {"model": "chat", "device": "cpu"})()})()
    engine._generator = type("Generator", (), {"close": lambda self: closed.append(True)})()
    load = program._in_lane(lambda message, placement, threads: engine)
    with pytest.raises(InputError, match="chat computes in a thread of its own"):
        load(Load("chat"), program.ModelOptions(), 1)
    assert closed == [True]


def _part(label: str, work: Any, bell: int, ready: bool = True) -> Part:
    return Part(label, work, lambda: ready, bell)


def test_a_part_that_fails_keeps_its_reason_and_nothing_else(bell: int) -> None:
    """Errors on purpose stay what they are, others are named by their kind; no frames, hence no tensors, are kept."""

    def refuse(stop: StopFlag) -> None:
        raise InputError("no such thing", ["first", "second"])

    def crash(stop: StopFlag) -> None:
        raise ValueError("shapes differ")

    for work, kind, text in ((refuse, InputError, "no such thing"), (crash, RunFault, "ValueError: shapes differ")):
        part = _part("trainer x", work, bell, ready=False)
        with pytest.raises(kind, match=text):
            part.start(StopFlag())
        assert part.ended
        assert part.error is not None
        assert part.error.__context__ is part.error.__cause__ is None


def _run(makers: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stop: StopFlag) -> int:
    """`run` with these works, by label, the last one the trainer's."""
    asked = Together((), Training(TrainOptions("resnet18")), {})
    services = tuple(parse(_argv([*SERVER, "--name", name])).services[0] for name in list(makers)[:-1])
    asked = Together(services, asked.trainer, {})

    def server(service: Any, lanes: Lanes, facts: Any, bell: int) -> Part:
        return _part(f"server {service.label}", makers[service.label], bell)

    def trainer(job: Any, lanes: Lanes, facts: Any, bell: int) -> Part:
        return _part(f"trainer {job.label}", makers["trainer"], bell)

    monkeypatch.setattr(together, "server_part", server)
    monkeypatch.setattr(together, "trainer_part", trainer)
    return run(asked, stop)


def _until_stopped(stop: StopFlag) -> None:
    while not stop.requested:
        time.sleep(0.01)


def test_the_others_go_on_when_one_fails_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trainer that raises is named on its own line while the service serves on; the exit code tells at the end."""
    stop, failed = StopFlag(), threading.Event()
    lives: list[bool] = []

    def serve(own: StopFlag) -> None:
        assert failed.wait(PATIENCE_S)
        time.sleep(0.05)
        lives.append(not own.requested)
        stop.request()
        _until_stopped(own)

    def train(own: StopFlag) -> None:
        failed.set()
        raise RunFault("it does not fit")

    # `start` must not see the failure as one of the start: the part says it is ready first
    monkeypatch.setattr(Part, "start", lambda self, stop: self._thread.start())
    assert _run({"a": serve, "trainer": train}, monkeypatch, stop) == 1
    assert lives == [True]
    assert "error: trainer resnet18: it does not fit" in capsys.readouterr().out


def test_a_stop_reaches_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """One signal of the process is a stop request of each of its parts, and all end in order."""
    stop = StopFlag()
    threading.Timer(0.05, stop.request).start()
    makers = {"a": _until_stopped, "b": _until_stopped, "trainer": _until_stopped}
    assert _run(makers, monkeypatch, stop) == 0


def test_a_stop_while_parts_start_ends_those_that_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal during a slow load: no further part is started, the one that loads is asked to end and waited for."""
    stop, started = StopFlag(), []
    original = Part.__init__

    def init(self: Part, label: str, work: Any, is_ready: Any, bell: int) -> None:
        original(self, label, work, lambda: False, bell)

    def load(own: StopFlag) -> None:
        started.append("a")
        stop.request()
        _until_stopped(own)

    monkeypatch.setattr(Part, "__init__", init)
    assert _run({"a": load, "trainer": lambda own: started.append("trainer")}, monkeypatch, stop) == 0
    assert started == ["a"]


def test_a_part_that_does_not_start_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until everybody is ready a failure is the process', with the part's name, its kind and its problems."""
    ended: list[str] = []

    def serve(own: StopFlag) -> None:
        _until_stopped(own)
        ended.append("a")

    def train(own: StopFlag) -> None:
        raise InputError("no such model", ["did you mean another"])

    asked_ready = {"server a": True, "trainer resnet18": False}
    original = Part.__init__

    def init(self: Part, label: str, work: Any, is_ready: Any, bell: int) -> None:
        original(self, label, work, lambda: asked_ready[label], bell)

    monkeypatch.setattr(Part, "__init__", init)
    with pytest.raises(InputError, match="trainer resnet18: no such model") as error:
        _run({"a": serve, "trainer": train}, monkeypatch, StopFlag())
    assert error.value.problems == ("did you mean another",)
    assert ended == ["a"]


def test_the_program_is_where_the_launcher_looks_for_it() -> None:
    """The module of the command line exists in this checkout."""
    assert (home() / "src" / "corun" / "launch" / "together.py").exists()
