"""The projection of up to 128 rows by a weight in FP8 on compute capability 9.0: codes streamed.

As `linear.stream_kernel`: bulk copies bring codes and rows to a ring in shared memory, programs own
whole groups of weight rows or equal shares of all products, and the weight is the first operand of
the tensor cores. Codes go from shared memory to registers, four columns a load, and become 16-bit
factors there. A step is 128 columns, all in one block: its product takes the blocks' scales before
it is added up. The rows of a step pass through registers too: they take the norm's weights and the
scales of norm groups, are rounded, and their columns are renamed as those of the codes are.

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

from stree_kernels.fp8.decode import native_factors
from stree_kernels.fp8.scaled_weight import ScaledWeight
from stree_kernels.fp8.stream_plan import CODE_BOX_K
from stree_kernels.launch.pdl import launch_options
from stree_kernels.launch.settings import Activation
from stree_kernels.linear.deferred_norm import DeferredNorm
from stree_kernels.linear.device_functions import gate, scale_factor, square_relu
from stree_kernels.linear.stream_kernel import (
    LEAST_SUMS,
    SUMS_AT_ONCE,
    _load_rows,
    _square_sums,
    barrier,
    bounds,
    part_of,
)
from stree_kernels.linear.stream_plan import BOX_K, TILE_N, StreamPlan

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_BOX_K, _STEP_K, _TILE_N = gl.constexpr(BOX_K), gl.constexpr(CODE_BOX_K), gl.constexpr(TILE_N)
MOST_REGISTERS = {8: 168, 16: 168, 32: 255, 64: 255, 128: 255}
"""Registers of a thread by rows: three programs of a multiprocessor, of more rows than 16 two."""
ROWS_OF_FOUR_WARPS = 64
"""Rows whose sums the registers of four warps hold; of more, eight take half each.

Both halves decode all codes: parts of the weight would leave gate and up to different warps.
"""


@gluon.jit
def _load_codes(
    w_desc, boxes, bar, slot, pred, row, column, last_row, num_outputs, num_weight_rows,
    GROUP: gl.constexpr, NUM_BOXES: gl.constexpr, GATE: gl.constexpr, STAGE_BYTES: gl.constexpr,
):  # fmt: skip
    """Start the copies of one step's codes; boxes past `last_row` are zeros and read nothing."""
    mbarrier.expect(bar, STAGE_BYTES, pred=pred)
    base = slot * NUM_BOXES * (2 if GATE else 1)
    for index in gl.static_range(NUM_BOXES):
        box_row = row + index * GROUP
        exists = box_row < last_row
        first = gl.where(exists, box_row, num_weight_rows)
        tma.async_copy_global_to_shared(
            w_desc, [first, column], bar, boxes.index(base + index), pred=pred
        )
        if GATE:
            second = gl.where(exists, box_row + num_outputs, num_weight_rows)
            tma.async_copy_global_to_shared(
                w_desc, [second, column], bar, boxes.index(base + NUM_BOXES + index), pred=pred
            )


