"""The projection of up to 128 rows on compute capability 9.0: weights streamed by bulk copies.

One program runs on each multiprocessor. Bulk copies bring the weight to a ring of STAGES tiles in
shared memory; the first ones start before the wait for the previous kernels, since a weight is
constant. The weight is the first operand of the tensor cores, 64 rows at a time, and the rows of
the input are the second, so few rows are not padded to 64.

There are two ways to share a weight among programs (`stream_plan`). *Whole rows*: a program owns a
run of groups of 16 or 8 weight rows and all their columns, and does what follows the product; in
tiles that are alike within a group, gate and up by turns of 8 rows. *Shares*: the sequence of (64
weight rows, K step) is cut into equal runs, so that a weight of few rows keeps every program busy;
a program leaves its partial sums in a workspace [rank, M, N], and the kernel that adds the residual
adds them in the order of ranks. No program waits for another one.

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
from stree_kernels.launch.settings import Activation
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
def _rows_of(
    place, first_group, num_groups, num_outputs,
    GROUP: gl.constexpr, STEPS: gl.constexpr, TILES: gl.constexpr, SHARES: gl.constexpr,
):  # fmt: skip
    """Where the rows of a place's tile begin and end."""
    tile = place // STEPS
    if SHARES:
        return tile * GROUP, num_outputs
    if TILES == 1:
        return first_group * GROUP, (first_group + num_groups) * GROUP
    first, last = bounds(tile, num_groups, TILES)
    return (first_group + first) * GROUP, (first_group + last) * GROUP


