"""NVIDIA MPS: processes share one GPU context, so their kernels run side by side, the trainer on part of the SMs.

A private daemon (own pipe and log directories) is started for the run and told to quit at its end. The percentage
and the priority are fixed when a process creates its context. The cap holds for SMs only: caches, HBM and PCIe are
shared, and one client's fault ends them all. Source: CUDA Multi-Process Service guide.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import dataclass, field
from typing import Any, ClassVar

from corun.errors import InputError, RunFault
from corun.share.host import Host, why_not
from corun.share.policy import Cast, Kind, Member, Policy, no_gpu

CONTROL = "nvidia-cuda-mps-control"
BELOW_NORMAL = "1"
COMPUTE_MODES = ("Default", "Exclusive_Process")


@dataclass
class Mps(Policy):
    """trainer_percent: share of the SMs the trainer's kernels may occupy. trainer_memory: hard limit, e.g. "6G"."""

    trainer_percent: int = 40
    trainer_memory: str = ""
    low_priority: bool = True

    name: ClassVar[str] = "mps"
    kind: ClassVar[Kind] = "gpu"
    summary: ClassVar[str] = "NVIDIA MPS with a capped, low-priority trainer"

    _directory: str = field(default="", init=False, repr=False)
    _version: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.trainer_percent <= 100:
            raise InputError(f"trainer_percent is {self.trainer_percent}; it must be 1 to 100")

    def refusals(self, host: Host, cast: Cast) -> list[str]:
        problems = no_gpu(cast, host)
        if host.which(CONTROL) is None:
            problems.append(f"{CONTROL} is not installed (it comes with the NVIDIA driver)")
        if cast.one_process:
            problems.append("trainer and service are one process; MPS shares between processes")
        return problems or self._mode_problems(host)

    def _mode_problems(self, host: Host) -> list[str]:
        query = ["nvidia-smi", "--query-gpu=compute_mode,mig.mode.current", "--format=csv,noheader"]
        try:
            rows = [line.split(",") for line in host.command(query).strip().splitlines()]
        except OSError as error:
            return [f"the compute mode cannot be read: {why_not(error)}"]
        problems = [
            f"GPU {index} is in compute mode {row[0].strip()}; MPS needs {' or '.join(COMPUTE_MODES)}"
            for index, row in enumerate(rows)
            if row[0].strip() not in COMPUTE_MODES
        ]
        if host.uid and any(row[0].strip() == "Exclusive_Process" for row in rows):
            problems.append("an Exclusive_Process GPU may belong to another user's MPS server")
        return problems

    def prepare(self, host: Host, cast: Cast) -> None:
        self._directory = tempfile.mkdtemp(prefix="corun-mps-")
        try:
            self._version = host.command([CONTROL, "-v"], self._directories()).strip()
        except OSError as error:
            self._version = f"unknown ({why_not(error)})"
        try:
            host.command([CONTROL, "-d"], self._directories())
        except OSError as error:
            self.teardown(host)
            raise RunFault(f"the MPS daemon does not start: {why_not(error)}") from error

    def _directories(self) -> dict[str, str]:
        return {
            "CUDA_MPS_PIPE_DIRECTORY": f"{self._directory}/pipe",
            "CUDA_MPS_LOG_DIRECTORY": f"{self._directory}/log",
        }

    def environment(self, member: Member) -> dict[str, str]:
        if member.serves:
            return self._directories()
        if not member.trains:
            return {}
        variables = {**self._directories(), "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(self.trainer_percent)}
        if self.low_priority:
            variables["CUDA_MPS_CLIENT_PRIORITY"] = BELOW_NORMAL
        if self.trainer_memory:
            variables["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = f"0={self.trainer_memory}"
        return variables

    def in_force(self) -> dict[str, Any]:
        return {"mps_version": self._version, "pipe_directory": self._directories()["CUDA_MPS_PIPE_DIRECTORY"]}

    def teardown(self, host: Host) -> None:
        if not self._directory:
            return
        with contextlib.suppress(OSError):
            host.command([CONTROL], self._directories(), stdin="quit\n")
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory = ""
