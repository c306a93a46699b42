"""The registry on disk: what it keeps, what it refuses, several processes at once, and a kill in the middle."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from corun.errors import InputError, RunFault
from corun.tasks import store as stores
from corun.tasks.choice import Choice
from corun.tasks.statistics import Statistics
from corun.tasks.store import Replica, Store
from corun.tasks.task import make

SRC = Path(__file__).resolve().parents[3] / "src"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A registry with the tasks a (priority 1) and b (priority 2)."""
    with Store(tmp_path / "tasks.sqlite") as opened:
        opened.add(make(id="a", priority=1))
        opened.add(make(id="b", priority=2))
        yield opened


def test_tasks_are_kept_in_the_order_of_their_priority(store: Store) -> None:
    """A registry gives back what was added, by priority, also after it was closed."""
    assert [task.id for task in store.all()] == ["b", "a"]
    store.close()
    with Store(store.path) as again:
        assert again.get("a") == make(id="a", priority=1)


def test_an_id_is_taken_once_and_must_be_known(store: Store) -> None:
    """A second task of one id is refused, an unknown id gets the near miss."""
    with pytest.raises(InputError, match="registered already"):
        store.add(make(id="a"))
    with pytest.raises(InputError, match="registered tasks: b, a"):
        store.get("c")
    with pytest.raises(InputError, match="no task"):
        store.remove("c")
    with pytest.raises(InputError, match="no task"):
        store.record("c", Statistics(requests=1))


def test_removing_a_task_takes_everything_of_it_but_its_events(store: Store) -> None:
    """Statistics, choice and replicas go with a task; what happened stays told."""
    store.record("a", Statistics(requests=1))
    store.set_choice("a", Choice("resnet18"))
    store.set_replica("a", Replica(0, "resnet18", "ready"))
    store.remove("a")
    store.add(make(id="a"))
    assert store.statistics("a") == Statistics()
    assert store.choice("a") is None
    assert store.chosen_s("a") == 0
    assert store.replicas("a") == []
    assert [event.kind for event in store.events("a")] == ["registered", "choice", "removed", "registered"]


def test_replacing_a_task_keeps_its_statistics_and_asks_for_a_new_choice(store: Store) -> None:
    """A changed task is the same task with another description; what was chosen for the old one is void."""
    store.record("a", Statistics(requests=7))
    store.set_choice("a", Choice("resnet18"))
    store.replace(make(id="a", rate=99))
    assert store.get("a").rate == 99
    assert store.statistics("a").requests == 7
    assert store.choice("a") is None


def test_statistics_add_up_and_their_windows_are_kept(store: Store) -> None:
    """Records merge into one total; the last ones can be read one by one, oldest first."""
    for number in range(1, 4):
        store.record("a", Statistics.of([10.0 * number], span_s=1.0))
    assert store.statistics("a").mean_ms == pytest.approx(20)
    assert [window.statistics.mean_ms for window in store.windows("a", 2)] == [20.0, 30.0]
    assert store.statistics("b") == Statistics()


