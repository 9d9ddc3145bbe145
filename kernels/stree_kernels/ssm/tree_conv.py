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

from stree_kernels.launch.conv_window import (
    advance_window,
    convolve,
    load_ancestors,
    load_sources,
)
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
CONFIGS = (
    ConvConfig(block_rows=1, block_channels=128, num_warps=2),
    ConvConfig(block_rows=2, block_channels=128, num_warps=2),
    ConvConfig(block_rows=4, block_channels=64, num_warps=1),
    ConvConfig(block_rows=8, block_channels=64, num_warps=2),
    ConvConfig(block_rows=16, block_channels=64, num_warps=2),
)


# With few programs a thread of several rows is what takes long.
ONE_SLOT_CONFIG = ConvConfig(block_rows=16, block_channels=64, num_warps=4)


def pick_config(num_tokens: int, batch: int) -> ConvConfig:
    """Return the config whose tile holds `num_tokens` rows, else the largest."""
    if batch == 1 and num_tokens > CONFIGS[-2].block_rows:
        return ONE_SLOT_CONFIG
    return next((config for config in CONFIGS if num_tokens <= config.block_rows), CONFIGS[-1])


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
        # Threads of several rows have loaded the same columns; one of them stores.
        tl.debug_barrier()
        for k in tl.static_range(NUM_COLUMNS):
            tl.store(state_ptrs + k, columns[k], mask=exists)
    # What follows is [T, C]: all of it that is known now takes its layout before the wait.
    rows_T = first + tl.arange(0, BLOCK_T)
    sources = load_sources(ancestors_ptr, rows_T, num_rows, NUM_COLUMNS)
    wide_columns, wide_weights = (), ()
    for k in tl.static_range(NUM_COLUMNS):
        wide_columns = wide_columns + (columns[k][None, :],)
    for k in tl.static_range(NUM_COLUMNS + 1):
        wide_weights = wide_weights + (weights[k][None, :],)
    bias_C = bias[None, :]
    channel_C = channel[None, :]
    exists_C = exists[None, :]
    in_row_C = channel_C < row_size
    inputs_ptr += sequence * stride_inputs_b
    out_ptr += sequence * stride_out_b
    wait_for_previous(PDL)
    for _ in range(first, num_rows, BLOCK_T):
        valid = (rows_T < num_rows)[:, None] & in_row_C
        ptrs = inputs_ptr + rows_T.to(tl.int64)[:, None] * stride_inputs_r + channel_C
        current = tl.load(ptrs, mask=valid, other=0.0).to(tl.float32)
        values = load_ancestors(
            inputs_ptr, stride_inputs_r, sources, channel_C, exists_C, NUM_COLUMNS
        )
        following = load_sources(ancestors_ptr, rows_T + BLOCK_T, num_rows, NUM_COLUMNS)
        conv = convolve(current, values, sources, wide_columns, wide_weights, bias_C, NUM_COLUMNS)
        result = tl.where(exists_C, conv / (1.0 + tl.exp(-conv)), current)
        out_ptrs = out_ptr + rows_T.to(tl.int64)[:, None] * stride_out_r + channel_C
        tl.store(out_ptrs, result, mask=valid)
        rows_T += BLOCK_T
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
    check_conv(
        state_BCK, inputs_BRE, weight_CW, bias_C, ancestors_RK, out_BRE, prev, pending, num_rows
    )
    batch, num_channels, num_columns = state_BCK.shape
    by_sequence = (state_BCK, inputs_BRE, out_BRE, prev, path)
    steps = strides(by_sequence, 0) + strides((inputs_BRE, out_BRE, prev), 1)
    config = pick_config(num_tokens, batch)
    row_size = inputs_BRE.shape[2]
    grid = (triton.cdiv(row_size, config.block_channels), batch)
    kernel = _tree_conv_kernel[grid](
        state_BCK, inputs_BRE, weight_CW, bias_C, ancestors_RK, out_BRE, prev, path, length,
        num_channels, row_size, first, num_rows, *steps, NUM_COLUMNS=num_columns,
        BLOCK_C=config.block_channels, BLOCK_T=config.block_rows, num_warps=config.num_warps,
        num_stages=1, **launch_options(inputs_BRE.device),
    )  # fmt: skip
    match_neighbours(
        kernel, inputs_BRE.device, batch * num_tokens, row_size, one_token=num_tokens == 1
    )


def check_conv(
    state: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, ancestors: Tensor, out: Tensor,
    prev: Tensor | None, pending: Pending | None, num_rows: int,
) -> None:  # fmt: skip
    """Raise ValueError for what a kernel that convolves `num_rows` rows of a block cannot take."""
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
