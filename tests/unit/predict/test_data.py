"""Reading traces: every format by column name, what is kept, what is refused, which files are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from corun.errors import InputError
from corun.predict import data
from corun.predict.data import from_frame, read

SHARED = Path(__file__).parents[4] / "shared" / "traces"

BURSTGPT_6 = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,276,693,Conversation log
"""
BURSTGPT_8 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,1,2.5,ChatGPT,472,18,490,Conversation log
45,1,4.0,ChatGPT,1087,230,1317,Conversation log
118,2,0.5,GPT-4,417,276,693,Conversation log
"""
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109"
)


def written(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("text", [BURSTGPT_6, BURSTGPT_8], ids=["six columns", "eight columns"])
def test_every_burstgpt_release_is_read_by_column_name(tmp_path: Path, text: str) -> None:
    """Releases 1 and 2 have six columns, release 3 inserts two more: the same requests come out."""
    requests = read(written(tmp_path, text))
    assert requests.format == "burstgpt"
    assert requests.t_ns.tolist() == [5 * data.NS, 45 * data.NS, 118 * data.NS]
    assert requests.request_tokens.tolist() == [472, 1087, 417]
    assert requests.response_tokens.tolist() == [18, 230, 276]


def test_elapsed_time_is_kept_where_recorded(tmp_path: Path) -> None:
    """Release 3 says how long each request took; the others do not."""
    elapsed = read(written(tmp_path, BURSTGPT_8)).elapsed_s
    assert elapsed is not None
    assert elapsed.tolist() == [2.5, 4.0, 0.5]
    assert read(written(tmp_path, BURSTGPT_6)).elapsed_s is None


def test_azure_is_read_with_crlf_and_without_a_final_newline(tmp_path: Path) -> None:
    """All seven decimals of a stamp count: the two requests are 4.314579 s apart."""
    requests = read(written(tmp_path, AZURE))
    assert requests.format == "azure-llm"
    assert np.diff(requests.t_ns).tolist() == [4_314_579_000]
    assert requests.stamp(int(requests.t_ns[0])) == "2023-11-16 18:15:46.680590000"


def test_stamps_with_a_zone_are_read_as_utc() -> None:
    """The 2024 files write +00:00 and sometimes no fraction."""
    frame = pd.DataFrame(
        {
            "TIMESTAMP": ["2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:01+00:00"],
            "ContextTokens": [1, 2],
            "GeneratedTokens": [3, 4],
        }
    )
    assert np.diff(from_frame(frame).t_ns).tolist() == [990_070_000]


def test_rows_are_sorted_stably_and_duplicates_stay() -> None:
    """Simultaneous and repeated requests are load; among equals the file's order holds."""
    frame = pd.DataFrame({"Timestamp": [9, 3, 3, 3], "Request tokens": [4, 1, 2, 2], "Response tokens": 1})
    requests = from_frame(frame)
    assert requests.request_tokens.tolist() == [1, 2, 2, 4]


@pytest.mark.parametrize(("from_end", "expected"), [(False, [0, 1, 2]), (True, [7, 8, 9])])
def test_a_sample_is_a_contiguous_block(tmp_path: Path, from_end: bool, expected: list[int]) -> None:
    """The first or the last N rows, never a random choice."""
    frame = pd.DataFrame({"Timestamp": range(10), "Request tokens": range(10), "Response tokens": 1})
    requests = read(written(tmp_path, frame.to_csv(index=False)), 3, from_end)
    assert requests.request_tokens.tolist() == expected
    assert requests.source.rows_in_file == 10


def test_a_missing_column_is_an_error_that_names_it() -> None:
    """Nothing is ever made up for a column that is not there."""
    frame = pd.DataFrame({"Timestamp": [1, 2], "Request token": [1, 2], "Response tokens": [1, 2]})
    with pytest.raises(InputError, match='no column "Request tokens"; did you mean "Request token"'):
        from_frame(frame)


