"""MIG: hardware slices of a GPU, used where they exist and never created.

Creating slices needs root and an idle GPU, and would take it from others; this policy reads `nvidia-smi -L`::

    GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-...)
      MIG 3g.40gb     Device  0: (UUID: MIG-...)
      MIG 1g.10gb     Device  1: (UUID: MIG-...)

and gives each service and the trainer a slice by CUDA_VISIBLE_DEVICES. A process sees one slice at most.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from corun.errors import InputError
from corun.share.host import Host, why_not
from corun.share.policy import Cast, Kind, Member, Policy, no_gpu

_GPU = re.compile(r"^GPU (\d+): (.+?) \(UUID: ([^)]+)\)")
_MIG = re.compile(r"^\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: ([^)]+)\)")
_SIZE = re.compile(r"(?:(\d+)c\.)?(\d+)g\.(\d+)gb")


@dataclass(frozen=True)
class Slice:
    """One MIG device: profile e.g. 3g.40gb (or 1c.3g.40gb), the GPU it is part of, its UUID."""

    gpu: int
    profile: str
    uuid: str

    @property
    def size(self) -> tuple[int, int]:
        """(compute slices, memory in GB)."""
        found = _SIZE.search(self.profile)
        return (int(found[1] or found[2]), int(found[3])) if found else (0, 0)


def parse_list(text: str) -> list[Slice]:
    """The MIG devices in the output of `nvidia-smi -L`, in its order; unknown lines are passed over."""
    gpu, slices = -1, []
    for line in text.splitlines():
        if found := _GPU.match(line):
            gpu = int(found[1])
        elif found := _MIG.match(line):
            slices.append(Slice(gpu, found[1], found[3]))
    return slices


@dataclass
class Mig(Policy):
    """trainer_profile, service_profile: e.g. "3g.40gb"; empty = the trainer gets the largest, services the next."""

    trainer_profile: str = ""
    service_profile: str = ""

    name: ClassVar[str] = "mig"
    kind: ClassVar[Kind] = "gpu"
    summary: ClassVar[str] = "existing MIG slices, one for the trainer and one for each service"

    _given: dict[str, Slice] = field(default_factory=dict, init=False, repr=False)

    def refusals(self, host: Host, cast: Cast) -> list[str]:
        problems = no_gpu(cast, host)
        if cast.one_process:
            problems.append("trainer and service are one process, and a process sees one slice only")
        if problems:
            return problems
        try:
            slices = parse_list(host.gpu_list())
        except OSError as error:
            return [f"the slices cannot be listed: {why_not(error)}"]
        try:
            self._assign(slices, cast)
        except InputError as error:
            return [error.what, *error.problems]
        return []

    def _assign(self, slices: list[Slice], cast: Cast) -> dict[str, Slice]:
        """A slice for everybody; InputError when they do not go round."""
        left = sorted(slices, key=lambda item: item.size, reverse=True)
        given: dict[str, Slice] = {}
        for member in sorted(cast.members, key=lambda member: not member.trains):
            profile = self.trainer_profile if member.trains else self.service_profile
            fitting = [item for item in left if not profile or item.profile == profile]
            if not fitting:
                there = ", ".join(item.profile for item in slices) or "none"
                wanted = f"a {profile} slice" if profile else "a slice"
                raise InputError(f"no MIG slice left for {member.label}: it needs {wanted}, there are: {there}")
            given[member.label] = fitting[0]
            left.remove(fitting[0])
        return given

    def prepare(self, host: Host, cast: Cast) -> None:
        self._given = self._assign(parse_list(host.gpu_list()), cast)

    def environment(self, member: Member) -> dict[str, str]:
        mine = self._given.get(member.label)
        return {"CUDA_VISIBLE_DEVICES": mine.uuid} if mine else {}

    def in_force(self) -> dict[str, Any]:
        return {label: f"{item.profile} {item.uuid}" for label, item in self._given.items()}
