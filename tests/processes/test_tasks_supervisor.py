"""The supervisor with real processes: what is killed comes back, what is registered while it runs is brought up."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.processes.supervised import Up
from tests.processes.tools import is_running, wait_until

from corun.errors import InputError
from corun.process import StopSignal
from corun.tasks import task as tasks
from corun.tasks.service import Pace
from corun.tasks.store import Store
from corun.tasks.supervisor import Supervisor, UpOptions, slots
from corun.testing.ask import Asker
from corun.testing.drive import Drive, poisson_dues_ns
from corun.wire import Status

PACE = Pace(look_s=0.25, record_s=1.0, rate_s=1.0, ahead_s=1.0, up_after_s=0.5, down_after_s=4.0)


def null(id: str, **values: object) -> dict[str, object]:
    return {"id": id, "kind": "null", "models": ["null"], **values}


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    """One task of the null model, up and ready."""
    with Up(tmp_path, [null("a")], UpOptions(directory=tmp_path / "run", pace=PACE)) as running:
        running.wait(running.all_ready)
        yield running


def test_a_killed_router_comes_back_on_its_port(up: Up) -> None:
    """Clients find it where it was; the replicas are as they were; the kill is an event."""
    address, replica = up.address("a"), up.live("a")["replicas"][0]["id"]
    os.kill(up.live("a")["router"]["pid"], signal.SIGKILL)
    up.wait(lambda: up.live("a")["router"]["restarts"] == 1 and up.all_ready())
    assert up.address("a") == address
    assert up.live("a")["replicas"][0]["id"] == replica
    with Asker(address) as asker:
        assert asker.ask(b"x").status == Status.OK
    assert any("the router was killed by SIGKILL" in line for line in up.said)


def test_a_replica_that_hangs_is_replaced(up: Up) -> None:
    """One that is stopped (SIGSTOP) answers no look; it is killed, and its request is answered by the next one."""
    victim = int(up.live("a")["replicas"][0]["id"])
    with Asker(up.address("a")) as asker:
        os.kill(victim, signal.SIGSTOP)
        assert asker.ask(b"x", 300.0).status in (Status.OK, Status.NOT_LOADED)
    assert not is_running(victim)
    up.wait(up.all_ready)
    assert any("did not answer 3 times" in line for line in up.said)


def test_tasks_come_and_go_while_it_runs(up: Up) -> None:
    """A task that is registered is brought up, a removed one is ended; the other one goes on untouched."""
    replica = up.live("a")["replicas"][0]["id"]
    up.store.add(tasks.make(**null("b")))
    up.wait(lambda: up.ready("b"))
    address, pid = up.address("b"), int(up.live("b")["replicas"][0]["id"])
    with Asker(address) as asker:
        assert asker.ask(b"x").status == Status.OK
    up.store.remove("b")
    wait_until(lambda: not is_running(pid))
    up.wait(lambda: not up.live("b")["replicas"])
    assert up.live("a")["replicas"][0]["id"] == replica
    assert up.ready("a")


def test_another_model_takes_over_without_an_error(up: Up) -> None:
    """Under load the task is given other options of its model: every request is answered OK."""
    with Drive(up.address("a"), poisson_dues_ns(50, 6.0, 1)) as drive:
        time.sleep(1.0)
        up.store.replace(tasks.make(**null("a", models=["null:service_ms=1"])))
        up.wait(lambda: up.live("a")["model"] == "null:service_ms=1" and up.ready("a"))
        up.wait(lambda: [one["model"] for one in up.live("a")["replicas"]] == ["null:service_ms=1"])
    assert set(drive.outcomes().counts) == {"OK"}


def test_a_load_brings_replicas_and_takes_them_back(tmp_path: Path) -> None:
    """One replica becomes more while requests need them, and one again afterwards; nothing is lost on the way."""
    registered = [null("a", models=["null:service_ms=20"], max_replicas=3)]
    with Up(tmp_path, registered, UpOptions(directory=tmp_path / "run", pace=PACE)) as up:
        up.wait(up.all_ready)
        with Drive(up.address("a"), poisson_dues_ns(80, 8.0, 2)) as drive:
            up.wait(lambda: len(up.live("a")["replicas"]) > 1)
        up.wait(lambda: up.ready("a") and len(up.live("a")["replicas"]) == 1)
    assert set(drive.outcomes().counts) <= {"OK", "REJECTED"}
    assert "scale" in {event.kind for event in up.store.events("a")}


def test_one_store_has_one_supervisor(up: Up) -> None:
    """A second one is refused with the pid of the first."""
    with pytest.raises(InputError, match=f"up already, by pid {os.getpid()}"):
        Supervisor(up.store, UpOptions(directory=up.supervisor.directory)).run(StopSignal())


def test_what_a_killed_supervisor_left_in_the_store_stops_nobody(tmp_path: Path) -> None:
    """The pid of a process that ended, or that is another one now, is no supervisor."""
    store = Store(tmp_path / "tasks.sqlite")
    store.set_state("supervisor", {"pid": os.getpid(), "began_s": 1.0, "directory": ""})
    stop = StopSignal()
    stop.request()
    Supervisor(store, UpOptions(directory=tmp_path / "run"), lambda _: None).run(stop)
    assert store.state("supervisor") is None


def test_a_lower_priority_runs_nicer() -> None:
    """Equal priorities are equal; each lower one gets 5 more, 15 at most."""
    made = [tasks.make(**null(f"t{place}", priority=priority)) for place, priority in enumerate((9, 9, 5, 1, 0, -1))]
    assert [slot.nice for slot in slots(made).values()] == [0, 0, 5, 10, 15, 15]
