"""One service: a model behind a socket, with its own queue, batcher and rows.

python src/server.py --model resnet18 --port 54100                     until Ctrl-C or STOP
python src/server.py --model null --address unix:/tmp/null.sock --extra '{"service_ms": 5}'
python src/server.py --port 54100                                      waits for a client's LOAD
"""

from __future__ import annotations

import os

from corun.process import StopSignal, die_with_parent, set_threads
from corun.run.commandline import program
from corun.run.serving import Serving, flags


def main(serving: Serving) -> None:
    """Serve one model in this process."""
    with StopSignal() as stop:
        if serving.parent:
            die_with_parent(serving.parent)
        set_threads(serving.threads)
        from corun.serve.program import build, serve
        from corun.share.announce import parse as announcer

        server = build(serving, announcer(serving.announce) if serving.announce else None)
        print(serve(server, serving, stop), flush=True)
        if server.abandoned:
            os._exit(0)


app = program(flags, main)

if __name__ == "__main__":
    app()
