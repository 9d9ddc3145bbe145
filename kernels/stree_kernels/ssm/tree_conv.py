"""Advance a conv state along an accepted path and convolve a token tree, in one Triton kernel.

The work is that of `tree_conv_ref`. One thread owns one channel of one sequence: it loads the K
state columns, advances and stores them, then convolves the rows against its registers, BLOCK_T rows
at a time. No thread reads what another one writes, and nothing passes through shared memory. The
state is advanced before the wait for the previous kernels: these write neither it nor the previous
step's rows. The ancestors of the first rows are known by then too, so all loads of a tile are
independent of each other.

Shape letters: B batch, R rows of a block buffer, T rows scored by this pass, L path capacity,
C conv channels, E columns of a row (C and those passed on), W conv width, K = W - 1.
"""

# The Triton DSL annotates its constants only and grows tuples in loops.
# mypy: disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.launch.pdl import launch_options, release_next, wait_for_previous
from stree_kernels.launch.rows import (
    FLOATS,
    Pending,
    check_cover,
    require_dtypes,
    require_packed,
    strides,
)
from stree_kernels.launch.shared_memory import match_neighbours

WIDTHS = (2, 3, 4)


@dataclass(frozen=True, slots=True)
class ConvConfig:
    """How a launch is cut: rows of a tile, channels of a program, its warps of 32 threads."""

    block_rows: int
    block_channels: int
    num_warps: int


# Never autotuned: the kernel updates the state in place.
BLOCK_ROWS = (1, 2, 4, 8, 16)
NUM_WARPS = 2


def pick_config(num_tokens: int) -> ConvConfig:
    """Return the config whose tile holds `num_tokens` rows, else the largest."""
    block_rows = next((rows for rows in BLOCK_ROWS if num_tokens <= rows), BLOCK_ROWS[-1])
    return ConvConfig(block_rows, 32 * NUM_WARPS, NUM_WARPS)


@triton.jit
def advance_window(columns, prev_ptr, stride_prev_r, path_ptr, length, channel, exists):
    """The last K of (state columns, rows along the path)."""
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
def _load_sources(ancestors_ptr, start, num_rows, NUM_COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr):
    """The ancestors of BLOCK_T rows, row by row; state columns where there is no such row."""
    sources = ()
    for t in tl.static_range(BLOCK_T):
        for k in tl.static_range(NUM_COLUMNS):
            ptr = ancestors_ptr + (start + t) * NUM_COLUMNS + k
            sources = sources + (tl.load(ptr, mask=start + t < num_rows, other=0),)
    return sources


