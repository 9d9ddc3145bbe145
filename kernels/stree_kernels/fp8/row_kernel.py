"""The projection of one row by a weight in FP8, on the CUDA cores.

As `linear.gemv_kernel`: a program owns BLOCK_N rows of the weight, whose first DEPTH steps are
loaded before the previous kernel ends. Codes become fp32 numbers in registers. A thread's columns
lie in one block of columns, so each of its sums takes one scale; where a block is a whole row, the
scales wait for the end. A thread's 16 codes meet 32 bytes of the row: the row comes in two halves,
of one load each, so that what a thread has loaded is what it needs.

Shape letters: N rows of the weight, R rows of one warp, W warps across the rows, K columns in,
T threads across the columns.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.fp8.decode import code_values, has_native
from stree_kernels.fp8.scaled_weight import ScaledWeight
from stree_kernels.launch.pdl import launch_options, wait_for_previous
from stree_kernels.launch.settings import GATED, Activation
from stree_kernels.linear.deferred_norm import DeferredNorm, Residual
from stree_kernels.linear.device_functions import (
    finish,
    load_stream,
    residual_buffers,
    row_scales,
    scale_factor,
    weight_rows,
)
from stree_kernels.linear.gemv_kernel import GemvConfig

VECTOR = 16
"""Columns that a thread loads at a time: as many bytes of codes."""


@triton.jit
def load_step(ptrs, columns_K, step, INNER: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K columns of several rows; 0 past the last one."""
    if INNER % BLOCK_K == 0:
        tile = tl.load(ptrs + step * BLOCK_K)
    else:
        valid_K = (columns_K + step * BLOCK_K < INNER)[None, :]
        tile = tl.load(ptrs + step * BLOCK_K, mask=valid_K, other=0)
    return tile


