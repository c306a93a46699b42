"""`python -m corun.tasks.health [host:port]`: exit 0 when a server answers there with its model loaded, else 1.

For a container engine's own health check. Without an address: that of the server among this container's processes, as
its command line says.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from corun.errors import InputError, guard
from corun.tasks.runtime import answers
from corun.wire.sockets import Address

DEFAULT_PORT: Final = "54100"
TIMEOUT_S: Final = 2.5
ANYWHERE: Final = frozenset({"0.0.0.0", "::"})


def address_in(argv: Sequence[str]) -> Address:
    """Where `server.py` with this command line can be reached from its own host."""
    given = {flag: value for flag, value in pairwise(argv) if flag.startswith("--")}
    if "--address" in given:
        return Address.parse(given["--address"])
    host = given.get("--host", "127.0.0.1")
    return Address.parse(f"{'127.0.0.1' if host in ANYWHERE else host}:{given.get('--port', DEFAULT_PORT)}")


def _server(proc: Path = Path("/proc")) -> list[str]:
    """The command line of the first process that runs server.py."""
    for entry in sorted((path for path in proc.iterdir() if path.name.isdigit()), key=lambda path: int(path.name)):
        try:
            argv = (entry / "cmdline").read_bytes().decode("utf-8", errors="replace").split("\0")
        except OSError:
            continue
        if any(word.endswith("server.py") for word in argv[:3]):
            return argv
    raise InputError("no server.py runs here: give its address, e.g. 127.0.0.1:54100")


def main(arguments: Sequence[str]) -> int:
    """Exit code of the check."""
    with guard():
        address = Address.parse(arguments[0]) if arguments else address_in(_server())
        body = answers(address, TIMEOUT_S)
        ready = body is not None and bool(body.get("model"))
        print(f"{address}: {body['model']}" if ready and body else f"{address}: not ready", flush=True)
        return 0 if ready else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
