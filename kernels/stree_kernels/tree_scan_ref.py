"""Replay an accepted path and score a token tree with a Mamba2 layer's scan, in plain torch.

    c_i = sum_j M_ij d_j A
    y_i = exp(c_i) C_i S^T + sum_j M_ij exp(c_i - c_j) d_j (C_i . B_j) x_j + D x_i
    S  <- exp(sum_m d_m A) S + sum_m exp(sum_{l>m} d_l A) d_m x_m B_m^T        (m, l on the path)

with d = softplus(dt + dt_bias) clamped to `dt_limit`. It is the CPU's decode path and what the
Triton kernel is compared with, so it is vectorised; tests compare it with a loop over nodes.
Source: Mamba-2 (arXiv:2405.21060) sec. 6; tree form: STree (arXiv:2505.14969).

Shape letters: B batch, R rows of a block buffer, E its rows up to the last one scored, T rows
scored by this pass, L path capacity, H heads, P head dim, N state dim, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.rows import Pending, ScanHeads, ScanRows


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
    previous: ScanRows | None,
    pending: Pending | None,
) -> None:
    """Advance the state along `pending`, then score rows first..first + T - 1 against it.

    `state_BHPN` changes in place, and only with `pending`, whose rows are in `previous`. `mask_RR`
    (bool) is True where the column is the row's ancestor or the row itself. Writes y, with the skip
    term and without gating, to `out_BTHP`. Computes in the state's dtype, in fp32 at least.
    """
    if pending is not None:
        assert previous is not None
        replay(state_BHPN, previous, pending, heads, dt_limit=dt_limit)
    end = first + c_BTGN.shape[1]
    state = _widen(state_BHPN)
    x_BHEP = rows.x_BRHP[:, :end].to(state.dtype).transpose(1, 2)
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

    group_size = state.shape[1] // b_BGEN.shape[1]
    score_BHTE = (c_BGTN @ b_BGEN.mT).repeat_interleave(group_size, dim=1)
    weight_BHTE = score_BHTE * exponent_BHTE.to(state.dtype).exp() * d_BHE[:, :, None]
    c_BHTN = c_BGTN.repeat_interleave(group_size, dim=1)
    y_BHTP = path_BHT1.to(state.dtype).exp() * (c_BHTN @ state.mT) + weight_BHTE @ x_BHEP
    y_BHTP += heads.d_H.to(state.dtype)[:, None, None] * x_BHEP[:, :, first:]
    out_BTHP.copy_(y_BHTP.transpose(1, 2))


def replay(
    state_BHPN: Tensor,
    previous: ScanRows,
    pending: Pending,
    heads: ScanHeads,
    *,
    dt_limit: tuple[float, float],
) -> None:
    """Advance `state_BHPN` in place along the pending path, whose rows are in `previous`."""
    state = _widen(state_BHPN)
    batch, capacity = pending.path_BL.shape
    sequence_B1 = torch.arange(batch, device=state.device)[:, None]
    position_L = torch.arange(capacity, device=state.device)
    unused_BL = position_L >= pending.length_B[:, None]
    x_BLHP, dt_BLH, b_BLGN = (rows[sequence_B1, pending.path_BL] for rows in previous)
    # Entries past the path may be rows that nothing has written, NaN included: no product with 0.
    d_BLH = _discretised(dt_BLH, heads, dt_limit, state.dtype)
    d_BLH = d_BLH.masked_fill(unused_BL[:, :, None], 0)
    x_BLHP = x_BLHP.to(state.dtype).masked_fill(unused_BL[:, :, None, None], 0)
    b_BLGN = b_BLGN.to(state.dtype).masked_fill(unused_BL[:, :, None, None], 0)

    # Sums from the far end, not differences of sums from the near one, which lose digits.
    from_here_BLH = (d_BLH * heads.a_H.to(state.dtype)).flip(1).cumsum(1).flip(1)
    after_here_BLH = functional.pad(from_here_BLH[:, 1:], (0, 0, 0, 1))
    weighted_BLHP = x_BLHP * (after_here_BLH.exp() * d_BLH)[..., None]
    group_size = state.shape[1] // b_BLGN.shape[2]
    b_BLHN = b_BLGN.repeat_interleave(group_size, dim=2)
    update_BHPN = weighted_BLHP.permute(0, 2, 3, 1) @ b_BLHN.transpose(1, 2)
    # In place: fresh buffers of a state's size cost several times the arithmetic.
    state.mul_(from_here_BLH[:, 0].exp()[..., None, None]).add_(update_BHPN)
    if state is not state_BHPN:
        state_BHPN.copy_(state)


def _widen(state: Tensor) -> Tensor:
    """Return the state in the dtype to compute in: float64 stays, anything else becomes fp32."""
    return state if state.dtype == torch.float64 else state.float()


def _discretised(
    dt: Tensor, heads: ScanHeads, dt_limit: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """Return d, the time step of each token and head, from raw dt whose last dimension is H."""
    return functional.softplus(dt.to(dtype) + heads.dt_bias_H.to(dtype)).clamp(*dt_limit)
