"""What the projection kernels share: the norm's scale, and what follows the product.

Shape letters: M rows, N rows of a weight in a program, C columns out (N, or half of it where gate
and up are multiplied), Q partial sums of a row.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.linear.deferred_norm import Residual

SQRT_HALF = tl.constexpr(math.sqrt(0.5))


@triton.jit
def weight_rows(tile_N, block, num_columns, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """The rows of the weight in a block of BLOCK_N: with GATED half gate, half up.

    Past the last row the last one is read again, so that these loads need no mask.
    """
    BLOCK_C: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    rows_N = tl.minimum(block * BLOCK_C + tile_N % BLOCK_C, num_columns - 1)
    if GATED:
        rows_N += tile_N // BLOCK_C * num_columns
    return rows_N.to(tl.int64)


@triton.jit
def scale_factor(square_sums, columns, eps):
    """The number that the norm multiplies by."""
    return 1.0 / tl.sqrt(square_sums / columns + eps)


@triton.jit
def row_scales(
    sums_ptr, num_rows, eps,
    INNER: tl.constexpr, SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """The scale of each row, from its SUMS sums of squares."""
    rows_M = tl.arange(0, BLOCK_M)
    valid_M = (rows_M < num_rows)[:, None]
    ptrs_M = sums_ptr + rows_M.to(tl.int64)[:, None] * SUMS
    total_MQ = tl.full([BLOCK_M, BLOCK_Q], 0.0, tl.float32)
    for first in tl.static_range(0, SUMS, BLOCK_Q):
        sums_Q = (first + tl.arange(0, BLOCK_Q))[None, :]
        total_MQ += tl.load(ptrs_M + sums_Q, mask=valid_M & (sums_Q < SUMS), other=0.0)
    return scale_factor(tl.sum(total_MQ, axis=1), INNER, eps)


@triton.jit
def gate(gate_MC, up_MC, ACTIVATION: tl.constexpr):
    """silu(gate) * up, or gelu(gate) * up."""
    if ACTIVATION == "swiglu":
        factor_MC = gate_MC / (1.0 + tl.exp(-gate_MC))
    else:
        factor_MC = 0.5 * gate_MC * (1.0 + tl.erf(gate_MC * SQRT_HALF))
    return factor_MC * up_MC


@triton.jit
def square_relu(up):
    """relu(up) ** 2. A NaN, which compares false, stays."""
    positive = tl.where(up < 0.0, 0.0, up)
    return positive * positive


@triton.jit
def activate_tile(
    acc_MN, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The activation [M, C] of a product with the rows that `weight_rows` gives; may be None."""
    if GATED:
        halves = tl.permute(tl.reshape(acc_MN, [BLOCK_M, 2, BLOCK_N // 2]), (0, 2, 1))
        gate_MC, up_MC = tl.split(halves)
        acc_MN = gate(gate_MC, up_MC, ACTIVATION)
    elif ACTIVATION is not None:
        acc_MN = square_relu(acc_MN)
    return acc_MN


@triton.jit
def _tile(num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The rows and columns that a program writes, and which of them exist."""
    rows_M = tl.arange(0, BLOCK_M).to(tl.int64)[:, None]
    columns_C = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    return rows_M, columns_C, (rows_M < num_rows) & (columns_C < num_columns)


@triton.jit
def load_stream(
    out_ptr, num_rows, num_columns, stride_out_m, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The part of the residual stream that a program adds to."""
    rows_M, columns_C, valid_MC = _tile(num_rows, num_columns, BLOCK_M, BLOCK_C)
    ptrs = out_ptr + rows_M * stride_out_m + columns_C
    return tl.load(ptrs, mask=valid_MC, other=0.0).to(tl.float32)


@triton.jit
def finish(
    acc_MN, scale_M, stream_MN, num_rows, num_columns, stride_out_m,
    out_ptr, values_ptr, square_sums_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    PER_SUM: tl.constexpr,
):  # fmt: skip
    """Scale the product, then store it, its activation, or its sum with the residual stream."""
    BLOCK_C: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    if scale_M is not None:
        acc_MN *= scale_M[:, None]
    acc_MN = activate_tile(acc_MN, BLOCK_M, BLOCK_N, GATED, ACTIVATION)
    if stream_MN is not None:
        acc_MN += stream_MN
    rows_M, columns_C, valid_MC = _tile(num_rows, num_columns, BLOCK_M, BLOCK_C)
    out_MC = acc_MN.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows_M * stride_out_m + columns_C, out_MC, mask=valid_MC)
    if square_sums_ptr is not None:
        exact_MC = out_MC.to(tl.float32)
        if values_ptr is not None:
            values_ptrs = values_ptr + rows_M * num_columns + columns_C
            tl.store(values_ptrs, exact_MC.to(values_ptr.dtype.element_ty), mask=valid_MC)
        BLOCK_Q: tl.constexpr = BLOCK_C // PER_SUM
        squares = tl.reshape(exact_MC * exact_MC, [BLOCK_M, BLOCK_Q, PER_SUM])
        num_sums = num_columns // PER_SUM
        sums_Q = (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q))[None, :]
        valid_MQ = (rows_M < num_rows) & (sums_Q < num_sums)
        sums_ptrs = square_sums_ptr + rows_M * num_sums + sums_Q
        tl.store(sums_ptrs, tl.sum(squares, axis=2), mask=valid_MQ)


def residual_buffers(residual: Residual | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Return what `finish` writes besides the stream, and the columns of a sum of squares."""
    if residual is None:
        return None, None, 1
    stream, values, sums = residual
    return None if values.dtype == stream.dtype else values, sums, stream.shape[1] // sums.shape[1]
