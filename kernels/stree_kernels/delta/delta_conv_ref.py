"""Convolve q, k and v of a token tree, norm q and k, and make the gates, in plain torch.

    q, k <- l2norm(silu(conv(q, k))) for each key head,  v <- silu(conv(v))
    g = A softplus(a + bias),  beta = sigmoid(b)

The conv is that of `tree_conv_ref`. k is rounded here, once: verification and replay see the same.
Source: Gated DeltaNet (arXiv:2412.06464) sec. 3.3; l2norm as in x / sqrt(sum x^2 + NORM_EPS).

Shape letters: B batch, R rows of a block buffer, T rows of this pass, C conv channels (q, k, v),
W conv width, K = W - 1, H value heads, N key head dim, G key heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.delta.rows import NORM_EPS, DeltaHeads
from stree_kernels.launch.rows import Pending
from stree_kernels.ssm.tree_conv_ref import tree_conv
from stree_kernels.ssm.tree_scan_ref import widen


class DeltaProjection(NamedTuple):
    """Rows of a block after the in-projection: q, k and v side by side, and the raw gates."""

    qkv_BRC: Tensor
    a_BRH: Tensor
    b_BRH: Tensor


class DeltaConvOutput(NamedTuple):
    """The same rows after the conv; the log decay g and beta are fp32."""

    qkv_BRC: Tensor
    g_BRH: Tensor
    beta_BRH: Tensor


def delta_conv(
    state_BCK: Tensor,
    inputs: DeltaProjection,
    weight_CW: Tensor,
    heads: DeltaHeads,
    ancestors_RK: Tensor,
    *,
    num_key_heads: int,
    key_head_dim: int,
    first: int,
    num_tokens: int,
    out: DeltaConvOutput,
    previous_BRC: Tensor | None,
    pending: Pending | None,
) -> None:
    """Advance the state along `pending`, then write rows first..first + num_tokens - 1 of `out`.

    Channels are q of all key heads, k of all, then v. State, ancestors and pending rows as in
    `tree_conv_ref.tree_conv`; the conv has no bias. Computes in fp32 at least.
    """
    end = first + num_tokens
    wide = torch.promote_types(inputs.qkv_BRC.dtype, torch.float32)
    convolved_BRC = torch.empty_like(inputs.qkv_BRC, dtype=wide)
    tree_conv(
        state_BCK, inputs.qkv_BRC, weight_CW, weight_CW.new_zeros(len(weight_CW)), ancestors_RK,
        first=first, num_tokens=num_tokens, out_BRE=convolved_BRC, previous_BRE=previous_BRC,
        pending=pending,
    )  # fmt: skip
    num_columns = 2 * num_key_heads * key_head_dim
    rows_BTC = convolved_BRC[:, first:end]
    heads_BTGN = rows_BTC[..., :num_columns].unflatten(-1, (2 * num_key_heads, key_head_dim))
    scale_BTG1 = torch.rsqrt(heads_BTGN.square().sum(3, keepdim=True) + NORM_EPS)
    out.qkv_BRC[:, first:end, :num_columns] = (heads_BTGN * scale_BTG1).flatten(2)
    out.qkv_BRC[:, first:end, num_columns:] = rows_BTC[..., num_columns:]
    a_BTH, b_BTH = (widen(raw[:, first:end]) for raw in (inputs.a_BRH, inputs.b_BRH))
    out.g_BRH[:, first:end] = heads.a_H * functional.softplus(a_BTH + heads.bias_H)
    out.beta_BRH[:, first:end] = torch.sigmoid(b_BTH)
