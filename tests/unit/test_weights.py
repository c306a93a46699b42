"""Published versions: whole or not there, whoever dies when; a pointer that only ever names what is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corun import weights
from corun.errors import InputError, RunFault
from corun.weights import Versions

SRC = Path(__file__).resolve().parents[2] / "src"
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.count": torch.tensor(7)}


def test_a_version_reads_back_as_it_was_published(tmp_path: Path) -> None:
    """Tensors, card and pointer agree; numbers count up; nothing but them is left behind."""
    versions = Versions(tmp_path / "new")
    assert versions.current() is None
    first = versions.publish(STATE, "resnet18", 10)
    second = versions.publish({**STATE, "a.count": torch.tensor(8)}, "resnet18", 20, 0.75, 64)
    pointer = versions.current()
    assert pointer is not None
    assert (pointer.version, pointer.why) == (2, "publish")
    assert (first.version, first.accuracy, second.accuracy, second.samples, second.step) == (1, None, 0.75, 64, 20)
    card, state = versions.read(2)
    assert card == second
    assert torch.equal(state["a.weight"], STATE["a.weight"])
    assert int(state["a.count"]) == 8
    assert sorted(path.name for path in versions.directory.iterdir()) == [
        "current.json", "v0001.json", "v0001.safetensors", "v0002.json", "v0002.safetensors",
    ]  # fmt: skip


def test_tensors_that_share_memory_or_are_transposed_can_be_published(tmp_path: Path) -> None:
    """What is published are values; how they lay in memory is not."""
    base = torch.arange(12.0).reshape(3, 4)
    versions = Versions(tmp_path)
    versions.publish({"whole": base, "tied": base, "turned": base.t()}, "m", 0)
    assert torch.equal(versions.read(1)[1]["turned"], base.t())


def test_a_rollback_points_to_an_earlier_whole_version(tmp_path: Path) -> None:
    """The pointer goes back and says why; to a version that is damaged it does not go."""
    versions = Versions(tmp_path)
    for step in range(3):
        versions.publish(STATE, "m", step)
    pointer = versions.roll_back(2)
    assert (pointer.version, pointer.why) == (2, "rollback")
    assert versions.current() == pointer
    versions.tensors_path(1).write_bytes(b"x")
    with pytest.raises(InputError, match="cut short"):
        versions.roll_back(1)
    assert versions.current() == pointer
    assert versions.publish(STATE, "m", 9).version == 4, "a number is never used twice"


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_damage_to_the_tensors_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut anywhere or changed in any byte, a version is refused with a sentence."""
    versions = Versions(tmp_path_factory.mktemp("w"))
    versions.publish(STATE, "m", 0)
    path = versions.tensors_path(1)
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    path.write_bytes(whole[:place] if cut else whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
    with pytest.raises(InputError, match="cut short" if cut else "damaged"):
        versions.read(1)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": "1", "why": "publish", "t_ns": 1}'])
def test_a_damaged_pointer_or_card_is_an_error_with_its_path(tmp_path: Path, text: str) -> None:
    """Neither a half-written pointer nor a wrong card is believed."""
    versions = Versions(tmp_path)
    versions.publish(STATE, "m", 0)
    versions.pointer_path.write_text(text)
    with pytest.raises(InputError, match=r"current\.json"):
        versions.current()
    versions.card_path(1).write_text(text)
    with pytest.raises(InputError, match=r"v0001\.json"):
        versions.read(1)


def test_only_the_newest_versions_keep_their_tensors(tmp_path: Path) -> None:
    """A long run does not fill the disk; cards stay as the record of what was published."""
    versions = Versions(tmp_path)
    for step in range(weights.KEEP + 3):
        versions.publish(STATE, "m", step)
    assert versions.known() == list(range(4, weights.KEEP + 4))
    assert versions.card(1).step == 0


def test_a_full_disk_is_a_fault_and_the_old_version_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written leaves no draft and no new pointer."""
    versions = Versions(tmp_path)
    versions.publish(STATE, "m", 0)

    def refuse(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.os, "fsync", refuse)
    with pytest.raises(RunFault, match="No space left"):
        versions.publish(STATE, "m", 1)
    monkeypatch.undo()
    pointer = versions.current()
    assert pointer is not None
    assert pointer.version == 1
    assert not list(tmp_path.glob(".draft*"))


WRITER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from pathlib import Path
from corun import weights
versions, state = weights.Versions(Path(sys.argv[2])), {"w": torch.ones(1000)}
versions.publish(state, "m", 0)
left, real = int(sys.argv[3]), os.fsync
def fsync(fd):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(fd)
weights.os.fsync = fsync
versions.publish({"w": torch.zeros(1000)}, "m", 1)
"""


@pytest.mark.parametrize("moment", range(6))
def test_a_writer_killed_at_any_moment_leaves_a_whole_version_in_service(tmp_path: Path, moment: int) -> None:
    """Killed before each synchronisation, the pointer names a version that reads back, and the next writer goes on."""
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(SRC), str(tmp_path), str(moment)], check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    versions = Versions(tmp_path)
    pointer = versions.current()
    assert pointer is not None
    _, state = versions.read(pointer.version)
    assert float(state["w"][0]) == (1.0 if pointer.version == 1 else 0.0)
    assert versions.publish({"w": torch.zeros(1)}, "m", 2).version > pointer.version
    assert not list(tmp_path.glob(".draft*"))
    assert json.loads(versions.pointer_path.read_text())["version"] == max(versions.known())
    assert os.path.getsize(versions.tensors_path(max(versions.known()))) > 0
