"""Read packed prompts with a Mamba2 layer's scan: how a launch is cut.

The work is that of `prompt_scan_ref`; the kernels are in `prompt_scan_kernel`.

Shape letters: M packed tokens, S sequences, B slots, H heads, P head dim, N state dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from stree_kernels.launch import pdl
from stree_kernels.launch.packing import Packing, check_packing, num_tiles
from stree_kernels.launch.pdl import launch_options
from stree_kernels.launch.rows import (
    FLOATS,
    Gate,
    ScanHeads,
    gate_width,
    require_dtypes,
    require_packed,
)
from stree_kernels.launch.shared_memory import prefer_shared
from stree_kernels.ssm.prompt_scan_kernel import (
    decays_kernel,
    pass_states_kernel,
    prompt_scan_kernel,
    segment_states_kernel,
)
from stree_kernels.ssm.prompt_scan_ref import PromptTokens
from stree_kernels.ssm.tree_scan import HEAD_DIMS, STATE_DIMS

SEGMENT = 512
"""Tokens that one program takes in turn: few enough that a long prompt fills the GPU."""
PASS_BLOCK = 1024
"""Values of a state that one program passes from segment to segment."""
DECAY_HEADS = 16
"""Heads whose time steps one program makes."""


@dataclass(frozen=True, slots=True)
class ChunkConfig:
    """Rows of a chunk, warps of 32 threads, chunks whose rows are under way, most registers."""

    chunk: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# Never autotuned: the kernel updates the state in place, and the order of sums is the chunk's.
CONFIG = ChunkConfig(64, 8, 1, 255)
# Operands of fp32 in shared memory, products on the CUDA cores.
WIDE_CONFIG = ChunkConfig(16, 8, 1)
# Before compute capability 9.0, and beside states of 256 columns, registers hold less.
SMALL_CONFIG = ChunkConfig(32, 8, 1, 255)


def pick_config(state_dim: int, dtype: torch.dtype, capability: int) -> ChunkConfig:
    """Return the config for rows of a dtype."""
    if dtype == torch.float32:
        return WIDE_CONFIG
    if dtype == torch.float16 or state_dim > 128 or capability != 90:
        return SMALL_CONFIG
    return CONFIG


def prompt_scan(
    state_BHPN: Tensor, tokens: PromptTokens, heads: ScanHeads, packing: Packing, *, longest: int,
    dt_limit: tuple[float, float], out_MHP: Tensor, gate: Gate,
) -> None:  # fmt: skip
    """Advance the states of the sequences' slots by their tokens, and write y of each token.

    The contract is that of `prompt_scan_ref.prompt_scan`, with x, B, C, z and y in one dtype of
    `FLOATS`, sums in fp32. Allocates the states between segments where `longest` is more than one.
    Raises ValueError when a size, dtype or stride is beyond what the kernels take.
    """
    block_p = _check(state_BHPN, tokens, heads, packing, out_MHP, gate)
    _, num_heads, head_dim, state_dim = state_BHPN.shape
    x, dt, b, c = tokens
    z, sums = gate
    device, num_tokens, num_sequences = x.device, len(out_MHP), len(packing.slots_S)
    config = pick_config(state_dim, out_MHP.dtype, pdl.capability(device))
    grid = (head_dim // block_p, num_heads, num_tiles(num_tokens, num_sequences, SEGMENT))
    shared: dict[str, Any] = {"num_stages": 1, **launch_options(device)}
    shared |= {"CHUNK": config.chunk, "BLOCK_S": triton.next_power_of_2(num_sequences)}
    decays = sums.new_empty(3, num_heads, num_tokens)
    chunks = num_tiles(num_tokens, num_sequences, config.chunk)
    decays_kernel[chunks, triton.cdiv(num_heads, DECAY_HEADS)](
        dt, heads.a_H, heads.dt_bias_H, packing.offsets_S1, decays, *map(float, dt_limit),
        num_sequences, num_heads, num_tokens, dt.stride(0), BLOCK_H=DECAY_HEADS, num_warps=4,
        **shared,
    )  # fmt: skip
    shared |= {
        "HEADS_PER_X": num_heads // x.shape[1], "HEADS_PER_B": num_heads // b.shape[1],
        "HEAD_DIM": head_dim, "STATE_DIM": state_dim, "BLOCK_P": block_p, "SEGMENT": SEGMENT,
        "NUM_STAGES": config.num_stages, "num_warps": config.num_warps, "stride_x_m": x.stride(0),
        "stride_b_m": b.stride(0),
    }  # fmt: skip
    before = None
    if longest > SEGMENT:
        before = _states_before(state_BHPN, tokens, decays, packing, grid, shared)
    if config.max_registers is not None:
        shared["maxnreg"] = config.max_registers
    skip = heads.d_H if heads.d_H.ndim == 2 else heads.d_H[:, None].expand(-1, head_dim)
    kernel = prompt_scan_kernel[grid](
        state_BHPN, x, b, c, out_MHP, z, sums, skip, decays, *packing, before, num_sequences,
        num_tokens, state_BHPN.stride(0), *skip.stride(), stride_c_m=c.stride(0),
        stride_out_m=out_MHP.stride(0), stride_z_m=z.stride(0), stride_sums_m=sums.stride(0),
        HEADS_PER_C=num_heads // c.shape[1], **shared,
    )  # fmt: skip
    prefer_shared(kernel, device, math.prod(grid))


def _states_before(
    state: Tensor, tokens: PromptTokens, decays: Tensor, packing: Packing,
    grid: tuple[int, int, int], shared: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Return the state before every segment of the sequences that have several."""
    _, num_heads, head_dim, state_dim = state.shape
    tiles, num_sequences, device = grid[2], len(packing.slots_S), state.device
    before = state.new_empty(tiles, num_heads, head_dim, state_dim, dtype=torch.float32)
    decay = before.new_empty(tiles, num_heads)
    kernel = segment_states_kernel[grid](
        tokens.x_MXP, tokens.b_MGN, decays, packing.offsets_S1, before, decay, num_sequences,
        len(tokens.dt_MH), **shared,
    )  # fmt: skip
    prefer_shared(kernel, device, math.prod(grid))
    size = head_dim * state_dim
    block = min(PASS_BLOCK, size)
    pass_states_kernel[size // block, num_heads, num_sequences](
        state, before, decay, *packing, state.stride(0), STATE_SIZE=size, SEGMENT=SEGMENT,
        BLOCK_X=block, num_warps=4, num_stages=1, **launch_options(device),
    )  # fmt: skip
    return before


