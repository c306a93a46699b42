"""The page of a run or a sweep: complete, self-contained, readable without a mouse, and never a crash."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from corun.errors import InputError
from corun.report import attribution, html, numbers, page, slowdown, sweep_page, timeline
from corun.report.exhibit import Data, Exhibit, missing
from corun.report.html import Drawn
from corun.report.loops import summarise_loops
from corun.report.page import Report
from corun.report.summary import Summary, summarise
from corun.report.validity import Flag, check
from corun.run.read import Run, read
from corun.run.table import TableWriter
from corun.serve.loop import INFER_LOOP
from corun.testing.runs import FakeRun, FakeService, FakeTrain, write_run, write_sweep

pytestmark = pytest.mark.timeout(600)  # a guard against hanging, wide enough for a machine with ten times the work
SHORT = {"alone": 4.0, "train": 2.0, "corun": 4.0}
VOID = {"meta", "link", "img", "source", "br", "input"}
LOADING = {"src", "srcset", "href", "data", "poster", "action"}


class _Page(HTMLParser):
    """Collects tags, ids and addresses, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _plain(run: Run, summary: Summary, flags: list[Flag]) -> str:
    """The page with one tiny picture in place of each figure, which costs no time to draw."""
    dot = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (1).to_bytes(4, "big") * 2
    figures = [
        Drawn(e, dict.fromkeys(("light", "dark", "light-phone", "dark-phone"), dot) if e.draw else {})
        for e in page.exhibits(run, summary)
    ]
    return page.render(Report(run, summary, flags, figures))


@pytest.fixture(scope="module")
def text(run: Run, summary: Summary) -> str:
    return _plain(run, summary, check(summary))


