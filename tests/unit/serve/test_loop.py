"""An inference loop: the same stages as a service, one row per inference, payloads in turn."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun import registry
from corun.errors import InputError
from corun.registry import ModelOptions, Payload, ServableInfo
from corun.run.read import read_table
from corun.run.records import names
from corun.run.table import TableWriter
from corun.serve.engine import ServableEngine
from corun.serve.loop import INFER_LOOP, STAGES, InferenceLoop, LoopOptions
from corun.wire.messages import Arm

null = registry.load_plugin("models", "null")
PAYLOADS = [Payload(f"{letter}.jpg", letter.encode()) for letter in "abc"]
ARM = Arm("corun", 2, 5, 0, 1)


class Rows:
    """Rows kept as dicts."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    def row(self, values: Sequence[Any]) -> None:
        self.kept.append(dict(zip(names(INFER_LOOP), values, strict=True)))


class Picky(null.Null):  # type: ignore[name-defined, misc]
    """Refuses payload `b` and breaks on a batch of three."""

    def decode(self, payload: bytes) -> bytes:
        if payload == b"b":
            raise ValueError("b is not a picture")
        return payload

    def forward(self, batch: int) -> int:
        if batch == 3:
            raise RuntimeError("out of memory")
        return batch


def loop(rows: Rows | None = None, servable: Any = None, **options: Any) -> InferenceLoop:
    engine = ServableEngine(servable or null.Null(ModelOptions(extra={"reply_bytes": 7})))
    return InferenceLoop(engine, PAYLOADS, LoopOptions("one", **options), rows)


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 8))
def test_payloads_come_in_turn_whatever_the_batch(batch: int, steps: int) -> None:
    """Inference i of batches of B begins with payload i * B, round and round."""
    rows = Rows()
    one = loop(rows, batch_size=batch)
    one.arm(ARM)
    assert all(one.step() for _ in range(steps))
    assert [row["file_name"] for row in rows.kept] == [PAYLOADS[i * batch % 3].name for i in range(steps)]
    assert {row["batch"] for row in rows.kept} == {batch}
    assert {row["reply_bytes"] for row in rows.kept} == {7 * batch}


def test_stamps_of_a_row_do_not_go_backwards() -> None:
    """t_start, the stages of a service and t_end stand in order, and latency is their span."""
    rows = Rows()
    one = loop(rows)
    one.arm(ARM)
    one.step()
    (row,) = rows.kept
    stamps = [row["t_start_ns"], *(row[f"s_{stage}_ns"] for stage in STAGES), row["t_end_ns"]]
    assert stamps == sorted(stamps)
    assert float(row["latency"]) == pytest.approx((stamps[-1] - stamps[0]) / 1e6)
    assert (row["arm"], row["repeat"], row["segment"], row["status"]) == ("corun", 2, 5, "OK")


def test_every_window_does_the_same_work() -> None:
    """ARM counts from zero and begins with the first payload again; ids go on, so they are unique in the run."""
    rows = Rows()
    one = loop(rows)
    for segment in range(2):
        one.arm(Arm("alone", 0, segment, 0, 1))
        one.step()
        one.step()
        assert one.counts()["inferences"] == 2
    assert [row["file_name"] for row in rows.kept] == ["a.jpg", "b.jpg", "a.jpg", "b.jpg"]
    assert [row["id"] for row in rows.kept] == [0, 1, 2, 3]


def test_a_payload_that_cannot_be_decoded_is_a_row_and_the_loop_goes_on() -> None:
    """BAD_REQUEST with the reason; stages it never reached are empty, never 0."""
    rows = Rows()
    one = loop(rows, servable=Picky(ModelOptions()))
    one.arm(ARM)
    for _ in range(3):
        one.step()
    assert [row["status"] for row in rows.kept] == ["OK", "BAD_REQUEST", "OK"]
    assert rows.kept[1]["detail"] == "b is not a picture"
    assert rows.kept[1]["s_device_ns"] is None
    assert one.counts() == {"inferences": 3, "failed": 1, "last_ms": one.counts()["last_ms"]} | {
        "detail": "b is not a picture"
    }