@triton.jit
def _load_windows(
    inputs_ptr, stride_inputs_r, sources, start, num_rows, channel, in_row, exists,
    NUM_COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The inputs of BLOCK_T rows, each followed by its ancestors'; 0 for those in the state."""
    windows = ()
    for t in tl.static_range(BLOCK_T):
        ptrs = inputs_ptr + tl.cast(start + t, tl.int64) * stride_inputs_r + channel
        windows = windows + (tl.load(ptrs, mask=in_row & (start + t < num_rows), other=0.0),)
        for k in tl.static_range(NUM_COLUMNS):
            row = sources[t * NUM_COLUMNS + k] - NUM_COLUMNS
            ptrs = inputs_ptr + row.to(tl.int64) * stride_inputs_r + channel
            windows = windows + (tl.load(ptrs, mask=exists & (row >= 0), other=0.0),)
    return windows


@triton.jit
def _convolve(window, sources, columns, weights, bias, NUM_COLUMNS: tl.constexpr):
    """bias + the weighted window [C] of one row: its own input, then its ancestors'."""
    total = bias + weights[NUM_COLUMNS] * window[0].to(tl.float32)
    for k in tl.static_range(NUM_COLUMNS):
        value = window[1 + k].to(tl.float32)
        for column in tl.static_range(NUM_COLUMNS):
            value = tl.where(sources[k] == column, columns[column], value)
        total += weights[NUM_COLUMNS - 1 - k] * value
    return total


@triton.jit(do_not_specialize=["first", "num_rows"])
def _tree_conv_kernel(
    # pointers
    state_ptr, inputs_ptr, weight_ptr, bias_ptr, ancestors_ptr, out_ptr,
    prev_ptr, path_ptr, length_ptr,
    # sizes
    num_channels, row_size, first, num_rows,
    # strides
    stride_state_b, stride_inputs_b, stride_out_b, stride_prev_b, stride_path_b,
    stride_inputs_r, stride_out_r, stride_prev_r,
    # meta
    NUM_COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release_next(PDL)
    sequence = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < num_channels
    state_ptrs = state_ptr + sequence * stride_state_b + channel * NUM_COLUMNS
    weight_ptrs = weight_ptr + channel * (NUM_COLUMNS + 1)
    columns, weights = (), ()
    for k in tl.static_range(NUM_COLUMNS):
        column = tl.load(state_ptrs + k, mask=exists, other=0.0)
        columns = columns + (column.to(tl.float32),)
    for k in tl.static_range(NUM_COLUMNS + 1):
        weight = tl.load(weight_ptrs + k, mask=exists, other=0.0)
        weights = weights + (weight.to(tl.float32),)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    if path_ptr is not None:
        columns = advance_window(
            columns, prev_ptr + sequence * stride_prev_b, stride_prev_r,
            path_ptr + sequence * stride_path_b, tl.load(length_ptr + sequence), channel, exists,
        )  # fmt: skip
        for k in tl.static_range(NUM_COLUMNS):
            tl.store(state_ptrs + k, columns[k], mask=exists)
    sources = _load_sources(ancestors_ptr, first, num_rows, NUM_COLUMNS, BLOCK_T)
    in_row = channel < row_size
    inputs_ptr += sequence * stride_inputs_b
    out_ptr += sequence * stride_out_b
    wait_for_previous(PDL)
    for start in range(first, num_rows, BLOCK_T):
        windows = _load_windows(
            inputs_ptr, stride_inputs_r, sources, start, num_rows, channel, in_row, exists,
            NUM_COLUMNS, BLOCK_T,
        )  # fmt: skip
        following = _load_sources(ancestors_ptr, start + BLOCK_T, num_rows, NUM_COLUMNS, BLOCK_T)
        for t in tl.static_range(BLOCK_T):
            window = windows[t * (NUM_COLUMNS + 1) : (t + 1) * (NUM_COLUMNS + 1)]
            own = sources[t * NUM_COLUMNS : (t + 1) * NUM_COLUMNS]
            conv = _convolve(window, own, columns, weights, bias, NUM_COLUMNS)
            result = tl.where(exists, conv / (1.0 + tl.exp(-conv)), window[0].to(tl.float32))
            out_ptrs = out_ptr + tl.cast(start + t, tl.int64) * stride_out_r + channel
            tl.store(out_ptrs, result, mask=in_row & (start + t < num_rows))
        sources = following


def tree_conv(
    state_BCK: Tensor,
    inputs_BRE: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    ancestors_RK: Tensor,
    *,
    first: int,
    num_tokens: int,
    out_BRE: Tensor,
    previous_BRE: Tensor | None,
    pending: Pending | None,
) -> None:
    """Advance the state along `pending`, then convolve rows first..first + num_tokens - 1.

    The contract is that of `tree_conv_ref.tree_conv`, with all in one dtype of `FLOATS`.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    num_rows = first + num_tokens
    path, length = (pending.path_BL, pending.length_B) if pending else (None, None)
    prev = previous_BRE if pending else None
    _check(state_BCK, inputs_BRE, weight_CW, bias_C, ancestors_RK, out_BRE, prev, pending, num_rows)
    batch, num_channels, num_columns = state_BCK.shape
    by_sequence = (state_BCK, inputs_BRE, out_BRE, prev, path)
    steps = strides(by_sequence, 0) + strides((inputs_BRE, out_BRE, prev), 1)
    config = pick_config(num_tokens)
    row_size = inputs_BRE.shape[2]
    grid = (triton.cdiv(row_size, config.block_channels), batch)
    kernel = _tree_conv_kernel[grid](
        state_BCK, inputs_BRE, weight_CW, bias_C, ancestors_RK, out_BRE, prev, path, length,
        num_channels, row_size, first, num_rows, *steps, NUM_COLUMNS=num_columns,
        BLOCK_C=config.block_channels, BLOCK_T=config.block_rows, num_warps=config.num_warps,
        num_stages=1, **launch_options(inputs_BRE.device),
    )  # fmt: skip
    match_neighbours(kernel, inputs_BRE.device, batch * num_tokens)


def _check(
    state: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, ancestors: Tensor, out: Tensor,
    prev: Tensor | None, pending: Pending | None, num_rows: int,
) -> None:  # fmt: skip
    """Raise ValueError for what the kernel cannot take."""
    num_columns = state.shape[2]
    if num_columns + 1 not in WIDTHS or weight.shape[1] != num_columns + 1:
        raise ValueError(
            f"the conv kernel takes widths {WIDTHS}, one more than the state's columns, got "
            f"{weight.shape[1]} and {num_columns}; use the torch backend"
        )
    check_cover(num_rows, inputs.shape[1], out.shape[1], ancestors.shape[0])
    if pending and prev is None:
        raise ValueError("a pending path needs the rows it names, got none; pass `previous_BRE`")
    blocks = (inputs, out) if prev is None else (inputs, out, prev)
    require_dtypes("the state, inputs and output", (state, *blocks), FLOATS)
    indices = (ancestors, *(pending or ()))
    require_dtypes("the ancestors, the path and its length", indices, (torch.int32,))
    require_packed("the state, the weight or the ancestors", (state, weight, ancestors), 2)
    require_packed("a row of inputs or output", (*blocks, bias, *(pending or ())), 1)
