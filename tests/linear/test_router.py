"""Which experts a row goes to, against a loop that follows the papers' words.

Shape letters: M rows, E experts.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stree_kernels.launch.settings import Routing
from stree_kernels.linear.router import add_shared, choose_experts
from stree_kernels.testing import assert_close

LAWS = {
    "softmax": Routing("softmax", 3),
    "softmax, one": Routing("softmax", 1),
    "softmax, not normalised": Routing("softmax", 3, normalised=False),
    "sigmoid": Routing("sigmoid", 3),
    "sigmoid, scaled": Routing("sigmoid", 3, scale=2.5),
    "sigmoid, not normalised": Routing("sigmoid", 3, normalised=False, scale=2.5),
    "groups": Routing("sigmoid", 3, num_groups=4, num_open_groups=2),
    "one open group": Routing("sigmoid", 2, num_groups=3, num_open_groups=1, scale=0.5),
    "all groups open": Routing("sigmoid", 4, num_groups=4, num_open_groups=4),
}


def normal(*shape: int) -> Tensor:
    """Return random numbers in float64 that depend on the shape alone."""
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def shares_of_row(
    logits: list[float], bias: list[float], distribution: Routing
) -> dict[int, float]:
    """Return the experts of one row, best first, each with its share."""
    if distribution.kind == "softmax":
        chosen = sorted(range(len(logits)), key=lambda e: -logits[e])[: distribution.num_chosen]
        powers = {expert: math.exp(logits[expert]) for expert in chosen}
        total = sum(powers.values() if distribution.normalised else map(math.exp, logits))
        return {expert: power / total for expert, power in powers.items()}
    score = [1 / (1 + math.exp(-logit)) for logit in logits]
    ranked = [s + b for s, b in zip(score, bias, strict=True)]
    size = len(logits) // distribution.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(distribution.num_groups)]
    groups.sort(key=lambda group: -sum(sorted(ranked[e] for e in group)[-2:]))
    may_open = [expert for group in groups[: distribution.num_open_groups] for expert in group]
    if distribution.num_open_groups == distribution.num_groups:
        may_open = list(range(len(logits)))
    chosen = sorted(may_open, key=lambda e: -ranked[e])[: distribution.num_chosen]
    total = sum(score[expert] for expert in chosen) if distribution.normalised else 1.0
    return {expert: score[expert] / total * distribution.scale for expert in chosen}


def check_law(logits_ME: Tensor, bias_E: Tensor | None, distribution: Routing) -> None:
    """Compare a choice with the loop."""
    choice_MC, share_MC = choose_experts(logits_ME, bias_E, distribution)
    assert choice_MC.dtype == torch.int64
    assert share_MC.dtype == logits_ME.dtype
    bias = [0.0] * logits_ME.shape[1] if bias_E is None else bias_E.tolist()
    rows = [shares_of_row(row, bias, distribution) for row in logits_ME.tolist()]
    assert choice_MC.tolist() == [list(row) for row in rows]
    shares = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)
    assert_close("shares", share_MC, shares)


@pytest.mark.parametrize("name", LAWS)
def test_choice_equals_the_loop(name: str) -> None:
    check_law(normal(40, 12), None, LAWS[name])


@pytest.mark.parametrize("name", [name for name in LAWS if "softmax" not in name])
def test_bias_decides_the_choice_but_not_the_shares(name: str) -> None:
    logits, bias = normal(40, 12), 0.3 * normal(12)
    check_law(logits, bias, LAWS[name])
    plain, _ = choose_experts(logits, None, LAWS[name])
    biased, _ = choose_experts(logits, bias, LAWS[name])
    assert not torch.equal(plain, biased)


def test_scores_below_zero_stay_within_the_open_groups() -> None:
    distribution = Routing("sigmoid", 4, num_groups=2, num_open_groups=1)
    bias = torch.tensor([-9.0] * 4 + [-5.0] * 4, dtype=torch.float64)
    choice, _ = choose_experts(normal(5, 8), bias, distribution)
    assert (choice >= 4).all(), "a closed group is worse than any score"


def test_fp32_logits_give_fp32_shares() -> None:
    logits = normal(7, 12).float()
    for distribution in (LAWS["softmax"], LAWS["groups"]):
        check_law(logits, None, distribution)


def test_shared_experts_stand_behind_the_chosen_ones() -> None:
    choice_MC, share_MC = torch.tensor([[2, 0], [1, 3]]), normal(2, 2)
    gate_M = torch.tensor([0.0, -1.5], dtype=torch.float64)
    choice, share = add_shared(choice_MC, share_MC, gate_M, 4, 2)
    assert choice.tolist() == [[2, 0, 4, 5], [1, 3, 4, 5]]
    expected = [1 / (1 + math.exp(-gate)) for gate in gate_M.tolist()]
    assert torch.equal(share[:, :2], share_MC)
    for column in (2, 3):
        assert share[:, column].tolist() == pytest.approx(expected)
