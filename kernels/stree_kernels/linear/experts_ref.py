"""Mixture-of-experts MLPs in plain torch: what the kernels are compared with.

It is also the CPU's path.

Shape letters: M rows, E experts, C chosen experts of a row, D columns in and out, F expert inner,
X = 2 F if gated, else F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stree_kernels.launch.settings import Activation
from stree_kernels.linear.residual_ref import activated


def expert_mlps(
    inputs_MD: Tensor,
    choice_MC: Tensor,
    share_MC: Tensor,
    up_EXD: Tensor,
    down_EDF: Tensor,
    out_MD: Tensor,
    *,
    activation: Activation,
) -> None:
    """Write the sum of each row's chosen MLPs (`choice_MC`, int64), times `share_MC`, to `out_MD`.

    A gated activation's first weight holds the rows of gate, then those of up. Computes in fp32 at
    least; `out_MD` is of any float dtype.
    """
    dtype = torch.promote_types(inputs_MD.dtype, torch.float32)
    total_MD = torch.zeros_like(out_MD, dtype=dtype)
    for expert in choice_MC.unique().tolist():
        row, place = (choice_MC == expert).nonzero(as_tuple=True)
        inner = activated(inputs_MD[row].to(dtype) @ up_EXD[expert].to(dtype).T, activation)
        result = inner @ down_EDF[expert].to(dtype).T * share_MC[row, place, None].to(dtype)
        total_MD.index_add_(0, row, result)
    out_MD.copy_(total_MD)
