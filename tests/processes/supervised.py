"""A supervisor in a thread of the test's process, with the tasks the test registers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from corun.process import StopSignal
from corun.tasks import task as tasks
from corun.tasks.monitor import snapshot
from corun.tasks.store import Store
from corun.tasks.supervisor import Supervisor, UpOptions
from corun.wire import Address


class Up:
    """A supervisor in a thread of this process, and what its store says."""

    def __init__(self, directory: Path, registered: Sequence[dict[str, Any]], options: UpOptions) -> None:
        self.store = Store(directory / "tasks.sqlite")
        self.ids = [values["id"] for values in registered]
        for values in registered:
            self.store.add(tasks.make(**values))
        self.said: list[str] = []
        self.stop = StopSignal()
        self.supervisor = Supervisor(self.store, options, self.said.append)
        self.fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.supervisor.run(self.stop)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self.fault = error

    def __enter__(self) -> Up:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.request()
        self._thread.join(180)

    def live(self, task: str) -> dict[str, Any]:
        found = [one for one in snapshot(self.store)["tasks"] if one["id"] == task]
        return found[0] if found else {"replicas": [], "router": {"up": False}}

    def wait(self, condition: Callable[[], Any], timeout_s: float = 300.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.fault is None, self.fault
            assert time.monotonic() < deadline, "\n".join(self.said)
            time.sleep(0.1)

    def all_ready(self) -> bool:
        """Every task has its router, and exactly the replicas it should have, all of them ready."""
        return all(self.ready(id) for id in self.ids)

    def ready(self, task: str) -> bool:
        live = self.live(task)
        states = [replica["state"] for replica in live["replicas"]]
        return bool(live["router"]["up"] and states and states == ["ready"] * live["wanted"])

    def address(self, task: str) -> Address:
        return Address.parse(self.live(task)["address"])
