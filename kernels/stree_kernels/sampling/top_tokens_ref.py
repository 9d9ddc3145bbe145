"""The likeliest tokens of rows of scores, in plain torch. Here ties are decided, once for all.

It is the CPU's path and what the Triton kernel is compared with.

Shape letters: N rows of scores of a slot, B slots, V vocabulary, C tokens of a row, R rows of a
token buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIGHEST = 0x7FFFFFFF
"""The key of NaN: above all numbers, so that a broken row shows."""


def top_tokens(scores_NBV: Tensor, num_tokens: int) -> Tensor:
    """Return the `num_tokens` likeliest tokens of every row [N, B, C], ties to the lower token id.

    The order for C tokens is a prefix of the order for more, so that a rank means the same for
    every tree. NaN is likelier than any number. `scores_NBV` is fp32.
    """
    if num_tokens == 1:
        # torch.argmax promises the first of equal maxima, and NaN before them.
        return scores_NBV.argmax(-1, keepdim=True)
    # torch.topk orders ties differently for different counts; distinct integer keys have none.
    # Adding zero turns -0.0, whose bits differ, into 0.0.
    bits = (scores_NBV + 0.0).view(torch.int32)
    ascending = torch.where(bits >= 0, bits, bits ^ HIGHEST)
    ascending = ascending.masked_fill(scores_NBV.isnan(), HIGHEST).to(torch.int64)
    ids = torch.arange(scores_NBV.shape[-1], device=scores_NBV.device)
    keys = (ascending << 32) - ids
    return keys.topk(num_tokens, dim=-1).indices


def place_top_tokens(scores_NBV: Tensor, row_NC: Tensor, out_RB: Tensor) -> None:
    """Write the c-th likeliest token of row n to row `row_NC[n, c]` of `out_RB`, -1 for nowhere.

    The order is that of `top_tokens`; no two entries name the same row. `scores_NBV` is fp32,
    `row_NC` and `out_RB` are int64.
    """
    top_NBC = top_tokens(scores_NBV, row_NC.shape[1])
    # One row more, for those that go nowhere: -1 is the last.
    padded_RB = torch.cat((out_RB, out_RB[:1]))
    padded_RB[row_NC.flatten()] = top_NBC.transpose(1, 2).flatten(0, 1)
    out_RB.copy_(padded_RB[:-1])
