"""The conv of a token tree behind the product of an in-projection, in the same kernel.

A program of a projection of few rows owns some of its columns for all rows of all slots, so the
windows of its channels are its own: it advances their conv state before the wait for the previous
kernels, stores the product, and convolves what it has stored. What it does is the work of
`ssm.tree_conv_ref` on the columns from `first_column` on.

Shape letters: M rows, C columns of a program, K columns of the state, R rows of a block buffer,
E columns of a row, W = K + 1, B slots. Rows are time-major: row m is of slot m % B.
"""

# The Triton DSL annotates its constants only and grows tuples in loops.
# mypy: disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from stree_kernels.launch.conv_window import (
    advance_window,
    convolve,
    load_ancestors,
    load_sources,
)
from stree_kernels.launch.rows import ConvTail, strides


@triton.jit
def begin_conv(
    conv, first, num_rows, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, NUM_COLUMNS: tl.constexpr
):
    """Advance the state of a program's channels; return what its rows' windows need of it."""
    (
        state_ptr, _, weight_ptr, bias_ptr, ancestors_ptr, _, prev_ptr, path_ptr, length_ptr,
        first_column, num_channels, _, num_slots, stride_state_b, _, _, stride_prev_b,
        stride_path_b, _, _, stride_prev_r,
    ) = conv  # fmt: skip
    rows_M = tl.arange(0, BLOCK_M)
    slot_M1 = (rows_M % num_slots).to(tl.int64)[:, None]
    channel_C = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C) - first_column)[None, :]
    exists_C = (channel_C >= 0) & (channel_C < num_channels)
    state_ptrs = state_ptr + slot_M1 * stride_state_b + channel_C * NUM_COLUMNS
    columns, weights = (), ()
    for k in tl.static_range(NUM_COLUMNS):
        column = tl.load(state_ptrs + k, mask=exists_C, other=0.0)
        columns = columns + (column.to(tl.float32),)
    for k in tl.static_range(NUM_COLUMNS + 1):
        ptrs = weight_ptr + channel_C * (NUM_COLUMNS + 1) + k
        weights = weights + (tl.load(ptrs, mask=exists_C, other=0.0).to(tl.float32),)
    bias_C = tl.load(bias_ptr + channel_C, mask=exists_C, other=0.0).to(tl.float32)
    if path_ptr is not None:
        columns = advance_window(
            columns, prev_ptr + slot_M1 * stride_prev_b, stride_prev_r,
            path_ptr + slot_M1 * stride_path_b, tl.load(length_ptr + slot_M1), channel_C, exists_C,
        )  # fmt: skip
        # Rows of one slot have loaded the same columns; one of them stores.
        tl.debug_barrier()
        for k in tl.static_range(NUM_COLUMNS):
            tl.store(state_ptrs + k, columns[k], mask=exists_C & (rows_M < num_slots)[:, None])
    # Rows past the last one read no source: their time is past the end too.
    sources = load_sources(
        ancestors_ptr, first + rows_M // num_slots, first + num_rows // num_slots, NUM_COLUMNS
    )
    return columns, weights, bias_C, sources


@triton.jit
def finish_conv(
    conv, window, first, num_rows, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Convolve the rows that this program has stored."""
    (
        _, inputs_ptr, _, _, _, out_ptr, _, _, _, first_column, num_channels, row_size, num_slots,
        _, stride_inputs_b, stride_out_b, _, _, stride_inputs_r, stride_out_r, _,
    ) = conv  # fmt: skip
    columns, weights, bias_C, sources = window
    # A barrier makes what its threads have stored visible to all of them.
    tl.debug_barrier()
    rows_M = tl.arange(0, BLOCK_M)
    slot_M1 = (rows_M % num_slots).to(tl.int64)[:, None]
    row_M1 = (first + rows_M // num_slots).to(tl.int64)[:, None]
    column_C = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    channel_C = column_C - first_column
    exists_C = (channel_C >= 0) & (channel_C < num_channels)
    valid_MC = (rows_M < num_rows)[:, None] & (channel_C >= 0) & (channel_C < row_size)
    inputs_ptrs = inputs_ptr + slot_M1 * stride_inputs_b
    current = tl.load(
        inputs_ptrs + row_M1 * stride_inputs_r + channel_C, mask=valid_MC, other=0.0
    ).to(tl.float32)
    values = load_ancestors(inputs_ptrs, stride_inputs_r, sources, channel_C, exists_C, NUM_COLUMNS)
    total = convolve(current, values, sources, columns, weights, bias_C, NUM_COLUMNS)
    result = tl.where(exists_C, total / (1.0 + tl.exp(-total)), current)
    out_ptrs = out_ptr + slot_M1 * stride_out_b + row_M1 * stride_out_r + channel_C
    tl.store(out_ptrs, result, mask=valid_MC)


def conv_arguments(conv: ConvTail | None) -> tuple[tuple[Any, ...] | None, int, int]:
    """Return what a projection's kernel takes of a conv: tensors and sizes, `first`, and K."""
    if conv is None:
        return None, 0, 0
    path, length = (conv.pending.path_BL, conv.pending.length_B) if conv.pending else (None, None)
    prev = conv.previous_BRE if conv.pending else None
    num_slots, num_channels, num_columns = conv.state_BCK.shape
    by_slot = (conv.state_BCK, conv.inputs_BRE, conv.out_BRE, prev, path)
    values = (
        conv.state_BCK, conv.inputs_BRE, conv.weight_CW, conv.bias_C, conv.ancestors_RK,
        conv.out_BRE, prev, path, length, conv.first_column, num_channels,
        conv.inputs_BRE.shape[2], num_slots, *strides(by_slot, 0),
        *strides((conv.inputs_BRE, conv.out_BRE, prev), 1),
    )  # fmt: skip
    return values, conv.first, num_columns
