"""What the measured code may not do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[3] / "src" / "corun" / "load"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_nothing_is_timed_by_the_wall_clock(path: Path) -> None:
    """A step of the wall clock must not move a latency: time.time and its kin are not called in the client."""
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not called & {"time.time", "time.time_ns", "datetime.utcnow"}


@pytest.mark.parametrize("name", ["sender.py", "closed.py"])
def test_the_send_path_writes_no_file_and_prints_nothing(name: str) -> None:
    """No open, print, CSV, JSON or logging where requests are sent; records go into the mapped ring."""
    tree = ast.parse((PACKAGE / name).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not imported & {"csv", "json", "logging", "threading", "asyncio", "pickle"}
    assert not called & {"open", "print"}
