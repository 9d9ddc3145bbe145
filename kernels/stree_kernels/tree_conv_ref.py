"""Advance a conv state along an accepted path and convolve a token tree, in plain torch.

A depthwise causal conv, whose window is a node and its nearest ancestors, followed by SiLU. It is
the CPU's decode path and what the Triton kernel is compared with.

Shape letters: B batch, R rows of a block buffer, T rows scored by this pass, L path capacity,
C conv channels, W conv width, K = W - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.rows import Pending


def tree_conv(
    state_BCK: Tensor,
    inputs_BRC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    ancestors_RK: Tensor,
    *,
    first: int,
    num_tokens: int,
    out_BRC: Tensor,
    previous_BRC: Tensor | None,
    pending: Pending | None,
) -> None:
    """Advance the state along `pending`, then convolve rows first..first + num_tokens - 1.

    `state_BCK` holds the last K committed inputs, oldest first; it changes in place, and only with
    `pending`, whose rows are in `previous_BRC`. `ancestors_RK` (int32) is `rows.conv_ancestors`.
    Writes silu(conv) to the same rows of `out_BRC`. Computes in fp32 at least.
    """
    if pending is not None:
        assert previous_BRC is not None
        _advance(state_BCK, previous_BRC, pending)
    dtype = torch.promote_types(inputs_BRC.dtype, torch.float32)
    end = first + num_tokens
    # Column v of the state and row v - K of the block, so that a value of the table is an index.
    sources_BVC = torch.cat((state_BCK.mT, inputs_BRC[:, :end]), dim=1).to(dtype)
    window_BTKC = sources_BVC[:, ancestors_RK[first:end]]
    weight_WC = weight_CW.to(dtype).T.flip(0)
    num_columns = state_BCK.shape[2]
    conv_BTC = sources_BVC[:, num_columns + first :] * weight_WC[0] + bias_C.to(dtype)
    conv_BTC += (window_BTKC * weight_WC[1:]).sum(2)
    out_BRC[:, first:end] = functional.silu(conv_BTC)


def _advance(state_BCK: Tensor, previous_BRC: Tensor, pending: Pending) -> None:
    """Make `state_BCK` the last K of (state, inputs along the pending path), in place."""
    batch, _, num_columns = state_BCK.shape
    sequence_B1 = torch.arange(batch, device=state_BCK.device)[:, None]
    path_BLC = previous_BRC[sequence_B1, pending.path_BL]
    history_BVC = torch.cat((state_BCK.mT, path_BLC), dim=1)
    # The last K of K + length entries start at entry `length`; unused ones stand after them.
    kept_BK = pending.length_B[:, None] + torch.arange(num_columns, device=state_BCK.device)
    state_BCK.copy_(history_BVC[sequence_B1, kept_BK].mT)
