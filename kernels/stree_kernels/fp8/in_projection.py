"""Project rows and convolve a tree over some of the columns, in one launch or in two.

The work is that of `in_projection_ref`. A short projection convolves its own columns at once
(`launch.conv_tail`); elsewhere the conv is a launch of its own.

Shape letters: M rows, K columns in, N columns out.
"""

from __future__ import annotations

from torch import Tensor

from stree_kernels.fp8 import projection
from stree_kernels.fp8.scaled_weight import InProjection
from stree_kernels.launch.rows import ConvTail
from stree_kernels.linear.deferred_norm import DeferredNorm
from stree_kernels.linear.linear import linear_conv, takes_conv
from stree_kernels.ssm.tree_conv import check_conv, tree_conv


def project_and_convolve(
    rows: DeferredNorm, weight_NK: InProjection, out_MN: Tensor, conv: ConvTail, *,
    one_token: bool = False,
) -> None:  # fmt: skip
    """Write norm(rows) @ weight.T to `out_MN`, then convolve what `conv` names of it.

    The contract is that of `in_projection_ref.project_and_convolve`.
    Raises ValueError when a size, dtype or stride is beyond what the kernels take.
    """
    state, inputs, weight, bias, ancestors, first, out, previous, pending, _ = conv
    num_rows, num_tokens = len(out_MN), len(out_MN) // len(state)
    if isinstance(weight_NK, Tensor) and takes_conv(num_rows, weight_NK, one_token=one_token):
        prev = previous if pending else None
        check_conv(
            state, inputs, weight, bias, ancestors, out, prev, pending, first + num_tokens
        )  # fmt: skip
        linear_conv(rows, weight_NK, out_MN, conv, one_token=one_token)
        return
    projection.linear(rows, weight_NK, out_MN, one_token=one_token)
    tree_conv(
        state, inputs, weight, bias, ancestors, first=first, num_tokens=num_tokens, out_BRE=out,
        previous_BRE=previous, pending=pending,
    )  # fmt: skip
