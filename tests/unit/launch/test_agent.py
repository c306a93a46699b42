"""The agent of a node, without Ray: processes, files, and what a Ray worker must not pass on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun.errors import RunFault
from corun.launch import agent as agents
from corun.launch.agent import NodeAgent, relocate
from corun.registry import home
from corun.share.policy import Cast, Member

WORD = st.text("ab/-", max_size=6)


@pytest.fixture
def agent() -> Iterator[NodeAgent]:
    one = NodeAgent()
    yield one
    one.terminate()
    one.remove()


def test_it_starts_watches_and_stops_processes(agent: NodeAgent) -> None:
    """A process started on a node can be waited for, signalled, and asked for its last words."""
    sleeper = agent.start("client", "sleeper", [sys.executable, "-c", "import time; time.sleep(60)"], {})
    failing = agent.start("client", "failing", [sys.executable, "-c", "raise SystemExit('error: no data')"], {})
    assert agent.wait(failing, 120.0) == 1
    assert "error: no data" in agent.log_tail(failing)
    assert agent.wait(sleeper, 0.0) is None
    agent.send_signal(sleeper, signal.SIGKILL)
    assert agent.wait(sleeper, 120.0) == -signal.SIGKILL
    with pytest.raises(RunFault, match="no process 1 "):
        agent.wait(1, 0.0)


def test_its_files_are_listed_and_read_from_anywhere(agent: NodeAgent) -> None:
    """What lies in the node's directory is listed with its size and read in pieces; it is gone after `remove`."""
    agent.put("infer_client/a.csv", b"0123456789")
    assert ("infer_client/a.csv", 10) in [entry[:2] for entry in agent.listing()]
    assert agent.read("infer_client/a.csv", 4, 3) == b"456"
    directory = Path(agent.facts()["directory"])
    agent.remove()
    assert not directory.exists()


def test_it_holds_the_sharing_policy_of_its_node(agent: NodeAgent) -> None:
    """A policy is prepared where it acts; asking before is a fault, its page goes with `terminate`."""
    with pytest.raises(RunFault, match="no sharing policy"):
        agent.sharing("describe")
    service = Member("server", "a")
    name, page = agent.share({"policy": "slo", "slo_ms": 50}, Cast((service,), Member("trainer", "t")))
    assert (name, page) == ("slo", True)
    flags = agent.sharing("flags", service)
    path = Path(flags[1].rpartition(":")[0])
    assert path.exists()
    agent.terminate()
    assert not path.exists()


@given(st.lists(WORD), WORD)
def test_only_paths_below_the_launchers_checkout_are_moved(words: list[str], other: str) -> None:
    """Command lines name the node's own interpreter and checkout; nothing else in them changes."""
    moved = {"/l/corun": "/n/corun", "/l/corun/.venv/bin/python": "/usr/bin/python3"}
    argv = ["/l/corun/.venv/bin/python", "/l/corun/src/server.py", "/l/corun2", *words]
    assert relocate(argv, moved) == ["/usr/bin/python3", "/n/corun/src/server.py", "/l/corun2", *words]
    assert relocate([other], {"/l": "/l"}) == [other]


def test_what_ray_took_from_its_workers_is_given_back(agent: NodeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured processes see the node's GPUs, not the empty list of a worker without any."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(agents, "_environment_of", lambda pid: {"CUDA_VISIBLE_DEVICES": "0,1"})
    agent.release(sys.executable, str(home()))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_niceness_that_cannot_be_had_back_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the worker's niceness cannot be undone nothing is measured, and the error says how to start the node."""

    def refuse(*arguments: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "getpriority", lambda which, pid: 15 if pid == 0 else 0)
    monkeypatch.setattr(os, "setpriority", refuse)
    with pytest.raises(RunFault, match="RAY_worker_niceness=0"):
        agents._be_as_nice_as(1)
