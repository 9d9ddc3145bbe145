"""Score a token tree with a Mamba2 layer's scan: which kernel, how a launch is cut.

The formulas are those of `tree_scan_ref`; the kernels are `tree_scan_kernel` and, for one row,
`token_scan_kernel`.

Shape letters: B batch, R rows of a buffer, T rows scored by this pass, H heads, P head dim, N state
dim, G groups of C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stree_kernels.launch import pdl
from stree_kernels.launch.pdl import launch_options
from stree_kernels.launch.rows import (
    MAX_BUFFERED,
    Gate,
    Past,
    ScanHeads,
    ScanRows,
    check_cover,
    check_scan,
    gate_width,
    require_row_offsets,
    strides,
)
from stree_kernels.launch.shared_memory import is_streamed, prefer_shared
from stree_kernels.ssm.token_scan_kernel import token_scan_kernel
from stree_kernels.ssm.tree_scan_kernel import tree_scan_kernel

MAX_ROWS = 256
HEAD_DIMS = (16, 32, 64, 128)
STATE_DIMS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class ScanConfig:
    """How a launch is cut: rows of a tile, warps of 32 threads, most registers of a thread."""

    max_rows: int
    max_state_dim: int
    block_rows: int
    num_warps: int
    max_registers: int | None


# Never autotuned: the kernel updates the state in place, and one choice per size keeps decoding
# reproducible. Each row is (few programs, many): with many, one more program on a multiprocessor is
# worth the few values that then go through its cache (measured on an H200).
CONFIGS = (
    (ScanConfig(16, 128, 16, 4, None), ScanConfig(16, 128, 16, 4, 128)),
    (ScanConfig(32, 128, 32, 4, None), ScanConfig(32, 128, 32, 4, 128)),
    (ScanConfig(256, 128, 64, 4, None), ScanConfig(256, 128, 64, 4, 168)),
    (ScanConfig(256, 256, 32, 4, None), ScanConfig(256, 256, 32, 4, None)),
)
# Before compute capability 9.0 tensor cores take both operands from registers: a tile of 64 rows
# would not fit there. Sized by `benchmarks/aot.py`, not by timing.
OLDER_CONFIGS = (
    (ScanConfig(16, 256, 16, 4, None),) * 2,
    (ScanConfig(256, 256, 32, 4, None),) * 2,
)
# Operands beside fp16 are of fp32, so a tile of 64 rows would not fit. All 255 registers are asked
# for: the assembler would rather spill some. Sized by `benchmarks/aot.py`, not by timing.
FP16_CONFIGS = (ScanConfig(16, 256, 16, 4, None), ScanConfig(256, 256, 32, 4, 255))
FP32_CONFIG = ScanConfig(256, 128, 16, 8, None)
TOKEN_CONFIGS = (ScanConfig(1, 256, 1, 4, None), ScanConfig(1, 256, 1, 4, 128))
# Triton 3.7 cannot lay out this kernel's product for the tensor cores of compute capability 10.0;
# two warps do not take those.
NEWEST_TOKEN_CONFIG = ScanConfig(1, 256, 1, 2, None)
FEW_PROGRAMS = 400
"""About three on each multiprocessor of an H200: fewer gain nothing from room for a fourth."""


def pick_config(
    num_rows: int, state_dim: int, dtype: torch.dtype, num_programs: int, capability: int
) -> ScanConfig:
    """Return the config for rows of this number and dtype against this state."""
    # The trade of registers is known from compute capability 9.0 alone.
    many = capability == 90 and num_programs > FEW_PROGRAMS
    if num_rows == 1:
        return NEWEST_TOKEN_CONFIG if capability >= 100 else TOKEN_CONFIGS[many]
    if dtype == torch.float32:
        return FP32_CONFIG
    if dtype == torch.float16:
        return FP16_CONFIGS[num_rows > FP16_CONFIGS[0].max_rows]
    return next(
        pair[many]
        for pair in (CONFIGS if capability >= 90 else OLDER_CONFIGS)
        if num_rows <= pair[0].max_rows and state_dim <= pair[0].max_state_dim
    )


def tree_scan(
    state_BHPN: Tensor, rows: ScanRows, c_BTGN: Tensor, mask_RR: Tensor, heads: ScanHeads, *,
    first: int, dt_limit: tuple[float, float], out_BTHP: Tensor, gate: Gate | None, past: Past,
) -> None:  # fmt: skip
    """Score rows first..first + T - 1 after all accepted tokens of `past`, and commit these.

    The contract is that of `tree_scan_ref.tree_scan`, with all in one dtype of `FLOATS`.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    num_rows = first + c_BTGN.shape[1]
    batch, num_heads, head_dim, state_dim = state_BHPN.shape
    block_p = gate_width(head_dim, state_dim, c_BTGN.dtype)
    _check(state_BHPN, c_BTGN.dtype, num_rows, past, gate, block_p)
    check_scan(state_BHPN, rows, c_BTGN, mask_RR, heads, out_BTHP, gate, past)
    check_cover(num_rows, rows.x_BRXP.shape[1], *mask_RR.shape)
    grid = (head_dim // block_p, num_heads, batch)
    num_programs, device = grid[0] * num_heads * batch, state_BHPN.device
    config = pick_config(num_rows, state_dim, c_BTGN.dtype, num_programs, pdl.capability(device))
    z, sums = gate or (None, None)
    skip = heads.d_H if heads.d_H.ndim == 2 else heads.d_H[:, None].expand(-1, head_dim)
    pointers = (
        state_BHPN, *rows, c_BTGN, out_BTHP, z, sums, heads.a_H, skip, heads.dt_bias_H,
        *past.rows, *past.pending,
    )  # fmt: skip
    by_sequence = (state_BHPN, *past.rows, c_BTGN, out_BTHP, z, sums, past.pending.path_BL)
    steps = [*strides(by_sequence, 0), *strides(past.rows, 1), *skip.stride()]
    limits = (*map(float, dt_limit), past.start)
    meta: dict[str, Any] = {
        "HEADS_PER_X": num_heads // rows.x_BRXP.shape[2],
        "HEADS_PER_B": num_heads // rows.b_BRGN.shape[2],
        "HEADS_PER_C": num_heads // c_BTGN.shape[2],
        "HEAD_DIM": head_dim, "STATE_DIM": state_dim, "BLOCK_P": block_p, "COMMIT": past.commit,
        "num_warps": config.num_warps, "num_stages": 1, **launch_options(device),
    }  # fmt: skip
    if config.max_registers is not None:
        meta["maxnreg"] = config.max_registers
    if num_rows == 1:
        kernel = token_scan_kernel[grid](*pointers, *limits, *steps, **meta)
    else:
        steps += strides((c_BTGN, out_BTHP, z, sums), 1)
        kernel = tree_scan_kernel[grid](
            *pointers, mask_RR, *limits, first, num_rows, *steps, mask_RR.stride(0),
            BLOCK_T=config.block_rows, ONE_TILE=num_rows <= config.block_rows, **meta,
        )  # fmt: skip
    num_tokens = c_BTGN.shape[1]
    streamed = is_streamed(batch * num_tokens, num_heads * head_dim, one_token=num_tokens == 1)
    prefer_shared(kernel, device, num_programs, streamed=streamed)


def _check(
    state: Tensor, dtype: torch.dtype, num_rows: int, past: Past, gate: Gate | None, block_p: int
) -> None:
    """Raise ValueError for sizes that the kernel cannot take."""
    _, num_heads, head_dim, state_dim = state.shape
    state_dims = STATE_DIMS[:-1] if dtype == torch.float32 else STATE_DIMS
    if head_dim not in HEAD_DIMS or state_dim not in state_dims:
        raise ValueError(
            f"in {dtype} the scan kernel takes head dims {HEAD_DIMS} and state dims "
            f"{state_dims}, got {head_dim} and {state_dim}; use the torch backend"
        )
    capacity = past.pending.path_BL.shape[1]
    if max(num_rows, capacity) > MAX_ROWS:
        raise ValueError(
            f"the scan kernel takes at most {MAX_ROWS} rows and path entries, "
            f"got {num_rows} and {capacity}; cut the block"
        )
    require_row_offsets(past.rows)
    if past.rows.x_BRXP.shape[1] < MAX_BUFFERED:
        raise ValueError(
            f"past rows begin with {MAX_BUFFERED} buffered rows; pass the whole buffer"
        )
    num_parts = num_heads * head_dim // block_p
    if gate is not None and gate.square_sums_BTQ.shape[2] != num_parts:
        raise ValueError(
            f"the kernel adds the squares of {block_p} columns at a time, {num_parts} sums a row, "
            f"got {gate.square_sums_BTQ.shape[2]}; take `gate_width` columns for each"
        )
