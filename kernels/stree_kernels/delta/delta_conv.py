"""Convolve q, k and v of a token tree, norm q and k, and make the gates, in one Triton kernel.

The work is that of `delta_conv_ref`. A program owns the channels of one head, so that it can norm
what it convolves; the last ones of a sequence make the gates of all heads. As in `tree_conv` the
state is advanced before the wait for the previous kernels.

Shape letters: B batch, R rows of a block buffer, T rows of this pass, L path capacity, C conv
channels (q, k, v), W conv width, K = W - 1, H value heads, N key head dim.
"""

# The Triton DSL annotates its constants only and grows tuples in loops.
# mypy: disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.delta.delta_conv_ref import DeltaConvOutput, DeltaProjection
from stree_kernels.delta.rows import NORM_EPS, DeltaHeads
from stree_kernels.launch.conv_window import advance_window
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
from stree_kernels.ssm.device_functions import load_rows, time_steps
from stree_kernels.ssm.tree_conv import WIDTHS, ConvConfig

HEAD_DIMS = (16, 32, 64, 128)

# Never autotuned: the kernel updates the state in place. A program's channels are a head's.
CONFIGS = (
    ConvConfig(block_rows=1, block_channels=128, num_warps=2),
    ConvConfig(block_rows=16, block_channels=128, num_warps=4),
)


def pick_config(num_tokens: int) -> ConvConfig:
    """Return the config whose tile holds `num_tokens` rows, else the largest."""
    return next((config for config in CONFIGS if num_tokens <= config.block_rows), CONFIGS[-1])


@triton.jit
def _convolve(
    current, rows_T, within, columns, weights, bias, inputs_ptr, stride_inputs_r, ancestors_ptr,
    channel, exists,
):  # fmt: skip
    """bias + the weighted window of each row [T, C], whose own value is `current`."""
    valid = within[:, None] & exists[None, :]
    total = bias[None, :] + weights[len(columns)][None, :] * current
    for k in tl.static_range(len(columns)):
        source = tl.load(ancestors_ptr + rows_T * len(columns) + k, mask=within, other=0)
        row = source - len(columns)
        offsets = row.to(tl.int64)[:, None] * stride_inputs_r + channel[None, :]
        in_block = valid & (row >= 0)[:, None]
        value = tl.load(inputs_ptr + offsets, mask=in_block, other=0.0).to(tl.float32)
        for column in tl.static_range(len(columns)):
            value = tl.where((source == column)[:, None], columns[column][None, :], value)
        total += weights[len(columns) - 1 - k][None, :] * value
    return total


