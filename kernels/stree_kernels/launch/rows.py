"""What the ops of one verify pass exchange: rows of a block, accepted rows, a layer's constants.

Shape letters: B batch, R rows of a buffer, T rows scored, L path capacity, H heads, X heads of x,
P head dim, N state dim, G groups of B, Q partial sums of a row, K conv width - 1, W conv width,
C conv channels, E columns of a row of the conv. X and G divide H:
neighbouring heads share x and B.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes that the kernels take for weights and activations."""

MAX_BUFFERED = 16
"""Accepted rows that wait beside the state; with more it advances, so it is seldom written."""

MASK_MULTIPLE = 64
"""Columns of a tree mask are a multiple of this, so that tiles of it load at once."""


class ScanRows(NamedTuple):
    """The scan's inputs, which a later pass may replay.

    Views into larger buffers: any strides over B and R, the dimensions after them contiguous.
    `dt_BRH` is raw: before the bias and softplus.
    """

    x_BRXP: Tensor
    dt_BRH: Tensor
    b_BRGN: Tensor


class Pending(NamedTuple):
    """Accepted tokens that are not in the state yet, all tables int32.

    `path_BL` holds rows of the previous step's block, root first; the first `length_B[b]` entries
    are valid, the others are any row of the block. `num_buffered_B` rows of earlier steps come
    before.
    """

    path_BL: Tensor
    length_B: Tensor
    num_buffered_B: Tensor


class ConvTail(NamedTuple):
    """The conv behind an in-projection; all but `first_column` are arguments of `tree_conv`.

    `inputs_BRE` begin at column `first_column` of the rows that the projection writes.
    """

    state_BCK: Tensor
    inputs_BRE: Tensor
    weight_CW: Tensor
    bias_C: Tensor
    ancestors_RK: Tensor
    first: int
    out_BRE: Tensor
    previous_BRE: Tensor | None
    pending: Pending | None
    first_column: int


class Past(NamedTuple):
    """Where a scan finds the accepted tokens that are not in the state.

    `rows` begin with MAX_BUFFERED buffered rows; entry v of the path is row `start + v`. With
    `commit` the pass moves the path behind the buffered rows, or, where they would be more than
    MAX_BUFFERED, advances the state by all of them. Without, an earlier pass of this step has done
    so. Only its own sequence's rows are touched.
    """

    rows: ScanRows
    start: int
    pending: Pending
    commit: bool


class Gate(NamedTuple):
    """Multiply a scan's output by silu(z), and sum its squares for the norm that follows.

    `square_sums_BTQ` (fp32) splits a row's columns into Q equal runs; the kernel takes runs of
    `gate_width` columns.
    """

    z_BTHP: Tensor
    square_sums_BTQ: Tensor


class ScanHeads(NamedTuple):
    """A layer's constants, fp32: A < 0, the skip weight D [H] or [H, P], the bias of dt."""

    a_H: Tensor
    d_H: Tensor
    dt_bias_H: Tensor


def next_num_buffered(pending: Pending) -> Tensor:
    """Return how many rows are kept [B] (int32) once a pass has committed `pending`."""
    total_B = pending.num_buffered_B + pending.length_B
    return total_B * (total_B <= MAX_BUFFERED)


def advance_pending(pending: Pending, path_BL: Tensor | None, length_B: Tensor) -> None:
    """Make a path pending, the same entries as before with None; its predecessor is committed.

    Entries of the table behind the path stay: they are rows of a block all the same.
    """
    pending.num_buffered_B.copy_(next_num_buffered(pending))
    if path_BL is not None:
        pending.path_BL[:, : path_BL.shape[1]].copy_(path_BL)
    pending.length_B.copy_(length_B)