@gluon.jit
def _renamed(tile):
    """The tile with column 4 q + 2 h + e of each 16 at 8 h + 2 q + e.

    Of codes a thread loads four neighbouring columns; of factors the tensor cores want two, and two
    more 8 columns on.
    """
    parts = tile.reshape([tile.shape[0], tile.shape[1] // 16, 4, 2, 2])
    return parts.permute((0, 1, 3, 2, 4)).reshape([tile.shape[0], tile.shape[1]])


@gluon.jit
def _codes(boxes, box, ACC: gl.constexpr):
    """The codes of the weight's tile that begins at a box, in registers."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=4)
    tile = boxes.index(box)._reinterpret(boxes.dtype, [_TILE_N, _STEP_K], boxes.layout)
    return tile.load(LAYOUT)


@gluon.jit
def _factors(codes, DTYPE: gl.constexpr, ACC: gl.constexpr):
    """Codes as the tensor cores' first operand."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    return gl.convert_layout(_renamed(native_factors(codes, DTYPE)), OPERAND)


@gluon.jit
def _block_scales(scale_ptrs, step, COLUMN_BLOCK: gl.constexpr, BLOCKED: gl.constexpr):
    """The scales of a tile's rows for one step; anything where a block is a whole row."""
    scales = scale_ptrs
    if BLOCKED:
        scales = gl.load(scale_ptrs + step * _STEP_K // COLUMN_BLOCK)
    return scales


@gluon.jit
def _column_factor(factor_ptr, step, INNER: gl.constexpr, LAYOUT: gl.constexpr):
    """The norm's weights of one step."""
    k = step * _STEP_K + gl.arange(0, _STEP_K, layout=gl.SliceLayout(0, LAYOUT))
    factor = k
    if factor_ptr is not None:
        if INNER % _STEP_K == 0:
            factor = gl.load(factor_ptr + k)
        else:
            factor = gl.load(factor_ptr + k, mask=k < INNER, other=0.0)
    return factor


@gluon.jit
def _group_squares(
    sums_ptr, step, num_rows, INNER: gl.constexpr, GROUPS: gl.constexpr, SUMS: gl.constexpr,
    BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The sums of squares of the rows' norm group that a step's columns are in."""
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
    squares = m
    if GROUPS > 1:
        first = step * _STEP_K // (INNER // GROUPS) * (SUMS // GROUPS)
        squares = gl.load(sums_ptr + m * SUMS + first, mask=m < num_rows, other=0.0)
        for index in gl.static_range(1, SUMS // GROUPS):
            squares += gl.load(sums_ptr + m * SUMS + first + index, mask=m < num_rows, other=0.0)
    return squares


@gluon.jit
def _prepare_rows(
    raw, out, factor, squares, eps,
    FACTOR: gl.constexpr, GROUPS: gl.constexpr, INNER: gl.constexpr, DTYPE: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Write a step's rows to `out`, times their norm group's scale and the norm's weights."""
    rows = raw.load(LAYOUT)
    if FACTOR or GROUPS > 1:
        wide = rows.to(gl.float32)
        if GROUPS > 1:
            wide = wide * scale_factor(squares, INNER // GROUPS, eps)[:, None]
        if FACTOR:
            wide = wide * factor.to(gl.float32)[None, :]
        rows = wide.to(DTYPE)
    out.store(_renamed(rows))


@gluon.jit
def _start(total, factors, rows, ACC: gl.constexpr, BLOCKED: gl.constexpr):
    """Start the products of one step: by themselves, or onto the total where no scale follows."""
    if BLOCKED:
        acc = gl.zeros([_TILE_N, total.shape[1]], gl.float32, layout=ACC)
        acc = warpgroup_mma(factors, rows, acc, use_acc=False, is_async=True)
    else:
        acc = warpgroup_mma(factors, rows, total, is_async=True)
    return warpgroup_mma_wait(num_outstanding=1, deps=(acc,))


@gluon.jit
def _end(total, acc, scales, BLOCKED: gl.constexpr):
    """The total with the products that were started last."""
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    if BLOCKED:
        acc = total + acc * scales[:, None]
    return acc


@gluon.jit
def _store(acc, out, m, rows, last_row, num_rows):
    """Store the products of one tensor core tile; `out` is (pointer, row stride)."""
    valid = (m < num_rows)[None, :] & (rows < last_row)[:, None]
    ptrs = out[0] + m.to(gl.int64)[None, :] * out[1] + rows[:, None]
    gl.store(ptrs, acc.to(out[0].dtype.element_ty), mask=valid)


@gluon.jit
def _finish(
    total, second, scale, out, m, rows, last_row, num_rows,
    SCALED: gl.constexpr, ACTIVATION: gl.constexpr, GATE: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Scale the products of both tensor core tiles, then store them or their activation."""
    if SCALED:
        total = total * scale[None, :]
        second = second * scale[None, :]
    if GATE:
        _store(gate(total, second, ACTIVATION), out, m, rows, last_row, num_rows)
    else:
        if ACTIVATION is not None:
            total = square_relu(total)
            second = square_relu(second)
        _store(total, out, m, rows, last_row, num_rows)
        if HALVES == 2:
            _store(second, out, m, rows + _TILE_N, last_row, num_rows)


@gluon.jit(do_not_specialize=["num_rows"])
def fp8_stream_kernel(
    # pointers
    w_desc, x_desc, scale_ptr, factor_ptr, out_ptr, sums_ptr,
    # sizes
    num_rows, num_outputs, num_weight_rows, eps,
    # strides
    stride_out_m,
    # meta
    INNER: gl.constexpr, GROUPS: gl.constexpr, SUMS: gl.constexpr, ROW_GROUP: gl.constexpr,
    COLUMN_BLOCK: gl.constexpr, ACTIVATION: gl.constexpr, GATE: gl.constexpr,
    SHARES: gl.constexpr, DTYPE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_Q: gl.constexpr,
    GROUP: gl.constexpr, NUM_BOXES: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr,
    STEPS: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Some weight rows, or a share of all products, times all rows; and what follows."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, WARPS // 4], instr_shape=[16, BLOCK_M * 4 // WARPS, 16]
    )
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    CODES: gl.constexpr = gl.NVMMASharedLayout(128, 8, rank=2)
    VALUES: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BLOCKED: gl.constexpr = COLUMN_BLOCK < INNER
    BLOCKS: gl.constexpr = (INNER + COLUMN_BLOCK - 1) // COLUMN_BLOCK
    FACTOR: gl.constexpr = factor_ptr is not None
    SLOT_BOXES: gl.constexpr = NUM_BOXES * (2 if GATE else 1)
    PER_TILE: gl.constexpr = _TILE_N // GROUP
    SECOND: gl.constexpr = NUM_BOXES if GATE else PER_TILE
    STAGE_BYTES: gl.constexpr = _STEP_K * (SLOT_BOXES * GROUP + 2 * BLOCK_M)
    TILE_ROWS: gl.constexpr = GROUP * NUM_BOXES
    # Boxes are packed, as in `linear.stream_kernel`: the last tile needs room behind it.
    NUM_SLOTS: gl.constexpr = STAGES * SLOT_BOXES + HALVES * PER_TILE - SLOT_BOXES
    boxes = gl.allocate_shared_memory(gl.uint8, [NUM_SLOTS, GROUP, _STEP_K], CODES)
    x_bufs = gl.allocate_shared_memory(DTYPE, [2 * STAGES, BLOCK_M, _BOX_K], VALUES)
    # The tensor cores may still read the rows of one step when the next ones are written.
    x_tiles = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M, _STEP_K], VALUES)
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
        _load_codes(
            w_desc, boxes, bars.index(s), s, s < num_items, first_row + place // STEPS * TILE_ROWS,
            place % STEPS * _STEP_K, last_row, num_outputs, num_weight_rows, GROUP, NUM_BOXES, GATE,
            STAGE_BYTES,
        )  # fmt: skip
    factor = _column_factor(factor_ptr, begin % STEPS, INNER, ROWS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for s in range(STAGES):
        column = (begin + s) % STEPS * _STEP_K
        _load_rows(x_desc, x_bufs, bars.index(s), s, s < num_items, column, 2)
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, ACC))
    n = gl.arange(0, _TILE_N, layout=gl.SliceLayout(1, ACC))
    if SUMS > 0 and GROUPS == 1:
        BY_ROW: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
        row_squares = _square_sums(sums_ptr, num_rows, SUMS, BLOCK_M, BLOCK_Q, BY_ROW)
    squares = _group_squares(sums_ptr, begin % STEPS, num_rows, INNER, GROUPS, SUMS, BLOCK_M, ROWS)
    item = 0
    while item < num_items:
        tile = (begin + item) // STEPS
        stop = gl.minimum((tile + 1) * STEPS - begin, num_items)
        tile_row = first_row + tile * TILE_ROWS
        # Past the last row of the weight the last one's scale is read again.
        scale_rows = gl.minimum(tile_row + n, num_outputs - 1)
        scale_ptrs = scale_ptr + scale_rows // ROW_GROUP * BLOCKS
        second_rows = gl.minimum(tile_row + n + _TILE_N, num_outputs - 1)
        if GATE:
            second_rows = scale_rows + num_outputs
        second_ptrs = scale_ptr + second_rows // ROW_GROUP * BLOCKS
        scales = _block_scales(scale_ptrs, (begin + item) % STEPS, COLUMN_BLOCK, BLOCKED)
        second_scales = _block_scales(second_ptrs, (begin + item) % STEPS, COLUMN_BLOCK, BLOCKED)
        total = gl.zeros([_TILE_N, BLOCK_M], gl.float32, layout=ACC)
        second = gl.zeros([_TILE_N, BLOCK_M], gl.float32, layout=ACC)
        # Products that are under way, those of the second tile if there is one. Triton carries a
        # name through a loop unless the body's first pass leaves its value as it was: another one.
        acc, acc_scales = second, scales + 0
        for current in range(item, stop):
            slot = current % STAGES
            # What the next step needs of caches is under way during this one.
            following = (begin + current + 1) % STEPS
            next_scales = _block_scales(scale_ptrs, following, COLUMN_BLOCK, BLOCKED)
            next_second = _block_scales(second_ptrs, following, COLUMN_BLOCK, BLOCKED)
            next_factor = _column_factor(factor_ptr, following, INNER, ROWS)
            next_squares = _group_squares(
                sums_ptr, following, num_rows, INNER, GROUPS, SUMS, BLOCK_M, ROWS
            )
            mbarrier.wait(bars.index(slot), current // STAGES & 1)
            x_tile = x_tiles.index(current % 2)
            raw = x_bufs.index(2 * slot)._reinterpret(DTYPE, [BLOCK_M, _STEP_K], VALUES)
            _prepare_rows(raw, x_tile, factor, squares, eps, FACTOR, GROUPS, INNER, DTYPE, ROWS)
            codes = _codes(boxes, slot * SLOT_BOXES, ACC)
            second_codes = codes
            if HALVES == 2:
                second_codes = _codes(boxes, slot * SLOT_BOXES + SECOND, ACC)
                second = _end(second, acc, acc_scales, BLOCKED)
            else:
                total = _end(total, acc, acc_scales, BLOCKED)
            factors = _factors(codes, DTYPE, ACC)
            fence_async_shared()
            barrier()
            acc = _start(total, factors, x_tile.permute((1, 0)), ACC, BLOCKED)
            acc_scales = scales
            # All has left the slot: it takes what comes STAGES later.
            place = begin + current + STAGES
            pred = current + STAGES < num_items
            column = place % STEPS * _STEP_K
            _load_codes(
                w_desc, boxes, bars.index(slot), slot, pred,
                first_row + place // STEPS * TILE_ROWS, column, last_row, num_outputs,
                num_weight_rows, GROUP, NUM_BOXES, GATE, STAGE_BYTES,
            )  # fmt: skip
            _load_rows(x_desc, x_bufs, bars.index(slot), slot, pred, column, 2)
            if HALVES == 2:
                total = _end(total, acc, scales, BLOCKED)
                factors = _factors(second_codes, DTYPE, ACC)
                acc = _start(second, factors, x_tile.permute((1, 0)), ACC, BLOCKED)
                acc_scales = second_scales
            scales, second_scales = next_scales, next_second
            factor, squares = next_factor, next_squares
        if HALVES == 2:
            second = _end(second, acc, acc_scales, BLOCKED)
        else:
            total = _end(total, acc, acc_scales, BLOCKED)
        if not BLOCKED:
            total = total * gl.load(scale_ptrs)[:, None]
            second = second * gl.load(second_ptrs)[:, None]
        at = m
        if BLOCK_M > 32:
            # Adds 0, which the compiler does not know: no addresses wait in registers for this.
            at = m + (item >> 31)
        if SHARES:
            all_places = (num_outputs + TILE_ROWS - 1) // TILE_ROWS * STEPS
            rank = (pid - part_of(tile * STEPS, all_places, PARTS)).to(gl.int64)
            share = (out_ptr + rank * num_rows * num_outputs, num_outputs)
            _store(total, share, at, tile_row + n, last_row, num_rows)
            if HALVES == 2:
                _store(second, share, at, tile_row + n + _TILE_N, last_row, num_rows)
        else:
            scale = m
            if SUMS > 0 and GROUPS == 1:
                sums = gl.convert_layout(gl.sum(row_squares, axis=1), gl.SliceLayout(0, ACC))
                scale = scale_factor(sums, INNER, eps)
            tile_end = gl.minimum(tile_row + TILE_ROWS, last_row)
            _finish(
                total, second, scale, (out_ptr, stride_out_m), at, tile_row + n, tile_end, num_rows,
                SUMS > 0 and GROUPS == 1, ACTIVATION, GATE, HALVES,
            )  # fmt: skip
        item = stop


def launch_codes(
    plan: StreamPlan, rows: DeferredNorm, weight: ScaledWeight, out: Tensor,
    *, activation: Activation | None = None,
) -> Any:  # fmt: skip
    """Run the kernel and return it; with shares `out` is the workspace [rank, M, N] in fp32.

    One norm over a whole row is then left to what adds the shares.
    """
    values, sums, num_groups, eps = rows
    late = plan.shares and num_groups == 1
    num_sums = 0 if sums is None or late else sums.shape[1]
    num_warps = 8 if plan.block_m > ROWS_OF_FOUR_WARPS else 4
    most_sums = max(LEAST_SUMS, SUMS_AT_ONCE // plan.block_m)
    block_q = min(most_sums, triton.next_power_of_2(max(LEAST_SUMS, num_sums)))
    return fp8_stream_kernel[(plan.num_programs,)](
        TensorDescriptor.from_tensor(
            weight.bytes, [plan.group, CODE_BOX_K], gl.NVMMASharedLayout(128, 8, rank=2)
        ),
        TensorDescriptor.from_tensor(
            values, [plan.block_m, BOX_K], gl.NVMMASharedLayout(128, 16, rank=2)
        ),
        weight.scales, weight.column_factor_K, out, sums, len(values), out.shape[-1], len(weight),
        eps, out.stride(-2),
        INNER=values.shape[1], GROUPS=num_groups, SUMS=num_sums, ROW_GROUP=weight.row_group,
        COLUMN_BLOCK=weight.column_block, ACTIVATION=activation, GATE=plan.gated,
        SHARES=plan.shares, DTYPE=_DTYPES[weight.dtype], BLOCK_M=plan.block_m, BLOCK_Q=block_q,
        GROUP=plan.group, NUM_BOXES=plan.num_boxes, HALVES=plan.mma_rows // TILE_N,
        STAGES=plan.stages, STEPS=plan.steps, PARTS=plan.num_programs, WARPS=num_warps,
        num_warps=num_warps, maxnreg=MOST_REGISTERS[plan.block_m],
        **launch_options(values.device),
    )  # fmt: skip
