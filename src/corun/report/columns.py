"""Documents every file and column of a run directory from the definitions that the writers use.

python -m corun.report.columns          writes result/README.md and the tables inside docs/results.md
python -m corun.report.columns --check  exits 1 and names the files that are out of date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from corun.errors import InputError, guard
from corun.profile.tables import GPU, PROCESS, PROFILE
from corun.registry import home
from corun.report.attribution import ATTRIBUTION
from corun.run.records import ACCURACY, EVENTS, INFER_CLIENT, INFER_SERVER, SCHEMA_VERSION, SUMMARY, TRAIN, Table
from corun.serve.loop import INFER_LOOP

KINDS = {"int": "integer", "float": "number", "str": "text"}
GENERATED = "<!-- made by `python -m corun.report.columns`; edit the tables in src/corun instead -->"
BLOCK = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


@dataclass(frozen=True)
class File:
    """One file of a run directory; table is empty where the file is none."""

    name: str
    doc: str
    table: Table = ()


FILES = (
    File("manifest.json", "what was run: written first, replaced at the end; `status` is running, complete, failed or interrupted"),
    File("schedule.npy", "every intended send time, made before the run from its seed; its hash is in the manifest"),
    File("infer_client/<service>.csv", "one row per request as the client saw it, with the server's stamps", INFER_CLIENT),
    File("infer_server/<service>.csv", "one row per request as the server saw it", INFER_SERVER),
    File("infer_loop/<loop>.csv", "one row per inference of a loop without sockets (multi_infer.py)", INFER_LOOP),
    File("train.csv", "one row per optimiser step", TRAIN),
    File("accuracy.csv", "right answers second by second, where requests carry labels", ACCURACY),
    File("profile.csv", "one row per tick of the profiler: the host", PROFILE),
    File("gpu.csv", "one row per tick and GPU", GPU),
    File("process.csv", "one row per tick and process", PROCESS),
    File("events.csv", "what happened when: processes ready, windows, epochs, checkpoints, faults", EVENTS),
    File("summary.csv", "one row per arm, repeat and service or training job; rows without a repeat hold all repeats", SUMMARY),
    File("summary.json", "the same, all repeats together, with the ratios between the arms"),
    File("attribution.csv", "who used the machine: CPU, memory, GPU and energy by role and arm", ATTRIBUTION),
    File("calibration.json", "client and null server alone on this machine, measured before the run"),
    File("validity.json", "every reason to doubt a number; nothing is ever thrown away because of one"),
    File("slo.json", "promised latencies and whether they were kept, missed or cannot be told"),
    File("loops.json", "figures of inference loops without sockets (multi_infer.py)"),
    File("report.html", "the page made by `python src/report.py RUN`, one file that loads nothing; its figures are in report/"),
    File("processes.jsonl", "role, name and pid of every process, as the profiler followed them"),
    File("profiler.json", "what the profiler could read on this machine and why not the rest; units of the extra columns"),
    File("logs/<role>-<name>.log", "what each process printed"),
    File("nodes/<node>/", "profile.csv, process.csv, gpu.csv and profiler.json of every other node of a cluster (docs/cluster.md)"),
)  # fmt: skip


def readme() -> str:
    """The text of result/README.md."""
    parts = [
        "# Run directories",
        GENERATED,
        "`main.py`, `multi_client.py` and the other programs write one directory per run here, `YYYYMMDD-HHMMSS-<6 hex of "
        "the configuration>`, and one directory of them per sweep. How to read them: [docs/results.md](../docs/results.md).",
        f"Tables are CSV with a header line, schema version {SCHEMA_VERSION} (`schema_version` of the manifest). Rows are "
        "written as they are made, so a run that was killed has all of them; a last line without its line end was cut and "
        "does not count. **An empty cell means that nothing was measured; it never means zero.** Columns ending in `_ns` "
        "named `t_` or `s_` are instants of one clock (CLOCK_MONOTONIC), on the clock of the client's host in client tables.",
        "## Files",
        files(),
        *(
            f"## `{file.name}`\n\n{file.doc[0].upper()}{file.doc[1:]}.\n\n{columns(file.table)}"
            for file in FILES
            if file.table
        ),
    ]
    return "\n\n".join(parts) + "\n"


def files() -> str:
    """The files of a run directory as a Markdown table."""
    rows = (f"| [`{file.name}`](#{anchor(file.name)}) | {file.doc} |" if file.table else f"| `{file.name}` | {file.doc} |" for file in FILES)  # fmt: skip
    return "\n".join(["| file | what is in it |", "|---|---|", *rows])


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def columns(table: Table) -> str:
    """The columns of a table as a Markdown table."""
    rows = (
        f"| `{column.name}` | {column.unit} | {KINDS[column.kind]} | {column.doc.replace('|', chr(92) + '|')} |"
        for column in table
    )
    return "\n".join(["| column | unit | type | meaning |", "|---|---|---|---|", *rows])


def results(text: str) -> str:
    """docs/results.md with the tables between its `<!-- begin NAME -->` marks made anew."""
    blocks = {"files": files().replace("](#", "](../result/README.md#"), "summary": columns(SUMMARY)}
    found = {match[2] for match in BLOCK.finditer(text)}
    if found != blocks.keys():
        raise InputError(
            f"docs/results.md needs marked blocks {', '.join(blocks)}; it has {', '.join(found) or 'none'}"
        )
    return BLOCK.sub(lambda match: f"{match[1]}{GENERATED}\n\n{blocks[match[2]]}\n\n{match[3]}", text)


def documents(root: Path) -> Iterator[tuple[Path, str]]:
    """Every generated document under a checkout's root, with the text it should have."""
    yield root / "result" / "README.md", readme()
    page = root / "docs" / "results.md"
    yield page, results(page.read_text(encoding="utf-8"))


def main(arguments: list[str]) -> int:
    """Write the documents, or with --check only say which are out of date."""
    stale = [(path, text) for path, text in documents(home()) if not path.exists() or path.read_text("utf-8") != text]
    for path, text in stale:
        if "--check" in arguments:
            print(f"{path} is out of date: run python -m corun.report.columns")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    with guard():
        sys.exit(main(sys.argv[1:]))
