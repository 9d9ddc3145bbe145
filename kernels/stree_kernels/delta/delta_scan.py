"""Score a token tree with a gated delta layer's scan: which kernels, how a launch is cut.

The formulas are those of `delta_scan_ref`; the kernels are in `delta_scan_kernel`.

Shape letters: B batch, R rows of a buffer, T rows scored by this pass, H value heads, P value head
dim, N key head dim, G key heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stree_kernels.delta.delta_scan_kernel import (
    delta_scan_kernel,
    delta_solve_kernel,
    delta_token_kernel,
)
from stree_kernels.delta.rows import DeltaPast, DeltaRows, DeltaTokens, check_delta
from stree_kernels.launch import pdl
from stree_kernels.launch.pdl import launch_options
from stree_kernels.launch.rows import Gate, check_cover, gate_width, strides
from stree_kernels.launch.shared_memory import prefer_shared

MAX_ROWS = 256
MAX_BATCH = 65535
HEAD_DIMS = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class DeltaConfig:
    """How a launch is cut: rows of a tile, warps of 32 threads, most registers of a thread.

    With `solve_warps` a kernel of so many warps solves the system of each head beforehand.
    `past_rows` accepted rows enter the state at once.
    """

    block_rows: int
    num_warps: int
    max_registers: int | None = None
    solve_warps: int | None = None
    past_rows: int = 16


# Never autotuned: the kernel updates the state in place, and one choice per size keeps decoding
# reproducible. Each row is (few programs, many), measured on an H200.
CONFIGS = (
    (DeltaConfig(16, 4, None, None, 32), DeltaConfig(16, 4, 128, None, 32)),
    (DeltaConfig(32, 4), DeltaConfig(32, 4, 168, 4)),
    (DeltaConfig(64, 4, 255, 4),) * 2,
)
# Before compute capability 9.0 tensor cores take both operands from registers: larger tiles would
# not fit there. Sized by `benchmarks/aot.py`, not by timing.
OLDER_CONFIGS = ((DeltaConfig(16, 4),) * 2,)
# What fits compute capability 10.0; two warps as in `tree_scan`.
NEWEST_CONFIGS = ((DeltaConfig(64, 4, None, 4),) * 2,)
NEWEST_TOKEN_CONFIG = DeltaConfig(1, 2)
# For rows of a block whose earlier rows another pass has scored. Likewise.
LATER_CONFIGS = ((DeltaConfig(32, 4),) * 2,)
FP32_CONFIG = DeltaConfig(16, 8)
TOKEN_CONFIGS = (DeltaConfig(1, 4, None, None, 32), DeltaConfig(1, 4, 128, None, 32))
FEW_PROGRAMS = 400
"""About three on each multiprocessor of an H200."""
BLOCK_EARLIER = 16
"""Rows of a tile of those that another pass has scored."""


def pick_config(
    num_rows: int, first: int, dtype: torch.dtype, num_programs: int, capability: int
) -> DeltaConfig:
    """Return the config for the rows from `first` on, of this dtype, that are left to score."""
    # The trade of registers is known from compute capability 9.0 alone; fp16 takes more of them.
    many = capability == 90 and num_programs > FEW_PROGRAMS and dtype != torch.float16
    if num_rows == 1 and first == 0:
        if capability >= 100:
            return NEWEST_TOKEN_CONFIG
        return TOKEN_CONFIGS[many and dtype != torch.float32]
    if dtype == torch.float32:
        return FP32_CONFIG
    configs = CONFIGS if capability >= 90 else OLDER_CONFIGS
    if capability >= 100:
        configs = NEWEST_CONFIGS
    if first > 0 and capability >= 90:
        configs = LATER_CONFIGS
    return next(
        (pair[many] for pair in configs if num_rows <= pair[0].block_rows), configs[-1][many]
    )


def delta_scan(
    state_BHPN: Tensor, rows: DeltaRows, tokens: DeltaTokens, mask_RR: Tensor, *,
    first: int, out_BTHP: Tensor, gate: Gate | None, past: DeltaPast,
) -> None:  # fmt: skip
    """Score rows first..first + T - 1 after all accepted tokens of `past`, and commit these.

    The contract is that of `delta_scan_ref.delta_scan`, with q, k, v, z and o in one dtype of
    `FLOATS` and u, g, beta and sums in fp32. Rows beyond a tile take a launch of their own, and
    allocate where the system is solved beforehand.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    end = first + tokens.q_BTGN.shape[1]
    batch, num_heads, head_dim, state_dim = state_BHPN.shape
    dtype, device = tokens.q_BTGN.dtype, state_BHPN.device
    check_delta(state_BHPN, rows, tokens, mask_RR, out_BTHP, gate, past)
    _check_sizes(state_BHPN, end, past, gate)
    check_cover(end, *(tensor.shape[1] for tensor in rows), *mask_RR.shape)
    num_programs = num_heads * head_dim // gate_width(head_dim, state_dim, dtype) * batch
    start = first
    while start < end:
        config = pick_config(end - start, start, dtype, num_programs, pdl.capability(device))
        part = slice(start - first, start - first + config.block_rows)
        _launch(
            config, state_BHPN, rows, DeltaTokens(*(tensor[:, part] for tensor in tokens)), mask_RR,
            start, out_BTHP[:, part], gate and Gate(*(tensor[:, part] for tensor in gate)), past,
        )  # fmt: skip
        start += config.block_rows
        past = past._replace(commit=False)