@triton.jit
def half_columns(BLOCK_K: tl.constexpr, VECTOR: tl.constexpr):
    """The columns [K / 2] of a step that are in the first half of a thread's VECTOR."""
    half_K = tl.arange(0, BLOCK_K // 2)
    return half_K // (VECTOR // 2) * VECTOR + half_K % (VECTOR // 2)


@triton.jit
def load_half(
    ptr, factor_ptr, half_K, step, INNER: tl.constexpr, BLOCK_K: tl.constexpr,
    WARPS_N: tl.constexpr,
):  # fmt: skip
    """One half [W, K / 2] of a step of the row, for every warp, times the columns' factor."""
    places_WK = step * BLOCK_K + half_K[None, :] + tl.full([WARPS_N, 1], 0, tl.int32)
    if INNER % BLOCK_K == 0:
        row_WK = tl.load(ptr + places_WK).to(tl.float32)
    else:
        row_WK = tl.load(ptr + places_WK, mask=places_WK < INNER, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        if INNER % BLOCK_K == 0:
            factor_WK = tl.load(factor_ptr + places_WK)
        else:
            factor_WK = tl.load(factor_ptr + places_WK, mask=places_WK < INNER, other=0.0)
        row_WK *= factor_WK.to(tl.float32)
    return row_WK


@triton.jit
def multiply_halves(
    codes_NK, first_WK, second_WK, BLOCK_R: tl.constexpr, WARPS_N: tl.constexpr,
    THREADS: tl.constexpr, VECTOR: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The sums [R, W, T] of a step's codes times both halves of its row."""
    HALF: tl.constexpr = VECTOR // 2
    codes = tl.reshape(codes_NK, [BLOCK_R, WARPS_N, THREADS, 2, HALF])
    first, second = tl.split(tl.permute(codes, (0, 1, 2, 4, 3)))
    first_row = tl.reshape(first_WK, [1, WARPS_N, THREADS, HALF])
    second_row = tl.reshape(second_WK, [1, WARPS_N, THREADS, HALF])
    products = code_values(first, NATIVE) * first_row + code_values(second, NATIVE) * second_row
    return tl.sum(products, axis=3)


@triton.jit
def _norm_scales(
    sums_ptr, eps, step, INNER: tl.constexpr, GROUPS: tl.constexpr, SUMS: tl.constexpr,
    VECTOR: tl.constexpr, THREADS: tl.constexpr, WARPS_N: tl.constexpr,
):  # fmt: skip
    """The norm's scales [W, T] of the groups that the threads' columns are in."""
    GROUP_COLUMNS: tl.constexpr = INNER // GROUPS
    GROUP_SUMS: tl.constexpr = SUMS // GROUPS
    group_T = (step * THREADS + tl.arange(0, THREADS)) * VECTOR // GROUP_COLUMNS
    # A copy for each warp across the rows, as every thread needs its own.
    group_WT = group_T[None, :] + tl.full([WARPS_N, 1], 0, tl.int32)
    total_WT = tl.full([WARPS_N, THREADS], 0.0, tl.float32)
    for index in tl.static_range(GROUP_SUMS):
        ptrs = sums_ptr + group_WT * GROUP_SUMS + index
        total_WT += tl.load(ptrs, mask=group_WT < GROUPS, other=0.0)
    return scale_factor(total_WT, GROUP_COLUMNS, eps)


@triton.jit
def _block_scales(
    scale_ptr, group, step, INNER: tl.constexpr, COLUMN_BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    THREADS: tl.constexpr, WARPS_N: tl.constexpr,
):  # fmt: skip
    """The scales [W, T] of the blocks that the threads' columns are in, for one group of rows."""
    BLOCKS: tl.constexpr = (INNER + COLUMN_BLOCK - 1) // COLUMN_BLOCK
    block_T = (step * THREADS + tl.arange(0, THREADS)) * VECTOR // COLUMN_BLOCK
    block_WT = block_T[None, :] + tl.full([WARPS_N, 1], 0, tl.int32)
    ptrs = scale_ptr + group * BLOCKS + block_WT
    return tl.load(ptrs, mask=block_WT < BLOCKS, other=0.0)


@triton.jit
def row_kernel(
    # pointers
    values_ptr, sums_ptr, factor_ptr, weight_ptr, scale_ptr, out_ptr, out_values_ptr, out_sums_ptr,
    # sizes
    num_columns, eps,
    # meta
    INNER: tl.constexpr, GROUPS: tl.constexpr, SUMS: tl.constexpr, ROW_GROUP: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    PER_SUM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, VECTOR: tl.constexpr,
    WARPS_N: tl.constexpr, WARPS_K: tl.constexpr, DEPTH: tl.constexpr, NATIVE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row times BLOCK_N rows of the weight, and what follows the product.

    With blocks of columns, all rows of a program, or of either half of it, are in one group.
    """
    THREADS: tl.constexpr = WARPS_K * 32
    BLOCK_K: tl.constexpr = THREADS * VECTOR
    STEPS: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K
    BLOCK_R: tl.constexpr = BLOCK_N // WARPS_N
    BLOCK_C: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    BLOCKED: tl.constexpr = COLUMN_BLOCK < INNER
    columns_K = tl.arange(0, BLOCK_K)
    rows_N = weight_rows(tl.arange(0, BLOCK_N), tl.program_id(0), num_columns, BLOCK_N, GATED)
    weight_ptrs = weight_ptr + rows_N[:, None] * INNER + columns_K[None, :]
    weights: tl.tuple = ()
    for step in tl.static_range(DEPTH if DEPTH < STEPS else STEPS):
        weights = weights + (load_step(weight_ptrs, columns_K, step, INNER, BLOCK_K),)
    wait_for_previous(PDL)
    half_K = half_columns(BLOCK_K, VECTOR)
    scale_M = None
    if SUMS > 0 and GROUPS == 1:
        scale_M = row_scales(sums_ptr, 1, eps, INNER, SUMS, 1, BLOCK_Q)
    stream_MN = None
    if out_sums_ptr is not None:
        stream_MN = load_stream(out_ptr, 1, num_columns, 0, 1, BLOCK_N)
    first_group = tl.program_id(0) * BLOCK_C // ROW_GROUP
    # Row n of a program is row n // W of warp n % W.
    tile_RW = tl.arange(0, BLOCK_R)[:, None] * WARPS_N + tl.arange(0, WARPS_N)[None, :]
    acc_RWT = tl.full([BLOCK_R, WARPS_N, THREADS], 0.0, tl.float32)
    for step in tl.static_range(STEPS):
        first = load_half(values_ptr, factor_ptr, half_K, step, INNER, BLOCK_K, WARPS_N)
        second = load_half(
            values_ptr, factor_ptr, half_K + VECTOR // 2, step, INNER, BLOCK_K, WARPS_N
        )
        part_RWT = multiply_halves(
            weights[step], first, second, BLOCK_R, WARPS_N, THREADS, VECTOR, NATIVE
        )
        if GROUPS > 1:
            norm_WT = _norm_scales(
                sums_ptr, eps, step, INNER, GROUPS, SUMS, VECTOR, THREADS, WARPS_N
            )
            part_RWT *= norm_WT[None, :, :]
        if BLOCKED:
            scale_WT = _block_scales(
                scale_ptr, first_group, step, INNER, COLUMN_BLOCK, VECTOR, THREADS, WARPS_N
            )
            if GATED:
                second_group = (num_columns + tl.program_id(0) * BLOCK_C) // ROW_GROUP
                up_WT = _block_scales(
                    scale_ptr, second_group, step, INNER, COLUMN_BLOCK, VECTOR, THREADS, WARPS_N
                )
                is_gate = (tile_RW < BLOCK_C)[:, :, None]
                part_RWT *= tl.where(is_gate, scale_WT[None, :, :], up_WT[None, :, :])
            else:
                part_RWT *= scale_WT[None, :, :]
        acc_RWT += part_RWT
        if step + DEPTH < STEPS:
            weights = weights + (load_step(weight_ptrs, columns_K, step + DEPTH, INNER, BLOCK_K),)
    acc_N = tl.reshape(tl.sum(acc_RWT, axis=2), [BLOCK_N])
    if not BLOCKED:
        acc_N *= tl.load(scale_ptr + rows_N // ROW_GROUP)
    finish(
        tl.reshape(acc_N, [1, BLOCK_N]), scale_M, stream_MN, 1, num_columns, 0, out_ptr,
        out_values_ptr, out_sums_ptr, 1, BLOCK_N, GATED, ACTIVATION, PER_SUM,
    )  # fmt: skip


def takes_row(config: GemvConfig, weight: ScaledWeight, *, gated: bool) -> bool:
    """Tell whether the kernel takes a weight: with blocks of columns, no scales row by row.

    With those, triton 3.6 gives the sums of squares a layout that it then adds up wrongly.
    """
    blocked = weight.column_block < weight.shape[1]
    return not blocked or in_one_group(weight, config.block_n, gated=gated)


def in_one_group(weight: ScaledWeight, block_n: int, *, gated: bool) -> bool:
    """Tell whether a program's rows, or those of either half of it, always share their scales."""
    block_c = block_n // 2 if gated else block_n
    aligned = not gated or len(weight) // 2 % weight.row_group == 0
    return aligned and weight.row_group % block_c == 0


def launch_row(
    config: GemvConfig, rows: DeferredNorm, weight: ScaledWeight, out: Tensor,
    *, activation: Activation | None = None, residual: Residual | None = None,
    native: bool | None = None,
) -> object:  # fmt: skip
    """Run the kernel on one row and return it; `out` is the stream of a residual."""
    values, sums, num_groups, eps = rows
    num_sums = 0 if sums is None else sums.shape[1]
    out_values, out_sums, per_sum = residual_buffers(residual)
    assert len(values) == 1
    assert takes_row(config, weight, gated=activation in GATED)
    assert config.block_n % per_sum == 0
    return row_kernel[(triton.cdiv(len(weight), config.block_n),)](
        values, sums, weight.column_factor_K, weight.bytes, weight.scales, out, out_values,
        out_sums, out.shape[1], eps,
        INNER=values.shape[1], GROUPS=num_groups if num_sums else 1, SUMS=num_sums,
        ROW_GROUP=weight.row_group, COLUMN_BLOCK=weight.column_block,
        GATED=activation in GATED, ACTIVATION=activation, PER_SUM=per_sum, BLOCK_N=config.block_n,
        BLOCK_Q=triton.next_power_of_2(max(1, num_sums)), VECTOR=VECTOR, WARPS_N=config.warps_n,
        WARPS_K=config.warps_k, DEPTH=config.depth,
        NATIVE=has_native(values.device) if native is None else native,
        num_warps=config.warps_n * config.warps_k, num_stages=1, **launch_options(values.device),
    )  # fmt: skip