def test_a_model_that_fails_is_a_row_too() -> None:
    """FAILED with the exception's name, for the whole batch."""
    rows = Rows()
    engine = ServableEngine(Picky(ModelOptions()))
    one = InferenceLoop(engine, [PAYLOADS[0]], LoopOptions("one", batch_size=3), rows)
    one.arm(ARM)
    one.step()
    assert (rows.kept[0]["status"], rows.kept[0]["detail"]) == ("FAILED", "RuntimeError: out of memory")


def test_rows_on_disk_read_back(tmp_path: Path) -> None:
    """The table's columns are the record's, and the rows are there as soon as they are made."""
    table = TableWriter(tmp_path / "one.csv", INFER_LOOP)
    engine = ServableEngine(null.Null(ModelOptions()))
    one = InferenceLoop(engine, PAYLOADS, LoopOptions("one", beside="resnet18_16"), table)
    one.arm(ARM)
    one.step()
    read = read_table(tmp_path / "one.csv", INFER_LOOP)
    assert list(read["train_model_name"]) == ["resnet18_16"]
    assert (read["t_end_ns"] >= read["t_start_ns"]).all()
    table.close()


def test_no_payloads_is_bad_input() -> None:
    """A loop over an empty data set is refused by name."""
    engine = ServableEngine(null.Null(ModelOptions()))
    with pytest.raises(InputError, match="loop one has no payloads"):
        InferenceLoop(engine, [], LoopOptions("one"))


def test_data_that_does_not_fit_the_model_is_refused_before_the_window() -> None:
    """One payload that can be answered is enough; when none can, the first one's reason is given."""
    loop(servable=Picky(ModelOptions())).check()
    engine = ServableEngine(Picky(ModelOptions()))
    InferenceLoop(engine, [PAYLOADS[1], PAYLOADS[2]], LoopOptions("one")).check()
    with pytest.raises(InputError, match=r"null cannot answer any payload.*\n.*b.jpg: b is not a picture"):
        InferenceLoop(engine, [PAYLOADS[1]], LoopOptions("one")).check()


def test_info_is_the_engines() -> None:
    """A loop's rows name the model and device of its engine, and an absent image size is empty."""
    rows = Rows()
    one = loop(rows)
    assert isinstance(one.engine.info, ServableInfo)
    one.step()
    row = rows.kept[0]
    assert (row["infer_model_name"], row["device"], row["image_size"], row["arm"]) == ("null", "cpu", None, None)


def _by_hand(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(registry.__file__).resolve().parents[1])}
    argv = [sys.executable, "-m", "corun.serve.loop", *arguments]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_by_hand_it_runs_without_a_launcher(tmp_path: Path) -> None:
    """The command line of a loop works alone: rows, counts, exit 0."""
    done = _by_hand("--model", "null", "--seconds", "1", "--count", "2", "--out", str(tmp_path), "--name", "n")
    assert done.returncode == 0, done.stderr
    rows = read_table(tmp_path / "infer_loop" / "n.csv", INFER_LOOP)
    assert set(rows["arm"]) == {"alone"}
    assert f"'inferences': {len(rows['id'])}" in done.stdout


def test_bad_options_by_hand_are_sentences() -> None:
    """An unknown model, and --extra that is no JSON object, end with exit code 2 and no traceback."""
    for arguments, sentence in (
        (("--model", "nul"), 'did you mean "null"'),
        (("--model", "null", "--extra", "[1]"), "not a JSON object"),
    ):
        done = _by_hand(*arguments)
        assert (done.returncode, sentence in done.stderr) == (2, True), done.stderr
        assert "Traceback" not in done.stderr
