"""Multiply unscaled rows by a weight, in plain torch: what the kernels are compared with.

It is also the CPU's path. `one_token` says that every row is another slot's: kernels may choose by
it.

Shape letters: M rows, K columns in, N columns out, D hidden, F MLP inner, X = 2 F if gated, else F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stree_kernels.launch.settings import Activation
from stree_kernels.linear.deferred_norm import DeferredNorm, Residual
from stree_kernels.linear.residual_ref import activated, add_residual, normalised


def linear(
    rows: DeferredNorm, weight_NK: Tensor, out_MN: Tensor, *, one_token: bool = False
) -> None:
    """Write norm(rows) @ weight.T to `out_MN`, in its dtype. Computes in fp32 at least."""
    out_MN.copy_(_product(rows, weight_NK))


def linear_activated(
    rows: DeferredNorm, weight_XK: Tensor, out_MF: Tensor, activation: Activation, *,
    one_token: bool = False,
) -> None:  # fmt: skip
    """Write the activation of norm(rows) @ weight.T to `out_MF`.

    The weight of a gated activation holds the rows of gate, then those of up.
    """
    out_MF.copy_(activated(_product(rows, weight_XK), activation))


def linear_add(
    rows: DeferredNorm, weight_DK: Tensor, residual: Residual, *, eps: float,
    one_token: bool = False,
) -> DeferredNorm:  # fmt: skip
    """Add norm(rows) @ weight.T to the residual stream; all parts of `residual` are written.

    Returns the stream's rows for the next projection, whose norm has this `eps`.
    """
    add_residual(_product(rows, weight_DK), residual)
    return residual.rows(eps)


def _product(rows: DeferredNorm, weight_NK: Tensor) -> Tensor:
    dtype = torch.promote_types(weight_NK.dtype, torch.float32)
    return normalised(rows).to(dtype) @ weight_NK.to(dtype).T
