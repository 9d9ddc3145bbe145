"""The projection of a few rows, on the tensor cores: a weight streamed once against a few rows.

A program owns BLOCK_N rows of the weight for all rows of the input. Its warps share the columns,
WIDTH of them at a step, and add their sums at the end.
The weight is constant, so its first DEPTH steps are loaded before the previous kernel ends; nothing
but registers holds them, and many small programs keep the memory busy.

A thread loads WIDTH / 4 neighbouring columns of a row. The tensor cores take other columns from a
thread, but the columns of a product may be renamed if both factors agree: then what a thread has
loaded is what it needs, and nothing passes through shared memory (`_operand`).

Shape letters: M rows, K columns in, N rows of the weight, C columns out (N, or half of it where
gate and up are multiplied), W warps, X rows of all warps' tiles.
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

WIDTH = 32
"""Columns of a warp's step."""
BLOCK_ROWS = (8, 16)
SUMS_PER_THREAD = 8


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """How a launch is cut: rows of the weight in a program, warps across its columns.

    `depth` steps of the weight and `rows_depth` of the rows are loaded ahead. The tensor cores'
    first factor, of 16 rows at least, is the weight with `weight_first`, else the rows; the second
    takes eight.
    """

    block_n: int
    num_warps: int
    depth: int
    rows_depth: int
    weight_first: bool = False


@triton.jit
def _row_of(x_X, WARPS: tl.constexpr):
    """The row of a tile that row x of all warps' tiles is: eight rows of a warp, then the next."""
    return x_X // (8 * WARPS) * 8 + x_X % 8