def _check(
    state: Tensor, tokens: PromptTokens, heads: ScanHeads, packing: Packing, out: Tensor, gate: Gate
) -> int:
    """Return a program's columns of x; raise ValueError for what the kernels cannot take."""
    _, num_heads, head_dim, state_dim = state.shape
    x, dt, b, c = tokens
    state_dims = STATE_DIMS[:-1] if out.dtype == torch.float32 else STATE_DIMS
    if head_dim not in HEAD_DIMS or state_dim not in state_dims:
        raise ValueError(
            f"in {out.dtype} the scan kernel takes head dims {HEAD_DIMS} and state dims "
            f"{state_dims}, got {head_dim} and {state_dim}; use the torch backend"
        )
    counts = (x.shape[1], b.shape[1], c.shape[1])
    if any(num_heads % count for count in counts):
        raise ValueError(
            f"heads of x and groups of B and C divide heads, got {counts} and {num_heads}; "
            "check the model"
        )
    check_packing(packing)
    blocks = (x, b, c, out, gate.z_BTHP)
    require_dtypes("x, B, C, z and the output", blocks, FLOATS)
    require_dtypes("dt and x", (dt, x), FLOATS)
    require_dtypes("the state", (state,), FLOATS)
    require_dtypes(
        "A, D, the bias of dt and sums", (*heads, gate.square_sums_BTQ), (torch.float32,)
    )
    require_packed("the state", (state,), 3)
    require_packed("a row of x, B, C, z or the output", blocks, 2)
    require_packed("a row of dt or sums", (dt, gate.square_sums_BTQ), 1)
    sizes = {len(tensor) for tensor in (*tokens, out, *gate)}
    if len(sizes) > 1:
        raise ValueError(
            f"packed rows are as many as those of the output, {len(out)}, got {sorted(sizes)}; "
            "pass whole buffers"
        )
    block_p = gate_width(head_dim, state_dim, out.dtype)
    num_parts = num_heads * head_dim // block_p
    if gate.square_sums_BTQ.shape[1] != num_parts:
        raise ValueError(
            f"the kernel adds the squares of {block_p} columns at a time, {num_parts} sums a row, "
            f"got {gate.square_sums_BTQ.shape[1]}; take `gate_width` columns for each"
        )
    return block_p
