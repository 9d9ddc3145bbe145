"""A weight in FP8: e4m3 codes, and fp32 scales by groups of rows and blocks of columns.

A value is its code times its scale, rounded once where it becomes a number of the model's dtype.
A norm's weights are never multiplied into codes: they stay a factor of the rows' columns.

Shape letters: E experts, N rows, K columns, G groups of rows, C blocks of columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CODES = torch.float8_e4m3fn
MAX_ROW_GROUP = 128


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """A matrix, or one for each expert, that rows of `dtype` are multiplied by.

    Element (i, j) of `codes` ([N, K] or [E, N, K], e4m3) is multiplied by
    `scales[i // row_group, j // column_block]` ([G, C] or [E, G, C], `dtype` but fp32 at least) and
    by `column_factor_K[j]`, if there is one. A last block may be ragged: its pitch stays.
    """

    codes: Tensor
    scales: Tensor
    row_group: int
    column_block: int
    dtype: torch.dtype
    column_factor_K: Tensor | None = None

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> torch.Size:
        """The sizes of the codes."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    @property
    def bytes(self) -> Tensor:
        """The codes as bytes."""
        return self.codes.view(torch.uint8)

    def dequantised(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight as a tensor, in the model's dtype unless another is given.

        Each value is formed in fp32 at least, and rounded once.
        """
        dtype = dtype or self.dtype
        wide = torch.promote_types(dtype, self.scales.dtype)
        *_, num_rows, num_columns = self.shape
        rows = torch.arange(num_rows, device=self.device) // self.row_group
        columns = torch.arange(num_columns, device=self.device) // self.column_block
        scales = self.scales.to(wide)[..., rows, :][..., columns]
        values = self.codes.to(torch.float32).to(wide) * scales
        if self.column_factor_K is not None:
            values *= self.column_factor_K
        return values.to(dtype)

    def times_rows(self, factor: Tensor) -> ScaledWeight:
        """Return the weight with entries of its first dim multiplied, through the scales.

        `factor` has one number for each expert, or for each row; all rows of a group have one.
        """
        first = factor if self.codes.ndim == 3 else factor[:: self.row_group]
        scales = self.scales * first.view(-1, *[1] * (self.scales.ndim - 1))
        return dataclasses.replace(self, scales=scales)

    def times_columns(self, factor_K: Tensor) -> ScaledWeight:
        """Return the weight with its columns multiplied, beside the codes.

        The factor is kept in the model's dtype where that holds it exactly: fewer bytes are read.
        """
        narrow = factor_K.to(self.dtype)
        exact = torch.equal(narrow.to(factor_K.dtype), factor_K)
        return dataclasses.replace(self, column_factor_K=narrow if exact else factor_K)


Projection = Tensor | ScaledWeight
"""What rows are multiplied by."""


@dataclass(frozen=True, slots=True)
class StackedWeight:
    """Weights of the same columns on top of each other, of which some are in FP8 and some not."""

    parts: tuple[Projection, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.parts[0].device


InProjection = Projection | StackedWeight
"""What `linear` multiplies rows by; the other projections take no stack."""


def parts_of(weight: StackedWeight, out_MN: Tensor) -> Iterator[tuple[Projection, Tensor]]:
    """Yield each part of a stack and the columns of the output that its product goes to."""
    first = 0
    for part in weight.parts:
        yield part, out_MN[:, first : first + len(part)]
        first += len(part)


def with_expert(experts: Projection, one: Projection) -> Projection | None:
    """Return the weights of experts with one more behind them, None where they are not alike."""
    if isinstance(experts, Tensor) and isinstance(one, Tensor):
        return torch.cat((experts, one[None]))
    if isinstance(experts, Tensor) or isinstance(one, Tensor):
        return None
    kinds = [(weight.row_group, weight.column_block) for weight in (experts, one)]
    if kinds[0] != kinds[1] or one.column_factor_K is not None:
        return None
    codes = torch.cat((experts.bytes, one.bytes[None])).view(CODES)
    scales = torch.cat((experts.scales, one.scales[None]))
    return dataclasses.replace(experts, codes=codes, scales=scales)


def dense(weight: Projection, dtype: torch.dtype | None = None) -> Tensor:
    """Return a weight as a tensor."""
    if isinstance(weight, ScaledWeight):
        return weight.dequantised(dtype)
    return weight if dtype is None else weight.to(dtype)


def random_scaled(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, *,
    row_group: int = MAX_ROW_GROUP, column_block: int | None = None,
) -> ScaledWeight:  # fmt: skip
    """Return a weight of random codes, with scales about as large as a trained model's."""
    device = generator.device
    codes = torch.randn(shape, generator=generator, device=device).mul_(64).clamp_(-448, 448)
    block = column_block or shape[-1]
    sizes = (*shape[:-2], -(-shape[-2] // row_group), -(-shape[-1] // block))
    wide = torch.promote_types(dtype, torch.float32)
    spread = torch.rand(sizes, generator=generator, device=device, dtype=wide) + 0.5
    scales = spread * (shape[-1] ** -0.5 / 64)
    return ScaledWeight(codes.to(CODES), scales, row_group, block, dtype)
