"""Mixture-of-experts MLPs of many rows: rows are sorted by expert, so each weight is read once.

The work is that of `experts_ref`. The products are torch's grouped ones, whose group sizes stay on
the device, so that a pass can be captured. Results of a row's experts are rounded to the weights'
dtype before they are added up, in the order in which they were chosen.

Shape letters: M rows, C chosen experts of a row, E experts, D columns in and out, F expert inner,
X = 2 F if gated, else F, N = M * C pairs of row and expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.launch import pdl
from stree_kernels.launch.settings import Activation
from stree_kernels.linear.residual import activate

FEWEST_ROWS = 33
"""Below, most experts that are chosen have one row, and a kernel that streams weights is faster."""
CAPABILITIES = (90, 100)
"""Where torch's grouped product runs without waiting for the host."""


def is_grouped(num_rows: int, weight: Tensor) -> bool:
    """Say whether so many rows take grouped products."""
    if num_rows < FEWEST_ROWS or weight.dtype != torch.bfloat16:
        return False
    return weight.is_cuda and pdl.capability(weight.device) in CAPABILITIES


def grouped_expert_mlps(
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

    The contract is that of `experts_ref.expert_mlps`. Allocates inputs, inner values and results of
    every pair.
    """
    num_rows, num_chosen = choice_MC.shape
    expert_N, order_N = choice_MC.flatten().sort(stable=True)
    experts_E = torch.arange(len(up_EXD), device=expert_N.device)
    ends_E = torch.searchsorted(expert_N, experts_E, right=True).int()
    inputs_ND = inputs_MD[order_N // num_chosen]
    product_NX = functional.grouped_mm(inputs_ND, up_EXD.transpose(1, 2), offs=ends_E)
    inner_NF = product_NX.new_empty(len(product_NX), down_EDF.shape[2])
    activate(product_NX, inner_NF, activation)
    sorted_ND = functional.grouped_mm(inner_NF, down_EDF.transpose(1, 2), offs=ends_E)
    result_ND = torch.empty_like(sorted_ND)
    result_ND[order_N] = sorted_ND
    result_MCD = result_ND.unflatten(0, (num_rows, num_chosen))
    total_MD = torch.zeros_like(out_MD, dtype=torch.float32)
    for place in range(num_chosen):
        total_MD.addcmul_(result_MCD[:, place].float(), share_MC[:, place, None].float())
    out_MD.copy_(total_MD)