def test_only_so_many_windows_and_events_are_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry does not grow for ever; totals do not forget."""
    monkeypatch.setattr(stores, "KEPT_WINDOWS", 3)
    monkeypatch.setattr(stores, "KEPT_EVENTS", 5)
    for number in range(8):
        store.record("a", Statistics(requests=1, mean_ms=number))
        store.record("b", Statistics(requests=1))
        store.add_event("a", "note", str(number))
    assert [window.statistics.mean_ms for window in store.windows("a")] == [5, 6, 7]
    assert len(store.windows("b")) == 3
    assert [event.detail for event in store.events()] == ["3", "4", "5", "6", "7"]
    assert store.statistics("a").requests == 8


def test_a_choice_is_dated_from_its_model(tmp_path: Path) -> None:
    """Choosing the same model again is no event and does not make it younger."""
    times = iter(range(100))
    with Store(tmp_path / "t.sqlite", clock=lambda: float(next(times))) as store:
        store.add(make(id="a"))
        choice = Choice("resnet18", {"resnet50": "too slow"}, expected_ms={"p99_ms": 5.0}, replicas=2)
        store.set_choice("a", choice)
        since = store.chosen_s("a")
        store.set_choice("a", choice)
        assert store.choice("a") == choice
        assert store.chosen_s("a") == since
        store.set_choice("a", Choice("resnet50"))
        assert store.chosen_s("a") > since
        assert [event.kind for event in store.events("a")].count("choice") == 2


def test_replicas_and_state_are_replaced_by_their_name(store: Store) -> None:
    """The last word about a replica or a value is what is kept."""
    store.set_replica("a", Replica(1, "resnet18", "starting"))
    store.set_replica("a", Replica(0, "resnet18", "ready", rss_mib=12.5))
    store.set_replica("a", Replica(1, "resnet18", "ready"))
    assert [(replica.index, replica.state) for replica in store.replicas("a")] == [(0, "ready"), (1, "ready")]
    store.remove_replica("a", 0)
    assert len(store.replicas("a")) == 1
    store.set_state("supervisor", {"pid": 3})
    assert store.state("supervisor") == {"pid": 3}
    store.set_state("supervisor", None)
    assert store.state("supervisor") is None


def test_what_is_no_registry_is_refused(tmp_path: Path) -> None:
    """Another file, another program's database and a newer version are bad input; nothing in them changes."""
    text = tmp_path / "text"
    text.write_text("x" * 5000)
    with pytest.raises(InputError, match="no registry"):
        Store(text)
    foreign = tmp_path / "foreign"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(InputError, match="another program's"):
        Store(foreign)
    newer = tmp_path / "newer"
    Store(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(InputError, match="newer version"):
        Store(newer)
    with pytest.raises(InputError, match="cannot open"):
        Store(text / "below" / "a file")


def test_who_waits_too_long_for_another_writer_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry held by another process is a fault that names the file, after the busy time."""
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(stores, "BUSY_S", 0.05)
    with pytest.raises((RunFault, InputError), match=r"tasks\.sqlite"):
        Store(store.path)
    other.execute("ROLLBACK")
    other.close()


def test_a_full_disk_is_a_fault_and_loses_nothing(store: Store) -> None:
    """What cannot be written is not there in part; what was there stays, and writing goes on once there is room."""
    store.record("a", Statistics(requests=1))
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(RunFault, match=r"tasks\.sqlite cannot be written: .*full"):
        store.set_state("big", "x" * 1_000_000)
    assert store.state("big") is None
    assert store.statistics("a").requests == 1
    store._db.execute("PRAGMA max_page_count = 1000000")
    store.record("a", Statistics(requests=1))
    assert store.statistics("a").requests == 2


def test_threads_share_one_open_registry(store: Store) -> None:
    """Records of several threads all count."""

    def record() -> None:
        for _ in range(20):
            store.record("a", Statistics(requests=1, mean_ms=2.0))

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.statistics("a").requests == 80
    assert store.statistics("a").mean_ms == 2.0


_WRITER = """
import sys; from pathlib import Path
from corun.tasks.store import Store; from corun.tasks.statistics import Statistics
with Store(Path(sys.argv[1])) as store:
    print("open", flush=True)
    for number in range(int(sys.argv[2])):
        store.record("a", Statistics(requests=1, mean_ms=1.0))
        print(number + 1, flush=True)
"""


def _writer(path: Path, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), str(count)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )


def test_processes_share_a_registry(store: Store) -> None:
    """Records of several processes at once all count."""
    writers = [_writer(store.path, 40) for _ in range(3)]
    for writer in writers:
        writer.communicate(timeout=300)
        assert writer.returncode == 0
    assert store.statistics("a").requests == 120
    assert len(store.windows("a")) == 120


def test_a_killed_process_leaves_whole_transactions(store: Store) -> None:
    """After SIGKILL in the middle of writing, total and windows agree, nothing acknowledged is lost, others go on."""
    writer = _writer(store.path, 1_000_000)
    assert writer.stdout is not None
    with writer.stdout:
        acknowledged = 0
        while acknowledged < 30:
            line = writer.stdout.readline().strip()
            acknowledged = int(line) if line.isdigit() else 0
        writer.send_signal(signal.SIGKILL)
        rest = [line.strip() for line in writer.stdout if line.strip().isdigit()]
    writer.wait()
    acknowledged = int(rest[-1]) if rest else acknowledged
    with Store(store.path) as again:
        kept = again.statistics("a").requests
        assert kept in (acknowledged, acknowledged + 1)
        assert len(again.windows("a", 10**6)) == min(kept, stores.KEPT_WINDOWS)
        again.record("a", Statistics(requests=1))
        assert again.statistics("a").requests == kept + 1


def test_what_is_stored_is_json(store: Store) -> None:
    """The file can be read by anything that knows SQLite and JSON."""
    store.record("a", Statistics(requests=1))
    db = sqlite3.connect(store.path)
    (body,) = db.execute("SELECT body FROM totals WHERE task_id = 'a'").fetchone()
    db.close()
    assert json.loads(body)["requests"] == 1
