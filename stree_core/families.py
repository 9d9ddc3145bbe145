"""From a parsed config to a ModelShape: which family a model is of, and what none supports."""

from __future__ import annotations

from collections.abc import Callable

from stree_core.config_keys import Config, Unsupported, refuse
from stree_core.errors import CheckpointError, nearest
from stree_core.family_bamba import bamba
from stree_core.family_falcon_h1 import falcon_h1
from stree_core.family_granite import granite
from stree_core.family_mamba2 import mamba2, native_mamba2
from stree_core.family_mamba_in_llama import mamba_in_llama
from stree_core.family_nemotron_h import nemotron_h
from stree_core.family_zamba2 import zamba2
from stree_core.model_shape import ModelShape

FAMILIES: dict[str, Callable[[Config], ModelShape]] = {
    "bamba": bamba,
    "falcon_h1": falcon_h1,
    "granitemoehybrid": granite,
    "mamba2": mamba2,
    "mamba2 (native)": native_mamba2,
    "mamba-in-llama": mamba_in_llama,
    "nemotron_h": nemotron_h,
    "zamba2": zamba2,
}
"""By model_type; the two formats without one of their own are known by other keys."""


def shape_from_config(config: Config, name: str) -> ModelShape:
    """Map a parsed config onto a ModelShape; `name` goes into errors.

    Raises CheckpointError on an unknown family, a missing key or an unsupported setting.
    """
    family = _family_of(config)
    if family not in FAMILIES:
        raise CheckpointError(
            f"{name}: model_type must be a known family, got {family!r}; "
            f"{nearest(family, FAMILIES)}"
        )
    try:
        refuse(config, quantization_config=None, sliding_window=None)
        return FAMILIES[family](config)
    except KeyError as err:
        raise CheckpointError(
            f"{name}: config.json of family {family} needs key {err.args[0]!r}; add it"
        ) from err
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as err:
        raise CheckpointError(
            f"{name}: config.json has a value of the wrong kind ({err}); mend it"
        ) from err
    except Unsupported as err:
        raise CheckpointError(f"{name}: {err}; use a checkpoint without it") from err


def _family_of(config: Config) -> str:
    if "mamba_config" in config:
        return "mamba-in-llama"
    if "ssm_cfg" in config and "model_type" not in config:
        return "mamba2 (native)"
    return str(config.get("model_type"))
