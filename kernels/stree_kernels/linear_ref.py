"""Multiply unscaled rows by a weight, in plain torch: what the kernels are compared with.

It is also the CPU's path.

Shape letters: M rows, K columns in, N columns out, D hidden, F MLP inner.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.residual_ref import add_residual, normalised
from stree_kernels.unscaled import Residual, UnscaledRows


def linear(rows: UnscaledRows, weight_NK: Tensor, out_MN: Tensor) -> None:
    """Write norm(rows) @ weight.T to `out_MN`, in its dtype. Computes in fp32 at least."""
    out_MN.copy_(_product(rows, weight_NK))


def linear_swiglu(rows: UnscaledRows, weight_2FK: Tensor, out_MF: Tensor) -> None:
    """Write silu(gate) * up to `out_MF`; the weight holds the rows of gate, then those of up."""
    gate_MF, up_MF = _product(rows, weight_2FK).chunk(2, dim=1)
    out_MF.copy_(functional.silu(gate_MF) * up_MF)


def linear_add(
    rows: UnscaledRows, weight_DK: Tensor, residual: Residual, *, eps: float
) -> UnscaledRows:
    """Add norm(rows) @ weight.T to the residual stream; all parts of `residual` are written.

    Returns the stream's rows for the next projection, whose norm has this `eps`.
    """
    add_residual(_product(rows, weight_DK), residual)
    return residual.rows(eps)


def _product(rows: UnscaledRows, weight_NK: Tensor) -> Tensor:
    dtype = torch.promote_types(weight_NK.dtype, torch.float32)
    return normalised(rows).to(dtype) @ weight_NK.to(dtype).T
