"""The registry on disk: tasks, what was chosen for them, their replicas, statistics and events, in one SQLite file.

Several processes use it at once: the command line, the supervisor, the router. Write-ahead logging lets readers go on
while one writes; a writer waits up to BUSY_S for another; each change is one transaction, so a process that is killed
leaves either all of it or nothing. The schema's version stands in the file; a newer one is refused, an older one is
brought up to date.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from corun.errors import InputError, RunFault, suggest
from corun.run.directory import result_root
from corun.tasks.choice import Choice
from corun.tasks.statistics import Statistics
from corun.tasks.task import Task

SCHEMA: Final = 1
BUSY_S: Final = 15.0
KEPT_WINDOWS: Final = 3600
KEPT_EVENTS: Final = 10_000

_TABLES: Final = """
CREATE TABLE tasks (id TEXT PRIMARY KEY, body TEXT NOT NULL, registered_s REAL NOT NULL);
CREATE TABLE totals (task_id TEXT PRIMARY KEY REFERENCES tasks(id) ON DELETE CASCADE, body TEXT NOT NULL);
CREATE TABLE windows (number INTEGER PRIMARY KEY, task_id TEXT NOT NULL REFERENCES tasks(id) ON DELETE CASCADE,
    t_s REAL NOT NULL, body TEXT NOT NULL);
CREATE INDEX windows_of ON windows (task_id, number);
CREATE TABLE choices (task_id TEXT PRIMARY KEY REFERENCES tasks(id) ON DELETE CASCADE,
    t_s REAL NOT NULL, body TEXT NOT NULL);
CREATE TABLE replicas (task_id TEXT NOT NULL REFERENCES tasks(id) ON DELETE CASCADE, place INTEGER NOT NULL,
    body TEXT NOT NULL, PRIMARY KEY (task_id, place));
CREATE TABLE events (number INTEGER PRIMARY KEY, task_id TEXT NOT NULL, t_s REAL NOT NULL, kind TEXT NOT NULL,
    detail TEXT NOT NULL);
