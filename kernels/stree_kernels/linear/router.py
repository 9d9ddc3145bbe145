"""Which experts a row goes to, and with what share: a few torch calls on either backend.

Shape letters: M rows, E experts, G groups of experts, C chosen experts of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stree_kernels.launch.settings import Routing


def choose_experts(
    logits_ME: Tensor, bias_E: Tensor | None, routing: Routing
) -> tuple[Tensor, Tensor]:
    """Return the experts of each row [M, C] (int64) and their shares [M, C], in the logits' dtype.

    `bias_E` is the sigmoid routing's correction of scores.
    """
    if routing.kind == "softmax":
        top = logits_ME.topk(routing.num_chosen, dim=1)
        if not routing.normalised:
            return top.indices, logits_ME.softmax(dim=1).gather(1, top.indices)
        return top.indices, top.values.softmax(dim=1)
    score_ME = logits_ME.sigmoid()
    ranked_ME = score_ME if bias_E is None else score_ME + bias_E
    if routing.num_open_groups < routing.num_groups:
        ranked_ME = _close_groups(ranked_ME, routing)
    choice_MC = ranked_ME.topk(routing.num_chosen, dim=1).indices
    share_MC = score_ME.gather(1, choice_MC)
    if routing.normalised:
        share_MC = share_MC / (share_MC.sum(dim=1, keepdim=True) + 1e-20)
    return choice_MC, share_MC * routing.scale


def add_shared(
    choice_MC: Tensor, share_MC: Tensor, gate_M: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor]:
    """Return choice and shares with the experts first..first + count - 1 behind, of every row.

    Their share is the sigmoid of the row's `gate_M`.
    """
    shared_C = torch.arange(first, first + count, device=choice_MC.device)
    choice_MC = torch.cat((choice_MC, shared_C.expand(len(choice_MC), -1)), dim=1)
    share_M1 = gate_M.sigmoid()[:, None]
    return choice_MC, torch.cat((share_MC, share_M1.expand(-1, count)), dim=1)


def _close_groups(ranked_ME: Tensor, routing: Routing) -> Tensor:
    """Return the scores with those outside the best groups at minus infinity."""
    grouped_MGE = ranked_ME.unflatten(1, (routing.num_groups, -1))
    best_MG = grouped_MGE.topk(2, dim=2).values.sum(dim=2)
    open_MG = torch.zeros_like(best_MG, dtype=torch.bool)
    open_MG.scatter_(1, best_MG.topk(routing.num_open_groups, dim=1).indices, value=True)
    masked_ME: Tensor = grouped_MGE.masked_fill(~open_MG[:, :, None], -torch.inf).flatten(1)
    return masked_ME
