"""The page and what it reads: who may see it, what it shows, which files it gives away."""

from __future__ import annotations

import io
import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from starlette.testclient import TestClient

from corun.errors import InputError
from corun.run.table import TableWriter
from corun.tasks import task as tasks
from corun.tasks.monitor import history, log_names, log_tail, report, snapshot, table, watch
from corun.tasks.service import HISTORY
from corun.tasks.store import Event, Store
from corun.tasks.web import check, in_background, make_app

TOKEN = "a-token-of-some-length"


def live_task(id: str = "doors") -> dict[str, Any]:
    replica = {"index": 0, "state": "ready", "address": "127.0.0.1:2", "id": "7", "model": "null", "restarts": 1}
    replica |= {"cpu_s": 1.5, "rss_mib": 50.0, "reason": "", "log": "", "started_s": 0.0, "gpu_mib": None}
    return {
        "id": id,
        "description": "<script>alert(1)</script>",
        "kind": "null",
        "priority": 1,
        "runtime": "process",
        "address": "127.0.0.1:1",
        "model": "null",
        "slo": "p99 <= 100 ms",
        "bound_ms": 100.0,
        "rate": 12.0,
        "forecast": {"rate": 15.0, "method": "ewma"},
        "service_ms": 5.0,
        "p50_ms": 6.1,
        "p99_ms": None,
        "max_ms": 9.0,
        "late_share": 0.01,
        "received": 5,
        "answered": {"ok": 4, "rejected": 1},
        "waiting": 0,
        "outstanding": 0,
        "router": {"pid": 3, "up": True, "restarts": 0},
        "wanted": 1,
        "least": 1,
        "most": 2,
        "replicas": [replica],
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store as a supervisor leaves it while it runs, with one task up and one not: fresh for an hour."""
    opened = Store(tmp_path / "tasks.sqlite")
    for id in ("doors", "later"):
        opened.add(tasks.make(id=id, kind="null", models=["null"]))
    run = tmp_path / "run"
    rows = TableWriter(run / "doors.csv", HISTORY)
    for second in range(300):
        rows.row({"t_s": 1000.0 + second, "received": 2, "rate": 1.0, "replicas": 1, "wanted": 1})
    rows.close()
    (run / "doors.log").write_text("line\n" * 500 + "last line\n")
    (run / "secret.txt").write_text("no")
    now = {"t_s": time.time() + 3600, "up": True, "pid": 1, "directory": str(run), "tasks": [live_task()]}
    opened.set_state("live", now)
    return opened


def client(store: Store, token: str | None = None, host: str = "127.0.0.1") -> TestClient:
    return TestClient(make_app(store, token), base_url=f"http://{host}")


def test_the_state_has_figures_history_logs_and_events(store: Store) -> None:
    """One request tells everything the page shows; the history is limited."""
    state = client(store).get("/api/state").json()
    (doors,) = state["tasks"]
    assert (doors["rate"], doors["logs"], len(doors["history"])) == (12.0, ["doors.log"], 150)
    assert doors["history"][-1]["t_s"] == 1299.0
    assert doors["history"][-1]["p99_ms"] is None
    assert [one["id"] for one in state["idle"]] == ["later"]
    assert [event["kind"] for event in state["events"]] == ["registered", "registered"]
    assert not state["stale"]


def test_the_page_is_one_file_that_asks_nobody_else(store: Store) -> None:
    """No address but its own, a policy that forbids others, and nothing is put in as HTML."""
    answer = client(store).get("/")
    assert "http" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "innerHTML" not in answer.text
    assert "insertAdjacentHTML" not in answer.text


def test_with_a_token_every_request_needs_it(store: Store) -> None:
    """The header counts everywhere, the query only for the page; a wrong or missing one is 401 and shows nothing."""
    guarded = client(store, TOKEN, "example.org")
    for path in ("/", "/api/state", "/api/log?task=doors&name=doors.log", "/nothing"):
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            answer = guarded.get(path, headers=wrong)
            assert answer.status_code == 401
            assert "doors" not in answer.text
    assert guarded.get("/api/state", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert guarded.get(f"/?token={TOKEN}").status_code == 200
    assert guarded.get(f"/api/state?token={TOKEN}").status_code == 401
    assert guarded.get("/?token=wrong").status_code == 401
    assert guarded.get("/?token=é").status_code == 401


def test_without_a_token_only_this_hosts_names_are_answered(store: Store) -> None:
    """A page elsewhere that points its name at 127.0.0.1 gets nothing."""
    for host in ("127.0.0.1", "localhost"):
        assert client(store, host=host).get("/api/state").status_code == 200
    assert client(store, host="evil.example").get("/api/state").status_code == 400


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_hosts_need_a_token(host: str) -> None:
    """Binding beyond loopback without a token is refused; with one it is allowed, if it is long enough."""
    with pytest.raises(InputError, match="give a token"):
        check(host, None)
    with pytest.raises(InputError, match="characters"):
        check(host, "short")
    check(host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8"])
def test_loopback_needs_none(host: str) -> None:
    """Every loopback address is this host's alone."""
    check(host, None)


@pytest.mark.parametrize("name", ["secret.txt", "../tasks.sqlite", "/etc/passwd", "later.log", ""])
def test_only_a_tasks_own_logs_are_given(store: Store, name: str) -> None:
    """Any other name is 404, whatever lies there."""
    answer = client(store).get("/api/log", params={"task": "doors", "name": name})
    assert answer.status_code == 404
    assert "no log" in answer.text


def test_a_log_is_its_end(store: Store) -> None:
    """The last lines, as plain text; an unknown task is 404."""
    answer = client(store).get("/api/log", params={"task": "doors", "name": "doors.log"})
    assert answer.text.endswith("line\nlast line")
    assert len(answer.text.splitlines()) == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert client(store).get("/api/log", params={"task": "x/../doors", "name": "doors.log"}).status_code == 404


def test_it_serves_from_a_thread(store: Store) -> None:
    """In the background, on a port that was free; one in use is refused before anything runs."""
    with in_background(store, port=0) as link:
        with urllib.request.urlopen(f"{link}api/state", timeout=60) as answer:
            assert json.load(answer)["tasks"][0]["id"] == "doors"
        port = int(link.rstrip("/").rpartition(":")[2])
        with pytest.raises(InputError, match="cannot listen"), in_background(store, port=port):
            pass


# Terminal and report


def printed(store: Store) -> str:
    text = io.StringIO()
    watch(store, Console(width=200, file=text), again=False)
    return text.getvalue()


def test_the_table_has_a_row_per_task(store: Store) -> None:
    """Those that are up with their figures, those that are not by name; n/a where too little was measured."""
    text = printed(store)
    row = next(line for line in text.splitlines() if line.startswith("doors"))
    assert row.split()[1:] == ["127.0.0.1:1", "null", "1", "1/1", "12.0", "15.0", "6.1", "n/a", "1.0", "0", "4", "1"]
    assert any(line.split()[:3] == ["later", "not", "up"] for line in text.splitlines())
    assert "supervised by pid 1" in text


def test_a_supervisor_that_is_gone_is_told(store: Store) -> None:
    """State that was not written for a while is stale; without a supervisor the table says how to start one."""
    state = store.state("live")
    assert snapshot(store, now_s=state["t_s"] + 60)["stale"]
    store.set_state("live", {**state, "t_s": 1.0})
    assert "hangs or was killed" in printed(store)
    store.set_state("live", None)
    assert "no supervisor is running" in printed(store)
    assert table(snapshot(store)) is not None


def test_history_of_a_short_or_missing_table(tmp_path: Path) -> None:
    """No file is no rows; a short one is all of its rows; a row that is being written does no harm."""
    assert history(tmp_path, "t") == []
    rows = TableWriter(tmp_path / "t.csv", HISTORY)
    rows.row({"t_s": 1.5, "rate": 2.0})
    rows.close()
    assert [(row["t_s"], row["rate"]) for row in history(tmp_path, "t")] == [(1.5, 2.0)]
    with open(tmp_path / "t.csv", "a") as file:
        file.write("3.5,1")
    assert [row["t_s"] for row in history(tmp_path, "t")] == [1.5, 3.5]


def test_logs_of_a_task_whose_name_begins_like_anothers(tmp_path: Path) -> None:
    """`a` and `a-b` do not see each other's logs."""
    for name in ("a.log", "a-0.log", "a-b.log", "a-b-0.log", "a-router.log"):
        (tmp_path / name).write_text(name)
    assert log_names(tmp_path, "a") == ["a.log", "a-router.log", "a-0.log"]
    assert log_tail(tmp_path, "a-b", "a-b.log") == "a-b.log"
    with pytest.raises(InputError):
        log_tail(tmp_path, "a", "a-b.log")


def test_a_report_says_what_happened() -> None:
    """Requests by how they ended, latency, lateness, restarts and events."""
    summary = {
        "task": "doors", "description": "counts them", "model": "null", "why": "the only model allowed", "runtime": "process",
        "priority": 1, "slo": "p99 <= 100 ms", "address": "127.0.0.1:1", "up_s": 60.0, "received": 10,
        "answered": {"ok": 9, "failed": 1}, "errors": 1, "unanswered": 0, "late": 1, "late_pct": 11.1, "p50_ms": 5.0,
        "p90_ms": None, "p99_ms": None, "max_ms": 120.0, "cpu_s": 1.0, "cpu_ms_per_request": 111.0, "most_replicas": 2,
        "replica_restarts": 1, "router_restarts": 0,
    }  # fmt: skip
    text = report(summary, [Event(0.0, "doors", "end", "replica 0 was killed\nby SIGKILL")])
    for part in (
        "9 ok, 1 failed",
        "p50 5.0 ms, p90 n/a ms",
        "1 (11.1 %)",
        "1 restarts",
        "replica 0 was killed by SIGKILL",
    ):
        assert part in text
