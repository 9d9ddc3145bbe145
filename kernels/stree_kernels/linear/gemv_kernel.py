"""The projection of one row, on the CUDA cores.

A program owns BLOCK_N rows of the weight. Its warps share their columns (WARPS_K) and its rows
(WARPS_N). Nothing is kept in shared memory but the last sums, and many small programs keep the
memory busy. The weight is constant, so its first DEPTH steps are loaded before the previous kernel
ends; for most layers that is all of it.

Shape letters: N rows of the weight, R rows of one warp, W warps across the rows, K columns in,
T threads across the columns.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.launch.conv_tail import begin_conv, conv_arguments, finish_conv
from stree_kernels.launch.pdl import launch_options, release_next, wait_for_previous
from stree_kernels.launch.rows import ConvTail
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


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """How a launch is cut: rows of the weight, warps across them and their columns, steps ahead."""

    block_n: int
    warps_n: int
    warps_k: int
    depth: int


LOAD_BYTES = 16
"""What a thread loads at a time."""


@triton.jit
def _load_step(ptrs, columns_K, step, INNER: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K columns of a row, or of several."""
    if (step + 1) * BLOCK_K <= INNER:
        return tl.load(ptrs + step * BLOCK_K)
    valid_K = (columns_K + step * BLOCK_K < INNER)[None, :]
    return tl.load(ptrs + step * BLOCK_K, mask=valid_K, other=0.0)


@triton.jit
def _group_scales(
    sums_ptr, eps, step, INNER: tl.constexpr, GROUPS: tl.constexpr, SUMS: tl.constexpr,
    VECTOR: tl.constexpr, THREADS: tl.constexpr, WARPS_N: tl.constexpr,
):  # fmt: skip
    """The scales [W, T] of the groups that the threads' columns are in."""
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


@triton.jit(do_not_specialize=["conv_first"])
def gemv_kernel(
    # pointers
    values_ptr, sums_ptr, weight_ptr, out_ptr, out_values_ptr, out_sums_ptr, conv,
    # sizes
    num_columns, eps, conv_first,
    # meta
    INNER: tl.constexpr, GROUPS: tl.constexpr, SUMS: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, PER_SUM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
    VECTOR: tl.constexpr, WARPS_N: tl.constexpr, WARPS_K: tl.constexpr, DEPTH: tl.constexpr,
    CONV_COLUMNS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row times BLOCK_N rows of the weight, and what follows the product."""
    THREADS: tl.constexpr = WARPS_K * 32
    BLOCK_K: tl.constexpr = THREADS * VECTOR
    STEPS: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K
    BLOCK_R: tl.constexpr = BLOCK_N // WARPS_N
    columns_K = tl.arange(0, BLOCK_K)
    rows_N = weight_rows(tl.arange(0, BLOCK_N), tl.program_id(0), num_columns, BLOCK_N, GATED)
    weight_ptrs = weight_ptr + rows_N[:, None] * INNER + columns_K[None, :]
    weights: tl.tuple = ()
    for step in tl.static_range(DEPTH if DEPTH < STEPS else STEPS):
        weights = weights + (_load_step(weight_ptrs, columns_K, step, INNER, BLOCK_K),)
    if EARLY:
        release_next(PDL)
    if CONV_COLUMNS > 0:
        window = begin_conv(conv, conv_first, 1, 1, BLOCK_N, CONV_COLUMNS)
    wait_for_previous(PDL)
    # Every warp across the rows loads the row for itself: then no thread needs another's.
    row_ptrs = values_ptr + columns_K[None, :] + tl.full([WARPS_N, 1], 0, tl.int32)
    tiles: tl.tuple = ()
    for step in tl.static_range(DEPTH if DEPTH < STEPS else STEPS):
        tiles = tiles + (_load_step(row_ptrs, columns_K, step, INNER, BLOCK_K),)
    scale_M = None
    if SUMS > 0 and GROUPS == 1:
        scale_M = row_scales(sums_ptr, 1, eps, INNER, SUMS, 1, BLOCK_Q)
    stream_MN = None
    if out_sums_ptr is not None:
        stream_MN = load_stream(out_ptr, 1, num_columns, 0, 1, BLOCK_N)
    acc_RWT = tl.full([BLOCK_R, WARPS_N, THREADS], 0.0, tl.float32)
    for step in tl.static_range(STEPS):
        weight = tl.reshape(weights[step], [BLOCK_R, WARPS_N, THREADS, VECTOR]).to(tl.float32)
        row = tl.reshape(tiles[step], [1, WARPS_N, THREADS, VECTOR]).to(tl.float32)
        part_RWT = tl.sum(weight * row, axis=3)
        if GROUPS > 1:
            scales_WT = _group_scales(
                sums_ptr, eps, step, INNER, GROUPS, SUMS, VECTOR, THREADS, WARPS_N
            )
            part_RWT *= scales_WT[None, :, :]
        acc_RWT += part_RWT
        if step + DEPTH < STEPS:
            weights = weights + (_load_step(weight_ptrs, columns_K, step + DEPTH, INNER, BLOCK_K),)
            tiles = tiles + (_load_step(row_ptrs, columns_K, step + DEPTH, INNER, BLOCK_K),)
    acc_MN = tl.reshape(tl.sum(acc_RWT, axis=2), [1, BLOCK_N])
    finish(
        acc_MN, scale_M, stream_MN, 1, num_columns, 0, out_ptr, out_values_ptr, out_sums_ptr,
        1, BLOCK_N, GATED, ACTIVATION, PER_SUM,
    )  # fmt: skip
    if CONV_COLUMNS > 0:
        finish_conv(conv, window, conv_first, 1, 1, BLOCK_N, CONV_COLUMNS)


def launch_gemv(
    config: GemvConfig, rows: DeferredNorm, weight: Tensor, out: Tensor,
    *, activation: Activation | None = None, residual: Residual | None = None,
    conv: ConvTail | None = None, early: bool = False,
) -> object:  # fmt: skip
    """Run the kernel on one row and return it; `out` is the stream of a residual."""
    values, sums, num_groups, eps = rows
    num_sums = 0 if sums is None else sums.shape[1]
    out_values, out_sums, per_sum = residual_buffers(residual)
    conv_values, conv_first, conv_columns = conv_arguments(conv)
    assert len(values) == 1
    assert config.block_n % per_sum == 0
    return gemv_kernel[(triton.cdiv(len(weight), config.block_n),)](
        values, sums, weight, out, out_values, out_sums, conv_values, out.shape[1], eps, conv_first,
        INNER=values.shape[1], GROUPS=num_groups if num_sums else 1, SUMS=num_sums,
        GATED=activation in GATED, ACTIVATION=activation, PER_SUM=per_sum, BLOCK_N=config.block_n,
        BLOCK_Q=triton.next_power_of_2(max(1, num_sums)),
        VECTOR=LOAD_BYTES // weight.element_size(), WARPS_N=config.warps_n,
        WARPS_K=config.warps_k, DEPTH=config.depth,
        num_warps=config.warps_n * config.warps_k, num_stages=1,
        CONV_COLUMNS=conv_columns, EARLY=early, **launch_options(values.device),
    )  # fmt: skip
