"""The cells of a grid before anything starts: names that do not exist, all of them at once, and the plan in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from corun import registry
from corun.errors import InputError
from corun.launch import drift
from corun.launch.segments import process_of
from corun.run.config import Pair
from corun.run.launching import RAY_MISSING
from corun.share.spec import in_one_process
from corun.share.spec import parse as parse_sharing

NOT_ON_A_CLUSTER = (
    "trainer and services as one process are started on the launcher's own machine only; use "
    '"backend": "local", or a policy that needs no common process'
)


def require_known(cells: Sequence[Pair]) -> None:
    """InputError that lists every unknown model, data set and arrival process of the cells, or that there are none."""
    if not cells:
        raise InputError('nothing to do: "train" and "infer" are both none, or no arm fits what they name')
    problems = [problem for cell in cells for problem in _problems(cell)]
    if problems:
        raise InputError("the configuration names what is not there", list(dict.fromkeys(problems)))


def describe(cells: Sequence[Pair]) -> Iterator[str]:
    """One line per cell with its windows and ports, then how long all of them will take."""
    for number, cell in enumerate(cells, 1):
        ports = [str(cell.config.port + index) for index in range(len(cell.services))]
        windows = ", ".join(f"{arm} {cell.config.duration(arm):g} s" for arm in cell.arms)
        yield f"{number}. {cell.label}: {windows}, {cell.config.repeat}x; ports {', '.join(ports) or 'none'}"
    yield f"{len(cells)} cells, about {sum(cell.expected_s for cell in cells) / 60:.1f} minutes"


def _launch_problems(cell: Pair) -> Iterator[str]:
    """What stands in the way of a cluster before it is even asked."""
    if cell.config.launch.local:
        return
    if find_spec("ray") is None:
        yield f"launch: {RAY_MISSING}"
    if cell.beside is None and "host" in cell.config.model_fields_set:
        yield 'host: has no effect with "backend": "ray", where services listen on the address of their node'
    with suppress(InputError):
        if in_one_process(cell.config.sharing):
            yield f"sharing: {NOT_ON_A_CLUSTER}"


def _problems(cell: Pair) -> Iterator[str]:
    yield from _launch_problems(cell)
    jobs = [("train", cell.train.arch, cell.train.data)] if cell.train else []
    for where, arch, data in [*jobs, *(("infer", service.arch, service.data) for service in cell.services)]:
        yield from _problem(where, registry.model, arch)
        yield from _problem(where, registry.resolve_data, data)
    for service in cell.services:
        yield from _problem("infer", process_of, service)
    yield from drift.problems(cell)
    try:
        parse_sharing(cell.config.sharing)
    except InputError as error:
        yield "; ".join([error.what, *error.problems])


def _problem(where: str, find: Callable[[Any], object], name: Any) -> Iterator[str]:
    try:
        find(name)
    except InputError as error:
        yield f"{where}: {error.what}"
