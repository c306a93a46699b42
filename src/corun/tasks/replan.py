"""Plans again now and then while tasks are up, so that choices follow live statistics and forecasts of the load.

A thread with a connection of its own; the supervisor sees a changed choice in the registry and replaces the replicas one
by one. A plan that cannot be made is said once and tried again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from corun.errors import CorunError
from corun.tasks import machine
from corun.tasks.choice import Capacity
from corun.tasks.planning import Planner
from corun.tasks.profiles import Profiles
from corun.tasks.quality import QualityTable
from corun.tasks.store import Store

__all__ = ["Context", "offered", "replanning"]

STATE = "planned"


def offered(store: Store, training: bool, cores: float | None, memory_mib: float | None) -> Capacity:
    """What the machine has for services: what is free, and what the tasks' own replicas hold now."""
    free = machine.capacity(training, cores, memory_mib)
    if memory_mib is not None:
        return free
    replicas = [replica for task in store.all() for replica in store.replicas(task.id)]
    held_mib = sum(replica.rss_mib or 0.0 for replica in replicas)
    gpus_mib = sorted(free.gpu_mib, reverse=True)
    if gpus_mib:
        gpus_mib[0] += sum(replica.gpu_mib or 0.0 for replica in replicas)
    return Capacity(free.cores, free.memory_mib + held_mib, tuple(gpus_mib), training)


class Context:
    """How the last plan was made, kept in the registry so that later ones are made alike."""

    def __init__(
        self,
        quality: Path | None = None,
        training: bool = False,
        cores: float | None = None,
        memory_mib: float | None = None,
        max_slowdown: float | None = None,
    ) -> None:
        self.quality, self.training, self.cores, self.memory_mib = quality, training, cores, memory_mib
        self.max_slowdown = max_slowdown

    @classmethod
    def load(cls, store: Store) -> Context:
        """That of the last plan, or the defaults."""
        kept = dict(store.state(STATE) or {})
        quality = kept.pop("quality", None)
        return cls(Path(quality) if quality else None, **kept)

    def save(self, store: Store) -> None:
        quality = str(self.quality.resolve()) if self.quality else None
        rest = {"training": self.training, "cores": self.cores, "memory_mib": self.memory_mib}
        rest["max_slowdown"] = self.max_slowdown
        store.set_state(STATE, {"quality": quality, **rest})

    def planner(self, store: Store, profiles: Profiles | None = None) -> Planner:
        """A planner of this kind."""
        table = QualityTable.load(self.quality) if self.quality else QualityTable()
        return Planner(store, profiles or Profiles(), table, self.training)

    def offered(self, store: Store) -> Capacity:
        """What the machine offers, as that plan saw it."""
        return replace(offered(store, self.training, self.cores, self.memory_mib), max_slowdown=self.max_slowdown)


@contextmanager
def replanning(path: Path, every_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """Plan again every `every_s` seconds meanwhile."""
    over = threading.Event()
    thread = threading.Thread(target=_loop, args=(path, every_s, say, over), name="replan", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5.0)


def _loop(path: Path, every_s: float, say: Callable[[str], None], over: threading.Event) -> None:
    said = ""
    with Store(path) as store:
        while not over.wait(every_s):
            try:
                context = Context.load(store)
                context.planner(store).decide(context.offered(store))
            except CorunError as error:
                if str(error) != said:
                    said = str(error)
                    say(f"planning again failed: {error}")
