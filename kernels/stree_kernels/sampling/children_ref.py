"""Drawing children, and what the target picks after a node, in plain torch.

Every rule is lossless: whatever the children are, the token that is picked after a node follows the
target's distribution p. Tests sum over every random outcome. It is the CPU's path and what the
Triton kernels are compared with. Distributions are given as scores: p = softmax(scores /
temperature), or for a slot of temperature 0 the likeliest token alone.

Shape letters: T tree tokens, I nodes with children, B slots, V vocabulary, W rows, C children, N
rows of any kind, R rows of a token buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stree_kernels.sampling.top_tokens_ref import place_top_tokens, top_tokens
from stree_kernels.sampling.uniforms_ref import LEAST_UNIFORM, fill_uniforms


def place_drawn_tokens(
    scores_NBV: Tensor, temperature_B: Tensor, seed_B: Tensor, step_B: Tensor, row_NC: Tensor,
    out_RB: Tensor, *, stream: int,
) -> None:  # fmt: skip
    """Draw tokens of every row without replacement; write draw c to row `row_NC[n, c]` of `out_RB`.

    -1 is nowhere. A slot of temperature 0 takes its likeliest tokens. The numbers are those that
    `fill_uniforms` gives for the seeds, the steps and `stream`. Scores are fp32.
    """
    hot_B1 = temperature_B[:, None] > 0
    uniform_NBV = torch.empty_like(scores_NBV)
    fill_uniforms(seed_B, step_B, uniform_NBV, stream=stream)
    raced_NBV = race_scores(
        scores_NBV / torch.where(hot_B1, temperature_B[:, None], 1), uniform_NBV
    )
    place_top_tokens(torch.where(hot_B1, raced_NBV, scores_NBV), row_NC, out_RB)


def sample_tokens(
    scores_NBV: Tensor, temperature_B: Tensor, uniform_NB: Tensor, out_NB: Tensor
) -> None:
    """Write a token of every row's distribution, decided by one number in [0, 1) each.

    A distribution that breaks down gives its likeliest token, whose score is not finite.
    """
    p_NBV = softmax_distribution(scores_NBV, temperature_B)
    best_NB = top_tokens(scores_NBV, 1)[..., 0]
    out_NB.copy_(torch.where(p_NBV.isnan().any(-1), best_NB, sample_from(p_NBV, uniform_NB)))


def try_children(
    p_TBV: Tensor, q_IBV: Tensor, temperature_B: Tensor, inner_I: Tensor, child_IC: Tensor,
    tokens_TB: Tensor, uniform_IBC: Tensor, uniform_TB: Tensor, chosen_TB: Tensor,
) -> None:  # fmt: skip
    """Replace the tokens after nodes with children by those of multi-step speculative sampling.

    `p_TBV` are scores after each node, `q_IBV` those that the children of node `inner_I[i]` were
    drawn from; these are `child_IC[i]`, in the order of drawing, a repeated one is none. Where p
    breaks down `chosen_TB` stays.
    """
    p_IBV = softmax_distribution(p_TBV[inner_I], temperature_B)
    chosen_IB = choose_by_mss(
        p_IBV, softmax_distribution(q_IBV, temperature_B), tokens_TB[child_IC].transpose(1, 2),
        uniform_IBC, uniform_TB[inner_I],
    )  # fmt: skip
    chosen_TB[inner_I] = torch.where(p_IBV.isnan().any(-1), chosen_TB[inner_I], chosen_IB)


def softmax_distribution(scores_NBV: Tensor, temperature_B: Tensor) -> Tensor:
    """Return the distribution [N, B, V] of scores; at temperature 0 it is 1 at the likeliest
    token."""
    greedy_B1 = temperature_B[:, None] == 0
    p_NBV = (scores_NBV / torch.where(greedy_B1, 1, temperature_B[:, None])).softmax(-1)
    one_hot_NBV = torch.zeros_like(p_NBV).scatter_(-1, scores_NBV.argmax(-1, keepdim=True), 1.0)
    return torch.where(greedy_B1, one_hot_NBV, p_NBV)


def sample_from(p_NBV: Tensor, uniform_NB: Tensor) -> Tensor:
    """Return tokens [N, B] of the distributions `p_NBV`, which need not sum to 1, by their inverse
    CDF.

    `uniform_NB` lies in [0, 1). A token of probability 0 is never returned.
    """
    rows_RV = p_NBV.flatten(0, -2)
    if len(rows_RV) == 1:
        # CUDA's scan of a single row adds in an order that changes from run to run.
        rows_RV = torch.cat((rows_RV, rows_RV))
    cdf_NBV = rows_RV.cumsum(-1)[: uniform_NB.numel()].view(p_NBV.shape)
    total_NB = cdf_NBV[..., -1]
    # A product that is rounded up to the total would point behind the last token.
    point_NB = torch.minimum(uniform_NB * total_NB, total_NB.nextafter(torch.zeros_like(total_NB)))
    token_NB: Tensor = torch.searchsorted(cdf_NBV, point_NB[..., None], right=True)[..., 0]
    # A distribution with NaN has no such place.
    return token_NB.clamp(max=p_NBV.shape[-1] - 1)


def race_scores(log_q_WBV: Tensor, uniform_WBV: Tensor) -> Tensor:
    """Return fp32 scores whose likeliest tokens are draws from a distribution without replacement.

    `log_q_WBV` are the logarithms of the distribution, or of any multiple of it. An exponential
    race: the tokens with the smallest E / q come first, E = -log(1 - u) exponential (Efraimidis and
    Spirakis, 2006); a score is the logarithm of q / E. A distribution of fewer tokens than draws
    ends with tokens of probability 0. Exact up to the resolution of the numbers: tokens below 1e-9
    are drawn too seldom.
    """
    # Small numbers decide the race, and they are finest there; both ends stay finite.
    shifted_WBV = (uniform_WBV + LEAST_UNIFORM / 2).clamp(max=1 - 2.0**-24)
    exponential_WBV = -torch.log1p(-shifted_WBV)
    return (log_q_WBV - exponential_WBV.log()).float()


def choose_by_mss(
    p_NBV: Tensor, q_NBV: Tensor, children_NBC: Tensor, uniform_NBC: Tensor, uniform_NB: Tensor
) -> Tensor:
    """Return the token [N, B] that follows each node, by multi-step speculative sampling.

    `children_NBC` were drawn from `q_NBV` without replacement and are tried in that order; an entry
    of probability 0 under what is left of q is no child. Child x is taken with probability
    min(1, p(x) / q(x)); a rejection replaces p by the normalised positive part of p - q, and q by
    q without x. After the last child the token is drawn from what is left of p. The uniforms decide
    the tries and the final draw. Source: SpecInfer (arXiv:2305.09781), with the order that makes
    it exact.
    """
    chosen_NB1 = torch.full_like(children_NBC[..., :1], -1)
    for child_NB1, uniform_NB1 in zip(
        children_NBC.split(1, dim=-1), uniform_NBC.split(1, dim=-1), strict=True
    ):
        left_NB1 = q_NBV.gather(-1, child_NB1)
        tried_NB1 = (chosen_NB1 < 0) & (left_NB1 > 0)
        taken_NB1 = tried_NB1 & (uniform_NB1 * left_NB1 < p_NBV.gather(-1, child_NB1))
        chosen_NB1 = torch.where(taken_NB1, child_NB1, chosen_NB1)
        rejected_NB1 = tried_NB1 & ~taken_NB1
        p_NBV = torch.where(rejected_NB1, _normalised((p_NBV - q_NBV).clamp(min=0), p_NBV), p_NBV)
        rest_NBV = q_NBV.scatter(-1, child_NB1, 0.0)
        q_NBV = torch.where(rejected_NB1, _normalised(rest_NBV, rest_NBV), q_NBV)
    return torch.where(chosen_NB1 < 0, sample_from(p_NBV, uniform_NB)[..., None], chosen_NB1)[
        ..., 0
    ]


def _normalised(mass_NBV: Tensor, otherwise_NBV: Tensor) -> Tensor:
    """Return mass as a distribution; where rounding or an empty q left none, another."""
    total_NB1 = mass_NBV.sum(-1, keepdim=True)
    return torch.where(total_NB1 > 0, mass_NBV / total_NB1, otherwise_NBV)
