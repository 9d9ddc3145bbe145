"""The projection of some dozens of rows by a weight in FP8, on the tensor cores.

A program owns BLOCK_N rows of the weight for all rows of the input, which come with their norm
applied. Codes and rows pass through shared memory, several steps of BLOCK_K columns ahead; codes
become 16-bit factors in registers, and a step's product takes the scale of its block. So the weight
is read once, a byte a value, where making a tensor of it moves five.

Shape letters: M rows, K columns in, N rows of the weight.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.fp8.decode import code_factors
from stree_kernels.fp8.scaled_weight import ScaledWeight
from stree_kernels.launch.pdl import launch_options, wait_for_previous

MAX_ROWS = 128
BLOCK_ROWS = (32, 64, 128)
BLOCK_K = 128
MANY_WEIGHT_ROWS = 8192
"""A weight of as many rows keeps all multiprocessors busy with programs of 64, others with 32."""


@triton.jit(do_not_specialize=["num_rows"])
def tile_kernel(
    # pointers
    values_ptr, weight_ptr, scale_ptr, out_ptr,
    # sizes
    num_rows, num_weight_rows,
    # strides
    stride_out_m,
    # meta
    INNER: tl.constexpr, ROW_GROUP: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All rows times BLOCK_N rows of the weight."""
    BLOCKED: tl.constexpr = COLUMN_BLOCK < INNER
    BLOCKS: tl.constexpr = (INNER + COLUMN_BLOCK - 1) // COLUMN_BLOCK
    DTYPE: tl.constexpr = values_ptr.dtype.element_ty
    rows_M = tl.arange(0, BLOCK_M)
    valid_M = rows_M < num_rows
    columns_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_N = columns_N < num_weight_rows
    # Past the last row the last one is read again.
    read_N = tl.minimum(columns_N, num_weight_rows - 1)
    columns_K = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + read_N.to(tl.int64)[:, None] * INNER + columns_K[None, :]
    values_ptrs = values_ptr + rows_M.to(tl.int64)[None, :] * INNER + columns_K[:, None]
    scale_ptrs = scale_ptr + read_N // ROW_GROUP * BLOCKS
    wait_for_previous(PDL)
    acc_NM = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    for first in range(0, INNER, BLOCK_K):
        if INNER % BLOCK_K == 0:
            codes_NK = tl.load(weight_ptrs + first)
            values_KM = tl.load(values_ptrs + first, mask=valid_M[None, :], other=0.0)
        else:
            valid_K = columns_K + first < INNER
            codes_NK = tl.load(weight_ptrs + first, mask=valid_K[None, :], other=0)
            valid_KM = valid_K[:, None] & valid_M[None, :]
            values_KM = tl.load(values_ptrs + first, mask=valid_KM, other=0.0)
        factors_NK = code_factors(codes_NK, DTYPE)
        if BLOCKED:
            product_NM = tl.dot(factors_NK, values_KM, input_precision="ieee")
            acc_NM += product_NM * tl.load(scale_ptrs + first // COLUMN_BLOCK)[:, None]
        else:
            acc_NM = tl.dot(factors_NK, values_KM, acc_NM, input_precision="ieee")
    if not BLOCKED:
        acc_NM *= tl.load(scale_ptrs)[:, None]
    out_ptrs = out_ptr + rows_M.to(tl.int64)[None, :] * stride_out_m + columns_N[:, None]
    valid_NM = valid_N[:, None] & valid_M[None, :]
    tl.store(out_ptrs, acc_NM.to(out_ptr.dtype.element_ty), mask=valid_NM)


def block_k(weight: ScaledWeight) -> int:
    """Return the columns of a step: within one block of columns."""
    return min(BLOCK_K, weight.column_block & -weight.column_block)


def launch_tiles(values_MK: Tensor, weight: ScaledWeight, out_MN: Tensor) -> None:
    """Write the product of at most MAX_ROWS rows, which have their columns' factor already."""
    num_rows, num_inner = values_MK.shape
    block_m = next(block for block in BLOCK_ROWS if num_rows <= block)
    block_n = 64 if len(weight) >= MANY_WEIGHT_ROWS else 32
    tile_kernel[(triton.cdiv(len(weight), block_n),)](
        values_MK, weight.bytes, weight.scales, out_MN, num_rows, len(weight), out_MN.stride(0),
        INNER=num_inner, ROW_GROUP=weight.row_group, COLUMN_BLOCK=weight.column_block,
        BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=block_k(weight) if weight.column_block < num_inner else BLOCK_K,
        num_warps=4, num_stages=4 if block_m < MAX_ROWS else 2,
        **launch_options(values_MK.device),
    )  # fmt: skip
