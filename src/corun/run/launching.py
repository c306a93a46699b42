"""The `launch` key of config.json: whether processes start on this machine or on the nodes of a Ray cluster."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

RAY_MISSING = (
    '"backend": "ray" needs Ray, which is not installed here: pip install "corun[ray]", or pip install -e ".[ray]" '
    "in the checkout"
)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _labels(value: Any) -> Any:
    """`"role=servers"` as {"role": "servers"}."""
    if not isinstance(value, str):
        return value
    key, sign, wanted = value.partition("=")
    if not (key and sign and wanted):
        raise ValueError('a label is "key=value" or {"key": "value"}')
    return {key: wanted}


Labels = Annotated[dict[str, str], BeforeValidator(_labels)]


class Where(_Model):
    """What a node must have; all that is given must fit."""

    label: Labels = Field({}, description='labels of `ray start --labels`, "role=servers" or {"role": "servers"}')
    resource: str | None = Field(None, description="a resource the node offers, e.g. GPU or one of --resources")
    node: str | None = Field(None, description="name or address of the node")


class Roles(_Model):
    """Where each role runs; a role that is left out runs on the launcher's node, the trainer beside the services."""

    server: Where | None = None
    client: Where | None = None
    trainer: Where | None = None
    profiler: Where | None = Field(None, description="which of the used nodes are profiled; default: all of them")


class Launch(_Model):
    """How the processes of a run are started."""

    backend: Literal["local", "ray"] = "local"
    address: str = Field(
        "auto", description="host:port of the cluster's head; auto = the one this machine is part of"
    )
    placement: Roles = Roles()
    collect_s: Annotated[float, Field(ge=1)] = Field(
        60.0, description="seconds between two visits to the nodes for new rows during a window"
    )

    @field_validator("address", "placement", "collect_s")
    @classmethod
    def _only_with_ray(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("backend") == "local":
            raise ValueError('has no effect without "backend": "ray"')
        return value

    @property
    def local(self) -> bool:
        """True when no cluster is asked for."""
        return self.backend == "local"

    def resolved(self) -> dict[str, Any]:
        """What of it determines a measurement: not the cluster's address."""
        return self.model_dump(
            mode="json", exclude={"address", "collect_s"}, exclude_none=True, exclude_defaults=True
        )


def model_of(location: list[Any]) -> type[BaseModel]:
    """The model whose keys stand beside the last part of a path that begins with `launch`."""
    models: dict[int, type[BaseModel]] = {2: Launch, 3: Roles}
    return models.get(len(location), Where)


__all__ = ["RAY_MISSING", "Launch", "Roles", "Where", "model_of"]
