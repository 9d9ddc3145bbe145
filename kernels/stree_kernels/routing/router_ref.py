"""Which experts a row goes to, and with what share, in plain torch: what the kernels equal.

It is also the CPU's path.

Shape letters: M rows, D columns, X rows of a router's weight, E experts, G groups of experts,
C chosen experts of a row, Z = C and the shared ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stree_kernels.launch.settings import Routing
from stree_kernels.linear.deferred_norm import DeferredNorm
from stree_kernels.linear.residual_ref import scale_rows


class Router(NamedTuple):
    """What a layer chooses experts by; tensors in fp32 at least.

    `norm_D` is the norm before the router and its experts. `bias_E` is the sigmoid routing's
    correction of scores. Where `num_shared` experts stand behind the routed ones, the last row of
    `weight_XD` is of their gate.
    """

    norm_D: Tensor
    weight_XD: Tensor
    bias_E: Tensor | None
    routing: Routing
    num_shared: int = 0

    @property
    def num_experts(self) -> int:
        """Experts to choose from."""
        return len(self.weight_XD) - (self.num_shared > 0)


def route(rows: DeferredNorm, router: Router, hidden_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Write norm(rows) to `hidden_MD`; return experts [M, Z] (int64) and shares [M, Z] of it.

    Shares are in the router's dtype. Experts that all rows share stand behind the chosen ones.
    """
    scale_rows(rows, router.norm_D, hidden_MD)
    return choose(hidden_MD.to(router.weight_XD.dtype) @ router.weight_XD.T, router)


def choose(logits_MX: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """Return the experts [M, Z] (int64) and shares [M, Z] that a router's logits say."""
    num_experts = router.num_experts
    choice_MC, share_MC = choose_experts(logits_MX[:, :num_experts], router.bias_E, router.routing)
    if not router.num_shared:
        return choice_MC, share_MC
    gate_M = logits_MX[:, num_experts]
    return add_shared(choice_MC, share_MC, gate_M, num_experts, router.num_shared)


def choose_experts(
    logits_ME: Tensor, bias_E: Tensor | None, routing: Routing
) -> tuple[Tensor, Tensor]:
    """Return the experts of each row [M, C] (int64) and their shares [M, C], in the logits' dtype.

    The best come first, of equal ones the lower; NaN is above all numbers.
    """
    if routing.kind == "softmax":
        choice_MC = _largest(logits_ME, routing.num_chosen)
        if not routing.normalised:
            return choice_MC, logits_ME.softmax(dim=1).gather(1, choice_MC)
        return choice_MC, logits_ME.gather(1, choice_MC).softmax(dim=1)
    score_ME = logits_ME.sigmoid()
    ranked_ME = score_ME if bias_E is None else score_ME + bias_E
    if routing.num_open_groups < routing.num_groups:
        ranked_ME = _close_groups(ranked_ME, routing)
    choice_MC = _largest(ranked_ME, routing.num_chosen)
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


def _largest(values_MX: Tensor, count: int) -> Tensor:
    """Return where the largest are, in order; of equal ones the lower comes first."""
    return values_MX.sort(dim=1, descending=True, stable=True).indices[:, :count].contiguous()


def _close_groups(ranked_ME: Tensor, routing: Routing) -> Tensor:
    """Return the scores with those outside the best groups at minus infinity."""
    grouped_MGE = ranked_ME.unflatten(1, (routing.num_groups, -1))
    best_MG = grouped_MGE.topk(2, dim=2).values.sum(dim=2)
    open_MG = torch.zeros_like(best_MG, dtype=torch.bool)
    open_MG.scatter_(1, _largest(best_MG, routing.num_open_groups), value=True)
    masked_ME: Tensor = grouped_MGE.masked_fill(~open_MG[:, :, None], -torch.inf).flatten(1)
    return masked_ME
