"""The profiler: host, processes and GPUs once a second, as raw counters in CSV files.

python src/profiler.py                                     until Ctrl-C, into result/profile-<time>
python src/profiler.py --count 60 --pid server:resnet50=4711
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corun.errors import guard
from corun.process import die_with_parent

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path | None, typer.Option(help="directory; default: result/profile-<time>")] = None,
    count: Annotated[int, typer.Option(help="stop after so many ticks; 0 = until stopped")] = 0,
    period: Annotated[float, typer.Option(help="seconds between two ticks")] = 1.0,
    device_file: Annotated[
        Path | None, typer.Option(help="readings of this device; default: device.json of the checkout")
    ] = None,
    watch: Annotated[
        Path | None, typer.Option(help='JSON lines {"pid":, "role":, "name":} of processes to follow')
    ] = None,
    pid: Annotated[list[str] | None, typer.Option(help="ROLE:NAME=PID to follow; may be repeated")] = None,
    root: Annotated[Path | None, typer.Option(help="look /proc and /sys up below this directory")] = None,
    control: Annotated[str | None, typer.Option(help="launcher's address")] = None,
) -> None:
    """Sample the machine on a fixed grid; a killed profiler keeps every row up to its last tick."""
    with guard():
        if control:
            die_with_parent()
        from corun.profile.session import ProfilerOptions, default_out, profile
        from corun.profile.watch import parse_pid

        options = ProfilerOptions(
            out=out or default_out(),
            period_s=period,
            count=count,
            device_file=device_file,
            root=root,
            watch=watch,
            pids=tuple(parse_pid(text) for text in pid or ()),
            control=control,
        )
        done = profile(options, lambda line: print(line, flush=True))
        print(f"{done.ticks} ticks, {done.missed} missed, {done.read_errors} failed readings")
        print(f"profile.csv, process.csv, gpu.csv and profiler.json are in {options.out}")


if __name__ == "__main__":
    app()