@gluon.jit
def _load_weight(
    w_desc, boxes, bar, slot, pred, rows, column, num_outputs,
    GROUP: gl.constexpr, NUM_BOXES: gl.constexpr, SPLITS: gl.constexpr, GATE: gl.constexpr,
    STAGE_BYTES: gl.constexpr,
):  # fmt: skip
    """Start the copies of one stage's weight; boxes past its rows are zeros and read nothing."""
    PAIR: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    mbarrier.expect(bar, STAGE_BYTES, pred=pred)
    for split in gl.static_range(SPLITS):
        at = column + split * _BOX_K
        for index in gl.static_range(NUM_BOXES):
            row = rows[0] + index * GROUP
            row = gl.where(row < rows[1], row, num_outputs)
            box = boxes.index((slot * SPLITS + split) * NUM_BOXES + index)
            if GATE:
                pair = box._reinterpret(boxes.dtype, [2, GROUP, _BOX_K], PAIR)
                tma.async_copy_global_to_shared(w_desc, [0, row, at], bar, pair, pred=pred)
            else:
                tma.async_copy_global_to_shared(w_desc, [row, at], bar, box, pred=pred)


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
def _gate_and_up(x):
    """Of rows that are 8 of the gate and 8 of up by turns, each; a thread has both of a pair."""
    ROWS: gl.constexpr = x.shape[0]
    x = gl.reshape(x, [ROWS // 16, 2, 8, x.shape[1]])
    return gl.split(gl.permute(x, [0, 2, 3, 1]))


@gluon.jit
def _store(acc, out, m, rows, last_row, num_rows):
    """Store the products of some weight rows; `out` is (pointer, row stride)."""
    ptrs = out[0] + m.to(gl.int64) * out[1] + rows
    valid = (m < num_rows) & (rows < last_row)
    gl.store(ptrs, acc.to(out[0].dtype.element_ty), mask=valid)


@gluon.jit
def _finish(
    acc, scale, out, m, n, row, last_row, num_rows,
    SCALED: gl.constexpr, ACTIVATION: gl.constexpr, GATE: gl.constexpr,
):  # fmt: skip
    """Scale the products of a tile, then store them or their activation."""
    if SCALED:
        acc = acc * scale[None, :]
    if GATE:
        # The indices go the products' way, and have their layout then.
        n = n[:, None] + m[None, :] * 0
        m = m[None, :] + n * 0
        n, _ = _gate_and_up(n // 16 * 8 + n % 8)
        m, _ = _gate_and_up(m)
        gates, ups = _gate_and_up(acc)
        _store(gate(gates, ups, ACTIVATION), out, m, row + n, last_row, num_rows)
    else:
        if ACTIVATION is not None:
            acc = square_relu(acc)
        _store(acc, out, m[None, :], row + n[:, None], last_row, num_rows)


@gluon.jit(do_not_specialize=["num_rows"])
def stream_kernel(
    # pointers
    w_desc, x_desc, out_ptr, sums_ptr,
    # sizes
    num_rows, num_outputs, eps,
    # strides
    stride_out_m,
    # meta
    INNER: gl.constexpr, SUMS: gl.constexpr, ACTIVATION: gl.constexpr, GATE: gl.constexpr,
    SHARES: gl.constexpr, DTYPE: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_Q: gl.constexpr, GROUP: gl.constexpr, NUM_BOXES: gl.constexpr, MMA_ROWS: gl.constexpr,
    SPLITS: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr, TILES: gl.constexpr,
    PARTS: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Some weight rows, or a share of all products, times all rows; and what follows."""
    # Warpgroups share the tile's rows, or the input's where it is of 64.
    BY_ROWS: gl.constexpr = WARPS if MMA_ROWS > _TILE_N else 4
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[BY_ROWS, WARPS // BY_ROWS],
        instr_shape=[16, BLOCK_M * BY_ROWS // WARPS, 16],
    )  # fmt: skip
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BOX_ROWS: gl.constexpr = GROUP * (2 if GATE else 1)
    TILE_ROWS: gl.constexpr = BOX_ROWS * NUM_BOXES
    STAGE_BYTES: gl.constexpr = SPLITS * _BOX_K * 2 * (TILE_ROWS + BLOCK_M)
    STEP_K: gl.constexpr = SPLITS * _BOX_K
    # The tensor cores read tiles of 64 rows. Boxes are packed, so what stands behind a tile's boxes
    # is another stage's: products with it are never stored. The last tile needs room behind it.
    NUM_SLOTS: gl.constexpr = (STAGES * SPLITS - 1) * NUM_BOXES + MMA_ROWS // BOX_ROWS
    boxes = gl.allocate_shared_memory(DTYPE, [NUM_SLOTS, BOX_ROWS, _BOX_K], TILE)
    x_bufs = gl.allocate_shared_memory(DTYPE, [STAGES * SPLITS, BLOCK_M, _BOX_K], TILE)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    fence_async_shared()
    barrier()
    # A place is (tile of weight rows, K step); items are this program's places, from `begin` on.
    pid = gl.program_id(0)
    begin, first_group, num_groups = pid * 0, pid * 0, pid * 0
    if SHARES:
        begin, end = bounds(pid, (num_outputs + GROUP - 1) // GROUP * STEPS, PARTS)
        num_items = end - begin
    else:
        first_group, last_group = bounds(pid, (num_outputs + GROUP - 1) // GROUP, PARTS)
        num_groups = last_group - first_group
        num_items = gl.where(num_groups > 0, TILES * STEPS, 0)
    # A number that the compiler does not know: unrolled, the copies would take all registers.
    num_first = gl.minimum(num_items, STAGES)
    for s in range(num_first):
        place = begin + s
        rows = _rows_of(place, first_group, num_groups, num_outputs, GROUP, STEPS, TILES, SHARES)
        _load_weight(
            w_desc, boxes, bars.index(s), s, True, rows, place % STEPS * STEP_K, num_outputs,
            GROUP, NUM_BOXES, SPLITS, GATE, STAGE_BYTES,
        )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for s in range(num_first):
        column = (begin + s) % STEPS * STEP_K
        _load_rows(x_desc, x_bufs, bars.index(s), s, True, column, SPLITS)
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, ACC))
    n = gl.arange(0, MMA_ROWS, layout=gl.SliceLayout(1, ACC))
    if SUMS > 0:
        BY_ROW: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
        squares = _square_sums(sums_ptr, num_rows, SUMS, BLOCK_M, BLOCK_Q, BY_ROW)
    item = 0
    while item < num_items:
        tile = (begin + item) // STEPS
        stop = gl.minimum((tile + 1) * STEPS - begin, num_items)
        acc = gl.zeros([MMA_ROWS, BLOCK_M], gl.float32, layout=ACC)
        for current in range(item, stop):
            slot = current % STAGES
            mbarrier.wait(bars.index(slot), current // STAGES & 1)
            for split in gl.static_range(SPLITS):
                part = slot * SPLITS + split
                w_tile = boxes.index(part * NUM_BOXES)
                w_tile = w_tile._reinterpret(DTYPE, [MMA_ROWS, _BOX_K], TILE)
                x_tile = x_bufs.index(part).permute((1, 0))
                acc = warpgroup_mma(w_tile, x_tile, acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=SPLITS, deps=(acc,))
            # The slot of the item before is free: it takes what comes STAGES later.
            barrier()
            ahead = current - 1 + STAGES
            free, place = ahead % STAGES, begin + ahead
            pred = (current > 0) & (ahead < num_items)
            column = place % STEPS * STEP_K
            rows = _rows_of(
                place, first_group, num_groups, num_outputs, GROUP, STEPS, TILES, SHARES
            )
            _load_weight(
                w_desc, boxes, bars.index(free), free, pred, rows, column, num_outputs, GROUP,
                NUM_BOXES, SPLITS, GATE, STAGE_BYTES,
            )  # fmt: skip
            _load_rows(x_desc, x_bufs, bars.index(free), free, pred, column, SPLITS)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        row, last_row = _rows_of(
            begin + item, first_group, num_groups, num_outputs, GROUP, STEPS, TILES, SHARES
        )
        last_row = gl.minimum(last_row, num_outputs)
        if SHARES:
            total = (num_outputs + GROUP - 1) // GROUP * STEPS
            rank = (pid - part_of(tile * STEPS, total, PARTS)).to(gl.int64)
            share = (out_ptr + rank * num_rows * num_outputs, num_outputs)
            _store(acc, share, m[None, :], row + n[:, None], last_row, num_rows)
        else:
            scale = m
            if SUMS > 0:
                sums = gl.convert_layout(gl.sum(squares, axis=1), gl.SliceLayout(0, ACC))
                scale = scale_factor(sums, INNER, eps)
            _finish(
                acc, scale, (out_ptr, stride_out_m), m, n, row, last_row, num_rows, SUMS > 0,
                ACTIVATION, GATE,
            )  # fmt: skip
        item = stop


def launch_stream(
    plan: StreamPlan, rows: DeferredNorm, weight: Tensor, out: Tensor,
    *, activation: Activation | None = None,
) -> Any:  # fmt: skip
    """Run the kernel and return it; with shares `out` is the workspace [rank, M, N] in fp32."""
    values, sums, num_groups, eps = rows
    assert num_groups == 1 or sums is None
    num_sums = 0 if sums is None or plan.shares else sums.shape[1]
    most_sums = max(LEAST_SUMS, SUMS_AT_ONCE // plan.block_m)
    block_q = min(most_sums, triton.next_power_of_2(max(LEAST_SUMS, num_sums)))
    if plan.gated:
        weight, box = weight.view(2, -1, values.shape[1]), [2, plan.group, BOX_K]
    else:
        box = [plan.group, BOX_K]
    return stream_kernel[(plan.num_programs,)](
        _descriptor(weight, box), _descriptor(values, [plan.block_m, BOX_K]),
        out, sums, len(values), out.shape[-1], eps, out.stride(-2),
        INNER=values.shape[1], SUMS=num_sums, ACTIVATION=activation, GATE=plan.gated,
        SHARES=plan.shares, DTYPE=_DTYPES[weight.dtype], BLOCK_M=plan.block_m, BLOCK_Q=block_q,
        GROUP=plan.group, NUM_BOXES=plan.num_boxes, MMA_ROWS=plan.mma_rows, SPLITS=plan.splits,
        STAGES=plan.stages, STEPS=plan.steps, TILES=plan.tiles, PARTS=plan.num_programs,
        WARPS=plan.num_warps,
        num_warps=plan.num_warps, **launch_options(values.device),
    )  # fmt: skip


def _descriptor(tensor: Tensor, box: list[int]) -> TensorDescriptor:
    """Describe a tensor to the bulk copies that read boxes of it."""
    layout = gl.NVMMASharedLayout(128, 16, rank=len(box))
    return TensorDescriptor.from_tensor(tensor, box, layout)
