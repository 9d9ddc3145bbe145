"""Read weights in FP8 from safetensors files: as they are stored, or as tensors.

A projection whose tensors are all in FP8 stays so: the codes of its parts are stacked, and their
scales are laid out by the largest group of rows on which all parts agree. What is not a projection,
has adapters, or is only partly in FP8 becomes a tensor, and that is said.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from stree_core.errors import CheckpointError
from stree_core.families import Weight
from stree_core.fp8 import Fp8Weights, row_group
from stree_core.models.weight_files import WeightFiles
from stree_kernels.fp8.scaled_weight import CODES, Projection, ScaledWeight

logger = logging.getLogger(__name__)

LARGE_SCALE = 256.0
"""Weights are below a few units, so that scales are below 1/100; the largest seen is far below."""


class ScaledFiles(WeightFiles):
    """Reads weights of one folder of which some are in FP8, for a model of `dtype`.

    Raises what WeightFiles raises, and CheckpointError for scales that are not above 0 or finite.
    """

    def __init__(
        self, folder: Path, name: str, device: torch.device, fp8: Fp8Weights, dtype: torch.dtype,
        renames: Sequence[tuple[str, str]] = (),
    ) -> None:  # fmt: skip
        super().__init__(folder, name, device, renames)
        self._fp8 = fp8
        self._dtype = dtype
        self._wide = torch.promote_types(dtype, torch.float32)

    def read_projection(self, weight: Weight) -> Projection:
        """Return a weight of a projection, in FP8 where all of it is stored so."""
        keys = weight.keys_in(self._names)
        if weight.adapters or not self._fp8.holds(keys):
            return self.read(weight)
        codes = [self._raw(key) for key in keys]
        self.require_shape(weight, keys, codes)
        group = row_group(self._fp8, _starts(weight, codes))
        parts = [
            self._grouped(key, tensor.shape, group) for key, tensor in zip(keys, codes, strict=True)
        ]
        scales = torch.cat(parts, dim=-2)
        values = torch.cat([tensor.view(torch.uint8) for tensor in codes]).view(weight.shape)
        if len(weight.shape) == 3:
            scales = scales.reshape(weight.shape[0], -1, scales.shape[-1])
        if weight.row_order:
            runs = [(first // group, count // group) for first, count in weight.row_order]
            values = _reordered(values, weight.row_order)
            scales = _reordered(scales, runs)
        return ScaledWeight(
            values.to(self._device).view(CODES),
            scales.to(self._device).contiguous(),
            group,
            self._fp8.column_block(weight.shape[-1]),
            self._dtype,
        )

    def read_parts(self, weight: Weight) -> list[Projection] | None:
        """Return the parts of a projection that is in FP8 in part, rows in the model's order.

        None where all of it is stored alike, or it cannot be cut.
        """
        pieces = weight.split(self._fp8.scales)
        if len(pieces) < 2:
            return None
        parts: list[Projection] = []
        for piece in pieces:
            part = self.read_projection(piece)
            if isinstance(part, Tensor) and piece.row_order:
                part = _reordered(part, piece.row_order)
            parts.append(part)
        return parts

    def _tensor(self, key: str) -> Tensor:
        """Return a tensor; one in FP8 with its codes times their scales."""
        if key not in self._fp8.scales:
            return super()._tensor(key)
        logger.info("%s: %s is in FP8 and becomes a tensor when it is read", self._name, key)
        codes = self._raw(key)
        scales = self._grouped(key, codes.shape, 1)
        blocks = torch.arange(codes.shape[-1]) // self._fp8.column_block(codes.shape[-1])
        values = codes.to(torch.float32).to(self._wide) * scales[..., blocks]
        return values.to(self._device)

    def _grouped(self, key: str, shape: torch.Size, group: int) -> Tensor:
        """Return a tensor's scales, one for each group of rows and block of columns."""
        *lead, num_rows, num_columns = shape
        name = self._fp8.scales[key]
        scales = self._raw(name).to(torch.float32)
        if not bool(((scales > 0) & scales.isfinite()).all()):
            raise CheckpointError(
                f"{self._name}: {name} must be finite and above 0, got from "
                f"{scales.min().item():g} to {scales.max().item():g}; fetch the checkpoint again"
            )
        if scales.max() > LARGE_SCALE:
            logger.warning(
                "%s: %s reaches %g: if they are what weights were multiplied by, not what codes "
                "are, the model is wrong", self._name, name, scales.max().item(),
            )  # fmt: skip
        rows = torch.arange(0, num_rows, group)
        if self._fp8.kind == "fp8-tensor":
            return scales.view(*lead, 1, 1).expand(*lead, len(rows), 1).to(self._wide)
        first = rows // self._fp8.block[0] if self._fp8.kind == "fp8-block" else rows
        blocks = -(-num_columns // self._fp8.column_block(num_columns))
        return scales.view(*lead, -1, blocks)[..., first, :].to(self._wide)


def _starts(weight: Weight, codes: Sequence[Tensor]) -> list[int]:
    """Return the rows at which other scales or factors may begin, or rows of another place."""
    if len(weight.shape) == 3 and len(codes) == 1:
        return []
    sizes = [len(tensor) for tensor in codes]
    if len(weight.shape) == 3:
        # Whole experts have groups of their own; their parts begin inside.
        return list(accumulate(sizes[: len(sizes) // weight.shape[0]]))
    factors = [count for count, _ in weight.row_scales]
    moved = [row for run in weight.row_order for row in run]
    return [*accumulate(sizes[:-1]), *accumulate(factors[:-1]), *moved]


def _reordered(rows: Tensor, order: Sequence[tuple[int, int]]) -> Tensor:
    """Return runs of rows (first, count), one behind the other."""
    return torch.cat([rows[first : first + count] for first, count in order])