def _launch(
    config: DeltaConfig, state: Tensor, rows: DeltaRows, tokens: DeltaTokens, mask: Tensor,
    first: int, out: Tensor, gate: Gate | None, past: DeltaPast,
) -> None:  # fmt: skip
    """Score one tile of rows."""
    num_rows = first + tokens.q_BTGN.shape[1]
    batch, num_heads, head_dim, state_dim = state.shape
    block_p = gate_width(head_dim, state_dim, out.dtype)
    grid = (head_dim // block_p, num_heads, batch)
    z, sums = gate or (None, None)
    pointers = (state, *rows, *tokens, out, z, sums, *past.rows, *past.pending)
    by_sequence = (state, *rows, *tokens, out, z, sums, past.pending.path_BL)
    steps = [*strides(by_sequence, 0), *strides(past.rows, 1)]
    meta: dict[str, Any] = {
        "HEADS_PER_K": num_heads // rows.k_BRGN.shape[2], "HEAD_DIM": head_dim,
        "STATE_DIM": state_dim, "BLOCK_P": block_p, "BLOCK_L": config.past_rows,
        "COMMIT": past.commit, "num_warps": config.num_warps, "num_stages": 1,
        **launch_options(state.device),
    }  # fmt: skip
    if config.max_registers is not None:
        meta["maxnreg"] = config.max_registers
    if num_rows == 1:
        kernel = delta_token_kernel[grid](*pointers, state_dim**-0.5, past.start, *steps, **meta)
    else:
        solved = None
        if config.solve_warps is not None:
            solved = _solve(rows, tokens, mask, num_heads, first, config)
        steps += [*strides((*tokens, out, z, sums), 1), mask.stride(0)]
        kernel = delta_scan_kernel[grid](
            *pointers, mask, solved, state_dim**-0.5, past.start, first, num_rows, *steps,
            BLOCK_T=config.block_rows, BLOCK_J=BLOCK_EARLIER,
            AHEAD=config.block_rows > 16 and first == 0,
            PAIR=_pairs(config, first), EARLIER=first > 0, EXACT=out.dtype == torch.float32, **meta,
        )  # fmt: skip
    prefer_shared(kernel, state.device, grid[0] * num_heads * batch)


def _solve(
    rows: DeltaRows, tokens: DeltaTokens, mask: Tensor, num_heads: int, first: int,
    config: DeltaConfig,
) -> Tensor:  # fmt: skip
    """Return the inverse of every head's system and the weights of u, in two parts each."""
    batch, num_tokens, num_groups, state_dim = tokens.q_BTGN.shape
    size, device = config.block_rows, mask.device
    solved = torch.empty(batch, num_heads, 4, size, size, dtype=torch.bfloat16, device=device)
    inputs = (rows.k_BRGN, rows.g_BRH, tokens.q_BTGN, tokens.beta_BTH)
    kernel = delta_solve_kernel[num_heads, batch](
        *inputs, mask, solved, state_dim**-0.5, first, first + num_tokens, *strides(inputs, 0),
        *strides(inputs, 1), mask.stride(0), HEADS_PER_K=num_heads // num_groups,
        STATE_DIM=state_dim, BLOCK_T=size, PAIR=_pairs(config, first), EARLIER=first > 0,
        num_warps=config.solve_warps, num_stages=1, **launch_options(device),
    )  # fmt: skip
    prefer_shared(kernel, device, num_heads * batch)
    return solved


def _pairs(config: DeltaConfig, first: int) -> bool:
    """Say whether k and q enter a product as one block: larger tiles lack the registers for it."""
    return config.block_rows <= 32 and first == 0


def _check_sizes(state: Tensor, num_rows: int, past: DeltaPast, gate: Gate | None) -> None:
    """Raise ValueError for sizes that the kernels cannot take."""
    batch, num_heads, head_dim, state_dim = state.shape
    if head_dim not in HEAD_DIMS or state_dim not in HEAD_DIMS:
        raise ValueError(
            f"the delta scan kernel takes head dims {HEAD_DIMS}, got {head_dim} of v and "
            f"{state_dim} of k; use the torch backend"
        )
    capacity = past.pending.path_BL.shape[1]
    if max(num_rows, capacity) > MAX_ROWS or batch > MAX_BATCH:
        raise ValueError(
            f"the delta scan kernel takes at most {MAX_ROWS} rows and path entries of "
            f"{MAX_BATCH} sequences, got {num_rows}, {capacity} and {batch}; cut the block"
        )
    block_p = 0 if gate is None else gate_width(head_dim, state_dim, gate.z_BTHP.dtype)
    num_parts = 0 if gate is None else num_heads * head_dim // block_p
    if gate is not None and gate.square_sums_BTQ.shape[2] != num_parts:
        raise ValueError(
            f"the kernel adds the squares of {block_p} columns at a time, {num_parts} sums a row, "
            f"got {gate.square_sums_BTQ.shape[2]}; take `gate_width` columns for each"
        )
