"""Mixture-of-experts MLPs whose weights may be in FP8, in plain torch: what the kernels equal.

It is also the CPU's path.

Shape letters: M rows, E experts, C chosen experts of a row, D columns in and out, F expert inner,
X = 2 F if gated, else F.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from stree_kernels.fp8.scaled_weight import Projection, ScaledWeight
from stree_kernels.launch.settings import Activation
from stree_kernels.linear import experts_ref


def expert_mlps(
    inputs_MD: Tensor, choice_MC: Tensor, share_MC: Tensor, up_EXD: Projection,
    down_EDF: Projection, out_MD: Tensor, *, activation: Activation,
) -> None:  # fmt: skip
    """Write the sum of each row's chosen MLPs (`choice_MC`, int64), times `share_MC`, to `out_MD`.

    A gated activation's first weight holds the rows of gate, then those of up. Computes in fp32 at
    least; `out_MD` is of any float dtype.
    """
    # Only experts that some row has chosen become tensors.
    experts, local_MC = choice_MC.unique(return_inverse=True)
    up, down = (_chosen(weight, experts) for weight in (up_EXD, down_EDF))
    experts_ref.expert_mlps(inputs_MD, local_MC, share_MC, up, down, out_MD, activation=activation)


def _chosen(weight: Projection, experts: Tensor) -> Tensor:
    """Return the weights of some experts as a tensor, no product rounded again."""
    if isinstance(weight, Tensor):
        return weight[experts]
    codes = weight.codes.view(torch.uint8)[experts].view(weight.codes.dtype)
    some: ScaledWeight = dataclasses.replace(weight, codes=codes, scales=weight.scales[experts])
    return some.dequantised(torch.promote_types(weight.dtype, torch.float32))
