"""Score a token tree with a gated delta layer's scan, and commit accepted tokens, in plain torch.

    S_i = a_i S_p (I - b_i k_i k_i^T) + b_i v_i k_i^T,  o_i = S_i q_i / sqrt(N),  p the parent of i

With a_i = exp(g_i), c_i the sum of g from the root to i, and u_i = b_i (v_i - a_i S_p k_i):

    u_i + b_i sum_{j<i} exp(c_i - c_j) (k_i . k_j) u_j = b_i (v_i - exp(c_i) S k_i)
    o_i = (exp(c_i) S q_i + sum_{j<=i} exp(c_i - c_j) (q_i . k_j) u_j) / sqrt(N)
    S  <- exp(sum_m g_m) S + sum_m exp(sum_{l>m} g_l) u_m k_m^T               (m, l accepted)

where j < i are i's ancestors: a triangular system, since parents come before their children. u of
a row depends on its ancestors alone, so what was solved for is what replay needs.
Source: Gated DeltaNet (arXiv:2412.06464) sec. 3.3; Kimi Linear (arXiv:2510.26692) for a decay of
each channel of k: g [B, R, H, N], c likewise, and exp(c_i - c_j) inside the products.

Shape letters: B batch, R rows of a buffer, E a block's rows up to the last one scored, T rows
scored by this pass, L accepted rows (buffered ones and a path), H value heads, P value head dim,
N key head dim, G key heads, X decays of a head (1 or N), Q partial sums of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.delta.rows import DeltaPast, DeltaRows, DeltaTokens
from stree_kernels.launch.rows import MAX_BUFFERED, Gate
from stree_kernels.ssm.tree_scan_ref import accepted_sources, keep_accepted, widen


class _Block(NamedTuple):
    """k and c of a block's rows up to the last one scored, for every value head."""

    k_BHEN: Tensor
    path_BHEX: Tensor
    mask_EE: Tensor


def delta_scan(
    state_BHPN: Tensor,
    rows: DeltaRows,
    tokens: DeltaTokens,
    mask_RR: Tensor,
    *,
    first: int,
    out_BTHP: Tensor,
    gate: Gate | None,
    past: DeltaPast,
) -> None:
    """Score rows first..first + T - 1 after all accepted tokens of `past`, and commit these.

    `mask_RR` (bool) is True where the column is the row's ancestor or the row itself. Reads u of
    rows 0..first - 1, which earlier passes of this step have scored, and writes that of the rows
    scored. Writes o to `out_BTHP`; with `gate` the sums of squares of o, and o times silu(z): the
    norm comes before the gate, and multiplies a head's columns by one number. `past` says when
    `state_BHPN` changes. Computes in the state's dtype, in fp32 at least.
    """
    state = widen(state_BHPN)
    num_buffered_B, length_B = past.pending.num_buffered_B, past.pending.length_B
    fits_B = num_buffered_B + length_B <= MAX_BUFFERED
    # Without `commit`, rows that did not fit are in the state already.
    total_B = num_buffered_B + length_B if past.commit else (num_buffered_B + length_B) * fits_B
    source_BL = accepted_sources(past.start, past.pending)
    sequence_B1 = torch.arange(len(total_B), device=state.device)[:, None]
    accepted = DeltaRows(*(tensor[sequence_B1, source_BL] for tensor in past.rows))
    state = advanced(state, accepted, total_B)
    if past.commit:
        state_BHPN.copy_(torch.where(fits_B[:, None, None, None], state_BHPN, state))
        # Rounded as stored, where it is.
        state = torch.where(fits_B[:, None, None, None], state, widen(state_BHPN))
        keep_accepted(past.rows, past.pending, accepted, fits_B)
    end = first + tokens.q_BTGN.shape[1]
    block = _block(state, rows, mask_RR[:end, :end])
    u_BHTP, o_BHTP = score_rows(state, tokens, block, rows.u_BRHP[:, :first])
    rows.u_BRHP[:, first:end] = u_BHTP.transpose(1, 2)
    write_output(o_BHTP.transpose(1, 2), out_BTHP, gate)


def advanced(state: Tensor, accepted: DeltaRows, total_B: Tensor) -> Tensor:
    """Return the state after the first `total_B` of the accepted rows."""
    unused_BL = torch.arange(accepted.u_BRHP.shape[1], device=state.device) >= total_B[:, None]
    # Entries behind the last may be rows that nothing has written, NaN included: no product with 0.
    u_BLHP = accepted.u_BRHP.to(state.dtype).masked_fill(unused_BL[:, :, None, None], 0)
    k_BLGN = accepted.k_BRGN.to(state.dtype).masked_fill(unused_BL[:, :, None, None], 0)
    g_BLHX = _per_channel(accepted.g_BRH, 3).to(state.dtype)
    g_BLHX = g_BLHX.masked_fill(unused_BL[:, :, None, None], 0)
    # Sums from the far end, not differences of sums from the near one, which lose digits.
    from_here_BLHX = g_BLHX.flip(1).cumsum(1).flip(1)
    after_here_BLHX = functional.pad(from_here_BLHX[:, 1:], (0, 0, 0, 0, 0, 1))
    weighted_BLHN = _spread(k_BLGN, state) * after_here_BLHX.exp()
    added_BHPN = u_BLHP.permute(0, 2, 3, 1) @ weighted_BLHN.transpose(1, 2)
    return torch.addcmul(added_BHPN, state, from_here_BLHX[:, 0, :, None].exp())


