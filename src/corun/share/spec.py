"""`"sharing": {"policy": "idle+slo", "slo_ms": 100}` as policy objects, with every problem found at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import msgspec

from corun.errors import InputError, suggest
from corun.share.policies import POLICIES
from corun.share.policy import Policy

NAIVE = "none"
TOGETHER = "one_process"


def split_names(text: str) -> list[str]:
    """`idle+slo` as names; InputError for an unknown one, with a suggestion."""
    names = [name.strip() for name in text.split("+") if name.strip()] or [NAIVE]
    unknown = [f'"{name}" is unknown{suggest(name, POLICIES)}' for name in names if name not in POLICIES]
    if unknown:
        raise InputError(f'sharing policy "{text}"', [*unknown, f"policies: {', '.join(POLICIES)}"])
    return names


def parse(spec: Mapping[str, Any] | str | None) -> tuple[Policy, ...]:
    """The policies of a config entry or of `--policy` text; whether all is one process says `in_one_process`.

    Raises InputError: an unknown policy or option, an impossible value, or two policies that contradict each other.
    """
    given: dict[str, Any] = {"policy": spec} if isinstance(spec, str) else dict(spec or {})
    names = split_names(str(given.pop("policy", NAIVE)))
    known = {name: _options(name) for name in names}
    problems = [*_contradictions(names), *_together_problems(given.pop(TOGETHER, None), names)]
    every = sorted({option for options in known.values() for option in options})
    for option in given:
        if option not in every:
            homes = [name for name in POLICIES if option in _options(name)]
            of = f" (it belongs to {', '.join(homes)})" if homes else suggest(option, every)
            problems.append(f'"{option}" is no option of {"+".join(names)}{of}')
    if problems:
        raise InputError("the sharing policy is wrong", problems)
    return tuple(_build(name, {key: value for key, value in given.items() if key in known[name]}) for name in names)


def in_one_process(spec: Mapping[str, Any] | str | None) -> bool:
    """Whether trainer and services are to be threads of one process: asked for, or part of what a policy is.

    InputError as from `parse` when a policy is unknown.
    """
    given: Mapping[str, Any] = {"policy": spec} if isinstance(spec, str) else spec or {}
    names = split_names(str(given.get("policy", NAIVE)))
    return given.get(TOGETHER) is True or any(POLICIES[name].one_process for name in names)


def _together_problems(asked: Any, names: Sequence[str]) -> list[str]:
    """What is wrong with `one_process` (None = not said)."""
    if not isinstance(asked, bool | None):
        return [f'"{TOGETHER}" must be true or false, not {asked!r}']
    inside = [name for name in names if POLICIES[name].one_process]
    if asked is False and inside:
        return [f'{" and ".join(inside)} acts inside one process: leave "{TOGETHER}" out or make it true']
    return []


def _options(name: str) -> list[str]:
    return [item.name for item in fields(POLICIES[name]) if item.init]  # type: ignore[arg-type]


def _contradictions(names: Sequence[str]) -> list[str]:
    problems = [f"{name} stands twice" for name in sorted({name for name in names if names.count(name) > 1})]
    kinds: dict[str, str] = {}
    for name in dict.fromkeys(names):
        kind = POLICIES[name].kind
        if kind in kinds:
            problems.append(f"{kinds[kind]} and {name} contradict each other (both set the {kind})")
        kinds[kind] = name
    if "base" in kinds and len(kinds) > 1:
        others = ", ".join(name for kind, name in kinds.items() if kind != "base")
        problems.append(f"{kinds['base']} means nothing else is done; leave it out beside {others}")
    return problems


def _build(name: str, options: dict[str, Any]) -> Policy:
    cls = POLICIES[name]
    types = {item.name: item.type for item in fields(cls) if item.init}  # type: ignore[arg-type]
    wrong = [
        f"{name}.{key}: {problem}" for key, value in options.items() if (problem := _mismatch(value, types[key]))
    ]
    if wrong:
        raise InputError("the sharing policy is wrong", wrong)
    return cls(**options)


def _mismatch(value: Any, type_name: Any) -> str | None:
    """Why a JSON value is not of a field's type (written as text by the annotations import)."""
    types: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}
    try:
        msgspec.convert(value, types[type_name])
    except msgspec.ValidationError as error:
        return str(error)
    return None
