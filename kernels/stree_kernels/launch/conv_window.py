"""What the kernels that convolve a token tree share: a window's columns, its sources, its sum.

A window is a row's own input and its K nearest ancestors, which are earlier rows of the block or
columns of the conv state (`rows.conv_ancestors`).

Shape letters: T rows, C channels, K columns of the state.
"""

# The Triton DSL annotates its constants only and grows tuples in loops.
# mypy: disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def advance_window(columns, prev_ptr, stride_prev_r, path_ptr, length, channel, exists):
    """The last K of (state columns, rows along the path).

    The path's pointer and length are numbers, or one of each row [T, 1].
    """
    advanced = ()
    for k in tl.static_range(len(columns)):
        entry = k + length - len(columns)
        row = tl.load(path_ptr + entry, mask=entry >= 0, other=0).to(tl.int64)
        kept = tl.load(
            prev_ptr + row * stride_prev_r + channel, mask=exists & (entry >= 0), other=0.0
        ).to(tl.float32)
        for column in tl.static_range(len(columns)):
            kept = tl.where(k + length == column, columns[column], kept)
        advanced = advanced + (kept,)
    return advanced


@triton.jit
def load_sources(ancestors_ptr, rows_T, num_rows, NUM_COLUMNS: tl.constexpr):
    """The ancestors [T, 1] of some rows, nearest first; state columns where there is no row."""
    sources = ()
    for k in tl.static_range(NUM_COLUMNS):
        ptrs = ancestors_ptr + rows_T * NUM_COLUMNS + k
        sources = sources + (tl.load(ptrs, mask=rows_T < num_rows, other=0)[:, None],)
    return sources


@triton.jit
def load_ancestors(
    inputs_ptr, stride_inputs_r, sources, channel_C, exists_C, NUM_COLUMNS: tl.constexpr
):
    """The inputs [T, C] of each ancestor that is a row of the block, else 0."""
    values = ()
    for k in tl.static_range(NUM_COLUMNS):
        row = sources[k] - NUM_COLUMNS
        ptrs = inputs_ptr + row.to(tl.int64) * stride_inputs_r + channel_C
        values = values + (tl.load(ptrs, mask=exists_C & (row >= 0), other=0.0),)
    return values


@triton.jit
def convolve(current, values, sources, columns, weights, bias, NUM_COLUMNS: tl.constexpr):
    """bias + the weighted windows [T, C]: each row's own input, then its ancestors'."""
    total = bias + weights[NUM_COLUMNS] * current
    for k in tl.static_range(NUM_COLUMNS):
        value = values[k].to(tl.float32)
        for column in tl.static_range(NUM_COLUMNS):
            value = tl.where(sources[k] == column, columns[column], value)
        total += weights[NUM_COLUMNS - 1 - k] * value
    return total
