"""Replay an accepted path and score a token tree with a Mamba2 layer's scan, in plain torch.

    c_i = sum_j M_ij d_j A
    y_i = exp(c_i) C_i S^T + sum_j M_ij exp(c_i - c_j) d_j (C_i . B_j) x_j + D x_i
    S  <- exp(sum_m d_m A) S + sum_m exp(sum_{l>m} d_l A) d_m x_m B_m^T        (m, l on the path)

with d = softplus(dt + dt_bias) clamped to `dt_limit`. It is the CPU's decode path and what the
Triton kernel is compared with, so it is vectorised; tests compare it with a loop over nodes.
Source: Mamba-2 (arXiv:2405.21060) sec. 6; tree form: STree (arXiv:2505.14969).

Shape letters: B batch, R rows of a block buffer, E its rows up to the last one scored, T rows
scored by this pass, L path capacity, H heads, P head dim, N state dim, G groups, X a group's heads
times P.
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
    state = _widen(state_BHPN)
    if first + c_BTGN.shape[1] == 1:
        y_BHTP = _score_root(state, rows, c_BTGN, heads, dt_limit)
    else:
        y_BHTP = _score_tree(state, rows, c_BTGN, mask_RR, heads, dt_limit, first)
    out_BTHP.copy_(y_BHTP.transpose(1, 2))


def _score_tree(
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

    num_groups = b_BGEN.shape[1]
    score_BGTE = c_BGTN @ b_BGEN.mT
    decay_BHTE = exponent_BHTE.to(state.dtype).exp() * d_BHE[:, :, None]
    weight_BHTE = (decay_BHTE.unflatten(1, (num_groups, -1)) * score_BGTE[:, :, None]).flatten(1, 2)
    carried_BHTP = _state_times(state, c_BGTN)
    y_BHTP: Tensor = path_BHT1.to(state.dtype).exp() * carried_BHTP + weight_BHTE @ x_BHEP
    y_BHTP += heads.d_H.to(state.dtype)[:, None, None] * x_BHEP[:, :, first:]
    return y_BHTP


def _score_root(
    state: Tensor,
    rows: ScanRows,
    c_BTGN: Tensor,
    heads: ScanHeads,
    dt_limit: tuple[float, float],
) -> Tensor:
    """Return y_BHTP of row 0 alone: the same sums of one term, in a third of the torch calls."""
    x_BHTP = rows.x_BRHP[:, :1].to(state.dtype).transpose(1, 2)
    d_BH = _discretised(rows.dt_BRH[:, 0], heads, dt_limit, state.dtype)
    b_BGTN = rows.b_BRGN[:, :1].to(state.dtype).transpose(1, 2)
    c_BGTN = c_BTGN.to(state.dtype).transpose(1, 2)
    group_size = state.shape[1] // b_BGTN.shape[1]
    own_BH = (b_BGTN * c_BGTN).sum((2, 3)).repeat_interleave(group_size, dim=1) * d_BH
    decay_BH = (d_BH * heads.a_H).exp()
    y_BHTP = _state_times(state, c_BGTN) * decay_BH[:, :, None, None]
    y_BHTP += (own_BH + heads.d_H)[:, :, None, None] * x_BHTP
    return y_BHTP


def _state_times(state_BHPN: Tensor, c_BGTN: Tensor) -> Tensor:
    """Return C S^T [B, H, T, P]: one product per group, whose heads share C."""
    groups_BGXN = state_BHPN.unflatten(1, (c_BGTN.shape[1], -1)).flatten(2, 3)
    product_BGXT: Tensor = groups_BGXN @ c_BGTN.mT
    return product_BGXT.view(*state_BHPN.shape[:3], -1).mT


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
    state.mul_(from_here_BLH[:, 0].exp()[..., None, None])
    # In place, sequence by sequence: a fresh buffer of a state's size costs several times the work.
    num_groups, state_dim = b_BLGN.shape[2:]
    weighted_BGXL = weighted_BLHP.view(batch, capacity, num_groups, -1).permute(0, 2, 3, 1)
    for sequence, state_HPN in enumerate(state):
        groups_GXN = state_HPN.view(num_groups, -1, state_dim)
        groups_GXN.baddbmm_(weighted_BGXL[sequence], b_BLGN[sequence].transpose(0, 1))
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
