"""Projections by weights that may be in FP8, in plain torch: what the kernels are compared with.

It is also the CPU's path. `one_token` says that every row is another slot's: kernels may choose by
it, the work is the same.

Shape letters: M rows, K columns in, N columns out, D hidden, F MLP inner, X = 2 F if gated, else F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stree_kernels.fp8.scaled_weight import InProjection, Projection, StackedWeight, dense, parts_of
from stree_kernels.launch.settings import Activation
from stree_kernels.linear import linear_ref
from stree_kernels.linear.deferred_norm import DeferredNorm, Residual


def linear(
    rows: DeferredNorm, weight_NK: InProjection, out_MN: Tensor, *, one_token: bool = False
) -> None:
    """Write norm(rows) @ weight.T to `out_MN`, in its dtype. Computes in fp32 at least."""
    if isinstance(weight_NK, StackedWeight):
        for part, out in parts_of(weight_NK, out_MN):
            linear(rows, part, out)
        return
    linear_ref.linear(rows, _wide(weight_NK), out_MN)


def linear_activated(
    rows: DeferredNorm, weight_XK: Projection, out_MF: Tensor, activation: Activation, *,
    one_token: bool = False,
) -> None:  # fmt: skip
    """Write the activation of norm(rows) @ weight.T to `out_MF`.

    The weight of a gated activation holds the rows of gate, then those of up.
    """
    linear_ref.linear_activated(rows, _wide(weight_XK), out_MF, activation)


def linear_add(
    rows: DeferredNorm, weight_DK: Projection, residual: Residual, *, eps: float,
    one_token: bool = False,
) -> DeferredNorm:  # fmt: skip
    """Add norm(rows) @ weight.T to the residual stream; all parts of `residual` are written.

    Returns the stream's rows for the next projection, whose norm has this `eps`.
    """
    return linear_ref.linear_add(rows, _wide(weight_DK), residual, eps=eps)


def _wide(weight: Projection) -> Tensor:
    """Return a weight as a tensor in which no product of a code and its scale is rounded again."""
    return dense(weight, torch.promote_types(weight.dtype, torch.float32))
