"""Read packed prompts with a Mamba2 layer's scan, chunk after chunk, in plain torch.

The formulas are those of `tree_scan_ref` for a chain, cut into chunks of CHUNK tokens between which
the state is passed on. It is the CPU's path and what the Triton kernels are compared with.
Source: Mamba-2 (arXiv:2405.21060) sec. 6.

Shape letters: M packed tokens, S sequences, B slots, H heads, X heads of x, P head dim,
N state dim, G groups of B or C, Q partial sums of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.launch.packing import Packing
from stree_kernels.launch.rows import Gate, ScanHeads, ScanRows
from stree_kernels.ssm.tree_scan_ref import advanced, score_tree, widen

CHUNK = 64


class PromptTokens(NamedTuple):
    """Packed tokens after the conv; `dt_MH` is raw: before the bias and softplus."""

    x_MXP: Tensor
    dt_MH: Tensor
    b_MGN: Tensor
    c_MGN: Tensor


def prompt_scan(
    state_BHPN: Tensor,
    tokens: PromptTokens,
    heads: ScanHeads,
    packing: Packing,
    *,
    longest: int,
    dt_limit: tuple[float, float],
    out_MHP: Tensor,
    gate: Gate,
) -> None:
    """Advance the states of the sequences' slots by their tokens, and write y of each token.

    No sequence has more than `longest` tokens. y has the skip term and is multiplied by silu(z);
    `gate` (its tensors [M, H, P] and [M, Q]) takes the sums of its squares. Computes in the state's
    dtype, in fp32 at least.
    """
    offsets, slots, starts = (table.tolist() for table in packing)
    for sequence, slot in enumerate(slots):
        begin, end = offsets[sequence : sequence + 2]
        if begin == end:
            continue
        state = widen(state_BHPN[slot : slot + 1])
        if not starts[sequence]:
            state = torch.zeros_like(state)
        for start in range(begin, end, CHUNK):
            here = slice(start, min(start + CHUNK, end))
            state = _read_chunk(state, tokens, heads, here, dt_limit, out_MHP, gate)
        state_BHPN[slot] = state[0]


def _read_chunk(
    state: Tensor, tokens: PromptTokens, heads: ScanHeads, here: slice,
    dt_limit: tuple[float, float], out_MHP: Tensor, gate: Gate,
) -> Tensor:  # fmt: skip
    """Write y of one chunk's tokens; return the state after them."""
    x, dt, b, c = (tensor[None, here] for tensor in tokens)
    rows, length = ScanRows(x, dt, b), x.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    y_HTP = score_tree(state, rows, c, causal, heads, dt_limit, 0)[0]
    y_THP = y_HTP.transpose(0, 1) * functional.silu(gate.z_BTHP[here].to(state.dtype))
    runs_TQX = y_THP.flatten(1).unflatten(1, (gate.square_sums_BTQ.shape[1], -1))
    gate.square_sums_BTQ[here] = runs_TQX.square().sum(2).to(gate.square_sums_BTQ.dtype)
    out_MHP[here] = y_THP.to(out_MHP.dtype)
    total_B = torch.full((1,), length, device=x.device)
    return advanced(state, rows, total_B, heads, dt_limit)
