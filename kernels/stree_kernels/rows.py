"""What the ops of one verify pass exchange: rows of a block, a pending path, a layer's constants.

Shape letters: B batch, R rows of a block buffer, L path capacity, H heads, P head dim, N state dim,
G groups, K conv width - 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
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


def check_scan(
    state: Tensor,
    rows: ScanRows,
    c: Tensor,
    mask: Tensor,
    heads: ScanHeads,
    out: Tensor,
    previous: ScanRows | None,
    pending: Pending | None,
) -> None:
    """Raise ValueError unless a scan's tensors have the dtypes and strides a kernel relies on."""
    if pending and not previous:
        raise ValueError("a pending path needs the rows it names, got none; pass `previous`")
    num_heads, num_groups = state.shape[1], c.shape[2]
    if num_heads % num_groups:
        raise ValueError(f"groups divide heads, got {num_groups} and {num_heads}; check the model")
    prev = previous if pending and previous else rows
    blocks = (rows.x_BRHP, rows.b_BRGN, c, out, prev.x_BRHP, prev.b_BRGN)
    vectors = (rows.dt_BRH, prev.dt_BRH, mask, *(pending or ()))
    require_dtypes("x, B, C and the output", blocks, (torch.bfloat16, torch.float32))
    require_dtypes("the state", (state,), (torch.float32, torch.bfloat16))
    require_dtypes("A, D and the bias of dt", heads, (torch.float32,))
    require_dtypes("the mask", (mask,), (torch.bool,))
    require_dtypes("the path and its length", pending or (), (torch.int32,))
    require_packed("the state", (state,), 3)
    require_packed("a row of x, B, C or the output", blocks, 2)
    require_packed("a row of dt, the mask or the path", vectors, 1)


def check_cover(num_rows: int, *sizes: int) -> None:
    """Raise ValueError unless every buffer and table has the rows up to the last one scored."""
    if min(sizes) < num_rows:
        raise ValueError(
            f"buffers and tables cover every row up to the last one scored, {num_rows}, "
            f"got {', '.join(map(str, sizes))}; pass the whole block"
        )


def require_packed(what: str, tensors: Iterable[Tensor], num_dims: int) -> None:
    """Raise ValueError unless the last `num_dims` dimensions lie in memory without gaps."""
    for tensor in tensors:
        expected = 1
        for dim in range(tensor.ndim - 1, tensor.ndim - 1 - num_dims, -1):
            if tensor.shape[dim] != 1 and tensor.stride(dim) != expected:
                raise ValueError(
                    f"{what} lies without gaps, got strides {tensor.stride()} for "
                    f"{tuple(tensor.shape)}; pass a contiguous buffer"
                )
            expected *= tensor.shape[dim]


def require_dtypes(what: str, tensors: Iterable[Tensor], allowed: Sequence[torch.dtype]) -> None:
    """Raise ValueError unless all tensors have one dtype, which is among `allowed`."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or not dtypes <= set(allowed):
        raise ValueError(
            f"{what}: one dtype of {', '.join(map(str, allowed))}, got "
            f"{', '.join(sorted(map(str, dtypes)))}; use the torch backend for others"
        )
