"""A command line as a value: the same words by hand, in a program and inside another program."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun.errors import InputError
from corun.run.commandline import program, read
from corun.run.serving import Serving, flags
from corun.train import program as training


@given(
    port=st.integers(0, 65535),
    threads=st.integers(1, 64),
    channels_last=st.booleans(),
    name=st.one_of(st.none(), st.text("abc-", min_size=1).filter(lambda text: not text.startswith("-"))),
)
def test_a_command_line_is_read_as_it_was_written(
    port: int, threads: int, channels_last: bool, name: str | None
) -> None:
    """Every flag lands in its field, and what is left out has its default."""
    argv = ["--port", str(port), "--threads", str(threads)]
    argv += ["--channels-last"] if channels_last else []
    argv += ["--name", name] if name else []
    serving = read(flags, argv)
    assert (serving.port, serving.threads, serving.channels_last, serving.name) == (
        port,
        threads,
        channels_last,
        name,
    )
    assert (serving.model, serving.queue_limit, serving.out) == (None, 1024, None)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--prt", "5"], "No such option"),
        (["--port", "70000"], "--port"),
        (["--threads", "many"], "--threads"),
        (["--help"], "asks for help"),
    ],
)
def test_a_wrong_command_line_is_bad_input(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Instead of a usage message and an exit there is an InputError that says what is wrong."""
    with pytest.raises(InputError, match=sentence):
        read(flags, argv)


def test_a_program_acts_on_what_it_read(capsys: pytest.CaptureFixture[str]) -> None:
    """The command gets the same value as `read`, and its help is that of the flags."""
    from typer.testing import CliRunner

    seen: list[Serving] = []
    app = program(flags, seen.append)
    argv = ["--model", "null", "--port", "0", "--out", "/tmp/x"]
    assert CliRunner().invoke(app, argv).exit_code == 0
    assert seen == [read(flags, argv)]
    assert seen[0].out == Path("/tmp/x")
    assert "Serve one model" in CliRunner().invoke(app, ["--help"]).output


def test_errors_of_a_program_are_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    """What the flags or the work refuse on purpose has its exit code and no traceback."""
    from typer.testing import CliRunner

    done = CliRunner().invoke(training.app, ["--model", "resnet18", "--extra", "[]"])
    assert done.exit_code == 2
    assert "--extra is not a JSON object" in done.output


def test_a_trainers_flags_are_its_options() -> None:
    """The options of the job and how it is run are told apart; the device is resolved by whoever runs it."""
    argv = ["--model", "resnet18", "--device", "auto", "--batch-size", "8", "--steps", "3", "--freeze-statistics"]
    argv += ["--gate", "a:b", "--gate-options", '{"page": "x"}', "--extra", '{"k": 1}', "--memory-fraction", "0.5"]
    job = read(training.flags, argv)
    assert (job.options.model, job.options.device, job.options.batch_size) == ("resnet18", "auto", 8)
    assert job.options.frozen_statistics
    assert job.options.extra == {"k": 1}
    assert job.options.publish is None
    assert (job.steps, job.gate, job.gate_options, job.memory_fraction) == (3, "a:b", {"page": "x"}, 0.5)


def test_what_a_service_cannot_be_is_known_before_anything_is_imported() -> None:
    """An unknown model and options that are no JSON object are found by `check` alone."""
    with pytest.raises(InputError, match='did you mean "null"'):
        read(flags, ["--model", "nul"]).check()
    for text in ("[1]", "{"):
        with pytest.raises(InputError, match="--extra is not"):
            read(flags, ["--model", "null", "--extra", text]).check()
    read(flags, ["--model", "null", "--extra", '{"service_ms": 1}']).check()
