"""A headless Chromium driven over plain WebDriver (W3C) by its chromedriver; no package is needed for that."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def missing() -> str:
    """Why there is no browser here, or an empty string."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return (
        f"{' and '.join(absent)} not installed (Debian: apt-get install chromium chromium-driver)" if absent else ""
    )


class Browser:
    """One session: navigate, run a script in the page, emulate a screen, read the console."""

    def __init__(self, address: str, profile: Path) -> None:
        self._address = address
        chrome = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        wanted = {"browserName": "chrome", "goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._call("session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"session/{made['sessionId']}"

    def open(self, page: Path) -> None:
        self._call(f"{self._session}/url", {"url": page.as_uri()})

    def script(self, body: str) -> Any:
        """What `body` (JavaScript with a return) returns."""
        return self._call(f"{self._session}/execute/sync", {"script": body, "args": []})

    def screen(self, width: int, height: int, dark: bool) -> None:
        """Show the page as on a screen of that size with that colour scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._devtools("Emulation.setDeviceMetricsOverride", size)
        self._devtools("Emulation.setEmulatedMedia", {"features": scheme})

    def press(self, key: str) -> None:
        """One key, pressed and released."""
        actions = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self._call(f"{self._session}/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def console(self) -> list[dict[str, Any]]:
        """What the console said since the last call."""
        return list(self._call(f"{self._session}/se/log", {"type": "browser"}))

    def close(self) -> None:
        self._call(self._session, None, "DELETE")

    def _devtools(self, command: str, parameters: dict[str, Any]) -> None:
        self._call(f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _call(self, path: str, body: dict[str, Any] | None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._address}/{path}", data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.loads(reply.read())["value"]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start chromedriver on a port of its choice, and end it with its browser."""
    with subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            started = (re.search(r"started successfully on port (\d+)", line) for line in driver.stdout)
            port = next(match[1] for match in started if match)
            session = Browser(f"http://127.0.0.1:{port}", profile)
            try:
                yield session
            finally:
                session.close()
        finally:
            driver.terminate()