@triton.jit
def _columns(x_X, WARPS: tl.constexpr, WIDTH: tl.constexpr):
    """The columns [X, WIDTH] of the first step."""
    return (x_X // 8 % WARPS * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _operand(tile_XK, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """The tile as a factor [W, ROWS, K], its columns renamed so that no thread needs another's.

    Column 8 a + 4 b + 2 c + d of a warp becomes 16 b + 8 c + 2 a + d.
    """
    parts = tl.reshape(tile_XK, [ROWS // 8, WARPS, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(parts, (1, 0, 2, 4, 5, 3, 6)), [WARPS, ROWS, tile_XK.shape[1]])


@triton.jit
def _load_weight(ptrs_XK, columns_XK, step, INNER: tl.constexpr, STEP_K: tl.constexpr):
    """The weight's tile of one step; the rows stay in the nearest cache rather than it."""
    first = step * STEP_K
    if INNER % STEP_K == 0:
        tile_XK = tl.load(ptrs_XK + first, eviction_policy="evict_first")
    else:
        valid_XK = columns_XK + first < INNER
        tile_XK = tl.load(ptrs_XK + first, mask=valid_XK, other=0.0, eviction_policy="evict_first")
    return tile_XK


@triton.jit
def _load_rows(ptrs_XK, columns_XK, valid_X, step, INNER: tl.constexpr, STEP_K: tl.constexpr):
    """The rows' tile of one step."""
    first = step * STEP_K
    valid_XK = valid_X[:, None]
    if INNER % STEP_K != 0:
        valid_XK = valid_XK & (columns_XK + first < INNER)
    return tl.load(ptrs_XK + first, mask=valid_XK, other=0.0)


@triton.jit
def _scale_groups(
    rows_XK, row_X, first_X, sums_ptr, valid_X, eps,
    INNER: tl.constexpr, GROUPS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """The rows' tile times the scale of the group that its columns, from `first_X` on, are in."""
    GROUP_COLUMNS: tl.constexpr = INNER // GROUPS
    GROUP_SUMS: tl.constexpr = SUMS // GROUPS
    ptrs = sums_ptr + row_X.to(tl.int64) * SUMS + first_X // GROUP_COLUMNS * GROUP_SUMS
    valid_X = valid_X & (first_X < INNER)
    total_X = tl.load(ptrs, mask=valid_X, other=0.0)
    for index in tl.static_range(1, GROUP_SUMS):
        total_X += tl.load(ptrs + index, mask=valid_X, other=0.0)
    scale_X = scale_factor(total_X, GROUP_COLUMNS, eps)
    return (rows_XK.to(tl.float32) * scale_X[:, None]).to(rows_XK.dtype)


@triton.jit
def _multiply(
    acc, rows_XK, weight_XK,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
):  # fmt: skip
    """Add one step to the warps' products, [W, N, M] with WEIGHT_FIRST, else [W, M, N]."""
    rows_WMK = _operand(rows_XK, BLOCK_M, WARPS)
    weight_WNK = _operand(weight_XK, BLOCK_N, WARPS)
    if WEIGHT_FIRST:
        acc = tl.dot(weight_WNK, tl.permute(rows_WMK, (0, 2, 1)), acc, input_precision="ieee")
    else:
        acc = tl.dot(rows_WMK, tl.permute(weight_WNK, (0, 2, 1)), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_rows", "conv_first"])
def linear_kernel(
    # pointers
    values_ptr, sums_ptr, weight_ptr, out_ptr, out_values_ptr, out_sums_ptr, conv,
    # sizes
    num_rows, num_columns, eps, conv_first,
    # strides
    stride_out_m,
    # meta
    INNER: tl.constexpr, GROUPS: tl.constexpr, SUMS: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, PER_SUM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    ROWS_DEPTH: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
    CONV_COLUMNS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All rows times BLOCK_N rows of the weight, and what follows."""
    STEP_K: tl.constexpr = WARPS * WIDTH
    STEPS: tl.constexpr = (INNER + STEP_K - 1) // STEP_K
    x_N = tl.arange(0, BLOCK_N * WARPS)
    rows_N = weight_rows(_row_of(x_N, WARPS), tl.program_id(0), num_columns, BLOCK_N, GATED)
    columns_N = _columns(x_N, WARPS, WIDTH)
    weight_ptrs = weight_ptr + rows_N[:, None] * INNER + columns_N
    weights: tl.tuple = ()
    for step in tl.static_range(DEPTH if DEPTH < STEPS else STEPS):
        tile = _load_weight(weight_ptrs, columns_N, step, INNER, STEP_K)
        weights = weights + (tile,)
    if EARLY:
        release_next(PDL)
    if CONV_COLUMNS > 0:
        window = begin_conv(conv, conv_first, num_rows, BLOCK_M, BLOCK_N, CONV_COLUMNS)
    wait_for_previous(PDL)
    x_M = tl.arange(0, BLOCK_M * WARPS)
    rows_M = _row_of(x_M, WARPS)
    columns_M = _columns(x_M, WARPS, WIDTH)
    rows_ptrs = values_ptr + rows_M.to(tl.int64)[:, None] * INNER + columns_M
    valid_M = rows_M < num_rows
    # The rows wait in the caches of the chip, but each load takes its time: some are under way.
    tiles: tl.tuple = ()
    for step in tl.static_range(ROWS_DEPTH if ROWS_DEPTH < STEPS else STEPS):
        tiles = tiles + (_load_rows(rows_ptrs, columns_M, valid_M, step, INNER, STEP_K),)
    scale_M = None
    if SUMS > 0 and GROUPS == 1:
        scale_M = row_scales(sums_ptr, num_rows, eps, INNER, SUMS, BLOCK_M, BLOCK_Q)
    stream_MN = None
    if out_sums_ptr is not None:
        stream_MN = load_stream(out_ptr, num_rows, num_columns, stride_out_m, BLOCK_M, BLOCK_N)
    if WEIGHT_FIRST:
        acc = tl.full([WARPS, BLOCK_N, BLOCK_M], 0.0, tl.float32)
    else:
        acc = tl.full([WARPS, BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for step in tl.static_range(STEPS):
        if step + ROWS_DEPTH < STEPS:
            ahead = step + ROWS_DEPTH
            tiles = tiles + (_load_rows(rows_ptrs, columns_M, valid_M, ahead, INNER, STEP_K),)
        tile = tiles[step]
        if GROUPS > 1:
            first_X = step * STEP_K + x_M // 8 % WARPS * WIDTH
            tile = _scale_groups(tile, rows_M, first_X, sums_ptr, valid_M, eps, INNER, GROUPS, SUMS)
        acc = _multiply(acc, tile, weights[step], BLOCK_M, BLOCK_N, WARPS, WEIGHT_FIRST)
        if step + DEPTH < STEPS:
            ahead = step + DEPTH
            tile = _load_weight(weight_ptrs, columns_N, ahead, INNER, STEP_K)
            weights = weights + (tile,)
    acc_MN = tl.sum(acc, axis=0)
    if WEIGHT_FIRST:
        acc_MN = tl.trans(acc_MN)
    finish(
        acc_MN, scale_M, stream_MN, num_rows, num_columns, stride_out_m,
        out_ptr, out_values_ptr, out_sums_ptr, BLOCK_M, BLOCK_N, GATED, ACTIVATION,
        PER_SUM,
    )  # fmt: skip
    if CONV_COLUMNS > 0:
        finish_conv(conv, window, conv_first, num_rows, BLOCK_M, BLOCK_N, CONV_COLUMNS)


def launch_linear(
    config: LinearConfig, rows: DeferredNorm, weight: Tensor, out: Tensor,
    *, activation: Activation | None = None, residual: Residual | None = None,
    conv: ConvTail | None = None, early: bool = False,
) -> object:  # fmt: skip
    """Run the kernel on at most 16 rows and return it; `out` is the stream of a residual."""
    values, sums, num_groups, eps = rows
    num_rows, num_inner = values.shape
    num_sums = 0 if sums is None else sums.shape[1]
    fewest = 8 if config.weight_first else 16
    block_m = next(block for block in BLOCK_ROWS if max(fewest, num_rows) <= block)
    block_q = max(1, SUMS_PER_THREAD * config.num_warps * 32 // block_m)
    out_values, out_sums, per_sum = residual_buffers(residual)
    conv_values, conv_first, conv_columns = conv_arguments(conv)
    assert config.block_n % per_sum == 0
    return linear_kernel[(triton.cdiv(len(weight), config.block_n),)](
        values, sums, weight, out, out_values, out_sums, conv_values,
        num_rows, out.shape[1], eps, conv_first, out.stride(0),
        INNER=num_inner, GROUPS=num_groups if num_sums else 1, SUMS=num_sums,
        GATED=activation in GATED, ACTIVATION=activation, PER_SUM=per_sum, BLOCK_M=block_m,
        BLOCK_N=config.block_n, BLOCK_Q=min(block_q, triton.next_power_of_2(max(1, num_sums))),
        WARPS=config.num_warps, WIDTH=WIDTH, DEPTH=config.depth, ROWS_DEPTH=config.rows_depth,
        WEIGHT_FIRST=config.weight_first, num_warps=config.num_warps, num_stages=1,
        CONV_COLUMNS=conv_columns, EARLY=early, **launch_options(values.device),
    )  # fmt: skip
