"""Tokens of a model that generates: in the summary, the console's table and the page, and nowhere without them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from corun.report import console, numbers
from corun.report.summary import Summary, summarise
from corun.run.read import read
from corun.testing.runs import FakeRun, FakeService, write_run

DURATION = {"alone": 4.0, "train": 2.0, "corun": 4.0}


def with_tokens(path: Path) -> Path:
    """Give every answered row 5 tokens: the first after a fifth of its sojourn, one each further eighth."""
    file = path / "infer_client" / "resnet18.csv"
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    for row in rows:
        if row["status"] == "OK":
            sojourn = float(row["sojourn_ms"])
            row |= {"tokens_out": "5", "ttft_ms": str(sojourn / 5), "tpot_ms": str(sojourn / 8)}
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    fake = FakeRun((FakeService("resnet18", rate=40, service_ms=2.0),), duration_s=DURATION)
    return summarise(with_tokens(write_run(tmp_path_factory.mktemp("tokens") / "run", fake)))


def test_the_summary_counts_tokens(generated: Summary) -> None:
    """tokens/s are the tokens of OK answers over the window; TTFT and TPOT are percentiles of their columns."""
    table = read(generated.run).infer_client["resnet18"]
    for arm in ("alone", "corun"):
        (row,) = generated.pooled(arm, "server")
        (window,) = [one for one in read(generated.run).windows if one.arm == arm]
        mine = (table["segment"] == window.segment) & (table["status"] == "OK")
        assert row["tokens_per_s"] == pytest.approx(5 * mine.sum() / window.seconds)
        assert row["ttft_p50_ms"] == pytest.approx(
            np.percentile(table["ttft_ms"][mine], 50, method="higher"), rel=0.2
        )
        assert row["ttft_p99_ms"] is None
    assert generated.ratios["services"]["resnet18"]["ttft_p50_x"] > 1


def test_tables_have_tokens_only_where_there_are_some(generated: Summary, summary: Summary) -> None:
    """A run of picture models shows no table of tokens."""
    for one, shown in ((generated, True), (summary, False)):
        text = io.StringIO()
        console.show(one, [], Console(file=text, width=100))
        assert ("TTFT p50" in text.getvalue()) is shown
        assert ("TTFT p50" in numbers.tokens(one)) is shown
        assert all((row.get("tokens_per_s") is not None) is shown for row in one.pooled("alone", "server"))