def gate_width(head_dim: int, state_dim: int, dtype: torch.dtype) -> int:
    """Return the columns of one head that one program of the scan owns.

    All of them where they are no multiple: kernels take none such, plain torch does.
    """
    width = min(head_dim, 16)
    if dtype != torch.float32:
        width = min(head_dim, 64, max(16, 8192 // state_dim))
    return head_dim if head_dim % width else width


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
    state: Tensor, rows: ScanRows, c: Tensor, mask: Tensor, heads: ScanHeads, out: Tensor,
    gate: Gate | None, past: Past,
) -> None:  # fmt: skip
    """Raise ValueError unless a scan's tensors have the dtypes and strides a kernel relies on."""
    num_heads = state.shape[1]
    shared = (rows.x_BRXP.shape[2], rows.b_BRGN.shape[2], c.shape[2])
    if any(num_heads % count for count in shared):
        raise ValueError(
            f"heads of x and groups of B and C divide heads, got {shared} and {num_heads}; "
            "check the model"
        )
    z = () if gate is None else (gate.z_BTHP,)
    sums = () if gate is None else (gate.square_sums_BTQ,)
    blocks = (rows.x_BRXP, rows.b_BRGN, c, out, past.rows.x_BRXP, past.rows.b_BRGN, *z)
    vectors = (rows.dt_BRH, past.rows.dt_BRH, mask, *past.pending, *sums)
    require_dtypes("x, B, C, z and the output", blocks, FLOATS)
    require_dtypes("the state", (state,), FLOATS)
    require_dtypes("A, D, the bias of dt and sums", (*heads, *sums), (torch.float32,))
    require_dtypes("the mask", (mask,), (torch.bool,))
    require_dtypes("the path and its lengths", past.pending, (torch.int32,))
    require_mask(mask)
    require_packed("the state", (state,), 3)
    require_packed("a row of x, B, C, z or the output", blocks, 2)
    require_packed("a row of dt, sums, the mask or the path", vectors, 1)
    require_one_buffer(rows, past.rows)


def check_cover(num_rows: int, *sizes: int) -> None:
    """Raise ValueError unless every buffer and table has the rows up to the last one scored."""
    if min(sizes) < num_rows:
        raise ValueError(
            f"buffers and tables cover every row up to the last one scored, {num_rows}, "
            f"got {', '.join(map(str, sizes))}; pass the whole block"
        )


def require_mask(mask: Tensor) -> None:
    """Raise ValueError unless a tree mask is padded as the kernels read it."""
    if mask.shape[1] % MASK_MULTIPLE or mask.stride(0) % MASK_MULTIPLE:
        raise ValueError(
            f"a mask has columns in multiples of {MASK_MULTIPLE}, False behind its rows, got "
            f"{tuple(mask.shape)} with strides {mask.stride()}; pad it"
        )


def require_one_buffer(rows: Iterable[Tensor], past_rows: Iterable[Tensor]) -> None:
    """Raise ValueError unless rows and past rows are views of one buffer, by their strides."""
    for new, old in zip(rows, past_rows, strict=True):
        # A dimension of size 1 may have any stride.
        if any(new.stride(d) != old.stride(d) for d in (0, 1) if new.shape[d] > 1):
            raise ValueError(
                "rows and past rows lie in one buffer, got strides "
                f"{new.stride()} and {old.stride()}; pass views of it"
            )


def require_row_offsets(past_rows: Iterable[Tensor]) -> None:
    """Raise ValueError unless 32 bits hold the offset of every row within its sequence."""
    row_strides = [tensor.stride(1) for tensor in past_rows]
    sizes = [tensor.shape[1] * tensor.stride(1) for tensor in past_rows]
    if max(sizes) >= 1 << 31:
        raise ValueError(
            f"rows of one sequence lie within 2^31 values, got row strides {row_strides}; "
            "take fewer slots"
        )


def strides(tensors: Iterable[Tensor | None], dim: int) -> list[int]:
    """Return the strides of a dimension, 0 for a missing tensor and for one of size 1 there.

    Torch gives a dimension of size 1 any stride; a kernel compiled for it would load unaligned.
    """
    return [0 if t is None or t.shape[dim] == 1 else t.stride(dim) for t in tensors]


def require_packed(what: str, tensors: Iterable[Tensor], num_dims: int) -> None:
    """Raise ValueError unless the last `num_dims` dimensions lie in memory without gaps."""
    for tensor in tensors:
        shape, steps = tensor.shape, tensor.stride()
        expected = 1
        for size, step in zip(shape[: -num_dims - 1 : -1], steps[::-1], strict=False):
            if size != 1 and step != expected:
                raise ValueError(
                    f"{what} lies without gaps, got strides {steps} for {tuple(shape)}; "
                    "pass a contiguous buffer"
                )
            expected *= size


def require_dtypes(what: str, tensors: Iterable[Tensor], allowed: Sequence[torch.dtype]) -> None:
    """Raise ValueError unless all tensors have one dtype, which is among `allowed`."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or not dtypes <= set(allowed):
        raise ValueError(
            f"{what}: one dtype of {', '.join(map(str, allowed))}, got "
            f"{', '.join(sorted(map(str, dtypes)))}; use the torch backend for others"
        )
