"""Which experts a row goes to, and with what share: a few torch calls on either backend.

Shape letters: M rows, E experts, G groups of experts, C chosen experts of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stree_kernels.launch.settings import RouterLaw


def choose_experts(
    logits_ME: Tensor, bias_E: Tensor | None, law: RouterLaw
) -> tuple[Tensor, Tensor]:
    """Return the experts of each row [M, C] (int64) and their shares [M, C], in the logits' dtype.

    `bias_E` is the sigmoid law's correction of scores.
    """
    if law.kind == "softmax":
        top = logits_ME.topk(law.num_chosen, dim=1)
        return top.indices, top.values.softmax(dim=1)
    score_ME = logits_ME.sigmoid()
    ranked_ME = score_ME if bias_E is None else score_ME + bias_E
    if law.num_open_groups < law.num_groups:
        ranked_ME = _close_groups(ranked_ME, law)
    choice_MC = ranked_ME.topk(law.num_chosen, dim=1).indices
    share_MC = score_ME.gather(1, choice_MC)
    if law.normalised:
        share_MC = share_MC / (share_MC.sum(dim=1, keepdim=True) + 1e-20)
    return choice_MC, share_MC * law.scale


def _close_groups(ranked_ME: Tensor, law: RouterLaw) -> Tensor:
    """Return the scores with those outside the best groups at minus infinity."""
    grouped_MGE = ranked_ME.unflatten(1, (law.num_groups, -1))
    best_MG = grouped_MGE.topk(2, dim=2).values.sum(dim=2)
    open_MG = torch.zeros_like(best_MG, dtype=torch.bool)
    open_MG.scatter_(1, best_MG.topk(law.num_open_groups, dim=1).indices, value=True)
    masked_ME: Tensor = grouped_MGE.masked_fill(~open_MG[:, :, None], -torch.inf).flatten(1)
    return masked_ME
