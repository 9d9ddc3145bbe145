"""Choosing child tokens and accepting a path: the one place where ties are broken.

Shape letters: T tree tokens, B slots, V vocabulary, W rows, C children.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_tokens(logits_WBV: Tensor, num_children: int) -> Tensor:
    """Return the `num_children` likeliest tokens [W, B, C], ties to the lower token id.

    The order for C children is a prefix of the order for more, so that a rank means the same for
    every tree. `logits_WBV` is fp32.
    """
    if num_children == 1:
        # torch.argmax promises the first of equal maxima.
        return logits_WBV.argmax(-1, keepdim=True)
    # torch.topk orders ties differently for different counts; distinct integer keys have none.
    # Adding zero turns -0.0, whose bits differ, into 0.0.
    bits = (logits_WBV + 0.0).view(torch.int32)
    ascending = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(torch.int64)
    ids = torch.arange(logits_WBV.shape[-1], device=logits_WBV.device)
    keys = (ascending << 32) - ids
    return keys.topk(num_children, dim=-1).indices


def accept_path(
    tokens_TB: Tensor, chosen_TB: Tensor, parents_T: Tensor, mask_TT: Tensor, depths_T: Tensor
) -> Tensor:
    """Return the last accepted node of every slot [B].

    `chosen_TB` is the token that the target picks after each node: its argmax (greedy) or a draw
    from its law (naive sampling). A node is accepted when it and all its ancestors equal the token
    chosen at their parents; siblings differ, so the accepted nodes form one path. Lossless for any
    tree. The root is always accepted.
    """
    mismatch_TB = tokens_TB != chosen_TB[parents_T]
    mismatch_TB[0] = False
    rejected_TB = (mask_TT[:, :, None] & mismatch_TB).any(1)
    return torch.where(rejected_TB, -1, depths_T[:, None]).argmax(0)
