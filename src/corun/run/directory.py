"""The directory of one run: manifest first, rows as they are made, manifest replaced at the end.

A run that is killed leaves `"status": "running"` and everything up to its last second.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from corun.clock import anchor
from corun.errors import InputError, RunFault
from corun.process import available_cores
from corun.registry import home
from corun.run.records import SCHEMA_VERSION

Status = Literal["running", "complete", "failed", "interrupted"]

_PACKAGES = ("numpy", "torch", "torchvision", "ultralytics-opencv-headless", "pillow", "psutil", "nvidia-ml-py")


def result_root() -> Path:
    """result/ of the checkout, or $CORUN_RESULT."""
    return Path(os.environ.get("CORUN_RESULT") or home() / "result")


def run_id(config_digest: str, now: datetime | None = None) -> str:
    """`YYYYMMDD-HHMMSS-<6 hex of the resolved config>`."""
    return f"{(now or datetime.now()):%Y%m%d-%H%M%S}-{config_digest[:6]}"


class RunDirectory:
    """`result/<run_id>/` with its manifest."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def create(cls, path: Path, resolved: dict[str, Any], config_digest: str) -> RunDirectory:
        """Make the directory and its manifest with status running; InputError when it cannot be written."""
        path = path.absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the run directory {path}: {error.strerror or error}") from error
        run = cls(
            path,
            {
                "schema_version": SCHEMA_VERSION,
                "run": path.name,
                "status": "running",
                "config": resolved,
                "config_sha256": config_digest,
                "argv": sys.argv,
                "git": git_state(home()),
                "versions": versions(),
                "hardware": hardware(),
                "clock_anchor": asdict(anchor()),
                "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            },
        )
        run.save()
        return run

    def file(self, name: str) -> Path:
        """A path inside the directory."""
        return self.path / name

    def update(self, **fields: Any) -> None:
        """Set fields of the manifest and save it."""
        self.manifest.update(fields)
        self.save()

    def finish(self, status: Status, **fields: Any) -> None:
        """Last word of the run."""
        self.update(status=status, finished=datetime.now().astimezone().isoformat(timespec="seconds"), **fields)

    def save(self) -> None:
        """Replace manifest.json atomically."""
        write_json(self.path / "manifest.json", self.manifest)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step; RunFault names the path when the disk refuses."""
    temporary = path.with_suffix(path.suffix + ".part")
    try:
        temporary.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise RunFault(f"cannot write {path}: {error.strerror or error}") from error


def read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json of a run directory; InputError when it is none."""
    try:
        value = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a run directory: its manifest.json cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}/manifest.json is not a manifest")
    return value


def versions() -> dict[str, str | None]:
    """Python, corun and the packages that shape the numbers."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """What this machine is: CPU, cores, memory, kernel, governor."""
    return {
        "cpu": _first_match("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "cores_available": available_cores(),
        "memory_kib": _first_match("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "hostname": socket.gethostname(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "autogroup": _read("/proc/sys/kernel/sched_autogroup_enabled"),
    }


def _first_match(path: str, key: str) -> str | None:
    for line in (_read(path) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def git_state(root: Path) -> dict[str, Any] | None:
    """Commit and whether the tree differs from it; None outside a git checkout."""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
