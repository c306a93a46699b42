"""Rules of naming the processes to follow."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun.errors import InputError
from corun.profile.watch import Watched, WatchFile, parse_pid


class Watch:
    """A watch file with the faults it recorded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults: list[Exception] = []
        self.file = WatchFile(path, self.faults.append)

    def append(self, text: str) -> None:
        """What the launcher does."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    """A watch file that does not exist yet."""
    return Watch(tmp_path / "processes.jsonl")


def test_a_file_that_is_not_there_yet_names_nobody(watch: Watch) -> None:
    """The launcher may start the profiler first."""
    assert watch.file.new() == []
    watch.append('{"pid": 7, "role": "server", "name": "a", "t_ns": 1, "argv": ["x"]}\n')
    assert watch.file.new() == [Watched(7, "server", "a")]


def test_only_new_rows_are_given(watch: Watch) -> None:
    """Each row is given once, and other keys are ignored."""
    watch.append('{"pid": 7, "role": "server"}\n')
    assert watch.file.new() == [Watched(7, "server", "")]
    assert watch.file.new() == []
    watch.append('{"pid": 8, "role": "client", "name": "c"}\n')
    assert watch.file.new() == [Watched(8, "client", "c")]


def test_a_half_written_row_waits(watch: Watch) -> None:
    """A line without its end is read once it is whole."""
    watch.append('{"pid": 7, "ro')
    assert watch.file.new() == []
    watch.append('le": "server", "name": "a"}\n')
    assert watch.file.new() == [Watched(7, "server", "a")]


def test_a_shorter_file_is_read_from_its_start(watch: Watch) -> None:
    """A launcher that starts over is followed."""
    watch.append('{"pid": 7, "role": "server", "name": "long enough"}\n')
    watch.file.new()
    watch.path.write_text('{"pid": 8, "role": "c"}\n')
    assert watch.file.new() == [Watched(8, "c", "")]


@pytest.mark.parametrize(
    "line",
    ["not json", "[1]", '{"role": "x"}', '{"pid": -1, "role": "x"}', '{"pid": true, "role": "x"}', '{"pid": 1}'],
)
def test_a_bad_row_is_a_fault_and_the_next_one_counts(watch: Watch, line: str) -> None:
    """One bad row is counted and does not hide the others."""
    watch.append(line + '\n{"pid": 9, "role": "x"}\n')
    assert watch.file.new() == [Watched(9, "x", "")]
    assert len(watch.faults) == 1


@given(st.lists(st.tuples(st.integers(1, 99999), st.text(min_size=1, max_size=5)), max_size=5), st.data())
def test_any_split_into_writes_gives_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str]], data: st.DataObject
) -> None:
    """However the launcher's writes are cut, every row arrives once and in order."""
    import json

    watch = Watch(tmp_path_factory.mktemp("w") / "w.jsonl")
    text = "".join(json.dumps({"pid": pid, "role": "r", "name": name}) + "\n" for pid, name in rows)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    seen: list[Watched] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        watch.append(text[start:end])
        seen += watch.file.new()
    assert seen == [Watched(pid, "r", name) for pid, name in rows]


def test_a_process_can_be_named_by_hand() -> None:
    """ROLE:NAME=PID; the name may hold an equals sign, the role may not hold a colon."""
    assert parse_pid("server:resnet50=4711") == Watched(4711, "server", "resnet50")
    assert parse_pid("server:a=b=7") == Watched(7, "server", "a=b")


@pytest.mark.parametrize(
    "text", ["", "4711", "server=4711", "server:=4711", ":x=1", "server:x=", "server:x=-3", "a:b=0"]
)
def test_a_process_named_badly_is_refused_with_an_example(text: str) -> None:
    """The message shows the form that is wanted."""
    with pytest.raises(InputError, match="server:resnet50=4711"):
        parse_pid(text)
