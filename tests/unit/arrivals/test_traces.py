"""Trace files: every format, golden values of the public traces, and what is said about bad files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from corun.arrivals.recorded import MinuteCounts, Trace
from corun.arrivals.traces import azure_default, default_rates, delays_of_rates, read
from corun.arrivals.validator import cv, dispersion
from corun.errors import InputError

SHARED = Path(__file__).parents[4] / "shared" / "traces"
DELAYS = SHARED / "azure_functions_2019_day01_delays.csv"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here: the public traces lie beside the project, not in it")
    return path


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("name", "rows", "span_s", "rate", "gap_cv", "longest_s", "fano_1s"),
    [("conv", 19_366, 3501.7, 5.530, 1.09, 4.31, 1.39), ("code", 8_819, 3435.9, 2.566, 13.15, 217.17, 13.2)],
)
def test_azure_llm_golden_values(
    name: str, rows: int, span_s: float, rate: float, gap_cv: float, longest_s: float, fano_1s: float
) -> None:
    """The published figures of the Azure LLM 2023 traces: rows, span, rate, CV, largest gap, Fano at 1 s."""
    trace = read(shared(f"AzureLLMInferenceTrace_{name}.csv"))
    assert isinstance(trace, Trace)
    gaps = np.diff(trace.offsets_s)
    assert trace.offsets_s.size == rows
    assert trace.offsets_s[-1] == pytest.approx(span_s, abs=0.05)
    assert trace.rate == pytest.approx(rate, abs=0.0006)
    assert cv(gaps) == pytest.approx(gap_cv, abs=0.006)
    assert gaps.max() == pytest.approx(longest_s, abs=0.006)
    assert dispersion(trace.offsets_s, 1.0, trace.offsets_s[-1]) == pytest.approx(fano_1s, rel=0.01)


def test_azure_llm_stamps_keep_their_100_ns() -> None:
    """18:15:46.6805900 to 18:15:50.9951690 is 4.314579 s: all seven decimals count."""
    trace = read(shared("AzureLLMInferenceTrace_conv.csv"))
    assert isinstance(trace, Trace)
    assert np.rint(trace.offsets_s[1:3] * 1e9).astype(int).tolist() == [4_314_579_000, 4_541_877_000]


def test_scaled_azure_functions_golden_values() -> None:
    """The published figures of the delays: 2,979 of them, 288.0 s, CV 0.110, Fano of the second counts 0.123."""
    trace = read(shared(DELAYS.name))
    assert isinstance(trace, Trace)
    assert trace.offsets_s.size == 2979
    assert trace.span_s == pytest.approx(288.0)
    assert trace.rate == pytest.approx(10.34, abs=0.005)
    assert cv(trace.gaps_s) == pytest.approx(0.110, abs=0.001)
    assert dispersion(trace.offsets_s + 1e-9, 1.0, 288.0) == pytest.approx(0.123, abs=0.001)


def test_the_packaged_rates_rebuild_the_original_delays() -> None:
    """The 288 packaged rates give back all 2,979 published delays to 1e-12 s."""
    original = np.loadtxt(shared(DELAYS.name))
    rebuilt = delays_of_rates(default_rates())
    assert rebuilt.size == original.size
    assert np.abs(rebuilt - original).max() <= 1e-12


def test_the_packaged_trace_needs_no_other_file() -> None:
    """Rate 0 works from the package alone: 288 seconds of 8 to 13 requests, the counts as published."""
    trace = azure_default({})
    assert isinstance(trace, Trace)
    assert trace.offsets_s.size == 2979
    assert trace.span_s == pytest.approx(288.0)
    rates, minutes = np.unique(default_rates(), return_counts=True)
    assert dict(zip(rates.tolist(), minutes.tolist(), strict=True)) == {8: 10, 9: 64, 10: 82, 11: 87, 12: 39, 13: 6}
    assert trace.draw(rng(), 3 * 288.0 + 10.01).size == 3 * 2979 + sum(default_rates()[:10]) + 1


def test_another_default_trace_can_be_named(tmp_path: Path) -> None:
    """$CORUN_TRACE replaces the packaged trace, in any format that can be read."""
    trace = azure_default({"CORUN_TRACE": str(written(tmp_path, "0.5\n0.25\n0.25\n"))})
    assert isinstance(trace, Trace)
    assert trace.draw(rng(), 2.0).tolist() == [0.0, 0.5, 0.75, 1.0, 1.5, 1.75]


def test_delays_may_lack_the_last_line_end_and_hold_blank_lines(tmp_path: Path) -> None:
    """CRLF, blank lines and a missing final newline make no difference."""
    trace = read(written(tmp_path, "0.5\r\n\r\n1e-1"))
    assert isinstance(trace, Trace)
    assert trace.gaps_s.tolist() == pytest.approx([0.5, 0.1])


AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:47.6805901,1,2"
)
AZURE_2024 = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,1,2\n2024-05-10 00:00:01.009930+00:00,1,2\n"


def test_azure_llm_files_of_both_years(tmp_path: Path) -> None:
    """CRLF without a last line end (2023) and stamps with a zone (2024) both read by column name."""
    old = read(written(tmp_path, AZURE))
    new = read(written(tmp_path, AZURE_2024))
    assert isinstance(old, Trace)
    assert isinstance(new, Trace)
    assert old.offsets_s.tolist() == [0.0, 1.0000001]
    assert new.offsets_s.tolist() == [0.0, 1.0]
    assert old.span_s == pytest.approx(2.0000002)


BURST_1 = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURST_3 = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


@pytest.mark.parametrize(
    "text",
    [
        BURST_1
        + "5,ChatGPT,472,18,490,Conversation log\n118,GPT-4,417,276,693,API log\n45,ChatGPT,1087,230,1317,API log\n",
        BURST_3
        + "5,a,1.5,ChatGPT,472,18,490,Conversation log\n45,,,ChatGPT,1,2,3,API log\n118,b,2,GPT-4,1,2,3,API log\n",
    ],
    ids=["releases 1 and 2", "release 3"],
)
def test_burstgpt_is_read_by_column_name(tmp_path: Path, text: str) -> None:
    """Six or eight columns, in time order or not; whole-second stamps are spread over their second."""
    trace = read(written(tmp_path, text))
    assert isinstance(trace, Trace)
    assert trace.offsets_s.tolist() == [0.0, 40.0, 113.0]
    assert trace.spread_s == 1.0
    assert np.floor(trace.draw(rng(), 115.0)).tolist() == [0.0, 40.0, 113.0]


def test_burstgpt_with_fractions_is_not_spread(tmp_path: Path) -> None:
    """Stamps that are not whole seconds are taken as they are."""
    trace = read(written(tmp_path, BURST_1 + "0.5,m,1,1,2,x\n0.75,m,1,1,2,x\n"))
    assert isinstance(trace, Trace)
    assert (trace.offsets_s.tolist(), trace.spread_s) == ([0.0, 0.25], 0.0)


MINUTES = "HashOwner,HashApp,HashFunction,Trigger,1,2,3\n"


def test_functions_are_summed_over_each_minute(tmp_path: Path) -> None:
    """Per-function rows add up to totals per minute."""
    trace = read(written(tmp_path, MINUTES + "a,b,c,http,1,0,5\na,b,d,timer,2,0,7\n"))
    assert isinstance(trace, MinuteCounts)
    assert trace.counts == (3, 0, 12)
    assert trace.rate == pytest.approx(15 / 180)


def test_every_malformed_row_is_counted_and_the_first_twenty_named(tmp_path: Path) -> None:
    """One error for the whole file: twenty problems with line numbers, then how many more; nothing is skipped."""
    rows = [f"0.{place}" if place % 2 else "soon" for place in range(60)]
    with pytest.raises(InputError, match="30 malformed rows") as caught:
        read(written(tmp_path, "\n".join(rows)), "delays")
    assert len(caught.value.problems) == 21
    assert caught.value.problems[0] == 'line 1: "soon" is not a delay in seconds'
    assert caught.value.problems[19].startswith("line 39:")
    assert caught.value.problems[20] == "and 10 more"


BAD_ROWS = [
    ("0.1\n-0.1\n", "line 2", "-0.1"),
    ("0.1\nnan\n", "line 2", "nan"),
    ("0.1\n0.1,0.2\n", "line 2", "2 values where one delay"),
    (AZURE + "\n2023-13-01 00:00:00.0,1,2", "line 4", "2023-13-01"),
    (AZURE + "\nyesterday,1,2", "line 4", "is not a stamp such as"),
    (AZURE + "\n2023-11-16 18:15:46.6805900", "line 4", "1 values where the header has 3"),
    (BURST_1 + "1,a,b,c,d,e\nx,a,b,c,d,e\n", "line 3", "not a Timestamp"),
    (BURST_1 + "-1,a,b,c,d,e\n", "line 2", "not a Timestamp"),
    (MINUTES + "a,b,c,http,1,2\n", "line 2", "6 values where the header has 7"),
    (MINUTES + "a,b,c,http,1,2,x\n", "line 2", "not a whole number"),
    (MINUTES + "a,b,c,http,1,2,99999999999999999999\n", "line 2", "not a whole number"),
    (MINUTES + "a,b,c,http,1,2,-3\n", "line 2", "negative"),
]


@pytest.mark.parametrize(("text", "line", "words"), BAD_ROWS, ids=[words for _, _, words in BAD_ROWS])
def test_a_malformed_row_is_named(tmp_path: Path, text: str, line: str, words: str) -> None:
    """The problem says the line and what was found there."""
    with pytest.raises(InputError, match="1 malformed row;") as caught:
        read(written(tmp_path, text))
    [problem] = caught.value.problems
    assert problem.startswith(line)
    assert words in problem


BAD_FILES = [
    (b"", "auto", "is empty"),
    (b"0\n0\n", "auto", "all delays are 0"),
    (b"hello,world\n1,2\n", "auto", 'no known trace format begins with "hello,world"'),
    (b"\x1f\x8b\x08\x00\xff\xfe", "auto", "not a CSV text file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "auto", "git lfs pull"),
    (b"Timestamps,Model\n1,2\n", "burstgpt", 'no column "Timestamp"; did you mean "Timestamps"'),
    (BURST_1.encode(), "auto", "two different times"),
    (BURST_1.encode() + b"5,a,b,c,d,e\n5,a,b,c,d,e\n", "auto", "two different times"),
    (b"HashFunction,1,3\nx,1,2\n", "auto", "minutes 1, 2, 3"),
    (MINUTES.encode(), "auto", "hold no arrival"),
]


@pytest.mark.parametrize(("content", "format", "message"), BAD_FILES, ids=[message for *_, message in BAD_FILES])
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, content: bytes, format: str, message: str) -> None:
    """Empty, binary, foreign and pointer files end in one sentence that says what to do."""
    with pytest.raises(InputError, match=message):
        read(written(tmp_path, content), format)


def test_missing_files_and_formats_are_refused(tmp_path: Path) -> None:
    """A missing file, a folder and an unknown format are user errors, the last with a suggestion."""
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path / "none.csv")
    with pytest.raises(InputError, match="directory"):
        read(tmp_path)
    with pytest.raises(InputError, match='did you mean "burstgpt"'):
        read(tmp_path / "none.csv", "burst-gpt")
