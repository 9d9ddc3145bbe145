"""Which tensors of a checkpoint are in FP8, by the headers of its files.

Headers win over lists in a config: an e4m3 weight needs exactly one tensor of scales, of the shape
that its own shape and the declared scheme give, and any other weight none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from stree_core.errors import CheckpointError
from stree_core.fp8.layout import FLOAT_TYPES, Fp8Weights
from stree_core.fp8.scheme import Fp8Scheme

logger = logging.getLogger(__name__)

E4M3 = "F8_E4M3"
SCALE_TYPES = ("F32", "BF16", "F16")
SCALE_ENDINGS = ("_scale_inv", "_scale")
"""What follows a weight's name in that of its scales; both are multiplied by."""

EXTRAS = ("*.input_scale", "*.activation_scale", "*.k_scale", "*.v_scale")
"""Scales of activations and of a quantised cache, neither of which is."""


class Header(NamedTuple):
    """Type and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]


def stored_fp8(
    keys: Iterable[str], scheme: Fp8Scheme | None, stored: Mapping[str, Header], name: str
) -> Fp8Weights | None:
    """Return which of the tensors `keys` that a model reads are in FP8, None where none is.

    Raises CheckpointError, with the model's `name`, for types that are not run, a missing or
    further scale, and a scale of another type or shape.
    """
    there = [key for key in keys if key in stored]
    _require_types(there, stored, name)
    quantised = [key for key in there if stored[key].dtype == E4M3]
    if scheme is None:
        if quantised:
            raise CheckpointError(
                f"{name}: {quantised[0]} is {E4M3}, but no config says how it is scaled; use the "
                "config that belongs to the weights"
            )
        return None
    scales = {key: _scale_of(key, stored, name) for key in quantised}
    fp8 = Fp8Weights(scheme.kind, scales, scheme.block)
    for key, scale in scales.items():
        _check_scale(key, scale, fp8, stored, name)
    for key in there:
        extra = [s for s in _scales_beside(key, stored) if key not in scales]
        if extra:
            raise CheckpointError(
                f"{name}: {key} is {stored[key].dtype} and takes no scales, but the files hold "
                f"{extra[0]}; use the checkpoint that the config belongs to"
            )
    excluded = [key for key in quantised if scheme.skips(key)]
    if excluded:
        logger.warning(
            "%s: %s is in FP8 although %s excludes it, as are %d in all: the files count",
            name, excluded[0], scheme.file, len(excluded),
        )  # fmt: skip
    return fp8 if scales else None


def _require_types(keys: Iterable[str], stored: Mapping[str, Header], name: str) -> None:
    for key in keys:
        dtype = stored[key].dtype
        if dtype in (*FLOAT_TYPES, E4M3):
            continue
        what = f"{dtype}, NVFP4" if f"{key}_scale_2" in stored else dtype
        raise CheckpointError(
            f"{name}: {key} must be bf16, fp16, fp32 or FP8 (e4m3), got {what}; use the "
            "checkpoint in bf16 or FP8"
        )


def _scales_beside(key: str, stored: Mapping[str, Header]) -> list[str]:
    return [key + ending for ending in SCALE_ENDINGS if key + ending in stored]


def _scale_of(key: str, stored: Mapping[str, Header], name: str) -> str:
    found = _scales_beside(key, stored)
    if len(found) != 1:
        wanted = " or ".join(key + ending for ending in SCALE_ENDINGS)
        got = "both" if found else "neither"
        raise CheckpointError(
            f"{name}: {key} is in FP8 and needs {wanted}, the files hold {got}; use the "
            "checkpoint that the config belongs to"
        )
    return found[0]


def _check_scale(
    key: str, scale: str, fp8: Fp8Weights, stored: Mapping[str, Header], name: str
) -> None:
    """Raise CheckpointError for scales of another type, or of a shape that the scheme rules out."""
    header, shape = stored[scale], stored[key].shape
    if header.dtype not in SCALE_TYPES:
        raise CheckpointError(
            f"{name}: {scale} must be fp32, bf16 or fp16, got {header.dtype}; use a checkpoint "
            "with such scales"
        )
    if len(shape) < 2:
        raise CheckpointError(
            f"{name}: {key} is in FP8 with shape {shape}, and only matrices may be; use the "
            "checkpoint in bf16"
        )
    wanted = fp8.scale_shape(shape)
    if _without_ones(header.shape) != _without_ones(wanted):
        blocks = f" of blocks {list(fp8.block)}" if fp8.kind == "fp8-block" else ""
        raise CheckpointError(
            f"{name}: {scale} must have shape {wanted} for {shape} in {fp8.kind}{blocks}, got "
            f"{header.shape}; use the config that belongs to the weights"
        )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
