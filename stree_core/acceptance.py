"""Drawing children, and what the target picks after a node.

Every rule is lossless: whatever the children are, the token that is picked after a node follows the
target's law p. Tests sum over every random outcome.

Shape letters: B slots, V vocabulary, W rows, C children, N rows of any kind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stree_kernels.uniforms_ref import LEAST_UNIFORM


def sample_from(p_NBV: Tensor, uniform_NB: Tensor) -> Tensor:
    """Return tokens [N, B] of the laws `p_NBV`, which need not sum to 1, by their inverse CDF.

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
    # A law with NaN has no such place.
    return token_NB.clamp(max=p_NBV.shape[-1] - 1)


def race_scores(q_WBV: Tensor, uniform_WBV: Tensor) -> Tensor:
    """Return scores [W, B, V] whose likeliest tokens are draws from `q_WBV` without replacement.

    An exponential race: the tokens with the smallest E / q come first, E = -log(1 - u) exponential
    (Efraimidis and Spirakis, 2006), here as the fp32 logarithm of q / E. A law of fewer tokens than
    children ends with tokens of probability 0. Exact up to the resolution of the numbers: tokens
    below 1e-9 are drawn too seldom.
    """
    # Small numbers decide the race, and they are finest there; both ends stay finite.
    shifted_WBV = (uniform_WBV + LEAST_UNIFORM / 2).clamp(max=1 - 2.0**-24)
    exponential_WBV = -torch.log1p(-shifted_WBV)
    return (q_WBV.log() - exponential_WBV.log()).float()


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
    """Return mass as a law; where rounding or an empty q left none, another."""
    total_NB1 = mass_NBV.sum(-1, keepdim=True)
    return torch.where(total_NB1 > 0, mass_NBV / total_NB1, otherwise_NBV)
