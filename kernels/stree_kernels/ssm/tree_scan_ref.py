"""Score a token tree with a Mamba2 layer's scan, and commit accepted tokens, in plain torch.

    c_i = sum_j M_ij d_j A
    y_i = exp(c_i) C_i S^T + sum_j M_ij exp(c_i - c_j) d_j (C_i . B_j) x_j + D x_i
    S  <- exp(sum_m d_m A) S + sum_m exp(sum_{l>m} d_l A) d_m x_m B_m^T        (m, l accepted)

with d = softplus(dt + dt_bias) clamped to `dt_limit`. It is the CPU's decode path and what the
Triton kernel is compared with, so it is vectorised; tests compare it with a loop over nodes.
Source: Mamba-2 (arXiv:2405.21060) sec. 6; tree form: STree (arXiv:2505.14969).

Shape letters: B batch, R rows of a buffer, E a block's rows up to the last one scored, T rows
scored by this pass, L accepted rows (buffered ones and a path), H heads, X heads of x, P head dim,
N state dim, G groups of B or C, Q partial sums of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.launch.rows import MAX_BUFFERED, Gate, Past, Pending, ScanHeads, ScanRows


def tree_scan(
    state_BHPN: Tensor,
    rows: ScanRows,
    c_BTGN: Tensor,
    mask_RR: Tensor,
    heads: ScanHeads,
    *,
    first: int,
    dt_limit: tuple[float, float],
    out_BTHP: Tensor,
    gate: Gate | None,
    past: Past,
) -> None:
    """Score rows first..first + T - 1 after all accepted tokens of `past`, and commit these.

    `mask_RR` (bool) is True where the column is the row's ancestor or the row itself; its columns
    are filled up with False to a multiple of MASK_MULTIPLE. Writes y, with the skip term, to
    `out_BTHP`; with `gate` times silu(z), and then its sums of squares. `past` says when
    `state_BHPN` changes. Computes in the state's dtype, in fp32 at least.
    """
    state = widen(state_BHPN)
    num_buffered_B, length_B = past.pending.num_buffered_B, past.pending.length_B
    fits_B = num_buffered_B + length_B <= MAX_BUFFERED
    # Without `commit`, rows that did not fit are in the state already.
    total_B = num_buffered_B + length_B if past.commit else (num_buffered_B + length_B) * fits_B
    source_BL = accepted_sources(past.start, past.pending)
    sequence_B1 = torch.arange(len(total_B), device=state.device)[:, None]
    accepted = ScanRows(*(tensor[sequence_B1, source_BL] for tensor in past.rows))
    state = advanced(state, accepted, total_B, heads, dt_limit)
    if past.commit:
        state_BHPN.copy_(torch.where(fits_B[:, None, None, None], state_BHPN, state))
        # Rounded as stored, where it is.
        state = torch.where(fits_B[:, None, None, None], state, widen(state_BHPN))
        keep_accepted(past.rows, past.pending, accepted, fits_B)
    if first + c_BTGN.shape[1] == 1:
        y_BHTP = _score_root(state, rows, c_BTGN, heads, dt_limit)
    else:
        y_BHTP = score_tree(state, rows, c_BTGN, mask_RR, heads, dt_limit, first)
    y_BTHP = y_BHTP.transpose(1, 2)
    if gate is not None:
        y_BTHP = y_BTHP * functional.silu(gate.z_BTHP.to(state.dtype))
        runs_BTQX = y_BTHP.flatten(2).unflatten(2, (gate.square_sums_BTQ.shape[2], -1))
        gate.square_sums_BTQ.copy_(runs_BTQX.square().sum(3))
    out_BTHP.copy_(y_BTHP)


def accepted_sources(start: int, pending: Pending) -> Tensor:
    """Return the rows [B, L] that hold the accepted tokens: buffered ones, then the path's.

    Entry v of the path is row `start + v`.
    """
    path_BL, _, num_buffered_B = pending
    position_L = torch.arange(MAX_BUFFERED + path_BL.shape[1], device=path_BL.device)
    entry_BL = position_L - num_buffered_B[:, None]
    in_path_BL = path_BL.gather(1, entry_BL.clamp(0, path_BL.shape[1] - 1))
    return torch.where(entry_BL >= 0, start + in_path_BL, position_L)


def keep_accepted(
    rows: Sequence[Tensor], pending: Pending, accepted: Sequence[Tensor], fits_B: Tensor
) -> None:
    """Move the path's rows behind the buffered ones where all fit."""
    position_K = torch.arange(MAX_BUFFERED, device=fits_B.device)
    total_B = pending.num_buffered_B + pending.length_B
    moved_BK = fits_B[:, None] & (position_K < total_B[:, None])
    for rows_BR, accepted_BL in zip(rows, accepted, strict=True):
        moved = moved_BK.view(*moved_BK.shape, *[1] * (rows_BR.ndim - 2))
        kept = torch.where(moved, accepted_BL[:, :MAX_BUFFERED], rows_BR[:, :MAX_BUFFERED])
        rows_BR[:, :MAX_BUFFERED] = kept


