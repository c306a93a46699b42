"""Tasks: register what is to be answered and how fast, let the best model that can be chosen, keep it served.

python src/tasks.py register doors --kind classification --rate 20 --slo "p99<=100" --model resnet18 --model resnet50
python src/tasks.py plan --measure        python src/tasks.py up        python src/tasks.py infer doors photo.jpg
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from corun.tasks import cli, program
from corun.tasks.runtime import Runtime
from corun.tasks.store import Store
from corun.tasks.supervisor import UpOptions, runtimes_here

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
program.add_registry(app)


@app.command()
def up(
    task: Annotated[list[str] | None, typer.Option(help="only this one, repeatable; default: all registered")] = None,
    host: Annotated[str, typer.Option(help="where the tasks are reached")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="of the first task, then upwards; 0 = free ones")] = 0,
    image: Annotated[str | None, typer.Option(help="of containers; default corun:latest")] = None,
    checkout: Annotated[
        bool, typer.Option("--checkout", help="mount this checkout and Python into the image")
    ] = False,
    replan: Annotated[float, typer.Option(min=0, help="seconds between plans from live statistics; 0 = never")] = 0.0,
    page: Annotated[int | None, typer.Option(help="serve a page about it on this port")] = None,
    page_host: Annotated[str, typer.Option(help="other than loopback needs --token")] = "127.0.0.1",
    token: Annotated[str | None, typer.Option(envvar="CORUN_TOKEN", help="password of the page")] = None,
    out: Annotated[Path | None, typer.Option(help="logs, rows and reports; default: beside the registry")] = None,
    launch: Annotated[
        str | None, typer.Option(help='processes on a cluster: a config.json with "launch", or that object')
    ] = None,
    store: program.Registry = None,
) -> None:
    """Serve the tasks until Ctrl-C or `down`: router, replicas, restarts, scaling."""
    options = UpOptions(tuple(task or ()), host, port, image, checkout, out)
    site = (page_host, page, token) if page is not None else None
    program.do(store, lambda opened: cli.up(opened, options, site, replan, _elsewhere(launch, opened, options)))


def _elsewhere(launch: str | None, opened: Store, options: UpOptions) -> Callable[[str], Runtime] | None:
    """Runtimes on the nodes of a cluster; None without --launch, before which nothing of it is imported."""
    if launch is None:
        return None
    from corun.launch.arguments import launch_of
    from corun.launch.ray_runtime import placed

    return placed(launch_of(launch), runtimes_here(opened, options))


program.add_running(app)

if __name__ == "__main__":
    app()
