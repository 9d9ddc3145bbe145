"""Read prompts with a gated delta layer's scan, chunk after chunk, in plain torch.

The formulas are those of `delta_scan_ref` for a chain, cut into chunks of CHUNK rows: within a
chunk u solves a triangular system, and the state passes from chunk to chunk. It is the CPU's path
and what the Triton kernels are compared with.
Source: Gated DeltaNet (arXiv:2412.06464) sec. 3.3.

Shape letters: M packed tokens, S sequences, B slots, H value heads, P value head dim, N key head
dim, G key heads, Q partial sums of a row.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from stree_kernels.delta.delta_scan_ref import advanced, chain_block, score_rows, write_output
from stree_kernels.delta.rows import DeltaRows, DeltaTokens
from stree_kernels.launch.packing import Packing
from stree_kernels.launch.rows import Gate
from stree_kernels.ssm.tree_scan_ref import widen

CHUNK = 64


class PackedTokens(NamedTuple):
    """Tokens of many prompts side by side: q and k of unit norm, v, log decay and beta in fp32.

    The torch reference takes g [M, H, N] as well: a decay for each channel of k.
    """

    q_MGN: Tensor
    k_MGN: Tensor
    v_MHP: Tensor
    g_MH: Tensor
    beta_MH: Tensor


def delta_chunk_scan(
    state_BHPN: Tensor,
    tokens: PackedTokens,
    packing: Packing,
    *,
    out_MHP: Tensor,
    gate: Gate | None,
) -> None:
    """Advance the states of the slots that sequences go on with, and write o of each token.

    A sequence without tokens leaves its slot as it was. `gate` as in `delta_scan_ref.delta_scan`,
    its tensors [M, H, P] and [M, Q]. Computes in the state's dtype, in fp32 at least.
    """
    offsets, slots, starts = (table.tolist() for table in packing)
    for sequence, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if begin == end:
            continue
        slot = slots[sequence]
        state = widen(state_BHPN[slot : slot + 1])
        if not starts[sequence]:
            state = torch.zeros_like(state)
        for start in range(begin, end, CHUNK):
            here = slice(start, min(start + CHUNK, end))
            state = _read_chunk(state, tokens, here, out_MHP, gate)
        state_BHPN[slot] = state[0]


def _read_chunk(
    state: Tensor, tokens: PackedTokens, here: slice, out_MHP: Tensor, gate: Gate | None
) -> Tensor:
    """Write o of one chunk's tokens; return the state after them."""
    q, k, v, g, beta = (tensor[None, here] for tensor in tokens)
    block = chain_block(state, k, g)
    u_BHTP, o_BHTP = score_rows(state, DeltaTokens(q, v, beta), block, v[:, :0])
    part = gate and Gate(gate.z_BTHP[None, here], gate.square_sums_BTQ[None, here])
    write_output(o_BHTP.transpose(1, 2), out_MHP[None, here], part)
    total = torch.full((1,), k.shape[1], device=state.device)
    return advanced(state, DeltaRows(u_BHTP.transpose(1, 2), k, g), total)
