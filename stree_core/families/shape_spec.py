"""Shape specs: the published config of a model without its weights, enough to time it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from stree_core.families.mtp_shape import MTP_CONFIG
from stree_core.files import load_yaml
from stree_core.profile import Name, Printable, Strict

Text = Annotated[str, Field(min_length=1, max_length=500), Printable]
Keys = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=100), Printable], JsonValue],
    Field(min_length=1, max_length=200),
]

MAMBA_CONFIG = "mamba_config"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


class ShapeSpec(Strict):
    """What a model's config.json says, and for Mamba-in-Llama its mamba_config.json.

    `mtp` describes an MTP head that the published model does not have; its keys go before those of
    `config`.
    """

    schema_version: Literal[1] = 1
    kind: Literal["stree-shape"] = "stree-shape"
    name: Name
    sources: Annotated[tuple[Text, ...], Field(min_length=1, max_length=16)]
    config: Keys
    mamba_config: Keys | None = None
    mtp: Keys | None = None
    note: Text | None = None

    @model_validator(mode="after")
    def _mamba_config_is_of_a_llama(self) -> ShapeSpec:
        model_type = self.config.get("model_type")
        if self.mamba_config is not None and model_type != "llama":
            raise ValueError(f"{MAMBA_CONFIG} belongs to model_type llama, not to {model_type}")
        for key, field in ((MAMBA_CONFIG, MAMBA_CONFIG), (MTP_CONFIG, "mtp")):
            if key in self.config:
                raise ValueError(f"{field} stands beside config, not in it")
        return self

    @property
    def config_dict(self) -> dict[str, Any]:
        """The config as a model folder's is read: the second file under a key of the first."""
        merged: dict[str, Any] = copy.deepcopy(self.config)
        if self.mamba_config is not None:
            merged[MAMBA_CONFIG] = copy.deepcopy(self.mamba_config)
        if self.mtp is not None:
            merged[MTP_CONFIG] = copy.deepcopy(self.mtp)
        return merged


def load_shape_spec(path: Path) -> ShapeSpec:
    """Read a shape spec; raise ConfigError when it is malformed."""
    return load_yaml(path, ShapeSpec)


def find_shape_spec(roots: Iterable[Path], name: str) -> Path | None:
    """Return the first shapes/NAME.yaml below the roots, None when there is none."""
    if not _NAME.fullmatch(name):
        return None
    paths = (root / "shapes" / f"{name}.yaml" for root in roots)
    return next((path for path in paths if path.is_file()), None)
