"""The published plots from the figures of bench.ectrans: memory and time by number of instances, steps, policies.

python -m bench.ectrans_plots [bench/results/ectrans.json] [--out result]
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.common import RESULTS
from corun.errors import InputError, guard


def steps(axes: Any, body: dict[str, Any]) -> None:
    """Total time of each step, logarithmic, with the range over repeats."""
    totals = body["details"]["total_s"]
    names = list(totals)
    middles = [statistics.median(totals[name]) for name in names]
    ranges = [
        [m - min(totals[name]) for m, name in zip(middles, names, strict=True)],
        [max(totals[name]) - m for m, name in zip(middles, names, strict=True)],
    ]
    axes.barh(names, middles, xerr=ranges)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="total time, s", title="steps, one on top of the other")


def policies(axes: Any, body: dict[str, Any]) -> None:
    """Mean turnaround of each policy in virtual time."""
    found = body["figures"]["policies"]
    names = list(found)
    axes.barh([i - 0.2 for i in range(len(names))], [found[name]["mix_h_s"] for name in names], 0.4, label="mix H")
    poisson = [found[name]["poisson_s"] for name in names]
    axes.barh([i + 0.2 for i in range(len(names))], poisson, 0.4, label="Poisson, 90 % load")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="mean turnaround, s", title="queue policies, virtual time")
    axes.legend()


def by_instances(axes: Any, body: dict[str, Any], metric: str, label: str) -> None:
    """One line an executor over the number of instances."""
    for executor, found in body["details"].get("instances", {}).items():
        counts = sorted(found, key=int)
        axes.plot([int(count) for count in counts], [found[count][metric] for count in counts], "o-", label=executor)
    axes.set(xlabel="instances", ylabel=label, ylim=(0, None), title=f"{label} by number of instances")
    if axes.lines:
        axes.legend()


def main(
    figures: Annotated[Path, typer.Argument()] = RESULTS / "ectrans.json",
    out: Annotated[Path, typer.Option()] = Path("result"),
) -> None:
    """Draw one PNG."""
    with guard():
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        try:
            body = json.loads(figures.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{figures} cannot be read: {error}", ["run python -m bench.ectrans first"]) from None
        drawing, ((a, b), (c, d)) = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
        steps(a, body)
        policies(b, body)
        by_instances(c, body, "pss_mib", "memory (PSS), MiB")
        by_instances(d, body, "total_s", "total time, s")
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{figures.stem}.png"
        drawing.savefig(path, dpi=130)
        print(path)


if __name__ == "__main__":
    typer.run(main)
