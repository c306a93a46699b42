"""A run that shifts: what is refused before anything starts, and that client and trainer are told the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from corun.errors import InputError
from corun.launch import commands, drift
from corun.launch.cells import require_known
from corun.launch.segments import make_schedule, plan
from corun.registry import DataOptions, request_payloads
from corun.run import config as configs
from corun.run.config import Pair
from corun.run.directory import RunDirectory
from corun.wire.sockets import Address

BOTH = {"arch": "resnet18", "data": "drift", "image_size": 32, "weights": "start.pt"}
SHIFT = {"shift_at_s": 4, "corruption": "invert", "severity": 5}


def pair(train: dict[str, Any] | None = None, service: dict[str, Any] | None = None, **top: Any) -> Pair:
    """One cell that shifts and publishes, changed as asked."""
    value = {
        "train": [{**BOTH, "publish": True, **(train or {})}],
        "infer": [{**BOTH, "rate": 20, **(service or {})}],
        "arms": ["corun"],
        "drift": SHIFT,
        **top,
    }
    return configs.pairs(configs.parse({key: item for key, item in value.items() if item is not None}))[0]


def run_of(cell: Pair, path: Path) -> RunDirectory:
    return RunDirectory.create(path / "run", cell.resolved(), cell.digest())


def test_publish_takes_true_or_settings() -> None:
    """`true` is the defaults, `false` nothing, an object its settings."""
    assert pair().train.publish == configs.Publish()  # type: ignore[union-attr]
    assert pair({"publish": False}).train.publish is None  # type: ignore[union-attr]
    assert pair({"publish": {"every_s": 5}}).train.publish.every_s == 5  # type: ignore[union-attr]


def test_cells_without_drift_keep_their_digest() -> None:
    """What a cell does not use is not in its resolved form, so finished cells of older sweeps still count."""
    plain = pair({"publish": None, "data": "digits"}, {"data": "sample"}, drift=None)
    resolved = plain.resolved()
    assert "drift" not in resolved
    assert "publish" not in resolved["train"]
    assert "follow" not in resolved["services"][0]
    assert pair().digest() != pair(drift={**SHIFT, "severity": 4}).digest()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arms": ["alone", "corun"]}, "shifts once"),
        ({"repeat": 2}, "shifts once"),
        ({"duration_s": 4}, "not before the window's end"),
        ({"service": {"mode": "closed"}}, 'only "open"'),
        ({"service": {"data": "sample"}}, "not 0"),
        ({"service": {"arch": "vgg16"}}, "nobody to publish to"),
        ({"service": {"image_size": 64}}, "image_size 32 differs"),
        ({"service": {"weights": None}}, "weights start.pt differ"),
        ({"train": {"data": "digits"}}, 'publish needs "data": "drift"'),
        ({"drift": {**SHIFT, "corruption": "fog"}}, 'corruption "fog"'),
        ({"drift": {**SHIFT, "class_mix": {"after": [1]}}}, "class_mix.after must be 8 weights"),
        ({"drift": None}, "publish validates on labelled requests"),
        ({"launch": {"backend": "ray"}}, "run them on one machine"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_start(changes: dict[str, Any], sentence: str) -> None:
    """Each contradiction is one sentence that says what to give instead."""
    with pytest.raises(InputError) as raised:
        require_known([pair(**changes)])
    assert any(sentence in problem for problem in raised.value.problems), raised.value.problems


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"shift_at_s": -1}, "drift.shift_at_s"),
        ({"shift_at_s": 1, "severity": 9}, "drift.severity"),
        ({"shift_at_s": 1, "corrupton": "blur"}, 'drift.corrupton: unknown key; did you mean "corruption"'),
        ({}, "drift.shift_at_s: Field required"),
    ],
)
def test_bad_values_are_named_with_their_key(value: dict[str, Any], sentence: str) -> None:
    """The config's own checks cover types, ranges and names."""
    with pytest.raises(InputError) as raised:
        pair(drift=value)
    assert any(sentence in problem for problem in raised.value.problems), raised.value.problems


def test_a_good_cell_passes() -> None:
    """The example of the documentation is runnable."""
    require_known([pair()])
    require_known([pair({"publish": None})])


def test_client_and_trainer_are_told_the_same(tmp_path: Path) -> None:
    """The shift's second becomes the number of its first request; both read one file, the service follows the trainer."""
    cell = pair()
    ready = drift.prepare(cell, run_of(cell, tmp_path))
    run = tmp_path / "run"
    told = json.loads((run / "drift.json").read_text())
    rows = make_schedule(ready, plan(ready)).schedule.rows
    assert told["shift_at"] == int((rows["intended_ns"] < 4 * 10**9).sum())
    assert told["count"] == len(rows)
    assert (rows["payload"] == rows["id"]).all(), "the k-th request carries the k-th payload"
    train, service = ready.train, ready.services[0]
    assert train is not None
    assert train.data == service.data == f"drift:{run / 'drift.json'}"
    assert service.num_classes == 8
    payloads = request_payloads(service.data, DataOptions(image_size=32))
    assert len(payloads) == len(rows)
    control = Address("unix", "/tmp/x")
    server, _ = commands.server(service, control, run, 1)
    assert server[server.index("--follow") + 1] == str(run / "weights")
    trainer, _ = commands.trainer(train, 1, 0, run, control)
    publish = json.loads(trainer[trainer.index("--publish") + 1])
    assert publish["directory"] == str(run / "weights")
    assert publish["arrivals"] == str(run / "schedule.npy")
    assert publish["stream"] == 0


def test_without_drift_nothing_is_changed(tmp_path: Path) -> None:
    """Other cells are passed through untouched, and no file is written."""
    cell = pair({"publish": None, "data": "digits"}, {"data": "sample"}, drift=None)
    assert drift.prepare(cell, run_of(cell, tmp_path)) is cell
    assert not (tmp_path / "run" / "drift.json").exists()
