"""The documents of files and columns say what the writers write."""

from __future__ import annotations

import re

import pytest

from corun.errors import InputError
from corun.registry import home
from corun.report import columns, export
from corun.run.directory import result_root


def test_documents_are_up_to_date() -> None:
    """result/README.md and docs/results.md are what `python -m corun.report.columns` makes of the definitions."""
    for path, text in columns.documents(home()):
        assert path.read_text(encoding="utf-8") == text, f"run: python -m corun.report.columns ({path})"


def test_every_column_is_documented() -> None:
    """Every column has a meaning, and stands once in its table."""
    for file in columns.FILES:
        names = [column.name for column in file.table]
        assert len(set(names)) == len(names), file.name
        assert all(column.doc for column in file.table), file.name


def test_links_lead_to_headings() -> None:
    """Each table named in the list of files links to its heading."""
    text = columns.readme()
    headings = {columns.anchor(title) for title in re.findall(r"^## (.+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_exports_know_the_same_files() -> None:
    """A table documented here is one whose types the Parquet export knows."""
    for file in (file for file in columns.FILES if file.table):
        assert export.definition(result_root() / "run" / file.name) == file.table


def test_page_without_marks() -> None:
    """A page that lost the mark of a table is refused, not silently left without it."""
    with pytest.raises(InputError, match="needs marked blocks"):
        columns.results("# no marks here\n")
