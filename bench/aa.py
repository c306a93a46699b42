"""Five runs against five equal ones, and against five with a service that is 30 % slower: what does the comparison say?

    python -m bench.aa [--quick]

A, A' and B are measured in turn, five times, with main.py, so that a drift of the machine hits all of them. A and A'
are the same configuration: two services beside a training job, in the arms alone and
corun. B is the same with one service a third slower. The answer for A against A' should be "no difference" or "cannot
tell" for every figure, and for A against B "slower" for that service's latency.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.common import last_line, store
from corun.registry import home
from corun.report.compare import as_json, compare

SERVICE_MS = 10.0
SLOWER = 1.3
ROUNDS = 5
QUIET = ("no difference", "cannot tell")


def config(service_ms: float, seed: int, seconds: float, port: int) -> dict[str, Any]:
    """Two services, one with a service time that is known, beside a small training job."""
    known = {"arch": "null", "name": "known", "rate": 20, "extra": {"service_ms": service_ms, "busy": True}}
    return {
        "train": [{"arch": "resnet18", "data": "digits", "batch_size": 32, "image_size": 32}],
        "infer": [[known, {"arch": "mobilenet_v3_small", "rate": 20, "image_size": 64}]],
        "arms": ["alone", "corun"],
        "duration_s": seconds,
        "seed": seed,
        "port": port,
    }


def measure(value: dict[str, Any], out: Path) -> None:
    """One run of main.py below `out`."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "config.json"
    file.write_text(json.dumps(value))
    command = [sys.executable, str(home() / "src" / "main.py"), "--config", str(file), "--out", str(out)]
    subprocess.run([*command, "--no-report", "--no-calibrate", "--quiet"], check=True, stdout=subprocess.DEVNULL)
    file.unlink()


def verdicts(baseline: Path, candidate: Path) -> list[dict[str, Any]]:
    """Every compared figure with its verdict."""
    rows: list[dict[str, Any]] = as_json(compare(baseline, candidate))["lines"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter windows")
    parser.add_argument("--port", type=int, default=54300)
    arguments = parser.parse_args()
    seconds = 4.0 if arguments.quick else 8.0
    with tempfile.TemporaryDirectory(prefix="corun-aa-") as directory:
        root = Path(directory)
        for number in range(ROUNDS):
            for name, factor in (("a", 1.0), ("again", 1.0), ("slower", SLOWER)):
                measure(config(SERVICE_MS * factor, number, seconds, arguments.port), root / name)
        same, other = verdicts(root / "a", root / "again"), verdicts(root / "a", root / "slower")
    for title, rows in (("A against A'", same), ("A against B (known service x1.3)", other)):
        print(title)
        for row in rows:
            print("  ", *(f"{key}={row[key]}" for key in row if key in ("arm", "who", "figure", "verdict", "ratio")))
    slowed = [row for row in other if row["who"] == "known" and row["figure"] == "p50"]
    figures = {
        "same": {
            verdict: sum(row["verdict"] == verdict for row in same) for verdict in {row["verdict"] for row in same}
        },
        "false_alarms": sum(row["verdict"] not in QUIET for row in same),
        "slowed_p50": {row["arm"]: row["verdict"] for row in slowed},
    }
    store("aa", figures, {"same": same, "slower": other})
    last_line(figures)


if __name__ == "__main__":
    main()
