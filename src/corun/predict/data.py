"""Reads request traces with their token counts: BurstGPT of any release by column name, and Azure LLM.

    format      time                             request tokens   response tokens   optional
    burstgpt    Timestamp, s from midnight       Request tokens   Response tokens   Elapsed time, s
    azure-llm   TIMESTAMP, date and time of day  ContextTokens    GeneratedTokens

Rows are sorted by time, stably; simultaneous and repeated requests stay, for they are load. A missing column or a
malformed cell is an error, never a guess. A sample is a contiguous block: random rows of a trace are not a shorter
trace but one with longer gaps (at 7 % of the rows the mean gap grows 14-fold and most burstiness is gone).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from corun.errors import InputError, suggest

__all__ = ["FORMATS", "KNOWN", "Requests", "Source", "find", "from_frame", "identify", "read"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NS: Final = 1_000_000_000
SHOWN_PROBLEMS: Final = 20
LATEST_S: Final = 9e9
ELAPSED: Final = "Elapsed time"
SEARCH: Final = (
    "dataset/BurstGPT_1_cleaned.csv",
    "dataset/BurstGPT_1.csv",
    "BurstGPT_1_cleaned.csv",
    "BurstGPT_1.csv",
)


@dataclass(frozen=True)
class Format:
    """Column names of one trace format."""

    name: str
    time: str
    request_tokens: str
    response_tokens: str

    @property
    def columns(self) -> tuple[str, str, str]:
        return (self.time, self.request_tokens, self.response_tokens)


FORMATS: Final = (
    Format("burstgpt", "Timestamp", "Request tokens", "Response tokens"),
    Format("azure-llm", "TIMESTAMP", "ContextTokens", "GeneratedTokens"),
)

KNOWN: Final[Mapping[str, str]] = {
    "4bb3783693d0a435686fbfc885615d2349bd067239079fa4b749f2e679e12122": "BurstGPT_1 v1.1",
    "a4d068a7113ec0290e74063a1b3447dc6001a30e4298eb313581b71006dda1f4": "BurstGPT_without_fails_1 v1.1",
    "44bf5942b03fca42c01a226a545ad3a750ec62688faecd67b6831c56a8928bf7": "BurstGPT_2 v1.1",
    "56193aa9b2bb26128ded43d2d29a960df6bf5af062bcfc9b005f3fcaa4e6e501": "BurstGPT_without_fails_2 v1.1",
    "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8": "AzureLLMInferenceTrace_conv 2023",
    "54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6": "AzureLLMInferenceTrace_code 2023",
}
"""sha256 of published files; BurstGPT's are the LFS object ids of its tag v1.1."""

KNOWN_BLOBS: Final[Mapping[str, str]] = {"f95dd2c84454b067fdd0973858c55ecfe31bdad7": "BurstGPT_1 v1.0, v1.2 or v2.0"}
"""git object ids (sha1 of `blob <size>\\0` and the content) of published files without a published sha256."""


@dataclass(frozen=True)
class Source:
    """Where the rows came from; `release` is empty when the file is none of the published ones."""

    path: str = ""
    sha256: str = ""
    release: str = ""
    rows_in_file: int = 0


@dataclass(frozen=True)
class Requests:
    """Requests in time order: stamps in ns (int64), token counts and, where recorded, how long each took in s."""

    t_ns: Ints
    request_tokens: Floats
    response_tokens: Floats
    elapsed_s: Floats | None
    format: str
    source: Source = Source()

    def __len__(self) -> int:
        return int(self.t_ns.size)

    @property
    def span_s(self) -> float:
        return float(self.t_ns[-1] - self.t_ns[0]) / NS

    @property
    def gaps_s(self) -> Floats:
        """(n - 1,) seconds between neighbours."""
        return np.diff(self.t_ns) / NS

    def block(self, start: int, stop: int) -> Requests:
        """Rows start..stop (exclusive), contiguous."""
        part = slice(start, stop)
        elapsed = None if self.elapsed_s is None else self.elapsed_s[part]
        return replace(
            self,
            t_ns=self.t_ns[part],
            request_tokens=self.request_tokens[part],
            response_tokens=self.response_tokens[part],
            elapsed_s=elapsed,
        )

    def sample(self, size: int | None, from_end: bool = False) -> Requests:
        """The first (or last) `size` rows; all of them when there are fewer or `size` is None."""
        if size is None or size >= len(self):
            return self
        return self.block(len(self) - size, len(self)) if from_end else self.block(0, size)

    def stamp(self, t_ns: int) -> float | str:
        """An instant as this format writes it: seconds for BurstGPT, date and time for Azure."""
        if self.format == "burstgpt":
            return t_ns / NS
        return str(np.datetime64(t_ns, "ns")).replace("T", " ")

    def warnings(self) -> list[str]:
        """What makes results on these rows doubtful."""
        found = []
        gaps = self.gaps_s
        if gaps.size and not (self.t_ns % NS).any() and float(np.median(gaps)) < 1.0:
            found.append(
                f"stamps are whole seconds and the median gap is {np.median(gaps):g} s: most gaps read as 0, "
                "so errors of inter_arrival_s say little; look at the windows instead"
            )
        if self.source.sha256 and not self.source.release:
            found.append(f"{self.source.path} is none of the published files (sha256 {self.source.sha256[:12]}…)")
        failed = int((self.response_tokens == 0).sum())
        if failed:
            found.append(f"{failed} requests have 0 response tokens (BurstGPT: failed); they are kept as load")
        if gaps.size >= 10:
            cut = int(0.8 * gaps.size)
            before, after = float(gaps[:cut].mean()), float(gaps[cut:].mean())
            if max(before, after) > 3 * min(before, after):
                found.append(
                    f"the last fifth arrives at {1 / max(after, 1e-9):.3g} requests/s, the rest at "
                    f"{1 / max(before, 1e-9):.3g}: a test on it judges one regime; take more days"
                )
        return found