CREATE INDEX events_of ON events (task_id, number);
CREATE TABLE state (name TEXT PRIMARY KEY, body TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Replica:
    """One replica as the supervisor last saw it.

    state: starting, ready, unhealthy, waiting (for its back-off) or stopped. id: pid or container id. restarts: of
    this place since `up`. rss_mib, cpu_s, gpu_mib: its last known use.
    """

    index: int
    model: str
    state: str
    address: str = ""
    id: str = ""
    log: str = ""
    restarts: int = 0
    started_s: float = 0.0
    reason: str = ""
    cpu_s: float = 0.0
    rss_mib: float | None = None
    gpu_mib: float | None = None


@dataclass(frozen=True)
class Event:
    """Something that happened: when (Unix time), to which task ("" = all), what, and the sentence about it."""

    t_s: float
    task_id: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Window:
    """What was recorded at one time (Unix time)."""

    t_s: float
    statistics: Statistics


def default_path() -> Path:
    """The registry a command line means without --store: $CORUN_TASKS, or result/tasks.sqlite."""
    return Path(os.environ.get("CORUN_TASKS") or result_root() / "tasks.sqlite")


class Store:
    """One open registry; usable from several threads. A forked child opens its own.

    Raises InputError when the path is no registry or one of a newer version, RunFault when the disk or another
    process refuses.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._lock = threading.RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"cannot open the registry {path}: {error}") from error
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise InputError(f"{path} is no registry of tasks: {error}; give another --store") from error
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        self._db.execute(f"PRAGMA busy_timeout = {round(BUSY_S * 1000)}")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA foreign_keys = ON")
        with self._transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA:
                raise InputError(
                    f"{self.path} was written by a newer version (schema {version}, this one knows {SCHEMA}); "
                    "use that version or give another --store"
                )
            if version == 0:
                if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise InputError(f"{self.path} is another program's database; give another --store")
                for statement in _TABLES.split(";\n"):
                    if statement.strip():
                        db.execute(statement)
                db.execute(f"PRAGMA user_version = {SCHEMA}")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of what happens inside, or nothing."""
        with self._lock:
            self._execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                self._roll_back()
                raise RunFault(f"the registry {self.path} cannot be written: {error}") from error
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise RunFault(f"the registry {self.path} cannot be used: {error}") from error

    def _rows(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with self._lock:
            return self._execute(statement, values).fetchall()

    # Tasks

    def add(self, task: Task) -> None:
        """Register a task; InputError when its id is taken."""
        with self._transaction() as db:
            try:
                db.execute("INSERT INTO tasks VALUES (?, ?, ?)", (task.id, task.to_json(), self._clock()))
            except sqlite3.IntegrityError:
                raise InputError(f'task "{task.id}" is registered already: remove it first, or replace it') from None
            self._event(db, task.id, "registered", task.description or task.kind)

    def replace(self, task: Task) -> None:
        """Register a task in the place of the one with its id; statistics and events stay."""
        with self._transaction() as db:
            self._require(task.id)
            db.execute("UPDATE tasks SET body = ? WHERE id = ?", (task.to_json(), task.id))
            db.execute("DELETE FROM choices WHERE task_id = ?", (task.id,))
            self._event(db, task.id, "replaced", task.description or task.kind)

    def get(self, id: str) -> Task:
        """The task with this id; InputError with a suggestion when there is none."""
        rows = self._rows("SELECT body FROM tasks WHERE id = ?", (id,))
        if not rows:
            known = [task.id for task in self.all()]
            raise InputError(
                f'no task "{id}" is registered{suggest(id, known)}',
                [f"registered tasks: {', '.join(known)}" if known else f"{self.path} has no tasks"],
            )
        return Task.from_json(rows[0][0])

    def all(self) -> list[Task]:
        """Every task: the highest priority first, then by id."""
        tasks = [Task.from_json(body) for (body,) in self._rows("SELECT body FROM tasks")]
        return sorted(tasks, key=lambda task: (-task.priority, task.id))

    def remove(self, id: str) -> None:
        """Forget a task with its statistics; its events stay. InputError when there is none."""
        with self._transaction() as db:
            self._require(id)
            db.execute("DELETE FROM tasks WHERE id = ?", (id,))
            self._event(db, id, "removed", "")

    def _require(self, id: str) -> None:
        self.get(id)

    # Statistics

    def record(self, task_id: str, statistics: Statistics) -> None:
        """Add what was measured since the last record; InputError for an unknown task."""
        now_s = self._clock()
        with self._transaction() as db:
            total = self.statistics(task_id) + statistics
            db.execute("INSERT OR REPLACE INTO totals VALUES (?, ?)", (task_id, _text(total)))
            db.execute(
                "INSERT INTO windows (task_id, t_s, body) VALUES (?, ?, ?)", (task_id, now_s, _text(statistics))
            )
            db.execute(
                "DELETE FROM windows WHERE task_id = ? AND number <= (SELECT number FROM windows WHERE task_id = ?"
                " ORDER BY number DESC LIMIT 1 OFFSET ?)",
                (task_id, task_id, KEPT_WINDOWS),
            )

    def statistics(self, task_id: str) -> Statistics:
        """Everything recorded of a task since it was registered; InputError for an unknown task."""
        self._require(task_id)
        rows = self._rows("SELECT body FROM totals WHERE task_id = ?", (task_id,))
        return Statistics(**json.loads(rows[0][0])) if rows else Statistics()

    def windows(self, task_id: str, last: int = KEPT_WINDOWS) -> list[Window]:
        """The last records of a task, oldest first."""
        rows = self._rows(
            "SELECT t_s, body FROM windows WHERE task_id = ? ORDER BY number DESC LIMIT ?", (task_id, last)
        )
        return [Window(t_s, Statistics(**json.loads(body))) for t_s, body in reversed(rows)]

    # Choices and replicas

    def set_choice(self, task_id: str, choice: Choice) -> None:
        """Keep what was chosen; an event when the model differs from the last one."""
        with self._transaction() as db:
            self._require(task_id)
            before = self.choice(task_id)
            same = before is not None and before.model == choice.model
            since_s = self.chosen_s(task_id) if same else self._clock()
            body = json.dumps(asdict(choice))
            db.execute("INSERT OR REPLACE INTO choices VALUES (?, ?, ?)", (task_id, since_s, body))
            if not same:
                self._event(db, task_id, "choice", f"{choice.model or 'no model'}: {choice.why}")

    def choice(self, task_id: str) -> Choice | None:
        """What was chosen last, None before the first time."""
        rows = self._rows("SELECT body FROM choices WHERE task_id = ?", (task_id,))
        return Choice(**json.loads(rows[0][0])) if rows else None

    def chosen_s(self, task_id: str) -> float:
        """Unix time since which the present model is chosen; 0 before the first choice."""
        rows = self._rows("SELECT t_s FROM choices WHERE task_id = ?", (task_id,))
        return float(rows[0][0]) if rows else 0.0

    def set_replica(self, task_id: str, replica: Replica) -> None:
        """Keep the state of one replica, by its index."""
        with self._transaction() as db:
            self._require(task_id)
            body = json.dumps(asdict(replica))
            db.execute("INSERT OR REPLACE INTO replicas VALUES (?, ?, ?)", (task_id, replica.index, body))

    def remove_replica(self, task_id: str, index: int) -> None:
        """Forget a replica that is gone."""
        with self._transaction() as db:
            db.execute("DELETE FROM replicas WHERE task_id = ? AND place = ?", (task_id, index))

    def replicas(self, task_id: str) -> list[Replica]:
        """The replicas of a task, by index."""
        rows = self._rows("SELECT body FROM replicas WHERE task_id = ? ORDER BY place", (task_id,))
        return [Replica(**json.loads(body)) for (body,) in rows]

    # Events and state

    def add_event(self, task_id: str, kind: str, detail: str = "") -> None:
        """Note that something happened; task_id "" = to all."""
        with self._transaction() as db:
            self._event(db, task_id, kind, detail)

    def _event(self, db: sqlite3.Connection, task_id: str, kind: str, detail: str) -> None:
        db.execute(
            "INSERT INTO events (task_id, t_s, kind, detail) VALUES (?, ?, ?, ?)",
            (task_id, self._clock(), kind, detail),
        )
        db.execute("DELETE FROM events WHERE number <= (SELECT max(number) FROM events) - ?", (KEPT_EVENTS,))

    def events(self, task_id: str | None = None, last: int = 100) -> list[Event]:
        """The last events of a task (None = of all), oldest first."""
        where, values = ("", ()) if task_id is None else ("WHERE task_id = ?", (task_id,))
        rows = self._rows(
            f"SELECT t_s, task_id, kind, detail FROM events {where} ORDER BY number DESC LIMIT ?", (*values, last)
        )
        return [Event(*row) for row in reversed(rows)]

    def set_state(self, name: str, value: Any) -> None:
        """Keep one JSON value by name, e.g. the supervisor's address; None forgets it."""
        with self._transaction() as db:
            if value is None:
                db.execute("DELETE FROM state WHERE name = ?", (name,))
            else:
                db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, json.dumps(value)))

    def state(self, name: str) -> Any:
        """The value kept by that name, None when there is none."""
        rows = self._rows("SELECT body FROM state WHERE name = ?", (name,))
        return json.loads(rows[0][0]) if rows else None


def _text(statistics: Statistics) -> str:
    return json.dumps(asdict(statistics))
