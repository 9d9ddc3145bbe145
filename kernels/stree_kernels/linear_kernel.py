"""The Triton kernel of the projections: a weight streamed once against a few rows.

A program owns BLOCK_N rows of the weight, or with SPLIT_K a part of their columns, for all rows of
the input. The weight is the first operand of the tensor cores' product, whose tile may not be small
there; the rows are the second, of which eight are enough. The rows' norm scales the product, per
group of columns where the norm has groups.

The weight is constant, so its first columns are fetched into L2 while the previous kernel runs.

With SPLIT_K the programs of a tile store their sums, and the last to arrive adds them in order: the
result does not depend on who is last.

Shape letters: M rows, K columns in, N rows of the weight, C columns out (N, or half of it where
gate and up are multiplied), Q partial sums of a row.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from stree_kernels.pdl import wait_for_previous

LINE_BYTES = tl.constexpr(128)
"""What one prefetch brings into L2."""


@triton.jit
def _prefetch(row_ptrs_N, first, stop):
    """Fetch columns first..stop - 1 of the rows into L2."""
    LINE: tl.constexpr = LINE_BYTES * 8 // row_ptrs_N.dtype.element_ty.primitive_bitwidth
    lines = tl.arange(0, 8) * LINE
    for column in range(first, stop, 8 * LINE):
        columns = tl.minimum(column + lines, stop - 1)
        addresses = (row_ptrs_N[:, None] + columns[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // no result $0", "=r,l", [addresses], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _scale(sums_MQ, group_columns, eps):
    """The number that each row of a group is multiplied by."""
    return 1.0 / tl.sqrt(tl.sum(sums_MQ, axis=1) / group_columns + eps)


@triton.jit
def _load_sums(sums_ptrs_M, valid_M, first, stop, BLOCK_Q: tl.constexpr):
    sums_Q = first + tl.arange(0, BLOCK_Q)
    valid_MQ = valid_M[:, None] & (sums_Q < stop)[None, :]
    return tl.load(sums_ptrs_M[:, None] + sums_Q[None, :], mask=valid_MQ, other=0.0)


@triton.jit
def _product(
    row_ptrs_M, valid_M, weight_ptrs_N, sums_ptrs_M, begin, end, group_columns, group_sums, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
    GROUPS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Blocks begin..end - 1 of weight @ rows.T [N, M], scaled where the norm has groups."""
    blocks_per_group = tl.cdiv(group_columns, BLOCK_K)
    acc_NM = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    for block in range(begin, end):
        if GROUPS == 1:
            group = 0
            inner_K = block * BLOCK_K + tl.arange(0, BLOCK_K)
        else:
            group = block // blocks_per_group
            inner_K = (block % blocks_per_group) * BLOCK_K + tl.arange(0, BLOCK_K)
        columns_K = group * group_columns + inner_K
        weight_ptrs = weight_ptrs_N[:, None] + columns_K[None, :]
        rows_ptrs = row_ptrs_M[None, :] + columns_K[:, None]
        if EVEN_K:
            weight_NK = tl.load(weight_ptrs)
            rows_KM = tl.load(rows_ptrs, mask=valid_M[None, :], other=0.0)
        else:
            valid_K = inner_K < group_columns
            weight_NK = tl.load(weight_ptrs, mask=valid_K[None, :], other=0.0)
            rows_KM = tl.load(rows_ptrs, mask=valid_K[:, None] & valid_M[None, :], other=0.0)
        if GROUPS == 1:
            acc_NM = tl.dot(weight_NK, rows_KM, acc_NM, input_precision="ieee")
        else:
            first = group * group_sums
            sums_MQ = _load_sums(sums_ptrs_M, valid_M, first, first + group_sums, BLOCK_Q)
            scale_M = _scale(sums_MQ, group_columns, eps)
            acc_NM += tl.dot(weight_NK, rows_KM, input_precision="ieee") * scale_M[None, :]
    return acc_NM


