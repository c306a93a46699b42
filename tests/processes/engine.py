"""A real container engine for tests: the one at DOCKER_HOST, or one that a script starts; else the test is skipped."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest
from tests.processes.tools import ROOT

BASE_IMAGE = os.environ.get("CORUN_TEST_IMAGE", "corun-test:1")
SCRIPT = Path(os.environ.get("CORUN_TEST_ENGINE") or ROOT.parent / "shared" / "containers" / "start-engine")
START_S = 300
TEST_S = START_S + 600  # a test's time-out counts the engine that its fixture may have to install


@cache
def _find() -> tuple[str, str]:
    """(DOCKER_HOST, "") of an engine that answers, or ("", why there is none)."""
    import docker

    tried = []
    if os.environ.get("DOCKER_HOST"):
        try:
            with closing(docker.from_env(timeout=10)) as client:
                client.images.get(BASE_IMAGE)
            return os.environ["DOCKER_HOST"], ""
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it is the reason to skip
            tried.append(f"DOCKER_HOST has no image {BASE_IMAGE} (CORUN_TEST_IMAGE names another): {error}")
    if not (SCRIPT.exists() and shutil.which("bash")):
        return "", "; ".join([*tried, "no container engine: set DOCKER_HOST, or CORUN_TEST_ENGINE to a script"])
    try:
        with open(Path(tempfile.gettempdir()) / "corun-test-engine.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # test workers side by side must not install it twice at once
            done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, timeout=START_S)
    except subprocess.TimeoutExpired:
        return "", "; ".join([*tried, f"{SCRIPT.name} did not end within {START_S} s"])
    found = [line.partition("=")[2] for line in done.stdout.splitlines() if line.startswith("DOCKER_HOST=")]
    if not found:
        return "", "; ".join([*tried, f"{SCRIPT.name} started no engine: {(done.stderr or done.stdout)[-300:]}"])
    return found[0], ""


def engine_host() -> str:
    """DOCKER_HOST of an engine that answers; skips the test with the reason where there is none."""
    host, why = _find()
    if not host:
        pytest.skip(why)
    return host