def find(path: Path | None, search: Sequence[str] = SEARCH) -> Path:
    """`path`, or the first file of the documented search list; InputError naming what was looked for."""
    if path is not None:
        return path
    for name in search:
        if Path(name).is_file():
            return Path(name)
    hint = (
        "give --data-path; BurstGPT is at github.com/HPMLL/BurstGPT, Azure LLM at github.com/Azure/AzurePublicDataset"
    )
    raise InputError("no trace found", [*(f"{name} does not exist" for name in search), hint])


def read(path: Path, sample_size: int | None = None, from_end: bool = False) -> Requests:
    """Read a trace file, whole or its first (last) `sample_size` rows in time order.

    Raises:
        InputError: no such file, not a known format, a missing column, malformed rows, or fewer than two requests.
    """
    if sample_size is not None and sample_size < 2:
        raise InputError(f"the sample size is {sample_size}; at least 2 rows are needed")
    names = _header(path)
    form = _format(names, str(path))
    wanted = {*form.columns, ELAPSED}
    try:
        frame = pd.read_csv(path, usecols=lambda name: str(name).strip() in wanted, encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: the trace cannot be read ({str(error).splitlines()[0]})") from error
    requests = from_frame(frame, str(path))
    digest, release = identify(path)
    source = Source(str(path), digest, release, len(requests))
    return replace(requests.sample(sample_size, from_end), source=source)


def from_frame(frame: pd.DataFrame, where: str = "the table") -> Requests:
    """A table as `pd.read_csv` gives it, in any known format, as Requests.

    Raises:
        InputError: a missing column, malformed cells (the first twenty in words), or fewer than two rows.
    """
    frame = frame.rename(columns=lambda name: str(name).strip())
    form = _format([str(name) for name in frame.columns], where)
    problems: list[str] = []
    t_ns = _stamps(frame[form.time], form, problems)
    tokens = [_numbers(frame[name], problems) for name in form.columns[1:]]
    elapsed = _numbers(frame[ELAPSED], problems) if ELAPSED in frame.columns else None
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        rest = [f"and {more} more"] if more > 0 else []
        raise InputError(f"{where}: {len(problems)} malformed cells", [*problems[:SHOWN_PROBLEMS], *rest])
    if t_ns.size < 2:
        raise InputError(f"{where}: {t_ns.size} requests; at least 2 are needed")
    order = np.argsort(t_ns, kind="stable")
    done = None if elapsed is None else elapsed[order]
    return Requests(t_ns[order], tokens[0][order], tokens[1][order], done, form.name)


def identify(path: Path) -> tuple[str, str]:
    """sha256 of a file and the published release it is ("" when none)."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            sha256.update(piece)
            blob.update(piece)
    digest = sha256.hexdigest()
    return digest, KNOWN.get(digest) or KNOWN_BLOBS.get(blob.hexdigest(), "")


def _header(path: Path) -> list[str]:
    """The first line's column names, after the mistakes that are worth a sentence."""
    try:
        first = pd.read_csv(path, nrows=0, encoding="utf-8-sig")
    except pd.errors.EmptyDataError:
        raise InputError(f"{path}: the trace is empty") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: the trace cannot be read ({reason}); give --data-path") from error
    except ValueError as error:
        raise InputError(f"{path}: not a CSV text file ({str(error).splitlines()[0]})") from error
    names = [str(name).strip() for name in first.columns]
    if names[0].startswith("version https://git-lfs"):
        raise InputError(f"{path}: a git-LFS pointer, not the trace itself; fetch the content with `git lfs pull`")
    return names


def _format(names: Sequence[str], where: str) -> Format:
    """The format whose columns are there; else the nearest one's missing columns are named."""
    missing = {form: [name for name in form.columns if name not in names] for form in FORMATS}
    nearest = min(FORMATS, key=lambda form: len(missing[form]))
    if not missing[nearest]:
        return nearest
    problems = [f'there is no column "{name}"{suggest(name, names)}' for name in missing[nearest]]
    known = "; ".join(f"{form.name} has {', '.join(form.columns)}" for form in FORMATS)
    raise InputError(f"{where}: columns are missing (found: {', '.join(names)}; {known})", problems)


def _numbers(column: pd.Series[Any], problems: list[str]) -> Floats:
    values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    _note(column, ~(np.isfinite(values) & (values >= 0)), "a number of 0 or more", problems)
    return values


def _stamps(column: pd.Series[Any], form: Format, problems: list[str]) -> Ints:
    if form.name == "burstgpt":
        seconds = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
        bad = ~((seconds >= 0) & (seconds < LATEST_S))
        _note(column, bad, "seconds from the first midnight", problems)
        return np.rint(np.where(bad, 0.0, seconds) * NS).astype(np.int64)
    stamps = pd.to_datetime(column, errors="coerce", utc=True, format="ISO8601")
    bad = stamps.isna().to_numpy()
    _note(column, bad, "a stamp such as 2023-11-16 18:15:46.6805900", problems)
    naive = stamps.dt.tz_localize(None).to_numpy(dtype="datetime64[ns]")
    return np.asarray(np.where(bad, np.datetime64(0, "ns"), naive), dtype="datetime64[ns]").astype(np.int64)


def _note(column: pd.Series[Any], bad: NDArray[np.bool_], wanted: str, problems: list[str]) -> None:
    for row in np.flatnonzero(bad):
        problems.append(f'row {row + 1}, "{column.name}": "{column.iloc[row]}" is not {wanted}')