@pytest.mark.parametrize("cell", ["", "many", "-1", "inf", "nan"])
def test_malformed_cells_are_named_with_their_row(cell: str) -> None:
    """A cell that is no count is refused with its row and column."""
    frame = pd.DataFrame({"Timestamp": ["1", "2"], "Request tokens": ["5", cell], "Response tokens": ["1", "1"]})
    with pytest.raises(InputError, match='row 2, "Request tokens"'):
        from_frame(frame)


def test_at_most_twenty_problems_are_shown() -> None:
    """The rest is a number."""
    frame = pd.DataFrame({"Timestamp": ["x"] * 50, "Request tokens": 1, "Response tokens": 1})
    with pytest.raises(InputError) as caught:
        from_frame(frame)
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "and 30 more"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4bb\n", "git-LFS pointer"),
        ("a,b\n1,2\n", "columns are missing"),
        ("Timestamp,Request tokens,Response tokens\n1,1,1\n", "1 requests; at least 2"),
    ],
)
def test_files_that_are_no_trace_are_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    """Empty, a pointer, other columns, too few rows: one sentence each."""
    with pytest.raises(InputError, match=message):
        read(written(tmp_path, text))


def test_a_missing_file_is_refused_with_the_flag_to_give(tmp_path: Path) -> None:
    """The reader says what to do."""
    with pytest.raises(InputError, match="give --data-path"):
        read(tmp_path / "none.csv")


def test_the_search_list_is_named_when_nothing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --data-path the documented files are looked for in order."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"dataset/BurstGPT_1_cleaned\.csv does not exist"):
        data.find(None)
    Path("BurstGPT_1.csv").write_text(BURSTGPT_6)
    assert data.find(None) == Path("BurstGPT_1.csv")


def test_whole_seconds_with_short_gaps_are_warned_about() -> None:
    """With 1 s stamps most gaps read as 0: predicting 0 would look perfect."""
    frame = pd.DataFrame({"Timestamp": np.arange(100) // 5, "Request tokens": 1, "Response tokens": 1})
    assert any("whole seconds" in warning for warning in from_frame(frame).warnings())


def test_a_change_of_rate_between_the_parts_is_warned_about() -> None:
    """The first 100,000 rows of BurstGPT_1 end inside one flood day: a test there judges one regime."""
    gaps = np.concatenate([np.full(80, 10.0), np.full(20, 0.5)])
    frame = pd.DataFrame({"Timestamp": np.cumsum(gaps), "Request tokens": 1, "Response tokens": 1})
    assert any("the last fifth" in warning for warning in from_frame(frame).warnings())


def test_an_unknown_file_is_read_but_warned_about(tmp_path: Path) -> None:
    """A file is one of the published ones only by its hash."""
    requests = read(written(tmp_path, BURSTGPT_6))
    assert requests.source.release == ""
    assert any("none of the published files" in warning for warning in requests.warnings())


@pytest.mark.parametrize(
    ("name", "rows", "span_s", "mean_in", "mean_out"),
    [("conv", 19_366, 3501.7, 1154.7, 211.1), ("code", 8_819, 3435.9, 2047.8, 27.9)],
)
def test_azure_golden_values(name: str, rows: int, span_s: float, mean_in: float, mean_out: float) -> None:
    """Rows, hash, span and token means of the published files."""
    path = SHARED / f"AzureLLMInferenceTrace_{name}.csv"
    if not path.exists():
        pytest.skip(f"{path} is not here: the public traces lie beside the project, not in it")
    requests = read(path)
    assert requests.source.release == f"AzureLLMInferenceTrace_{name} 2023"
    assert len(requests) == rows
    assert requests.span_s == pytest.approx(span_s, abs=0.05)
    assert requests.request_tokens.mean() == pytest.approx(mean_in, abs=0.05)
    assert requests.response_tokens.mean() == pytest.approx(mean_out, abs=0.05)
