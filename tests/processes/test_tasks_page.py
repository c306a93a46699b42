"""The tasks' page in a real browser: what it draws from the state, and that text stays text."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from tests.processes.browser import FLAGS
from tests.unit.tasks.test_web import live_task

from corun.run.table import TableWriter
from corun.tasks import task as tasks
from corun.tasks.service import HISTORY
from corun.tasks.store import Store
from corun.tasks.web import in_background


def shown(link: str, profile: Path) -> str:
    """The page's document after its scripts have run."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    argv = [chromium, *FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom", link]
    return subprocess.run(argv, capture_output=True, text=True, timeout=500).stdout


def test_the_page_draws_every_task(tmp_path: Path) -> None:
    """A card with figures, three charts, the replicas and the events; a description with tags is shown as it is."""
    with Store(tmp_path / "tasks.sqlite") as store:
        store.add(tasks.make(id="doors", kind="null", models=["null"]))
        store.add(tasks.make(id="later", kind="null", models=["null"]))
        rows = TableWriter(tmp_path / "run" / "doors.csv", HISTORY)
        for second in range(20):
            rows.row({"t_s": 1000.0 + 2 * second, "rate": second, "p50_ms": 5.0, "max_ms": 150.0, "replicas": 1})
        rows.close()
        now = {
            "t_s": time.time() + 3600,
            "up": True,
            "pid": 4711,
            "directory": str(tmp_path / "run"),
            "tasks": [live_task()],
        }
        store.set_state("live", now)
        with in_background(store, port=0) as link:
            page = shown(link, tmp_path / "profile")
    assert "up, pid 4711" in page
    card = page[page.index('id="task-doors"') : page.index("<h2>later</h2>")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in card
    assert "<script>" not in card
    assert card.count("<svg") == 3
    assert card.count('<path d="M3') >= 4
    assert "1 of 1" in card
    assert "127.0.0.1:2" in card
    assert "registered" in page[page.index('id="events"') :]
