"""The projection of up to 128 rows on compute capability 9.0: weights streamed by bulk copies.

One program runs on each multiprocessor. Bulk copies bring the weight to a ring of STAGES tiles in
shared memory; the first ones start before the wait for the previous kernels, since a weight is
constant. The weight is the first operand of the tensor cores, 64 rows at a time, and the rows of
the input are the second, so few rows are not padded to 64.

There are two ways to share a weight among programs (`stream_plan`). *Whole rows*: a program owns a
run of groups of 16 weight rows and all their columns, and does what follows the product. *Shares*:
the sequence of (64 weight rows, K step) is cut into equal runs, so that a weight of few rows keeps
every program busy; a program leaves its partial sums in a workspace [rank, M, N], and the kernel
that adds the residual adds them in the order of ranks. No program waits for another one.

Shape letters: M rows of the input, N rows of a tile of the weight, K columns, Q partial sums.
"""

# The Gluon DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from stree_kernels.launch.pdl import launch_options
from stree_kernels.launch.settings import GATED, Activation
from stree_kernels.linear.deferred_norm import DeferredNorm
from stree_kernels.linear.device_functions import gate, scale_factor, square_relu
from stree_kernels.linear.stream_plan import BOX_K, TILE_N, StreamPlan

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""The barrier of a program's threads; Triton 3.7 has renamed it."""

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_BOX_K, _TILE_N = gl.constexpr(BOX_K), gl.constexpr(TILE_N)
SUMS_AT_ONCE, LEAST_SUMS = 1024, 16
"""Partial sums of the norm that a program holds at a time, of all rows; the fewest of one row."""


@gluon.jit
def bounds(part, total, parts):
    """Where a part of `total` things begins and ends."""
    return part * total // parts, (part + 1) * total // parts


@gluon.jit
def part_of(index, total, parts):
    """The part that a thing is in."""
    return ((index + 1) * parts - 1) // total


@gluon.jit
def _load_weight(
    w_desc, boxes, bar, slot, pred, row, column, last_row, num_outputs, num_weight_rows,
    GROUP: gl.constexpr, NUM_BOXES: gl.constexpr, SPLITS: gl.constexpr, GATE: gl.constexpr,
    STAGE_BYTES: gl.constexpr,
):  # fmt: skip
    """Start the copies of one stage's weight; boxes past `last_row` are zeros and read nothing."""
    PER_SPLIT: gl.constexpr = NUM_BOXES * (2 if GATE else 1)
    mbarrier.expect(bar, STAGE_BYTES, pred=pred)
    for split in gl.static_range(SPLITS):
        base = (slot * SPLITS + split) * PER_SPLIT
        at = column + split * _BOX_K
        for index in gl.static_range(NUM_BOXES):
            box_row = row + index * GROUP
            exists = box_row < last_row
            first = gl.where(exists, box_row, num_weight_rows)
            tma.async_copy_global_to_shared(
                w_desc, [first, at], bar, boxes.index(base + index), pred=pred
            )
            if GATE:
                second = gl.where(exists, box_row + num_outputs, num_weight_rows)
                tma.async_copy_global_to_shared(
                    w_desc, [second, at], bar, boxes.index(base + NUM_BOXES + index), pred=pred
                )


@gluon.jit
def _load_rows(x_desc, x_bufs, bar, slot, pred, column, SPLITS: gl.constexpr):
    """Start the copies of one stage's columns of all rows."""
    for split in gl.static_range(SPLITS):
        tma.async_copy_global_to_shared(
            x_desc, [0, column + split * _BOX_K], bar, x_bufs.index(slot * SPLITS + split),
            pred=pred,
        )  # fmt: skip


