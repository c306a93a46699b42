"""A dataclass as a command line: which flags there are, in which order, and what the program is given."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from corun.flags import takes
from corun.load.flags import Flags, OpenFlags

SRC = Path(__file__).resolve().parents[2] / "src"


@dataclass(frozen=True)
class Options:
    count: Annotated[int, typer.Option(help="how many")]
    rate_hz: Annotated[float, typer.Option("--rate", min=0, help="how often")] = 1.0
    path: Annotated[Path | None, typer.Option(help="where")] = None
    loud: bool = False


@dataclass(frozen=True)
class Slower(Options):
    rate_hz: Annotated[float, typer.Option("--rate", help="how seldom")] = 0.5


def ran(options: type[Options], *words: str, **fixed: object) -> tuple[int, str, list[Options]]:
    app, seen = typer.Typer(add_completion=False), []

    @app.command()
    @takes(options, **fixed)
    def main(asked: Options) -> None:
        """Do it."""
        seen.append(asked)

    done = CliRunner().invoke(app, words, env={"COLUMNS": "160"})
    return done.exit_code, done.output, seen


@settings(max_examples=25, deadline=None)
@given(count=st.integers(-9, 9), rate=st.floats(0, 1e6), path=st.none() | st.just(Path("a/b")))
def test_what_is_typed_arrives_with_its_type(count: int, rate: float, path: Path | None) -> None:
    """Every flag reaches the field it stands for; fields left out have their default, fixed ones their value."""
    words = ["--count", str(count), "--rate", repr(rate), *(["--path", str(path)] if path else [])]
    assert ran(Options, *words, loud=True) == (0, "", [Options(count, rate, path, True)])


def test_a_field_without_a_default_must_be_given() -> None:
    """A missing required flag ends with 2 before the program is run."""
    code, output, seen = ran(Options, loud=False)
    assert code == 2
    assert "--count" in output
    assert seen == []


def test_a_fixed_field_has_no_flag() -> None:
    """What the program sets itself cannot be asked for."""
    code, output, seen = ran(Options, "--count", "1", "--rate", "2", rate_hz=3.0, loud=False)
    assert code == 2
    assert "No such option" in output
    assert seen == []


def test_a_subclass_changes_a_flag_in_its_place() -> None:
    """The help of a subclass differs in the field it overrides and keeps the order of the others."""
    first, second = (ran(one, "--help", loud=False)[1] for one in (Options, Slower))
    assert "Do it." in first
    assert [text.index("--count") < text.index("--rate") < text.index("--path") for text in (first, second)] == [
        True,
        True,
    ]
    assert "how often" in first
    assert "how seldom" in second
    assert "how often" not in second
    assert ran(Slower, "--count", "1", loud=False)[2] == [Slower(1)]


def test_a_fixed_name_that_is_no_field_is_a_mistake() -> None:
    """A misspelt name is refused when the program is made, not ignored."""
    with pytest.raises(TypeError, match="Options has no field lout"):
        takes(Options, lout=True)


def test_both_clients_have_the_same_fields_in_the_same_order() -> None:
    """client_async.py differs from client.py in the help of --process and in flags it leaves out, nothing else."""
    mine, theirs = fields(OpenFlags), fields(Flags)
    assert [(one.name, one.default) for one in mine] == [(one.name, one.default) for one in theirs]
    assert [one.name for one, other in zip(mine, theirs, strict=True) if one.type != other.type] == ["process"]


def test_a_client_knows_its_flags_before_it_loads_numpy() -> None:
    """The threads of numerical libraries are set after the flags are read and before numpy is imported."""
    program = "import sys, corun.load.flags, corun.flags; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=SRC, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