@triton.jit
def _finish(
    acc_NM, sums_MQ, stream_NM, columns_C, rows_M, valid_M, num_columns, group_columns, eps,
    out_ptr, values_ptr, square_sums_ptr, stride_out_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr, PER_SUM: tl.constexpr,
):  # fmt: skip
    """Scale the product, then store it, silu(gate) * up, or its sum with the residual stream."""
    if sums_MQ is not None:
        acc_NM *= _scale(sums_MQ, group_columns, eps)[None, :]
    if SWIGLU:
        halves = tl.permute(tl.reshape(acc_NM, [2, BLOCK_N // 2, BLOCK_M]), (1, 2, 0))
        gate_CM, up_CM = tl.split(halves)
        acc_NM = gate_CM / (1.0 + tl.exp(-gate_CM)) * up_CM
    if stream_NM is not None:
        acc_NM += stream_NM
    valid_CM = (columns_C < num_columns)[:, None] & valid_M[None, :]
    out_CM = acc_NM.to(out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + rows_M[None, :] * stride_out_m + columns_C[:, None]
    tl.store(out_ptrs, out_CM, mask=valid_CM)
    if square_sums_ptr is not None:
        exact_CM = out_CM.to(tl.float32)
        if values_ptr is not None:
            values_ptrs = values_ptr + rows_M[None, :] * num_columns + columns_C[:, None]
            tl.store(values_ptrs, exact_CM.to(values_ptr.dtype.element_ty), mask=valid_CM)
        squares = tl.reshape(exact_CM * exact_CM, [BLOCK_N // PER_SUM, PER_SUM, BLOCK_M])
        num_sums = num_columns // PER_SUM
        sums_Q = tl.program_id(0) * (BLOCK_N // PER_SUM) + tl.arange(0, BLOCK_N // PER_SUM)
        sums_ptrs = square_sums_ptr + rows_M[None, :] * num_sums + sums_Q[:, None]
        valid_QM = (sums_Q < num_sums)[:, None] & valid_M[None, :]
        tl.store(sums_ptrs, tl.sum(squares, axis=1), mask=valid_QM)


@triton.jit
def _partial_ptrs(
    partial_ptr, split, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr
):
    """Where one part of this program's tile keeps its sums."""
    tile = tl.program_id(0).to(tl.int64) * SPLIT_K + split
    inner_NM = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    return partial_ptr + tile * (BLOCK_N * BLOCK_M) + inner_NM


@triton.jit(do_not_specialize=["num_rows", "prefetch_columns"])
def linear_kernel(
    # pointers
    values_ptr, sums_ptr, weight_ptr, out_ptr, out_values_ptr, out_sums_ptr,
    partial_ptr, arrived_ptr,
    # sizes
    num_rows, num_columns, group_columns, group_sums, eps, prefetch_columns,
    # strides
    stride_out_m,
    # meta
    GROUPS: tl.constexpr, SWIGLU: tl.constexpr, PER_SUM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
    SUM_BLOCKS: tl.constexpr, EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr, PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    num_inner = group_columns * GROUPS
    blocks = tl.cdiv(group_columns, BLOCK_K) * GROUPS
    part = tl.cdiv(blocks, SPLIT_K)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, blocks)
    rows_M = tl.arange(0, BLOCK_M).to(tl.int64)
    valid_M = rows_M < num_rows
    BLOCK_C: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    columns_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inner_N = tl.arange(0, BLOCK_N)
    # Past the last row the last one is read again, so that these loads need no mask.
    rows_N = tl.minimum(tl.program_id(0) * BLOCK_C + inner_N % BLOCK_C, num_columns - 1)
    if SWIGLU:
        rows_N += (inner_N // BLOCK_C) * num_columns
    weight_ptrs_N = weight_ptr + rows_N.to(tl.int64) * num_inner
    if PREFETCH:
        first = begin * BLOCK_K
        _prefetch(weight_ptrs_N, first, tl.minimum(first + prefetch_columns, num_inner))
    wait_for_previous(PDL)
    # What is used after the loop is loaded before it, so that nothing waits for it; several blocks
    # of sums would take the loop's registers.
    sums_MQ = None
    sums_ptrs_M = sums_ptr
    if sums_ptr is not None:
        sums_ptrs_M = sums_ptr + rows_M * (group_sums * GROUPS)
        if GROUPS == 1 and SUM_BLOCKS == 1:
            sums_MQ = _load_sums(sums_ptrs_M, valid_M, 0, group_sums, BLOCK_Q)
    stream_NM = None
    if out_sums_ptr is not None:
        stream_ptrs = out_ptr + rows_M[None, :] * stride_out_m + columns_C[:, None]
        valid_NM = (columns_C < num_columns)[:, None] & valid_M[None, :]
        stream_NM = tl.load(stream_ptrs, mask=valid_NM, other=0.0).to(tl.float32)
    acc_NM = _product(
        values_ptr + rows_M * num_inner, valid_M, weight_ptrs_N, sums_ptrs_M, begin, end,
        group_columns, group_sums, eps, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_Q, GROUPS, EVEN_K,
    )  # fmt: skip
    if sums_ptr is not None and GROUPS == 1 and SUM_BLOCKS > 1:
        sums_MQ = _load_sums(sums_ptrs_M, valid_M, 0, group_sums, BLOCK_Q)
        for index in tl.static_range(1, SUM_BLOCKS):
            sums_MQ += _load_sums(sums_ptrs_M, valid_M, index * BLOCK_Q, group_sums, BLOCK_Q)
    last = True
    if SPLIT_K > 1:
        ptrs = _partial_ptrs(partial_ptr, tl.program_id(1), BLOCK_M, BLOCK_N, SPLIT_K)
        tl.store(ptrs, acc_NM)
        # Every thread has stored before one of them says so.
        tl.debug_barrier()
        last = tl.atomic_add(arrived_ptr + tl.program_id(0), 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        if SPLIT_K > 1:
            acc_NM = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
            for split in tl.static_range(SPLIT_K):
                ptrs = _partial_ptrs(partial_ptr, split, BLOCK_M, BLOCK_N, SPLIT_K)
                acc_NM += tl.load(ptrs, cache_modifier=".cg")
            tl.store(arrived_ptr + tl.program_id(0), 0)
        _finish(
            acc_NM, sums_MQ, stream_NM, columns_C, rows_M, valid_M, num_columns, group_columns, eps,
            out_ptr, out_values_ptr, out_sums_ptr, stride_out_m, BLOCK_M, BLOCK_N, SWIGLU, PER_SUM,
        )  # fmt: skip
