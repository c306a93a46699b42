"""Several roles in one process: one pid, one log, a child each, and how the end of one or of all is told."""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from corun.errors import RunFault
from corun.launch.children import Child, Family, Part, lanes_of
from corun.wire.channel import Channel

PARTS = [("server", "a"), ("server", "b"), ("trainer", "vgg_8")]
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    with Family(tmp_path) as made:
        yield made


def _connected(child: Child) -> socket.socket:
    """The other end of a control connection of this child."""
    mine, theirs = socket.socketpair()
    mine.settimeout(0.01)
    child.channel = Channel(mine)
    return theirs


def test_one_process_has_a_child_for_each_role(family: Family, tmp_path: Path) -> None:
    """Children share pid, log and command line; the profiler is told of one process, whose role is all of theirs."""
    children = family.start_together(PARTS, SLEEP, {})
    assert [(child.role, child.name) for child in children] == PARTS
    assert len({child.popen.pid for child in children}) == 1
    assert family.of("server") == children[:2]
    assert family.of("trainer") == children[2:]
    rows = [json.loads(line) for line in (tmp_path / "processes.jsonl").read_text().splitlines()]
    assert [(row["role"], row["name"]) for row in rows[1:]] == [("server+trainer", "a+b+vgg_8")]
    assert rows[1]["pid"] == children[0].popen.pid
    assert children[0].log.read_text().startswith("$ ")


def test_the_end_of_the_process_is_the_end_of_every_role(family: Family) -> None:
    """Each child says how it ended, and an unwanted end is one sentence that names all of them."""
    children = family.start_together(PARTS, SLEEP, {})
    ends = [_connected(child) for child in children]
    children[0].popen.kill()
    children[0].popen.wait()
    for end in ends:
        end.close()
    assert all(child.closed_fd() and not child.alive for child in children)
    assert {child.how_it_ended() for child in children} == {f"was killed by {signal.SIGKILL.name}"}
    with pytest.raises(RunFault, match=r"^server a and server b and trainer vgg_8 was killed by SIGKILL$"):
        family.require_alive()


def test_a_role_can_end_while_the_process_goes_on(family: Family) -> None:
    """Its control connection closes: it is no longer alive, its reason is the line of the log that names it, and the
    others are not concerned."""
    children = family.start_together(PARTS, SLEEP, {})
    ends = [_connected(child) for child in children]
    ends[0].send(b"an answer that waits to be read")
    assert all(child.alive and child.fd == child.channel.fileno() for child in children if child.channel)
    with open(children[0].log, "a", encoding="utf-8") as log:
        log.write("error: server b: its disk is full\nerror: trainer vgg: out of memory\n  - a hint\nmore\n")
    ends[2].close()
    assert not children[2].alive
    assert children[2].closed_fd()
    assert children[2].how_it_ended() == "ended: error: trainer vgg: out of memory\n  - a hint"
    assert family.of("server", "trainer") == children[:2]
    ends[1].close()
    assert children[1].how_it_ended() == "ended: error: server b: its disk is full"
    with pytest.raises(RunFault, match="out of memory"):
        family.require_alive()
    assert children[0].alive
    family.terminate()
    assert children[0].popen.returncode == -signal.SIGTERM
    ends[0].close()


def test_a_role_that_did_not_report_is_alive_with_its_process(family: Family) -> None:
    """Before a control connection is there only the process can be asked."""
    (child,) = family.start_together(PARTS[:1], SLEEP, {})
    assert isinstance(child, Part)
    assert child.fd == child.pidfd
    assert child.alive


def test_lanes_are_found_in_either_kind_of_hello(family: Family) -> None:
    """A server's HELLO has them among its info, a trainer's beside its options; an empty description is none."""
    server, trainer = family.start_together([PARTS[0], PARTS[2]], SLEEP, {})
    assert lanes_of([server, trainer]) == {}
    trainer.hello = {"model": "vgg", "lanes": {"service_sms": 8}}
    assert lanes_of([server, trainer]) == {"service_sms": 8}
    server.hello = {"info": {"lanes": {}}}
    assert lanes_of([server, trainer]) == {"service_sms": 8}