def advanced(
    state: Tensor,
    accepted: ScanRows,
    total_B: Tensor,
    heads: ScanHeads,
    dt_limit: tuple[float, float],
) -> Tensor:
    """Return the state after the first `total_B` of the accepted rows."""
    x_BLHP, dt_BLH, b_BLGN = accepted
    batch, num_accepted, num_groups, _ = b_BLGN.shape
    unused_BL = torch.arange(num_accepted, device=state.device) >= total_B[:, None]
    # Entries behind the last may be rows that nothing has written, NaN included: no product with 0.
    d_BLH = _discretised(dt_BLH, heads, dt_limit, state.dtype)
    d_BLH = d_BLH.masked_fill(unused_BL[:, :, None], 0)
    x_BLHP = _spread(x_BLHP, state).masked_fill(unused_BL[:, :, None, None], 0)
    b_BLGN = b_BLGN.to(state.dtype).masked_fill(unused_BL[:, :, None, None], 0)

    # Sums from the far end, not differences of sums from the near one, which lose digits.
    from_here_BLH = (d_BLH * heads.a_H.to(state.dtype)).flip(1).cumsum(1).flip(1)
    after_here_BLH = functional.pad(from_here_BLH[:, 1:], (0, 0, 0, 1))
    weighted_BLHP = x_BLHP * (after_here_BLH.exp() * d_BLH)[..., None]
    weighted_BGXL = weighted_BLHP.reshape(batch, num_accepted, num_groups, -1).permute(0, 2, 3, 1)
    added_BGXN = weighted_BGXL @ b_BLGN.transpose(1, 2)
    decay_BH11 = from_here_BLH[:, 0].exp()[..., None, None]
    return torch.addcmul(added_BGXN.view(state.shape), state, decay_BH11)


def score_tree(
    state: Tensor,
    rows: ScanRows,
    c_BTGN: Tensor,
    mask_RR: Tensor,
    heads: ScanHeads,
    dt_limit: tuple[float, float],
    first: int,
) -> Tensor:
    """Return y_BHTP of rows first..first + T - 1."""
    end = first + c_BTGN.shape[1]
    x_BHEP = _spread(rows.x_BRXP[:, :end], state).transpose(1, 2)
    d_BHE = _discretised(rows.dt_BRH[:, :end], heads, dt_limit, state.dtype).transpose(1, 2)
    b_BGEN = rows.b_BRGN[:, :end].to(state.dtype).transpose(1, 2)
    c_BGTN = c_BTGN.to(state.dtype).transpose(1, 2)
    mask_EE = mask_RR[:end, :end]

    # A difference of two long sums: fp32 would lose digits, and these are small tensors.
    log_decay_BHE = d_BHE.double() * heads.a_H.double()[:, None]
    path_BHE = log_decay_BHE @ mask_EE.T.double()
    path_BHT1 = path_BHE[:, :, first:, None]
    # Outside the mask the exponent may be positive and overflow, so the mask comes before exp.
    exponent_BHTE = (path_BHT1 - path_BHE[:, :, None]).masked_fill(~mask_EE[first:], -torch.inf)

    num_groups = math.lcm(b_BGEN.shape[1], c_BGTN.shape[1])
    score_BGTE = _regroup(c_BGTN, num_groups) @ _regroup(b_BGEN, num_groups).mT
    decay_BHTE = exponent_BHTE.to(state.dtype).exp() * d_BHE[:, :, None]
    weight_BHTE = (decay_BHTE.unflatten(1, (num_groups, -1)) * score_BGTE[:, :, None]).flatten(1, 2)
    carried_BHTP = _state_times(state, c_BGTN)
    y_BHTP: Tensor = path_BHT1.to(state.dtype).exp() * carried_BHTP + weight_BHTE @ x_BHEP
    y_BHTP += _skip(heads, state.dtype) * x_BHEP[:, :, first:]
    return y_BHTP


