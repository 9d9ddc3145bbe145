"""Which tensors of a model are in FP8, how each is scaled, and what that takes; no torch here.

Shape letters: N rows, K columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Fp8Kind = Literal["fp8-block", "fp8-tensor", "fp8-channel"]
"""One scale for each block of rows and columns, for a tensor, or for a row."""

BLOCK = (128, 128)
MAX_ROW_GROUP = 128
"""The largest group of rows that shares scales once a model is loaded, as in stree_kernels.fp8."""
SCALE_BYTES = 4
FLOAT_TYPES = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class Fp8Weights:
    """The e4m3 tensors of a checkpoint: `scales` maps the name of each to that of its scales.

    `block` are rows and columns of a block, for `fp8-block`.
    """

    kind: Fp8Kind
    scales: Mapping[str, str]
    block: tuple[int, int] = BLOCK

    def holds(self, keys: Sequence[str]) -> bool:
        """True when all of these tensors are in FP8."""
        return all(key in self.scales for key in keys)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of a tensor's scales; stacks of matrices have some for each."""
        *lead, num_rows, num_columns = shape
        if self.kind == "fp8-tensor":
            return tuple(lead)
        if self.kind == "fp8-channel":
            return (*lead, num_rows, 1)
        return (*lead, -(-num_rows // self.block[0]), -(-num_columns // self.block[1]))

    def column_block(self, num_columns: int) -> int:
        """Return how many columns share a scale."""
        return self.block[1] if self.kind == "fp8-block" else num_columns

    def held_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a weight as it is held: a byte a value, and its scales."""
        *lead, num_rows, num_columns = shape
        groups = -(-num_rows // row_group(self, ()))
        blocks = -(-num_columns // self.column_block(num_columns))
        return math.prod(shape) + SCALE_BYTES * math.prod(lead) * groups * blocks


def row_group(fp8: Fp8Weights, starts: Sequence[int]) -> int:
    """Return the largest power of two of rows, up to MAX_ROW_GROUP, that always share scales.

    `starts` are rows of a weight at which other scales or factors begin: those of its parts, and
    of runs with multipliers of their own.
    """
    if fp8.kind == "fp8-channel":
        return 1
    rows = fp8.block[0] if fp8.kind == "fp8-block" else 0
    return math.gcd(MAX_ROW_GROUP, rows, *starts)