@gluon.jit
def _square_sums(
    sums_ptr, num_rows, SUMS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_Q: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """The sums of squares of each row [M, Q], their last dimension not added up yet."""
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    q = gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    total = gl.zeros([BLOCK_M, BLOCK_Q], gl.float32, layout=LAYOUT)
    # Not unrolled: all loads at once would take all registers.
    for first in range(0, SUMS, BLOCK_Q):
        valid = (m < num_rows) & (first + q < SUMS)
        total += gl.load(sums_ptr + m * SUMS + first + q, mask=valid, other=0.0)
    return total


@gluon.jit
def _store(acc, out, m, rows, last_row, num_rows):
    """Store the products of one tile of weight rows; `out` is (pointer, row stride)."""
    valid = (m < num_rows)[None, :] & (rows < last_row)[:, None]
    ptrs = out[0] + m.to(gl.int64)[None, :] * out[1] + rows[:, None]
    gl.store(ptrs, acc.to(out[0].dtype.element_ty), mask=valid)


@gluon.jit
def _finish(
    acc, second, scale, out, m, rows, last_row, num_rows,
    SCALED: gl.constexpr, ACTIVATION: gl.constexpr, GATE: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Scale the products of a tile, then store them or their activation."""
    if SCALED:
        acc = acc * scale[None, :]
        second = second * scale[None, :]
    if GATE:
        _store(gate(acc, second, ACTIVATION), out, m, rows, last_row, num_rows)
    else:
        if ACTIVATION is not None:
            acc = square_relu(acc)
            second = square_relu(second)
        _store(acc, out, m, rows, last_row, num_rows)
        if HALVES == 2:
            _store(second, out, m, rows + _TILE_N, last_row, num_rows)


@gluon.jit
def _multiply(
    acc, second, boxes, x_bufs, slot,
    NUM_BOXES: gl.constexpr, PER_SPLIT: gl.constexpr, PER_TILE: gl.constexpr, SPLITS: gl.constexpr,
    HALVES: gl.constexpr, GATE: gl.constexpr,
):  # fmt: skip
    """Start the products of one stage, and wait until those of the stage before are over."""
    TILE: gl.constexpr = boxes.layout
    DTYPE: gl.constexpr = boxes.dtype
    for split in gl.static_range(SPLITS):
        part = slot * SPLITS + split
        x_tile = x_bufs.index(part).permute((1, 0))
        w_tile = boxes.index(part * PER_SPLIT)._reinterpret(DTYPE, [_TILE_N, _BOX_K], TILE)
        acc = warpgroup_mma(w_tile, x_tile, acc, is_async=True)
        if HALVES == 2:
            box = part * PER_SPLIT + (NUM_BOXES if GATE else PER_TILE)
            w_tile = boxes.index(box)._reinterpret(DTYPE, [_TILE_N, _BOX_K], TILE)
            second = warpgroup_mma(w_tile, x_tile, second, is_async=True)
    if HALVES == 2:
        acc, second = warpgroup_mma_wait(num_outstanding=SPLITS * HALVES, deps=(acc, second))
    else:
        acc = warpgroup_mma_wait(num_outstanding=SPLITS, deps=(acc,))
    return acc, second


@gluon.jit(do_not_specialize=["num_rows"])
def stream_kernel(
    # pointers
    w_desc, x_desc, out_ptr, sums_ptr,
    # sizes
    num_rows, num_outputs, num_weight_rows, eps,
    # strides
    stride_out_m,
    # meta
    INNER: gl.constexpr, SUMS: gl.constexpr, ACTIVATION: gl.constexpr, GATE: gl.constexpr,
    SHARES: gl.constexpr, DTYPE: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_Q: gl.constexpr, GROUP: gl.constexpr, NUM_BOXES: gl.constexpr, HALVES: gl.constexpr,
    SPLITS: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr, PARTS: gl.constexpr,
    WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Some weight rows, or a share of all products, times all rows; and what follows."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, WARPS // 4], instr_shape=[16, BLOCK_M * 4 // WARPS, 16]
    )
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    PER_SPLIT: gl.constexpr = NUM_BOXES * (2 if GATE else 1)
    PER_TILE: gl.constexpr = _TILE_N // GROUP
    STAGE_BYTES: gl.constexpr = SPLITS * _BOX_K * 2 * (PER_SPLIT * GROUP + BLOCK_M)
    TILE_ROWS: gl.constexpr = GROUP * NUM_BOXES
    STEP_K: gl.constexpr = SPLITS * _BOX_K
    # The tensor cores read tiles of 64 rows. Boxes are packed, so what stands behind a tile's boxes
    # is another stage's: products with it are never stored. The last tile needs room behind it.
    NUM_SLOTS: gl.constexpr = STAGES * SPLITS * PER_SPLIT + HALVES * PER_TILE - PER_SPLIT
    boxes = gl.allocate_shared_memory(DTYPE, [NUM_SLOTS, GROUP, _BOX_K], TILE)
    x_bufs = gl.allocate_shared_memory(DTYPE, [STAGES * SPLITS, BLOCK_M, _BOX_K], TILE)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    fence_async_shared()
    barrier()
    # A place is (tile of weight rows, K step); items are this program's places, from `begin` on.
    pid = gl.program_id(0)
    begin, first_row, last_row = pid * 0, pid * 0, num_outputs
    if SHARES:
        begin, end = bounds(pid, (num_outputs + TILE_ROWS - 1) // TILE_ROWS * STEPS, PARTS)
    else:
        first_group, last_group = bounds(pid, (num_outputs + GROUP - 1) // GROUP, PARTS)
        end = (last_group - first_group + NUM_BOXES - 1) // NUM_BOXES * STEPS
        first_row, last_row = first_group * GROUP, gl.minimum(last_group * GROUP, num_outputs)
    num_items = end - begin
    for s in range(STAGES):
        place = begin + s
        _load_weight(
            w_desc, boxes, bars.index(s), s, s < num_items, first_row + place // STEPS * TILE_ROWS,
            place % STEPS * STEP_K, last_row, num_outputs, num_weight_rows, GROUP, NUM_BOXES,
            SPLITS, GATE, STAGE_BYTES,
        )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for s in range(STAGES):
        column = (begin + s) % STEPS * STEP_K
        _load_rows(x_desc, x_bufs, bars.index(s), s, s < num_items, column, SPLITS)
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, ACC))
    n = gl.arange(0, _TILE_N, layout=gl.SliceLayout(1, ACC))
    if SUMS > 0:
        BY_ROW: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
        squares = _square_sums(sums_ptr, num_rows, SUMS, BLOCK_M, BLOCK_Q, BY_ROW)
    item = 0
    while item < num_items:
        tile = (begin + item) // STEPS
        stop = gl.minimum((tile + 1) * STEPS - begin, num_items)
        tile_row = first_row + tile * TILE_ROWS
        acc = gl.zeros([_TILE_N, BLOCK_M], gl.float32, layout=ACC)
        second = gl.zeros([_TILE_N, BLOCK_M], gl.float32, layout=ACC)
        for current in range(item, stop):
            slot = current % STAGES
            mbarrier.wait(bars.index(slot), current // STAGES & 1)
            acc, second = _multiply(
                acc, second, boxes, x_bufs, slot, NUM_BOXES, PER_SPLIT, PER_TILE, SPLITS, HALVES,
                GATE,
            )  # fmt: skip
            # The slot of the item before is free: it takes what comes STAGES later.
            barrier()
            ahead = current - 1 + STAGES
            free, place = ahead % STAGES, begin + ahead
            pred = (current > 0) & (ahead < num_items)
            column = place % STEPS * STEP_K
            _load_weight(
                w_desc, boxes, bars.index(free), free, pred,
                first_row + place // STEPS * TILE_ROWS, column, last_row, num_outputs,
                num_weight_rows, GROUP, NUM_BOXES, SPLITS, GATE, STAGE_BYTES,
            )  # fmt: skip
            _load_rows(x_desc, x_bufs, bars.index(free), free, pred, column, SPLITS)
        if HALVES == 2:
            acc, second = warpgroup_mma_wait(num_outstanding=0, deps=(acc, second))
        else:
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        if SHARES:
            total = (num_outputs + TILE_ROWS - 1) // TILE_ROWS * STEPS
            rank = (pid - part_of(tile * STEPS, total, PARTS)).to(gl.int64)
            share = (out_ptr + rank * num_rows * num_outputs, num_outputs)
            _store(acc, share, m, tile_row + n, last_row, num_rows)
        else:
            scale = m
            if SUMS > 0:
                sums = gl.convert_layout(gl.sum(squares, axis=1), gl.SliceLayout(0, ACC))
                scale = scale_factor(sums, INNER, eps)
            tile_end = gl.minimum(tile_row + TILE_ROWS, last_row)
            _finish(
                acc, second, scale, (out_ptr, stride_out_m), m, tile_row + n, tile_end, num_rows,
                SUMS > 0, ACTIVATION, GATE, HALVES,
            )  # fmt: skip
        item = stop


def launch_stream(
    plan: StreamPlan, rows: DeferredNorm, weight: Tensor, out: Tensor,
    *, activation: Activation | None = None,
) -> Any:  # fmt: skip
    """Run the kernel and return it; with shares `out` is the workspace [rank, M, N] in fp32."""
    values, sums, num_groups, eps = rows
    assert num_groups == 1 or sums is None
    layout = gl.NVMMASharedLayout(128, 16, rank=2)
    num_sums = 0 if sums is None or plan.shares else sums.shape[1]
    most_sums = max(LEAST_SUMS, SUMS_AT_ONCE // plan.block_m)
    block_q = min(most_sums, triton.next_power_of_2(max(LEAST_SUMS, num_sums)))
    return stream_kernel[(plan.num_programs,)](
        TensorDescriptor.from_tensor(weight, [plan.group, BOX_K], layout),
        TensorDescriptor.from_tensor(values, [plan.block_m, BOX_K], layout),
        out, sums, len(values), out.shape[-1], len(weight), eps, out.stride(-2),
        INNER=values.shape[1], SUMS=num_sums, ACTIVATION=activation, GATE=activation in GATED,
        SHARES=plan.shares, DTYPE=_DTYPES[weight.dtype], BLOCK_M=plan.block_m, BLOCK_Q=block_q,
        GROUP=plan.group, NUM_BOXES=plan.num_boxes, HALVES=plan.halves, SPLITS=plan.splits,
        STAGES=plan.stages, STEPS=plan.steps, PARTS=plan.num_programs, WARPS=plan.num_warps,
        num_warps=plan.num_warps, **launch_options(values.device),
    )  # fmt: skip
