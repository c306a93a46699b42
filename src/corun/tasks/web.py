"""The web page of the tasks: live state, charts and logs, read from the store; it changes nothing.

Without a token it is for this host only: it binds to a loopback address and answers no request whose Host header is
another name (a page elsewhere could point its own name at 127.0.0.1). Anywhere else every request needs the token, in
`Authorization: Bearer` or, for the page itself, in `?token=`; it is compared in constant time.
"""

from __future__ import annotations

import hmac
import ipaddress
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from corun.errors import CorunError, InputError
from corun.tasks.monitor import history, log_names, log_tail, snapshot
from corun.tasks.store import Store
from corun.wire import Address, listen

__all__ = ["in_background", "make_app", "serve"]

Say = Callable[[str], None]

PAGE = Path(__file__).with_name("page.html")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
LEAST_TOKEN = 16
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFE = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Guard:
    """Lets requests with the right token through and answers the others 401."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may(Request(scope)):
            answer = PlainTextResponse("the token is missing or wrong\n", 401, {"WWW-Authenticate": "Bearer", **SAFE})
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = request.query_params.get("token", "") if request.url.path == "/" else ""
        return hmac.compare_digest(given.strip().encode(), self._token)


def make_app(store: Store, token: str | None = None) -> Starlette:
    """The page at /, its data at /api/state and /api/log; token: None = for this host only."""

    async def page(_request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=SAFE)

    async def state(_request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(_state, store), headers=SAFE)

    async def log(request: Request) -> Response:
        task, name = request.query_params.get("task", ""), request.query_params.get("name", "")
        try:
            store.get(task)
            text = await run_in_threadpool(log_tail, _directory(store), task, name)
        except CorunError as error:
            return PlainTextResponse(f"{error}\n", 404, SAFE)
        return PlainTextResponse(text, headers=SAFE)

    guard = Middleware(Guard, token=token) if token else Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK])
    routes = [Route("/", page), Route("/api/state", state), Route("/api/log", log)]
    return Starlette(routes=routes, middleware=[guard])


def _directory(store: Store) -> Path:
    live = store.state("live") or {}
    return Path(live.get("directory") or store.path.with_suffix(""))


def _state(store: Store) -> dict[str, Any]:
    """The snapshot with each task's history and the names of its logs."""
    state = snapshot(store, events=30)
    directory = _directory(store)
    for task in state["tasks"]:
        task["history"] = history(directory, task["id"])
        task["logs"] = log_names(directory, task["id"])
    return state


def check(host: str, token: str | None) -> None:
    """InputError when a page may not be served there like that."""
    if token is not None and len(token) < LEAST_TOKEN:
        raise InputError(f"the token has {len(token)} characters; give {LEAST_TOKEN} or more")
    if token is None and not _is_loopback(host):
        raise InputError(
            f"the page would be open to everybody who reaches {host}: give a token, or bind to 127.0.0.1",
            ['a token: python -c "import secrets; print(secrets.token_urlsafe())"'],
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class _Site:
    """A server bound to its place, so that a port in use is told before anything runs."""

    def __init__(self, store: Store, host: str, port: int, token: str | None) -> None:
        check(host, token)
        self._sock = listen(Address("tcp", host.strip("[]"), port))
        self.port = int(self._sock.getsockname()[1])
        config = uvicorn.Config(make_app(store, token), log_level="warning", access_log=False, lifespan="off")
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        self._server.run(sockets=[self._sock])

    def stop(self) -> None:
        self._server.should_exit = True


def serve(
    store: Store, host: str = "127.0.0.1", port: int = 8080, token: str | None = None, say: Say = print
) -> None:
    """Serve the page until Ctrl-C. InputError for a place that needs a token or cannot be had."""
    site = _Site(store, host, port, token)
    say(f"the page is at {_link(host, site.port, token)}")
    site.run()


@contextmanager
def in_background(store: Store, host: str = "127.0.0.1", port: int = 8080, token: str | None = None) -> Iterator[str]:
    """Serve the page from a thread of this process meanwhile; its address. InputError as `serve`."""
    site = _Site(store, host, port, token)
    thread = threading.Thread(target=site.run, name="web", daemon=True)
    thread.start()
    try:
        yield _link(host, site.port, token)
    finally:
        site.stop()
        thread.join(5.0)


def _link(host: str, port: int, token: str | None) -> str:
    return f"http://{host}:{port}/" + ("?token=..." if token else "")
