"""What the ops of one verify pass exchange: rows of a block, a pending path, a layer's constants.

Shape letters: B batch, R rows of a block buffer, L path capacity, H heads, P head dim, N state dim,
G groups, K conv width - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class ScanRows(NamedTuple):
    """One block's inputs to the scan, which the next pass may replay.

    Views into larger buffers: any strides over B and R, the dimensions after them contiguous.
    `dt_BRH` is raw: before the bias and softplus.
    """

    x_BRHP: Tensor
    dt_BRH: Tensor
    b_BRGN: Tensor


class Pending(NamedTuple):
    """The path accepted in the previous step, which is not in the state yet.

    `path_BL` (int32) holds rows of the previous step's block, root first; the first `length_B[b]`
    (int32) entries are valid, the others are any row of the block. Length 0 leaves the state alone.
    """

    path_BL: Tensor
    length_B: Tensor


class ScanHeads(NamedTuple):
    """A layer's constants per head, fp32: A < 0, the skip weight D, the bias of dt."""

    a_H: Tensor
    d_H: Tensor
    dt_bias_H: Tensor


def conv_ancestors(parents: Sequence[int], width: int) -> list[list[int]]:
    """Return the table [R, width - 1] of where the conv of each row reads its earlier inputs.

    `parents` holds a row's parent, -1 where the path starts. Entry k of a row belongs to its
    (k + 1)-th nearest ancestor: with K = width - 1, a value v < K is column v of the conv state
    (oldest first), a value v >= K is row v - K of the block.
    """
    num_columns = width - 1
    table: list[list[int]] = []
    for parent in parents:
        if parent < 0:
            table.append(list(range(num_columns - 1, -1, -1)))
        else:
            table.append([num_columns + parent, *table[parent]][:num_columns])
    return table


def is_packed(tensor: Tensor, num_dims: int) -> bool:
    """Return whether the last `num_dims` dimensions lie in memory without gaps, last one fastest."""
    expected = 1
    sizes, strides = tensor.shape[-num_dims:], tensor.stride()[-num_dims:]
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
