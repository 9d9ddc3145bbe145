"""Add the partial sums of a streamed projection to a residual stream, in one Triton kernel.

What `stream_kernel` leaves in shares is added in the order of ranks, so sums are always the same.
The sums of squares of the rows that the next projection reads come in runs of BLOCK columns too:
that is all a later kernel has to read of them.

Shape letters: R ranks, M rows, D hidden, Q partial sums of a row.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.launch.pdl import launch_options, wait_for_previous
from stree_kernels.launch.shared_memory import match_neighbours
from stree_kernels.linear.deferred_norm import COLUMNS_PER_SUM, DeferredNorm, Residual
from stree_kernels.linear.residual import row_scale, write_stream
from stree_kernels.linear.stream_plan import StreamPlan

BLOCK = 256
"""Columns of one row that a program holds."""


@triton.jit(do_not_specialize=["num_rows"])
def _add_shares_kernel(
    # pointers
    shares_ptr, norm_sums_ptr, stream_ptr, values_ptr, sums_ptr, run_sums_ptr,
    # sizes
    num_rows, num_columns, norm_columns, num_norm_sums, eps,
    # meta
    RANKS: tl.constexpr, TILE_ROWS: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, PER_SUM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid_D = columns_D < num_columns
    first_D = columns_D // TILE_ROWS * STEPS
    total = (num_columns + TILE_ROWS - 1) // TILE_ROWS * STEPS
    num_ranks_D = (
        ((first_D + STEPS) * PARTS - 1) // total - ((first_D + 1) * PARTS - 1) // total + 1
    )
    # Stream and norm are older than the projection, whose wait is over.
    offsets_D = row * num_columns + columns_D
    stream_D = tl.load(stream_ptr + offsets_D, mask=valid_D, other=0.0).to(tl.float32)
    scale = 1.0
    if norm_sums_ptr is not None:
        norm_ptr = norm_sums_ptr + row * num_norm_sums
        scale = row_scale(norm_ptr, num_norm_sums, norm_columns, eps, BLOCK_Q)
    wait_for_previous(PDL)
    product_D = tl.full([BLOCK_D], 0.0, tl.float32)
    for rank in tl.static_range(RANKS):
        share_ptrs = shares_ptr + rank * num_rows.to(tl.int64) * num_columns + offsets_D
        product_D += tl.load(share_ptrs, mask=valid_D & (rank < num_ranks_D), other=0.0)
    exact_D = write_stream(
        stream_D + product_D * scale, row, columns_D, valid_D, num_columns,
        stream_ptr, values_ptr, sums_ptr, BLOCK_D, PER_SUM,
    )  # fmt: skip
    if run_sums_ptr is not None:
        ptr = run_sums_ptr + row * tl.num_programs(1) + tl.program_id(1)
        tl.store(ptr, tl.sum(exact_D * exact_D, axis=0))


def add_shares(
    shares_RMD: Tensor, plan: StreamPlan, residual: Residual, norm_of: DeferredNorm, eps: float
) -> DeferredNorm:
    """Add a product's shares to the stream, times the norm of the rows that it is of.

    `shares_RMD` is what `stream_kernel` wrote for `plan`, `norm_of` has one norm group. Returns the
    stream's rows for the next projection, whose norm has `eps`. Checks nothing: `linear_add` has.
    """
    stream, values, sums = residual
    num_rows, num_columns = stream.shape
    norm_sums = norm_of.square_sums_MQ
    num_norm_sums = 1 if norm_sums is None else norm_sums.shape[1]
    grid = (num_rows, triton.cdiv(num_columns, BLOCK))
    whole = num_columns % BLOCK == 0
    run_sums = torch.empty(grid, dtype=torch.float32, device=stream.device) if whole else None
    kernel = _add_shares_kernel[grid](
        shares_RMD, norm_sums, stream, None if values.dtype == stream.dtype else values, sums,
        run_sums, num_rows, num_columns, norm_of.values_MK.shape[1], num_norm_sums, norm_of.eps,
        RANKS=len(shares_RMD), TILE_ROWS=plan.group * plan.num_boxes, STEPS=plan.steps,
        PARTS=plan.num_programs, BLOCK_D=BLOCK, BLOCK_Q=triton.next_power_of_2(num_norm_sums),
        PER_SUM=COLUMNS_PER_SUM, num_warps=1, **launch_options(stream.device),
    )  # fmt: skip
    match_neighbours(kernel, stream.device, num_rows, num_columns)
    return DeferredNorm(values, sums if run_sums is None else run_sums, 1, eps)