@triton.jit
def _make_gates(
    raw_a, raw_b, g, beta, a_ptr, bias_ptr, start, num_rows, num_heads, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Store the log decay and beta of a tile of rows, all heads."""
    heads_H = tl.arange(0, BLOCK_H)
    exists = heads_H < num_heads
    rows_T = start + tl.arange(0, BLOCK_T)
    valid = (rows_T < num_rows)[:, None] & exists[None, :]
    rate_H = tl.load(a_ptr + heads_H, mask=exists, other=0.0)
    bias_H = tl.load(bias_ptr + heads_H, mask=exists, other=0.0)
    raw_TH = load_rows(raw_a, rows_T, rows_T < num_rows, tl.where(exists, heads_H, 0))
    step_TH = time_steps(raw_TH, (rate_H, bias_H[None, :], 0.0, float("inf")))
    g_ptrs = g[0] + rows_T[:, None] * g[1] + heads_H[None, :]
    tl.store(g_ptrs, step_TH * rate_H[None, :], mask=valid)
    raw_TH = load_rows(raw_b, rows_T, rows_T < num_rows, tl.where(exists, heads_H, 0))
    beta_ptrs = beta[0] + rows_T[:, None] * beta[1] + heads_H[None, :]
    tl.store(beta_ptrs, 1.0 / (1.0 + tl.exp(-raw_TH.to(tl.float32))), mask=valid)


@triton.jit(do_not_specialize=["first", "num_rows"])
def _delta_conv_kernel(
    # pointers
    state_ptr, inputs_ptr, raw_a_ptr, raw_b_ptr, weight_ptr, a_ptr, bias_ptr, ancestors_ptr,
    out_ptr, g_ptr, beta_ptr, prev_ptr, path_ptr, length_ptr,
    # sizes
    num_channels, num_normed, num_heads, eps, first, num_rows,
    # strides
    stride_state_b, stride_inputs_b, stride_raw_a_b, stride_raw_b_b, stride_out_b, stride_g_b,
    stride_beta_b, stride_prev_b, stride_path_b, stride_inputs_r, stride_raw_a_r, stride_raw_b_r,
    stride_out_r, stride_g_r, stride_beta_r, stride_prev_r,
    # meta
    NUM_COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    release_next(PDL)
    sequence = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
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
    if path_ptr is not None:
        columns = advance_window(
            columns, prev_ptr + sequence * stride_prev_b, stride_prev_r,
            path_ptr + sequence * stride_path_b, tl.load(length_ptr + sequence), channel, exists,
        )  # fmt: skip
        for k in tl.static_range(NUM_COLUMNS):
            tl.store(state_ptrs + k, columns[k], mask=exists)
    wait_for_previous(PDL)
    inputs_ptr += sequence * stride_inputs_b
    out_ptr += sequence * stride_out_b
    if block * BLOCK_C < num_channels:
        no_bias = tl.full([BLOCK_C], 0.0, tl.float32)
        for start in range(first, num_rows, BLOCK_T):
            rows_T = start + tl.arange(0, BLOCK_T)
            valid = (rows_T < num_rows)[:, None] & exists[None, :]
            offsets = rows_T.to(tl.int64)[:, None] * stride_inputs_r + channel[None, :]
            current = tl.load(inputs_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
            conv = _convolve(
                current, rows_T, rows_T < num_rows, columns, weights, no_bias, inputs_ptr,
                stride_inputs_r, ancestors_ptr, channel, exists,
            )  # fmt: skip
            conv = conv / (1.0 + tl.exp(-conv))
            if block * BLOCK_C < num_normed:
                conv *= (1.0 / tl.sqrt(tl.sum(conv * conv, axis=1) + eps))[:, None]
            out_ptrs = out_ptr + rows_T.to(tl.int64)[:, None] * stride_out_r + channel[None, :]
            tl.store(out_ptrs, conv, mask=valid)
    else:
        raw_a = (raw_a_ptr + sequence * stride_raw_a_b, stride_raw_a_r)
        raw_b = (raw_b_ptr + sequence * stride_raw_b_b, stride_raw_b_r)
        g = (g_ptr + sequence * stride_g_b, stride_g_r)
        beta = (beta_ptr + sequence * stride_beta_b, stride_beta_r)
        for start in range(first, num_rows, BLOCK_T):
            _make_gates(
                raw_a, raw_b, g, beta, a_ptr, bias_ptr, start, num_rows, num_heads, BLOCK_T, BLOCK_H
            )


def delta_conv(
    state_BCK: Tensor, inputs: DeltaProjection, weight_CW: Tensor, heads: DeltaHeads,
    ancestors_RK: Tensor, *, num_key_heads: int, key_head_dim: int, first: int, num_tokens: int,
    out: DeltaConvOutput, previous_BRC: Tensor | None, pending: Pending | None,
) -> None:  # fmt: skip
    """Advance the state along `pending`, then write rows first..first + num_tokens - 1 of `out`.

    The contract is that of `delta_conv_ref.delta_conv`, with the state, projection and output in
    one dtype of `FLOATS`.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    num_rows = first + num_tokens
    path, length = (pending.path_BL, pending.length_B) if pending else (None, None)
    prev = previous_BRC if pending else None
    num_normed = 2 * num_key_heads * key_head_dim
    _check(state_BCK, inputs, weight_CW, heads, ancestors_RK, out, prev, pending)
    check_cover(num_rows, *(t.shape[1] for t in (*inputs, *out)), len(ancestors_RK))
    batch, num_channels, num_columns = state_BCK.shape
    if key_head_dim not in HEAD_DIMS or num_normed > num_channels:
        raise ValueError(
            f"the delta conv kernel takes key head dims {HEAD_DIMS} and {num_normed} or more "
            f"channels for {num_key_heads} heads of q and k, got {key_head_dim} and "
            f"{num_channels}; use the torch backend"
        )
    by_sequence = (state_BCK, *inputs, *out, prev, path)
    steps = strides(by_sequence, 0) + strides((*inputs, *out, prev), 1)
    config = pick_config(num_tokens)
    num_heads = len(heads.a_H)
    grid = (triton.cdiv(num_channels, key_head_dim) + 1, batch)
    kernel = _delta_conv_kernel[grid](
        state_BCK, *inputs, weight_CW, *heads, ancestors_RK, *out, prev, path, length,
        num_channels, num_normed, num_heads, NORM_EPS, first, num_rows, *steps,
        NUM_COLUMNS=num_columns, BLOCK_C=key_head_dim, BLOCK_T=config.block_rows,
        BLOCK_H=triton.next_power_of_2(num_heads), num_warps=config.num_warps, num_stages=1,
        **launch_options(state_BCK.device),
    )  # fmt: skip
    match_neighbours(kernel, state_BCK.device, batch * num_tokens)


def _check(
    state: Tensor, inputs: DeltaProjection, weight: Tensor, heads: DeltaHeads, ancestors: Tensor,
    out: DeltaConvOutput, prev: Tensor | None, pending: Pending | None,
) -> None:  # fmt: skip
    """Raise ValueError for what the kernel cannot take."""
    num_columns = state.shape[2]
    if num_columns + 1 not in WIDTHS or weight.shape[1] != num_columns + 1:
        raise ValueError(
            f"the conv kernel takes widths {WIDTHS}, one more than the state's columns, got "
            f"{weight.shape[1]} and {num_columns}; use the torch backend"
        )
    if pending and prev is None:
        raise ValueError("a pending path needs the rows it names, got none; pass `previous_BRC`")
    previous = () if prev is None else (prev,)
    indices = (ancestors, *(pending or ()))
    require_dtypes(
        "the state, projection and output", (state, *inputs, out.qkv_BRC, *previous), FLOATS
    )
    require_dtypes("A, its bias and the gates", (*heads, *out[1:]), (torch.float32,))
    require_dtypes("the ancestors, the path and its length", indices, (torch.int32,))
    require_packed("the state, the weight or the ancestors", (state, weight, ancestors), 2)
    require_packed("a row of projection, gates or output", (*inputs, *out, *previous, *heads), 1)
    require_packed("the path", pending or (), 1)
