"""Advance a conv state along an accepted path and convolve a token tree, in plain torch.

A depthwise causal conv, whose window is a node and its nearest ancestors, followed by SiLU. It is
the CPU's decode path and what the Triton kernel is compared with.

Shape letters: B batch, R rows of a block buffer, T rows scored by this pass, L path capacity,
C conv channels, E columns of a row (C and those passed on), W conv width, K = W - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.launch.rows import Pending


def tree_conv(
    state_BCK: Tensor,
    inputs_BRE: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    ancestors_RK: Tensor,
    *,
    first: int,
    num_tokens: int,
    out_BRE: Tensor,
    previous_BRE: Tensor | None,
    pending: Pending | None,
) -> None:
    """Advance the state along `pending`, then convolve rows first..first + num_tokens - 1.

    `state_BCK` holds the last K committed inputs, oldest first; it changes in place, and only with
    `pending`, whose rows are in `previous_BRE`. `ancestors_RK` (int32) is `rows.conv_ancestors`.
    Writes silu(conv) to the same rows of `out_BRE`, and copies the columns behind the first C.
    Computes in fp32 at least.
    """
    if pending is not None:
        assert previous_BRE is not None
        advance_window(state_BCK, previous_BRE, pending)
    dtype = torch.promote_types(inputs_BRE.dtype, torch.float32)
    end = first + num_tokens
    # Column v of the state and row v - K of the block, so that a value of the table is an index.
    num_channels, num_columns = state_BCK.shape[1:]
    sources_BVC = torch.cat((state_BCK.mT, inputs_BRE[:, :end, :num_channels]), dim=1).to(dtype)
    window_BTKC = sources_BVC[:, ancestors_RK[first:end]]
    weight_WC = weight_CW.to(dtype).T.flip(0)
    conv_BTC = sources_BVC[:, num_columns + first :] * weight_WC[0] + bias_C.to(dtype)
    conv_BTC += (window_BTKC * weight_WC[1:]).sum(2)
    out_BRE[:, first:end, :num_channels] = functional.silu(conv_BTC)
    out_BRE[:, first:end, num_channels:] = inputs_BRE[:, first:end, num_channels:]


def advance_window(state_BCK: Tensor, previous_BRE: Tensor, pending: Pending) -> None:
    """Make `state_BCK` the last K of (state, inputs along the pending path), in place."""
    batch, num_channels, num_columns = state_BCK.shape
    sequence_B1 = torch.arange(batch, device=state_BCK.device)[:, None]
    path_BLC = previous_BRE[sequence_B1, pending.path_BL, :num_channels]
    history_BVC = torch.cat((state_BCK.mT, path_BLC), dim=1)
    # The last K of K + length entries start at entry `length`; unused ones stand after them.
    kept_BK = pending.length_B[:, None] + torch.arange(num_columns, device=state_BCK.device)
    state_BCK.copy_(history_BVC[sequence_B1, kept_BK].mT)
