"""Project rows and convolve a tree over some of the columns, in plain torch.

Shape letters: M rows, K columns in, N columns out.
"""

from __future__ import annotations

from torch import Tensor

from stree_kernels.fp8 import projection_ref
from stree_kernels.fp8.scaled_weight import InProjection
from stree_kernels.launch.rows import ConvTail
from stree_kernels.linear.deferred_norm import DeferredNorm
from stree_kernels.ssm.tree_conv_ref import tree_conv


def project_and_convolve(
    rows: DeferredNorm, weight_NK: InProjection, out_MN: Tensor, conv: ConvTail, *,
    one_token: bool = False,
) -> None:  # fmt: skip
    """Write norm(rows) @ weight.T to `out_MN`, then convolve what `conv` names of it.

    Row m of `out_MN` is row `conv.first` + m // B of slot m % B of a block; its columns from
    `conv.first_column` on are that row of `conv.inputs_BRE`. The conv is `tree_conv_ref.tree_conv`.
    """
    projection_ref.linear(rows, weight_NK, out_MN, one_token=one_token)
    state, inputs, weight, bias, ancestors, first, out, previous, pending, _ = conv
    tree_conv(
        state, inputs, weight, bias, ancestors, first=first,
        num_tokens=len(out_MN) // len(state), out_BRE=out, previous_BRE=previous, pending=pending,
    )  # fmt: skip