def score_rows(
    state: Tensor, tokens: DeltaTokens, block: _Block, solved_BSHP: Tensor
) -> tuple[Tensor, Tensor]:
    """Return u and o [B, H, T, P] of a block's last T rows; those before them are solved for."""
    num_solved = solved_BSHP.shape[1]
    solved_BHSP = solved_BSHP.to(state.dtype).transpose(1, 2)
    q_BHTN = _spread(tokens.q_BTGN, state).transpose(1, 2)
    v_BHTP = tokens.v_BTHP.to(state.dtype).transpose(1, 2)
    beta_BHT1 = tokens.beta_BTH.to(state.dtype).transpose(1, 2)[..., None]
    k_BHTN, path_BHTX = block.k_BHEN[:, :, num_solved:], block.path_BHEX[:, :, num_solved:]
    decay_BHTX = path_BHTX.exp().to(state.dtype)

    right_BHTP = beta_BHT1 * (v_BHTP - (k_BHTN * decay_BHTX) @ state.mT)
    system_BHTE = beta_BHT1 * _decayed_scores(k_BHTN, path_BHTX, block)
    right_BHTP = right_BHTP - system_BHTE[..., :num_solved] @ solved_BHSP
    u_BHTP: Tensor = torch.linalg.solve_triangular(
        system_BHTE[..., num_solved:], right_BHTP, upper=False, unitriangular=True
    )
    u_BHEP = torch.cat((solved_BHSP, u_BHTP), dim=2)
    o_BHTP = (q_BHTN * decay_BHTX) @ state.mT + _decayed_scores(q_BHTN, path_BHTX, block) @ u_BHEP
    return u_BHTP, o_BHTP * state.shape[3] ** -0.5


def write_output(o_BTHP: Tensor, out_BTHP: Tensor, gate: Gate | None) -> None:
    """Write o, or its sums of squares and o times silu(z)."""
    if gate is not None:
        runs_BTQX = o_BTHP.flatten(-2).unflatten(-1, (gate.square_sums_BTQ.shape[-1], -1))
        gate.square_sums_BTQ.copy_(runs_BTQX.square().sum(-1))
        o_BTHP = o_BTHP * functional.silu(gate.z_BTHP.to(o_BTHP.dtype))
    out_BTHP.copy_(o_BTHP)


def _block(state: Tensor, rows: DeltaRows, mask_EE: Tensor) -> _Block:
    end = len(mask_EE)
    k_BHEN = _spread(rows.k_BRGN[:, :end], state).transpose(1, 2)
    # A difference of two long sums: fp32 would lose digits, and these are small tensors.
    g_BHXE = _per_channel(rows.g_BRH[:, :end], 3).double().permute(0, 2, 3, 1)
    return _Block(k_BHEN, (g_BHXE @ mask_EE.T.double()).mT, mask_EE)


def chain_block(state: Tensor, k_BEGN: Tensor, g_BEH: Tensor) -> _Block:
    """Return the block of rows that follow one another."""
    num_rows = k_BEGN.shape[1]
    mask_EE = torch.ones(num_rows, num_rows, dtype=torch.bool, device=state.device).tril()
    return _block(state, DeltaRows(k_BEGN, k_BEGN, g_BEH), mask_EE)


def _decayed_scores(left_BHTN: Tensor, path_BHTX: Tensor, block: _Block) -> Tensor:
    """Return exp(c_i - c_j) (left_i . k_j) [B, H, T, E], 0 where j is not i nor above it."""
    outside_TE = ~block.mask_EE[-left_BHTN.shape[2] :]
    difference_BHTEX = path_BHTX[:, :, :, None] - block.path_BHEX[:, :, None]
    # Outside the mask the exponent may be positive and overflow, so the mask comes before exp.
    exponent_BHTEX = difference_BHTEX.masked_fill(outside_TE[..., None], -torch.inf)
    decay_BHTEX = exponent_BHTEX.exp().to(left_BHTN.dtype)
    if decay_BHTEX.shape[4] == 1:
        return (left_BHTN @ block.k_BHEN.mT) * decay_BHTEX[..., 0]
    return torch.einsum("bhtn,bhten,bhen->bhte", left_BHTN, decay_BHTEX, block.k_BHEN)


def _per_channel(g: Tensor, num_dims: int) -> Tensor:
    """Return the decay with a last dimension of channels, one for all where there is none."""
    return g[..., None] if g.ndim == num_dims else g


def _spread(x_BTGN: Tensor, state: Tensor) -> Tensor:
    """Return q or k for every value head, in the state's dtype."""
    repeats = state.shape[1] // x_BTGN.shape[2]
    return x_BTGN.to(state.dtype).repeat_interleave(repeats, dim=2)