def _score_root(
    state: Tensor,
    rows: ScanRows,
    c_BTGN: Tensor,
    heads: ScanHeads,
    dt_limit: tuple[float, float],
) -> Tensor:
    """Return y_BHTP of row 0 alone: the same sums of one term, in a third of the torch calls."""
    x_BHTP = _spread(rows.x_BRXP[:, :1], state).transpose(1, 2)
    d_BH = _discretised(rows.dt_BRH[:, 0], heads, dt_limit, state.dtype)
    b_BGTN = rows.b_BRGN[:, :1].to(state.dtype).transpose(1, 2)
    c_BGTN = c_BTGN.to(state.dtype).transpose(1, 2)
    num_groups = math.lcm(b_BGTN.shape[1], c_BGTN.shape[1])
    score_BGTN = _regroup(b_BGTN, num_groups) * _regroup(c_BGTN, num_groups)
    own_BHTN = _regroup(score_BGTN, state.shape[1])
    own_BHTP = own_BHTN.sum(3, keepdim=True) * d_BH[:, :, None, None] + _skip(heads, state.dtype)
    decay_BH = (d_BH * heads.a_H).exp()
    y_BHTP = _state_times(state, c_BGTN) * decay_BH[:, :, None, None]
    y_BHTP += own_BHTP * x_BHTP
    return y_BHTP


def _regroup(tensor_BGTN: Tensor, num_groups: int) -> Tensor:
    """Return the tensor with each group repeated so that there are `num_groups`."""
    repeats = num_groups // tensor_BGTN.shape[1]
    return tensor_BGTN if repeats == 1 else tensor_BGTN.repeat_interleave(repeats, dim=1)


def _skip(heads: ScanHeads, dtype: torch.dtype) -> Tensor:
    """Return D as a factor of [H, T, P]."""
    return heads.d_H.to(dtype).view(len(heads.d_H), 1, -1)


def _state_times(state_BHPN: Tensor, c_BGTN: Tensor) -> Tensor:
    """Return C S^T [B, H, T, P]: one product per group, whose heads share C."""
    groups_BGXN = state_BHPN.unflatten(1, (c_BGTN.shape[1], -1)).flatten(2, 3)
    product_BGXT: Tensor = groups_BGXN @ c_BGTN.mT
    return product_BGXT.view(*state_BHPN.shape[:3], -1).mT


def _spread(x: Tensor, state_BHPN: Tensor) -> Tensor:
    """Return x, whose last dimensions are [X, P], for every head, in the state's dtype."""
    repeats = state_BHPN.shape[1] // x.shape[-2]
    wide = x.to(state_BHPN.dtype)
    return wide if repeats == 1 else wide.repeat_interleave(repeats, dim=-2)


def widen(state: Tensor) -> Tensor:
    """Return the state in the dtype to compute in: float64 stays, anything else becomes fp32."""
    return state if state.dtype == torch.float64 else state.float()


def _discretised(
    dt: Tensor, heads: ScanHeads, dt_limit: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """Return d, the time step of each token and head, from raw dt whose last dimension is H."""
    return functional.softplus(dt.to(dtype) + heads.dt_bias_H.to(dtype)).clamp(*dt_limit)
