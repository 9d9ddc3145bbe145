"""Make a tensor of a weight in FP8: for products of many rows, which are not bound by its bytes.

Shape letters: N rows, K columns.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.fp8.decode import code_values, has_native
from stree_kernels.fp8.scaled_weight import ScaledWeight
from stree_kernels.launch.pdl import launch_options, wait_for_previous

BLOCK_N = 8
BLOCK_K = 512
NUM_WARPS = 4


@triton.jit
def _dequantise_kernel(
    # pointers
    codes_ptr, scale_ptr, factor_ptr, out_ptr,
    # sizes
    num_rows, num_columns,
    # meta
    ROW_GROUP: tl.constexpr, COLUMN_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows by BLOCK_K columns."""
    rows_N = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    columns_K = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    valid_NK = (rows_N < num_rows) & (columns_K < num_columns)
    places_NK = rows_N.to(tl.int64) * num_columns + columns_K
    codes_NK = tl.load(codes_ptr + places_NK, mask=valid_NK, other=0)
    num_blocks = (num_columns + COLUMN_BLOCK - 1) // COLUMN_BLOCK
    scale_ptrs = scale_ptr + rows_N // ROW_GROUP * num_blocks + columns_K // COLUMN_BLOCK
    values_NK = code_values(codes_NK, NATIVE)
    values_NK *= tl.load(scale_ptrs, mask=valid_NK, other=0.0)
    if factor_ptr is not None:
        factor_K = tl.load(factor_ptr + columns_K, mask=columns_K < num_columns, other=0.0)
        values_NK *= factor_K.to(tl.float32)
    # The buffer may be one that the kernel before still reads.
    wait_for_previous(PDL)
    tl.store(out_ptr + places_NK, values_NK.to(out_ptr.dtype.element_ty), mask=valid_NK)


def dequantise(weight_NK: ScaledWeight) -> Tensor:
    """Return a weight as a new tensor of its model's dtype.

    The contract is that of `ScaledWeight.dequantised`: the same bits.
    """
    num_rows, num_columns = weight_NK.shape
    out_NK = torch.empty(num_rows, num_columns, dtype=weight_NK.dtype, device=weight_NK.device)
    grid = (triton.cdiv(num_rows, BLOCK_N), triton.cdiv(num_columns, BLOCK_K))
    _dequantise_kernel[grid](
        weight_NK.bytes, weight_NK.scales, weight_NK.column_factor_K, out_NK, num_rows, num_columns,
        ROW_GROUP=weight_NK.row_group, COLUMN_BLOCK=weight_NK.column_block, BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K, NATIVE=has_native(weight_NK.device), num_warps=NUM_WARPS,
        **launch_options(weight_NK.device),
    )  # fmt: skip
    return out_NK
