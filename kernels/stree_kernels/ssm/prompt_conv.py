"""Convolve packed prompts along their own tokens, in two Triton kernels.

The work is that of `prompt_conv_ref`. A program of the first kernel convolves a tile of one
sequence's tokens, some channels; the second one advances the conv states, which the first reads.

Shape letters: M packed tokens, S sequences, T rows of a tile, B slots, C conv channels,
W conv width, K = W - 1.
"""

# The Triton DSL annotates its constants only and grows tuples in loops.
# mypy: disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.launch.packing import Packing, check_packing, num_tiles
from stree_kernels.launch.pdl import launch_options, wait_for_previous
from stree_kernels.launch.rows import FLOATS, require_dtypes, require_packed
from stree_kernels.launch.tiles import find_tile
from stree_kernels.ssm.tree_conv import WIDTHS, ConvConfig

# Never autotuned: the second kernel updates the state in place.
CONFIG = ConvConfig(block_rows=32, block_channels=128, num_warps=4)
STATE_CHANNELS = 256


@triton.jit
def _prompt_conv_kernel(
    # pointers
    state_ptr, inputs_ptr, weight_ptr, bias_ptr, offsets_ptr, slots_ptr, starts_ptr, out_ptr,
    # sizes
    num_channels, num_sequences,
    # strides
    stride_state_b, stride_inputs_m: tl.constexpr, stride_out_m: tl.constexpr,
    # meta
    NUM_COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    sequence, start, first, end = find_tile(
        offsets_ptr, num_sequences, tl.program_id(0), BLOCK_T, BLOCK_S
    )
    if first < end:
        channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        exists = channel < num_channels
        rows_T = first + tl.arange(0, BLOCK_T)
        valid = (rows_T < end)[:, None] & exists[None, :]
        # Beside the tile's first row, what is added to a pointer are small numbers.
        own_T = tl.arange(0, BLOCK_T)
        inputs_ptr += first.to(tl.int64) * stride_inputs_m
        offsets = own_T[:, None] * stride_inputs_m + channel[None, :]
        weight_ptrs = weight_ptr + channel * (NUM_COLUMNS + 1)
        total = tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
        for k in tl.static_range(NUM_COLUMNS + 1):
            weight = tl.load(weight_ptrs + NUM_COLUMNS - k, mask=exists, other=0.0)
            known = rows_T - k >= start
            value = tl.load(inputs_ptr + offsets, mask=valid & known[:, None], other=0.0)
            total += weight.to(tl.float32)[None, :] * value.to(tl.float32)
            inputs_ptr -= stride_inputs_m
        # Only the first tile of a sequence reaches back into its state.
        if (first == start) & (tl.load(starts_ptr + sequence) > 0):
            slot = tl.load(slots_ptr + sequence).to(tl.int64)
            state_ptrs = state_ptr + slot * stride_state_b + channel[None, :] * NUM_COLUMNS
            for k in tl.static_range(1, NUM_COLUMNS + 1):
                weight = tl.load(weight_ptrs + NUM_COLUMNS - k, mask=exists, other=0.0)
                column_T = NUM_COLUMNS + rows_T - k - start
                before = (rows_T - k < start)[:, None]
                value = tl.load(state_ptrs + column_T[:, None], mask=valid & before, other=0.0)
                total += weight.to(tl.float32)[None, :] * value.to(tl.float32)
        total = total / (1.0 + tl.exp(-total))
        out_ptr += first.to(tl.int64) * stride_out_m
        tl.store(out_ptr + own_T[:, None] * stride_out_m + channel[None, :], total, mask=valid)


@triton.jit
def _window_kernel(
    # pointers
    state_ptr, inputs_ptr, offsets_ptr, slots_ptr, starts_ptr,
    # sizes
    num_channels,
    # strides
    stride_state_b, stride_inputs_m,
    # meta
    NUM_COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Make a slot's state the last K of (state, inputs)."""
    sequence = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < num_channels
    wait_for_previous(PDL)
    start = tl.load(offsets_ptr + sequence)
    length = tl.load(offsets_ptr + sequence + 1) - start
    if length > 0:
        slot = tl.load(slots_ptr + sequence).to(tl.int64)
        goes_on = tl.load(starts_ptr + sequence) > 0
        state_ptrs = state_ptr + slot * stride_state_b + channel * NUM_COLUMNS
        columns = ()
        for k in tl.static_range(NUM_COLUMNS):
            row = length - NUM_COLUMNS + k
            inputs_ptrs = inputs_ptr + (start + row).to(tl.int64) * stride_inputs_m + channel
            value = tl.load(inputs_ptrs, mask=exists & (row >= 0), other=0.0)
            kept = tl.load(state_ptrs + length + k, mask=exists & (row < 0) & goes_on, other=0.0)
            columns = columns + (tl.where(row >= 0, value, kept),)
        for k in tl.static_range(NUM_COLUMNS):
            tl.store(state_ptrs + k, columns[k], mask=exists)


def prompt_conv(
    state_BCK: Tensor, inputs_MC: Tensor, weight_CW: Tensor, bias_C: Tensor, packing: Packing, *,
    out_MC: Tensor,
) -> None:  # fmt: skip
    """Write silu(conv) of every token, and leave in its slot each sequence's last K inputs.

    The contract is that of `prompt_conv_ref.prompt_conv`, with the state, inputs and output in one
    dtype of `FLOATS`. Raises ValueError when a size, dtype or stride is beyond what the kernels
    take.
    """
    _check(state_BCK, inputs_MC, weight_CW, bias_C, packing, out_MC)
    num_channels, num_columns = state_BCK.shape[1:]
    num_sequences, options = len(packing.slots_S), launch_options(inputs_MC.device)
    tiles = num_tiles(len(inputs_MC), num_sequences, CONFIG.block_rows)
    _prompt_conv_kernel[tiles, triton.cdiv(num_channels, CONFIG.block_channels)](
        state_BCK, inputs_MC, weight_CW, bias_C, *packing, out_MC, num_channels, num_sequences,
        state_BCK.stride(0), inputs_MC.stride(0), out_MC.stride(0), NUM_COLUMNS=num_columns,
        BLOCK_C=CONFIG.block_channels, BLOCK_T=CONFIG.block_rows,
        BLOCK_S=triton.next_power_of_2(num_sequences), num_warps=CONFIG.num_warps, num_stages=1,
        **options,
    )  # fmt: skip
    _window_kernel[num_sequences, triton.cdiv(num_channels, STATE_CHANNELS)](
        state_BCK, inputs_MC, *packing, num_channels, state_BCK.stride(0), inputs_MC.stride(0),
        NUM_COLUMNS=num_columns, BLOCK_C=STATE_CHANNELS, num_warps=4, num_stages=1, **options,
    )  # fmt: skip


def _check(
    state: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, packing: Packing, out: Tensor
) -> None:
    """Raise ValueError for what the kernels cannot take."""
    num_channels, num_columns = state.shape[1:]
    if num_columns + 1 not in WIDTHS or weight.shape != (num_channels, num_columns + 1):
        raise ValueError(
            f"the conv kernel takes widths {WIDTHS}, one more than the state's columns, got "
            f"{tuple(weight.shape)} and {num_columns}; use the torch backend"
        )
    if inputs.shape != out.shape or inputs.shape[1] != num_channels:
        raise ValueError(
            f"inputs and output have {num_channels} channels, got {tuple(inputs.shape)} and "
            f"{tuple(out.shape)}; pass one layer's"
        )
    check_packing(packing)
    require_dtypes("the state, inputs and output", (state, inputs, out), FLOATS)
    require_dtypes("the weight and the bias", (weight, bias), FLOATS)
    require_packed("the state or the weight", (state, weight), 2)
    require_packed("a row of inputs or output, or the bias", (inputs, out, bias), 1)
