"""What was measured, for other programs: summaries on stdout and Parquet beside each CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corun.errors import InputError, RunFault
from corun.profile.tables import GPU, PROCESS, PROFILE
from corun.report.attribution import ATTRIBUTION
from corun.report.summary import as_json, summarise
from corun.report.validity import check
from corun.run.records import ACCURACY, EVENTS, INFER_CLIENT, INFER_SERVER, SUMMARY, TRAIN, Table
from corun.serve.loop import INFER_LOOP

COMPRESSION = "zstd"


def summary_csv(runs: Sequence[Path], given: Path) -> str:
    """summary.csv of a run; of a sweep the rows of all its runs with the run's name in front."""
    texts = {path: _summary_text(path) for path in runs}
    if list(texts) == [given]:
        return texts[given]
    lines: list[str] = []
    for path, text in texts.items():
        head, *rows = text.splitlines()
        lines += [f"cell,{head}"] * (not lines)
        lines += [f"{path.name},{row}" for row in rows]
    return "\n".join(lines) + "\n"


def _summary_text(path: Path) -> str:
    summarise(path)
    return (path / "summary.csv").read_text(encoding="utf-8")


def summary_json(runs: Sequence[Path], given: Path) -> dict[str, Any]:
    """The summary and the reasons for doubt of a run; of a sweep a list of them under `runs`."""
    answers = []
    for path in runs:
        summary = summarise(path)
        flags = check(summary)
        answers.append({**as_json(summary), "valid": not flags, "reasons": [flag.sentence for flag in flags]})
    return answers[0] if list(runs) == [given] else {"sweep": str(given), "runs": answers}


def parquet(path: Path) -> list[Path]:
    """Write a Parquet file beside every CSV file of a run directory; returns the files written.

    Types follow the columns' names: instants and counters in ns are int64, empty cells are null. A last row that was
    cut by a kill is left out, as everywhere.
    """
    import pyarrow.parquet

    written = []
    for source in sorted(path.rglob("*.csv")):
        whole = source.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        if not whole:
            continue
        target = source.with_suffix(".parquet")
        try:
            pyarrow.parquet.write_table(_table(source, whole), target, compression=COMPRESSION)
        except OSError as error:
            raise RunFault(f"cannot write {target}: {error.strerror or error}") from error
        written.append(target)
    return written


def _table(source: Path, text: bytes) -> Any:
    """Columns typed by their definition, so that an empty one keeps its type; guessed where that does not fit."""
    import pyarrow as pa
    import pyarrow.csv

    kinds = {"int": pa.int64(), "float": pa.float64(), "str": pa.string()}
    known = {column.name: kinds[column.kind] for column in definition(source)}
    try:
        options = pyarrow.csv.ConvertOptions(column_types=known, strings_can_be_null=False)
        return pyarrow.csv.read_csv(pa.BufferReader(text), convert_options=options)
    except pa.ArrowInvalid:
        try:
            return pyarrow.csv.read_csv(pa.BufferReader(text))
        except pa.ArrowInvalid as error:
            raise InputError(f"{source} cannot be read as a table: {error}") from error


def definition(source: Path) -> Table:
    """The columns that a file of a run directory is defined to have; none for a file corun does not define."""
    tables = {
        "infer_client": INFER_CLIENT,
        "infer_server": INFER_SERVER,
        "infer_loop": INFER_LOOP,
        "accuracy.csv": ACCURACY,
        "attribution.csv": ATTRIBUTION,
        "train.csv": TRAIN,
        "profile.csv": PROFILE,
        "gpu.csv": GPU,
        "process.csv": PROCESS,
        "events.csv": EVENTS,
        "summary.csv": SUMMARY,
    }
    return tables.get(source.parent.name) or tables.get(source.name) or ()
