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
    advance_states_kernel,
    decays_kernel,
    pass_states_kernel,
    prompt_scan_kernel,
    scores_kernel,
    segment_states_kernel,
)
from stree_kernels.ssm.prompt_scan_ref import PromptTokens
from stree_kernels.ssm.tree_scan import HEAD_DIMS, STATE_DIMS

SEGMENT = 2048
"""Tokens whose chunks one program takes in turn; longer sequences cost two kernels more."""
PASS_BLOCK = 1024
"""Values of a state that one program passes from segment to segment."""
DECAY_HEADS = 16
"""Heads whose time steps one program makes."""


@dataclass(frozen=True, slots=True)
class ChunkConfig:
    """Rows of a chunk, warps of 32 threads for states and for scores, chunks under way."""

    chunk: int
    state_warps: int
    score_warps: int
    num_stages: int


# Never autotuned: the kernels update the state in place, and the order of sums is the chunk's.
CONFIG = ChunkConfig(64, 8, 4, 2)
# Operands of fp32 in shared memory, products on the CUDA cores.
WIDE_CONFIG = ChunkConfig(16, 8, 8, 1)
# fp16 is taken apart into more operands; other compute capabilities were not measured.
SMALL_CONFIG = ChunkConfig(32, 8, 4, 1)


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
    x, _, b, c = tokens
    z, sums = gate
    device, num_tokens, num_sequences = x.device, len(out_MHP), len(packing.slots_S)
    config = pick_config(state_dim, out_MHP.dtype, pdl.capability(device))
    tiles, per_head = num_tiles(num_tokens, num_sequences, SEGMENT), head_dim // block_p
    chunks = num_tiles(num_tokens, num_sequences, config.chunk)
    options: dict[str, Any] = {"num_stages": 1, **launch_options(device)}
    options |= {"CHUNK": config.chunk, "BLOCK_S": triton.next_power_of_2(num_sequences)}
    decays, scores = _decays_and_scores(tokens, heads, packing, dt_limit, options)
    num_groups = scores.shape[1]
    options |= {"HEADS_PER_X": num_heads // x.shape[1], "HEAD_DIM": head_dim}
    options |= {"STATE_DIM": state_dim, "BLOCK_P": block_p, "stride_x_m": x.stride(0)}
    # As the products round it, which read it once.
    narrow = torch.bfloat16 if out_MHP.dtype == torch.bfloat16 else torch.float32
    carried = x.new_empty(chunks, num_heads, state_dim, head_dim, dtype=narrow)
    rows = {
        "HEADS_PER_B": num_heads // b.shape[1], "SEGMENT": SEGMENT, "stride_b_m": b.stride(0),
        "NUM_STAGES": config.num_stages, "num_warps": config.state_warps,
    }  # fmt: skip
    grid = (per_head, num_heads, tiles)
    before = None
    if longest > SEGMENT:
        before = _states_before(state_BHPN, tokens, decays, packing, grid, options | rows)
    kernel = advance_states_kernel[grid](
        state_BHPN, x, b, decays, *packing, before, carried, num_sequences, num_tokens,
        state_BHPN.stride(0), **options, **rows,
    )  # fmt: skip
    prefer_shared(kernel, device, math.prod(grid))
    skip = heads.d_H if heads.d_H.ndim == 2 else heads.d_H[:, None].expand(-1, head_dim)
    kernel = prompt_scan_kernel[per_head, num_heads, chunks](
        x, c, out_MHP, z, sums, skip, decays, scores, carried, packing.offsets_S1, num_sequences,
        num_tokens, *skip.stride(), stride_c_m=c.stride(0), stride_out_m=out_MHP.stride(0),
        stride_z_m=z.stride(0), stride_sums_m=sums.stride(0), HEADS_PER_C=num_heads // c.shape[1],
        HEADS_PER_SCORE=num_heads // num_groups, num_warps=config.score_warps, **options,
    )  # fmt: skip
    prefer_shared(kernel, device, per_head * num_heads * chunks)


def _decays_and_scores(
    tokens: PromptTokens, heads: ScanHeads, packing: Packing, dt_limit: tuple[float, float],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return time steps and log decays [3, H, M], and C B^T by chunk and group of heads."""
    _, dt, b, c = tokens
    num_tokens, num_heads = dt.shape
    num_sequences, chunk = len(packing.slots_S), options["CHUNK"]
    chunks = num_tiles(num_tokens, num_sequences, chunk)
    decays = heads.a_H.new_empty(3, num_heads, num_tokens)
    decays_kernel[chunks, triton.cdiv(num_heads, DECAY_HEADS)](
        dt, heads.a_H, heads.dt_bias_H, packing.offsets_S1, decays, *map(float, dt_limit),
        num_sequences, num_heads, num_tokens, dt.stride(0), BLOCK_H=DECAY_HEADS, num_warps=4,
        **options,
    )  # fmt: skip
    num_groups = math.lcm(b.shape[1], c.shape[1])
    scores = decays.new_empty(chunks, num_groups, chunk, chunk)
    scores_kernel[chunks, num_groups](
        b, c, packing.offsets_S1, scores, num_sequences, b.stride(0), c.stride(0),
        GROUPS_PER_B=num_groups // b.shape[1], GROUPS_PER_C=num_groups // c.shape[1],
        STATE_DIM=b.shape[2], num_warps=4, **options,
    )  # fmt: skip
    return decays, scores


def _states_before(
    state: Tensor, tokens: PromptTokens, decays: Tensor, packing: Packing,
    grid: tuple[int, int, int], options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Return the state before every segment of the sequences that have several."""
    _, num_heads, head_dim, state_dim = state.shape
    tiles, num_sequences, device = grid[2], len(packing.slots_S), state.device
    before = state.new_empty(tiles, num_heads, head_dim, state_dim, dtype=torch.float32)
    decay = before.new_empty(tiles, num_heads)
    kernel = segment_states_kernel[grid](
        tokens.x_MXP, tokens.b_MGN, decays, packing.offsets_S1, before, decay, num_sequences,
        len(tokens.dt_MH), **options,
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
