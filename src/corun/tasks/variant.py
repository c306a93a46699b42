"""A model and how it is built, as one word: `resnet18`, `resnet18:precision=bf16,image_size=160`, `null:service_ms=5`.

The same network at another size or precision is another candidate: faster, and less accurate. Options are the
fields of registry.ModelOptions; any other key is an option of the model's family (`extra`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from corun import registry
from corun.errors import InputError
from corun.registry import Model

OPTIONS: Final = ("weights", "precision", "channels_last", "compile", "image_size", "num_classes")
FREE: Final = frozenset({"channels_last", "compile"})
"""Options that change how fast an answer comes and not what it is."""

_FLAGS: Final = frozenset({"channels_last", "compile"})


@dataclass(frozen=True)
class Variant:
    """A model's name and the options that differ from its defaults, in the order of their names."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read `name` or `name:key=value,key=value`; InputError when it is neither, or no such model is known."""
        name, colon, rest = text.partition(":")
        registry.model(name)
        options: dict[str, Any] = {}
        problems = []
        for part in rest.split(",") if colon else ():
            key, equals, value = part.partition("=")
            if not (key and equals and value):
                problems.append(f'"{part}" is not key=value')
            options[key] = _value(key, value)
        for key in ("image_size", "num_classes"):
            if key in options and not (isinstance(options[key], int) and options[key] > 0):
                problems.append(f"{key}: give a whole number above 0 (got {options[key]})")
        if options.get("precision", "fp32") not in registry.PRECISIONS:
            problems.append(f"precision: {options['precision']} is none of {', '.join(registry.PRECISIONS)}")
        if problems:
            raise InputError(f'"{text}" is no model with options, e.g. resnet18:precision=bf16', problems)
        return cls(name, dict(sorted(options.items())))

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}:{','.join(f'{key}={_text(value)}' for key, value in self.options.items())}"

    @property
    def row(self) -> Model:
        """Its row of the model table."""
        return registry.model(self.name)

    @property
    def answers_as(self) -> str:
        """The variant without the options that change only its speed: what its quality depends on."""
        kept = {key: value for key, value in self.options.items() if key not in FREE}
        return str(Variant(self.name, kept))

    def flags(self, weights: str | None) -> list[str]:
        """Command line of src/server.py for it; weights: of the task, None = random, used when no option says more."""
        options = {"weights": weights} | {key: self.options[key] for key in OPTIONS if key in self.options}
        if options["weights"] == "random":
            options["weights"] = None
        words = ["--model", self.name]
        for key, value in options.items():
            flag = f"--{key.replace('_', '-')}"
            if key in _FLAGS:
                words += [flag] if value else []
            elif value is not None:
                words += [flag, str(value)]
        extra = {key: value for key, value in self.options.items() if key not in OPTIONS}
        return words + (["--extra", json.dumps(extra)] if extra else [])


def _value(key: str, text: str) -> Any:
    if key in ("weights", "precision"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
