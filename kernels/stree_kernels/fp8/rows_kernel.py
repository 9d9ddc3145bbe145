"""The projection of a few rows by a weight in FP8, on the tensor cores.

As `linear.linear_kernel`: a program owns BLOCK_N rows of the weight for all rows of the input, its
warps share the columns, WIDTH of them at a step, and nothing passes through shared memory but the
last sums. Codes become 16-bit factors in registers (`decode`). The rows take the norm's weights, a
step's product the scale of its block.

Shape letters: M rows, K columns in, N rows of the weight, W warps, X rows of all warps' tiles.
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
from stree_kernels.linear.linear_kernel import BLOCK_ROWS, SUMS_PER_THREAD, LinearConfig

WIDTH = 64
"""Columns of a warp's step."""
VECTOR = 16
"""Columns of a row that a thread loads at a time: as many bytes of codes."""


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

    Column 16 a + 8 b + 4 c + d of a warp becomes 32 b + 16 c + 4 a + d: of factors that are loaded
    as bytes Triton gives a thread four neighbouring columns.
    """
    parts = tl.reshape(tile_XK, [ROWS // 8, WARPS, 8, 4, 2, 2, 4])
    return tl.reshape(tl.permute(parts, (1, 0, 2, 4, 5, 3, 6)), [WARPS, ROWS, tile_XK.shape[1]])


@triton.jit
def _load_weight(ptrs_XK, columns_XK, step, INNER: tl.constexpr, STEP_K: tl.constexpr):
    """The weight's tile of one step; the rows stay in the nearest cache rather than it."""
    first = step * STEP_K
    valid_XK = columns_XK + first < INNER
    return tl.load(ptrs_XK + first, mask=valid_XK, other=0, eviction_policy="evict_first")


