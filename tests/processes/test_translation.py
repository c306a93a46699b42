"""Translation over real sockets: server.py as for any model, and a training beside it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.processes.tools import Program, wait_until

from corun.ectrans import build, parts, translate
from corun.testing.ask import Asker
from corun.wire import Address, Status

Start = Callable[..., Program]


def _done(program: Program) -> str:
    assert program.wait() == 0, program.output()
    return program.output()


def test_a_served_translation(start: Start, tmp_path: Path) -> None:
    """server.py answers lines of text with the lines that the reference translator gives, and refuses what is no text."""
    model = build.prepare("tiny", None, 300, tmp_path / "model")
    expected = translate.load(parts.split(model, tmp_path / "parts"), max_new=9).translate(["ba ruto", "go"])
    program = start("server.py", "--port", 0, "--model", "nmt", "--weights", model, "--extra", '{"max_new": 9}')

    def shown() -> re.Match[str] | None:
        assert program.popen.poll() is None, program.output()
        return re.search(r"ready on (\S+?),", program.output())

    with Asker(Address.parse(wait_until(shown)[1])) as asker:
        answer = asker.ask(b"ba ruto\ngo")
        assert (answer.status, answer.payload.decode().split("\n")) == (Status.OK, expected)
        assert asker.ask(b"\xff").status == Status.BAD_REQUEST
        assert asker.ask(b"go").payload.decode() == expected[1]


def test_bad_input_of_the_program(start: Start) -> None:
    """What is no parts directory ends with one sentence and exit code 2."""
    program = start("ectrans.py", "check", "--parts", "none")
    assert program.wait() == 2
    assert "error: none is not a parts directory" in program.output()
    assert "Traceback" not in program.output()


@pytest.mark.slow
def test_beside_a_training_of_its_own_kind(
    start: Start, free_port: Callable[..., int], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    """config.json names nmt as a service and as the training job; both are measured like any other model."""
    config = write_config(
        {
            "train": [{"arch": "nmt", "data": "pairs", "batch_size": 8, "count": 64}],
            "infer": [[{"arch": "nmt", "data": "pairs", "rate": 4, "count": 8, "extra": {"max_new": 4}}]],
            "duration_s": 4,
            "port": free_port(),
            "repeat": 1,
        }
    )
    program = start(
        "main.py", "--config", config, "--no-report", "--no-calibrate", "--out", tmp_path / "result", "--json"
    )
    answer = json.loads(_done(program).splitlines()[-1])
    assert answer["arms"]["corun"]["services"]["nmt"]["errors"] == 0
    assert answer["arms"]["corun"]["services"]["nmt"]["requests"] > 0
    (run,) = (tmp_path / "result").iterdir()
    with open(run / "train.csv", newline="") as file:
        assert {row["arm"] for row in csv.DictReader(file)} == {"train", "corun"}
