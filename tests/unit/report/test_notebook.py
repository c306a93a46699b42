"""The notebook that shows how to read a run, executed without Jupyter."""

from __future__ import annotations

import ast
import json
from typing import Any

import pytest

from corun.registry import home
from corun.run.read import read

DOCS = home() / "docs"


def _cells() -> list[str]:
    notebook = json.loads((DOCS / "read_a_run.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_every_cell_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The cells run from top to bottom in the notebook's folder, and print what they promise."""
    monkeypatch.chdir(DOCS)
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(_cells()):
        exec(compile(ast.parse(cell), f"cell {number}", "exec"), space)
    printed = capsys.readouterr().out
    assert "alone" in printed
    assert "99: None" in printed, "the sample is too short for p99, and the notebook shows that"


def test_sample_run_is_small_and_whole() -> None:
    """The sample stays under 300 kB and has all three arms."""
    sample = DOCS / "sample_run"
    assert (
        sum(file.stat().st_size for file in sample.rglob("*") if file.suffix in (".csv", ".json", ".npy")) < 300_000
    )
    run = read(sample)
    assert run.manifest["status"] == "complete"
    assert run.arms == ("alone", "train", "corun")