@triton.jit
def _half_columns(x_X, WARPS: tl.constexpr, WIDTH: tl.constexpr):
    """The columns [X, WIDTH / 2] of the first step that are in the first half of a thread's 16."""
    half_K = tl.arange(0, WIDTH // 2)
    return (x_X // 8 % WARPS * WIDTH)[:, None] + (half_K // 8 * 16 + half_K % 8)[None, :]


@triton.jit
def _joined_operand(first_XK, second_XK, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Both halves of the rows' tile as a factor [W, ROWS, K], its columns renamed as `_operand`'s.

    Half b of a thread's 16 columns a has columns 8 b to 8 b + 7 of them.
    """
    both = tl.join(first_XK, second_XK)
    parts = tl.reshape(both, [ROWS // 8, WARPS, 8, 4, 2, 4, 2])
    renamed = tl.permute(parts, (1, 0, 2, 6, 4, 3, 5))
    return tl.reshape(renamed, [WARPS, ROWS, 2 * first_XK.shape[1]])


@triton.jit
def _load_rows(
    values_ptr, rows_X, columns_XK, valid_X, step, INNER: tl.constexpr, STEP_K: tl.constexpr
):
    """One half of the rows' tile of one step."""
    first = step * STEP_K
    valid_XK = valid_X[:, None] & (columns_XK + first < INNER)
    ptrs_XK = values_ptr + rows_X.to(tl.int64)[:, None] * INNER + columns_XK + first
    return tl.load(ptrs_XK, mask=valid_XK, other=0.0)


@triton.jit
def _times_factor(tile_XK, factor_ptr, columns_XK, step, INNER: tl.constexpr, STEP_K: tl.constexpr):
    """One half of a tile of the rows, in fp32 times the columns' factor if there is one."""
    first = step * STEP_K
    if factor_ptr is not None:
        valid_XK = columns_XK + first < INNER
        factor_XK = tl.load(factor_ptr + columns_XK + first, mask=valid_XK, other=0.0)
        tile_XK = tile_XK.to(tl.float32) * factor_XK.to(tl.float32)
    return tile_XK


@triton.jit
def _norm_scales(
    rows_X, first_X, sums_ptr, valid_X, eps,
    INNER: tl.constexpr, GROUPS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """The norm's scales [X] of the groups that the columns from `first_X` on are in."""
    GROUP_COLUMNS: tl.constexpr = INNER // GROUPS
    GROUP_SUMS: tl.constexpr = SUMS // GROUPS
    ptrs = sums_ptr + rows_X.to(tl.int64) * SUMS + first_X // GROUP_COLUMNS * GROUP_SUMS
    valid_X = valid_X & (first_X < INNER)
    # Columns past the last one are zeros, whatever the scale.
    total_X = tl.load(ptrs, mask=valid_X, other=1.0)
    for index in tl.static_range(1, GROUP_SUMS):
        total_X += tl.load(ptrs + index, mask=valid_X, other=0.0)
    return scale_factor(total_X, GROUP_COLUMNS, eps)


@triton.jit
def _scaled_product(
    product, scale_ptr, step, num_columns,
    INNER: tl.constexpr, ROW_GROUP: tl.constexpr, COLUMN_BLOCK: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr, ONE_GROUP: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
):  # fmt: skip
    """The warps' products of a step times the scales of the blocks that their columns are in."""
    BLOCK_C: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    BLOCKS: tl.constexpr = (INNER + COLUMN_BLOCK - 1) // COLUMN_BLOCK
    block_W = (step * WARPS + tl.arange(0, WARPS)) * WIDTH // COLUMN_BLOCK
    valid_W = block_W < BLOCKS
    begin = tl.program_id(0) * BLOCK_C
    if ONE_GROUP:
        ptrs_W = scale_ptr + begin // ROW_GROUP * BLOCKS + block_W
        scale_W1 = tl.load(ptrs_W, mask=valid_W, other=0.0)[:, None]
        if GATED:
            up_ptrs_W = scale_ptr + (num_columns + begin) // ROW_GROUP * BLOCKS + block_W
            up_W1 = tl.load(up_ptrs_W, mask=valid_W, other=0.0)[:, None]
            scale_WN = tl.where(tl.arange(0, BLOCK_N)[None, :] < BLOCK_C, scale_W1, up_W1)
        else:
            scale_WN = scale_W1
    else:
        rows_N = weight_rows(tl.arange(0, BLOCK_N), tl.program_id(0), num_columns, BLOCK_N, GATED)
        ptrs_WN = scale_ptr + (rows_N // ROW_GROUP * BLOCKS)[None, :] + block_W[:, None]
        scale_WN = tl.load(ptrs_WN, mask=valid_W[:, None], other=0.0)
    if WEIGHT_FIRST:
        product *= scale_WN[:, :, None]
    else:
        product *= scale_WN[:, None, :]
    return product


@triton.jit(do_not_specialize=["num_rows"])
def rows_kernel(
    # pointers
    values_ptr, sums_ptr, factor_ptr, weight_ptr, scale_ptr, out_ptr, out_values_ptr, out_sums_ptr,
    # sizes
    num_rows, num_columns, eps,
    # strides
    stride_out_m,
    # meta
    INNER: tl.constexpr, GROUPS: tl.constexpr, SUMS: tl.constexpr, ROW_GROUP: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    PER_SUM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
    WARPS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr, ONE_GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All rows times BLOCK_N rows of the weight, and what follows."""
    STEP_K: tl.constexpr = WARPS * WIDTH
    STEPS: tl.constexpr = (INNER + STEP_K - 1) // STEP_K
    BLOCKED: tl.constexpr = COLUMN_BLOCK < INNER
    DTYPE: tl.constexpr = values_ptr.dtype.element_ty
    x_N = tl.arange(0, BLOCK_N * WARPS)
    rows_N = weight_rows(_row_of(x_N, WARPS), tl.program_id(0), num_columns, BLOCK_N, GATED)
    columns_N = _columns(x_N, WARPS, WIDTH)
    weight_ptrs = weight_ptr + rows_N[:, None] * INNER + columns_N
    weights: tl.tuple = ()
    for early in tl.static_range(DEPTH):
        weights = weights + (_load_weight(weight_ptrs, columns_N, early, INNER, STEP_K),)
    wait_for_previous(PDL)
    x_M = tl.arange(0, BLOCK_M * WARPS)
    rows_M = _row_of(x_M, WARPS)
    first_M = _half_columns(x_M, WARPS, WIDTH)
    valid_M = rows_M < num_rows
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
    for begin in range(0, STEPS, DEPTH):
        # The rows wait in the caches of the chip, but each load takes its time: all are under way.
        tiles: tl.tuple = ()
        for ahead in tl.static_range(DEPTH):
            step = begin + ahead
            tiles = tiles + (
                _load_rows(values_ptr, rows_M, first_M, valid_M, step, INNER, STEP_K),
                _load_rows(values_ptr, rows_M, first_M + 8, valid_M, step, INNER, STEP_K),
            )
        following: tl.tuple = ()
        for ahead in tl.static_range(DEPTH):
            step = begin + ahead
            first = _times_factor(tiles[2 * ahead], factor_ptr, first_M, step, INNER, STEP_K)
            second = _times_factor(
                tiles[2 * ahead + 1], factor_ptr, first_M + 8, step, INNER, STEP_K
            )
            if GROUPS > 1:
                begin_M = step * STEP_K + x_M // 8 % WARPS * WIDTH
                scales_M = _norm_scales(
                    rows_M, begin_M, sums_ptr, valid_M, eps, INNER, GROUPS, SUMS
                )
                first = first.to(tl.float32) * scales_M[:, None]
                second = second.to(tl.float32) * scales_M[:, None]
            rows_WMK = _joined_operand(first.to(DTYPE), second.to(DTYPE), BLOCK_M, WARPS)
            weight_WNK = _operand(code_factors(weights[ahead], DTYPE), BLOCK_N, WARPS)
            if WEIGHT_FIRST:
                product = tl.dot(
                    weight_WNK, tl.permute(rows_WMK, (0, 2, 1)), input_precision="ieee"
                )
            else:
                product = tl.dot(
                    rows_WMK, tl.permute(weight_WNK, (0, 2, 1)), input_precision="ieee"
                )
            if BLOCKED:
                product = _scaled_product(
                    product, scale_ptr, step, num_columns, INNER, ROW_GROUP, COLUMN_BLOCK, GATED,
                    BLOCK_N, WARPS, WIDTH, ONE_GROUP, WEIGHT_FIRST,
                )  # fmt: skip
            acc += product
            tile = _load_weight(weight_ptrs, columns_N, step + DEPTH, INNER, STEP_K)
            following = following + (tile,)
        weights = following
    acc_MN = tl.sum(acc, axis=0)
    if WEIGHT_FIRST:
        acc_MN = tl.trans(acc_MN)
    if not BLOCKED:
        all_N = weight_rows(tl.arange(0, BLOCK_N), tl.program_id(0), num_columns, BLOCK_N, GATED)
        acc_MN *= tl.load(scale_ptr + all_N // ROW_GROUP)[None, :]
    finish(
        acc_MN, scale_M, stream_MN, num_rows, num_columns, stride_out_m,
        out_ptr, out_values_ptr, out_sums_ptr, BLOCK_M, BLOCK_N, GATED, ACTIVATION,
        PER_SUM,
    )  # fmt: skip


def in_one_group(weight: ScaledWeight, block_n: int, *, gated: bool) -> bool:
    """Tell whether a program's rows, or those of either half of it, always share their scales."""
    block_c = block_n // 2 if gated else block_n
    aligned = not gated or len(weight) // 2 % weight.row_group == 0
    return aligned and weight.row_group % block_c == 0


def launch_rows(
    config: LinearConfig, rows: DeferredNorm, weight: ScaledWeight, out: Tensor,
    *, activation: Activation | None = None, residual: Residual | None = None,
) -> object:  # fmt: skip
    """Run the kernel on at most 16 rows and return it; `out` is the stream of a residual."""
    values, sums, num_groups, eps = rows
    num_rows, num_inner = values.shape
    num_sums = 0 if sums is None else sums.shape[1]
    fewest = 8 if config.weight_first else 16
    block_m = next(block for block in BLOCK_ROWS if max(fewest, num_rows) <= block)
    block_q = max(1, SUMS_PER_THREAD * config.num_warps * 32 // block_m)
    out_values, out_sums, per_sum = residual_buffers(residual)
    assert config.block_n % per_sum == 0
    gated = activation in GATED
    one_group = in_one_group(weight, config.block_n, gated=gated)
    # Scales of single rows take the registers of steps ahead.
    depth = config.depth if one_group else max(1, config.depth // 2)
    return rows_kernel[(triton.cdiv(len(weight), config.block_n),)](
        values, sums, weight.column_factor_K, weight.bytes, weight.scales, out, out_values,
        out_sums, num_rows, out.shape[1], eps, out.stride(0),
        INNER=num_inner, GROUPS=num_groups if num_sums else 1, SUMS=num_sums,
        ROW_GROUP=weight.row_group, COLUMN_BLOCK=weight.column_block, GATED=gated,
        ACTIVATION=activation, PER_SUM=per_sum, BLOCK_M=block_m, BLOCK_N=config.block_n,
        BLOCK_Q=min(block_q, triton.next_power_of_2(max(1, num_sums))), WARPS=config.num_warps,
        WIDTH=WIDTH, DEPTH=depth,
        WEIGHT_FIRST=config.weight_first,
        ONE_GROUP=one_group, num_warps=config.num_warps, num_stages=1,
        **launch_options(values.device),
    )  # fmt: skip
