"""The report as a reader sees it: made by the front door, opened in a browser."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.processes.browser import Browser, browser, missing
from tests.processes.tools import Program
from typer.testing import CliRunner

from corun.launch.demo import DEMO
from corun.testing.runs import FakeRun, FakeService, write_run

TIMES = {"alone": 5.0, "train": 3.0, "corun": 5.0}
TAB, ENTER = "\ue004", "\ue007"

needs_browser = pytest.mark.skipif(bool(missing()), reason=missing())


def _report(*arguments: object) -> tuple[int, str]:
    """Exit code and output of `python src/report.py arguments...`, in this process."""
    from src import report

    done = CliRunner().invoke(report.app, [str(argument) for argument in arguments])
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    services = (FakeService("resnet18", rate=150, service_ms=2.0), FakeService("yolov5n", rate=20, lost_share=0.03))
    path = write_run(tmp_path_factory.mktemp("page") / "run", FakeRun(services, gpu=True, duration_s=TIMES))
    assert _report(path)[0] == 0
    return path


@pytest.fixture(scope="module")
def opened(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as session:
        session.open(run / "report.html")
        yield session


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False), (390, True)])
def test_page_in_a_browser(opened: Browser, run: Path, width: int, dark: bool) -> None:
    """On a desk and a phone, light and dark: every picture is shown in its rendering and the page fits its width."""
    opened.screen(width, 900, dark)
    opened.open(run / "report.html")
    pictures = opened.script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth, i.getBoundingClientRect().right])"
    )
    assert len(pictures) == 5
    for complete, natural, shown, right in pictures:
        assert complete
        assert natural == (820 if width < 640 else 1472), "the rendering made for this width"
        assert 0.8 * min(width, 1056) < shown <= width
        assert right <= width
    wide = opened.script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1] == width
    ground = opened.script("return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")


@needs_browser
def test_timeline_and_its_table(opened: Browser) -> None:
    """The timeline is the first figure; its table is closed at first and shown by the keyboard alone."""
    opened.screen(1200, 900, False)
    assert opened.script("return document.querySelector('figure').id") == "timeline"
    rows = "return document.querySelectorAll('#timeline tbody tr').length"
    shown = "return document.querySelector('#timeline table').getBoundingClientRect().height > 0 && document.querySelector('#timeline details').open"
    assert opened.script(rows) >= 13
    assert not opened.script(shown)
    opened.script("document.querySelector('#timeline summary').focus()")
    opened.press(ENTER)
    assert opened.script(shown)
    opened.press(TAB)
    assert opened.script("return document.activeElement.download") == "timeline.csv"
    opened.press(TAB)
    assert opened.script("return document.activeElement.getAttribute('aria-label')") == "Data of timeline"


@needs_browser
def test_nothing_loaded_and_nothing_complained(opened: Browser, run: Path) -> None:
    """The console is silent, and the browser asked nobody for anything but the page."""
    opened.console()
    opened.open(run / "report.html")
    assert opened.console() == []
    names = opened.script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in names if not name.startswith("data:")] == []


@needs_browser
def test_the_page_of_the_demo(
    start: Callable[..., Program],
    free_port: Callable[..., int],
    write_config: Callable[[dict[str, Any]], Path],
    opened: Browser,
    tmp_path: Path,
) -> None:
    """The demo's services and training job, measured for a moment: timeline, table and a silent console."""
    config = write_config({**DEMO, "duration_s": 2, "port": free_port(2)})
    program = start("main.py", "--config", config, "--out", tmp_path / "result")
    assert program.wait() == 0, program.output()
    (page,) = (tmp_path / "result").glob("*/report.html")
    assert f"report: {page}" in program.output()
    opened.console()
    opened.open(page)
    assert opened.console() == []
    assert opened.script("return document.querySelector('#timeline img').naturalWidth") > 0
    cells = opened.script("return [...document.querySelectorAll('table td, table th')].map(c => c.textContent)")
    for text in ("mobilenet_v3_small", "shufflenet_v2_x1_0", "resnet18_32", "corun / alone"):
        assert text in cells


def test_front_door_exports(run: Path) -> None:
    """--json and --csv write data and no page; --trace and --parquet name their files."""
    code, output = _report(run, "--json")
    assert code == 0
    assert json.loads(output.splitlines()[-1])["status"] == "complete"
    assert _report(run, "--csv")[1].startswith("arm,repeat,service")
    assert "trace.json" in _report(run, "--trace")[1]
    assert "train.parquet" in _report("page", run, "--parquet")[1]


def test_front_door_compares(run: Path) -> None:
    """`compare` of a run with itself, one repeat a side, cannot tell."""
    code, output = _report("compare", run, run, "--json")
    assert code == 0
    assert {line["verdict"] for line in json.loads(output)["lines"]} == {"cannot tell"}


def test_front_door_refuses(tmp_path: Path) -> None:
    """What is no run is refused with exit code 2 and a sentence."""
    for arguments in ((tmp_path / "nowhere",), (tmp_path,), ("compare", tmp_path, tmp_path)):
        code, output = _report(*arguments)
        assert code == 2
        assert "Traceback" not in output