def test_self_contained(text: str) -> None:
    """Nothing is loaded: every address is inside the file or on the page, and there is no script."""
    parsed = _Page(text)
    assert not parsed.of("script")
    for tag, attributes in parsed.tags:
        for name in LOADING & attributes.keys():
            assert attributes[name].startswith(("data:", "#")), (tag, attributes[name][:60])
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(" not in text


def test_every_picture_has_words_and_data(text: str) -> None:
    """Each figure has alt text, renderings for phones and dark mode, and a table with a file to save."""
    parsed = _Page(text)
    pictures = parsed.of("img")
    assert len(pictures) == len(parsed.of("figure")) == 5
    assert all(len(picture["alt"]) > 40 and picture["width"] for picture in pictures)
    media = {source["media"] for source in parsed.of("source")}
    assert any("prefers-color-scheme: dark" in condition for condition in media)
    assert any("max-width" in condition for condition in media)
    saved = [link for link in parsed.of("a") if link.get("download", "").endswith(".csv")]
    assert len(saved) == 5
    for link in saved:
        head = base64.b64decode(link["href"].split(",", 1)[1]).decode().splitlines()[0]
        assert "," in head


def test_keyboard(text: str) -> None:
    """Links lead to parts that exist, and every box that scrolls can be reached and is named."""
    parsed = _Page(text)
    ids = {attributes["id"] for _, attributes in parsed.tags if "id" in attributes}
    anchors = [link["href"][1:] for link in parsed.of("a") if link["href"].startswith("#")]
    assert anchors
    assert set(anchors) <= ids
    boxes = [attributes for _, attributes in parsed.tags if "scroll" in attributes.get("class", "").split()]
    assert boxes
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def test_doubts_stand_above_the_numbers(text: str) -> None:
    """Validity comes before the first number, and each kind of doubt is said."""
    assert "not answered with OK" in text
    assert text.index('class="doubt"') < text.index('class="cards"') < text.index('id="latency"')


def test_how_it_was_measured(run: Run, text: str) -> None:
    """The manifest is shown: policy, threads, weights, versions, machine, seed, schedule, and the whole of it to save."""
    for words in (
        "sharing policy",
        "threads",
        "random",
        "numpy",
        run.manifest["schedule_sha256"],
        "made up by",
        "seed",
    ):
        assert words in text
    link = next(link for link in _Page(text).of("a") if link.get("download") == "manifest.json")
    assert json.loads(base64.b64decode(link["href"].split(",", 1)[1])) == run.manifest


def test_names_are_escaped(run: Run, summary: Summary) -> None:
    """Whatever stands in a manifest is text on the page, never markup."""
    evil = "<script>alert(1)</script>"
    manifest = {**run.manifest, "run": evil, "argv": [evil], "versions": {evil: evil}}
    other = Run(run.path, manifest, run.windows, run.infer_client, train=run.train, events=run.events)
    text = _plain(
        other, Summary(run.path, manifest, summary.rows, summary.ratios), [Flag("x", "", "", None, None, evil)]
    )
    assert not _Page(text).of("script")


def test_many_doubts_of_a_kind_fold() -> None:
    """Twenty flags of one kind are one item with the rest folded away; none is lost."""
    flags = [Flag("slip", "", "", None, None, f"sentence {number}") for number in range(20)]
    text = page.doubts(flags)
    assert text.count("<details>") == 1
    assert all(f"sentence {number}" in text for number in range(20))
    assert "20 reasons" in text


def test_missing_figure_is_a_sentence() -> None:
    """An exhibit without a picture is a heading and a sentence."""
    text = html.figure(Drawn(missing("tail", "Tail", "There is <nothing>."), {}))
    assert "There is &lt;nothing&gt;." in text
    assert "<img" not in text


def test_numbers_stand_right_and_missing_is_empty() -> None:
    """A column of numbers, factors and n/a is right-aligned; a missing cell is empty."""
    text = html.table(("a", "b"), [("x", 1.5), ("y", None), ("z", "×2.00"), ("w", "n/a")], "t")
    assert text.count('class="number"') == 5
    assert '<td class="number"></td>' in text


def test_figure_with_data() -> None:
    """One row is one row, and the label names the figure."""
    text = html.data_details(Data(("a",), [(1,)]), "tail")
    assert "Data (1 row)" in text
    assert 'download="tail.csv"' in text


@pytest.mark.parametrize(
    ("name", "fake", "says"),
    [
        ("no trainer", FakeRun(train=None, duration_s=SHORT), "No training was measured"),
        ("no service", FakeRun(services=(), duration_s=SHORT), "No request was measured"),
        ("no profiler", FakeRun(profiler=False, duration_s=SHORT), "The profiler left no rows"),
        ("killed at once", FakeRun(duration_s=SHORT, stop_after=0), "ended before its first window"),
        ("killed later", FakeRun(duration_s=SHORT, stop_after=1), "not finished: killed, or still running"),
        ("failed", FakeRun(duration_s=SHORT, status="failed", faults=("server a died",)), "server a died"),
        ("all lost", FakeRun((FakeService(lost_share=1.0),), duration_s=SHORT), "no request was answered with OK"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_incomplete_runs(tmp_path: Path, name: str, fake: FakeRun, says: str) -> None:
    """Whatever a run lacks, its page is whole and says what is missing in a sentence."""
    path = write_run(tmp_path / "run", fake)
    run, summary = read(path), summarise(path)
    text = _plain(run, summary, check(summary))
    _Page(text)
    assert says in text, name


def test_torn_files(tmp_path: Path) -> None:
    """A run whose tables were cut in the middle of a row by a kill still has its page."""
    path = write_run(tmp_path / "run", FakeRun(gpu=True, duration_s=SHORT, stop_after=2))
    for table in path.rglob("*.csv"):
        table.write_bytes(table.read_bytes()[:-7])
    run, summary = read(path), summarise(path)
    _Page(_plain(run, summary, check(summary)))


def test_written_files(tmp_path: Path) -> None:
    """The page and every rendering are on disk; pictures of an older page are gone."""
    path = write_run(tmp_path / "run", FakeRun(train=None, duration_s={"alone": 2.0}))
    (path / "report").mkdir()
    (path / "report" / "old.png").write_bytes(b"old")
    assert page.write(path) == path / "report.html"
    assert re.search("<figure", (path / "report.html").read_text())
    assert {file.name for file in (path / "report").iterdir()} == {
        f"{key}{look}.png"
        for key in ("timeline", "tail", "stages")
        for look in ("", "-dark", "-light-phone", "-dark-phone")
    }


# Sweeps


def test_sweep_page(tmp_path: Path) -> None:
    """A sweep's page has a row per cell and service in the index's order, links cells with pages, and names failures."""
    runs = [
        FakeRun(train=FakeTrain(batch_size=8), duration_s=SHORT),
        FakeRun(train=FakeTrain(batch_size=16), duration_s=SHORT, status="failed", faults=("server died",)),
    ]
    root = write_sweep(tmp_path / "sweep", runs)
    first = next(iter(sweep_page.run_directories(root)))
    (first / "report.html").write_text("")
    assert sweep_page.is_sweep(root)
    assert not sweep_page.is_sweep(first)
    cells = sweep_page.cells(root)
    text = sweep_page.render(root, cells, [Drawn(missing("interference", "Who slows whom", "Nothing."), {})])
    parsed = _Page(text)
    assert f"{first.name}/report.html" in [link["href"] for link in parsed.of("a")]
    assert text.index("resnet18_8") < text.index("resnet18_16")
    assert "server died" in text
    assert "1 of them complete" in text


def test_nothing_there(tmp_path: Path) -> None:
    """A directory without runs is refused in a sentence."""
    with pytest.raises(InputError, match="neither a run directory nor a sweep"):
        sweep_page.cells(tmp_path)


def test_exhibits_are_unique(run: Run, summary: Summary) -> None:
    """Keys name files and anchors, so no two exhibits share one."""
    keys = [exhibit.key for exhibit in page.exhibits(run, summary)]
    assert len(set(keys)) == len(keys)
    assert all(isinstance(exhibit, Exhibit) for exhibit in page.exhibits(run, summary))


def test_use_of_the_machine(tmp_path: Path) -> None:
    """Who used the machine stands by arm; energy adds up to the total; columns nobody could read are left out."""
    path = write_run(tmp_path / "run", FakeRun(gpu=True, duration_s=SHORT))
    rows = attribution.attribute(path)
    text = numbers.usage(rows)
    assert "server resnet18" in text
    assert "GPU energy, J" in text
    assert "CPU energy" not in text
    assert "waited for cores" not in text
    pooled = [row for row in rows if row["repeat"] is None and row["arm"] == "corun"]
    total = next(row["gpu_energy_mj"] for row in pooled if row["role"] == "total")
    assert sum(row.get("gpu_energy_mj") or 0 for row in pooled if row["role"] != "total") == total > 0
    assert "nobody knows" in numbers.usage([])


def test_run_of_loops(tmp_path: Path) -> None:
    """A run of inference loops has its own table, its dots in the timeline, and its summary.json stays its own."""
    start = 10**12
    config = {"loops": [{"name": "resnet18", "arch": "resnet18"}], "train": None}
    segments = [{"index": 0, "arm": "alone", "repeat": 0, "start_ns": start, "stop_ns": start + 10**10}]
    tmp_path.joinpath("manifest.json").write_text(
        json.dumps({"run": "loops", "status": "complete", "config": config, "segments": segments})
    )
    with TableWriter(tmp_path / "infer_loop" / "resnet18.csv", INFER_LOOP) as table:
        for number in range(100):
            t_ns = start + number * 10**8
            row = {"loop": "resnet18", "arm": "alone", "repeat": 0, "segment": 0, "id": number, "status": "OK"}
            table.row({**row, "batch": 1, "latency": 90.0, "t_start_ns": t_ns, "t_end_ns": t_ns + 9 * 10**7})
    run, summary = read(tmp_path), summarise(tmp_path)
    loops = summarise_loops(tmp_path)
    assert [name for name, _ in timeline.requests(run)] == ["resnet18"]
    drawn = [Drawn(missing(e.key, e.title, e.caption), {}) for e in page.exhibits(run, summary)]
    text = page.render(Report(run, summary, [], drawn, [], loops))
    _Page(text)
    assert "Inference loops" in text
    assert "90.0" in text
    assert 'id="latency"' not in text


def test_headline_has_the_interval_of_the_repeats(repeated_path: Path, run: Run, summary: Summary) -> None:
    """With repeats the large figure is the one with the interval, the same as in the plot; with one repeat it has none."""
    repeated, numbers_of = read(repeated_path), summarise(repeated_path)
    text = _plain(repeated, numbers_of, [])
    p99 = next(row for row in slowdown.make(repeated, numbers_of) if row.name == "p99")
    assert f"×{p99.ratio:.2f}</span>" in text
    assert f"95 % interval ×{p99.low:.2f} to" in text
    assert "95 % interval ×" not in _plain(run, summary, [])
