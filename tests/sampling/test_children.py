"""Sampling kernels against the reference, with the same numbers.

Sums in another order move the points between two tokens a little, so a token may be another one
where a number falls next to such a point: that is measured in float64.

Shape letters: T tree tokens, I nodes with children, B slots, V vocabulary, C children, N rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stree_kernels.sampling import children as kernel, children_ref as reference
from stree_kernels.sampling.children_ref import softmax_distribution

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")
TEMPERATURES = torch.tensor([0.7, 0.0, 1.0, 1.6])
NAN = float("nan")
NEXT_TO = 1e-5
"""How far from a point between two tokens both may come out."""

SMALL = (3, 6)
"""Rows and scores that an interpreter takes in a second or two."""
SIZES = [SMALL, (2, 5000)]
LARGE = [*SIZES, (65, 50288), (5, 131072)]


def random_scores(num_rows: int, num_scores: int, seed: int = 0) -> Tensor:
    """Return scores [N, B, V], some of them -inf, a whole block of them among these."""
    generator = torch.Generator().manual_seed(num_scores + seed)
    scores = 3 * torch.randn(num_rows, len(TEMPERATURES), num_scores, generator=generator)
    scores[torch.rand(scores.shape, generator=generator) < 0.2] = -torch.inf
    scores[0, 0, : num_scores - 2] = -torch.inf
    scores[..., -1] = 1.0
    return scores


def on(device: str, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device, copy=True) for tensor in tensors]


def check_sampled(num_rows: int, num_scores: int, device: str) -> None:
    scores_NBV = random_scores(num_rows, num_scores)
    scores_NBV[-1, 2, num_scores // 3] = NAN
    scores_NBV[-1, 3, num_scores // 2] = torch.inf
    uniform_NB = torch.rand(num_rows, len(TEMPERATURES), generator=torch.Generator().manual_seed(1))
    uniform_NB[0, 2:] = torch.tensor([0.0, 1 - 2.0**-24])
    out_NB = torch.full(uniform_NB.shape, -7)
    ours, truth = (
        on(where, scores_NBV, TEMPERATURES, uniform_NB, out_NB) for where in (device, "cpu")
    )
    kernel.sample_tokens(*ours)
    reference.sample_tokens(*truth)
    token_NB = ours[-1].cpu()
    assert token_NB[-1, 2:].tolist() == [num_scores // 3, num_scores // 2]
    assert torch.equal(token_NB[:, 1], truth[-1][:, 1]), "greedy"
    p_NBV = softmax_distribution(scores_NBV.double(), TEMPERATURES.double())
    p_NBV[-1, 2:] = torch.nn.functional.one_hot(token_NB[-1, 2:], num_scores).double()
    after_NB = p_NBV.cumsum(-1).gather(-1, token_NB[..., None])[..., 0]
    p_NB = p_NBV.gather(-1, token_NB[..., None])[..., 0]
    assert (p_NB > 0).all()
    assert (uniform_NB < after_NB + NEXT_TO).all()
    assert (uniform_NB > after_NB - p_NB - NEXT_TO).all()


@interpreted
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_interpreted_samples_lie_where_their_number_points(sizes: tuple[int, int]) -> None:
    check_sampled(*sizes, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_samples_lie_where_their_number_points(sizes: tuple[int, int]) -> None:
    check_sampled(*sizes, "cuda")


def tries(num_inner: int, num_scores: int, num_children: int) -> list[Tensor]:
    """Return the arguments of `try_children`: a tree whose last nodes are children."""
    generator = torch.Generator().manual_seed(num_children)
    batch, num_tokens = len(TEMPERATURES), 1 + num_inner * num_children
    p_TBV = random_scores(num_tokens, num_scores)
    inner_I = torch.arange(num_inner)
    # Near the target's, so that children are taken and rejected.
    q_IBV = p_TBV[:num_inner] + torch.randn(
        num_inner, batch, num_scores, generator=generator
    ).clamp(-2, 2)
    q_IBV[q_IBV.isneginf()] = -9.0
    child_IC = 1 + torch.arange(num_inner * num_children).view(num_inner, num_children)
    tokens_TB = torch.zeros(num_tokens, batch, dtype=torch.int64)
    steps = torch.arange(batch)
    reference.place_drawn_tokens(q_IBV, TEMPERATURES, steps, steps, child_IC, tokens_TB, stream=3)
    if num_children > 1:
        child_IC[-1, -1] = child_IC[-1, 0]
    p_TBV[0, 2, 0] = NAN
    uniform_IBC = torch.rand(num_inner, batch, num_children, generator=generator)
    uniform_TB = torch.rand(num_tokens, batch, generator=generator)
    chosen_TB = torch.full((num_tokens, batch), -7)
    return [
        p_TBV, q_IBV, TEMPERATURES, inner_I, child_IC, tokens_TB, uniform_IBC, uniform_TB,
        chosen_TB,
    ]  # fmt: skip


def check_tries(num_inner: int, num_scores: int, num_children: int, device: str) -> None:
    arguments = tries(num_inner, num_scores, num_children)
    ours, truth = on(device, *arguments), on("cpu", *arguments)
    kernel.try_children(*ours)
    truth[:3] = [tensor.double() for tensor in truth[:3]]
    truth[6:8] = [tensor.double() for tensor in truth[6:8]]
    reference.try_children(*truth)
    chosen_TB, expected_TB = ours[-1].cpu(), truth[-1]
    # Greedy slots keep what was there, the reference repeats their likeliest token.
    assert (chosen_TB[:, 1] == -7).all()
    assert chosen_TB[0, 2] == -7, "a distribution that breaks down"
    differ = (chosen_TB != expected_TB)[:, [0, 2, 3]].sum().item()
    assert differ <= num_inner * len(TEMPERATURES) // 100
    taken = (chosen_TB[:num_inner, None] == arguments[5][arguments[4]])[..., [0, 2, 3]].any(1)
    assert 0 < taken.sum() < taken.numel(), "children are taken and all are rejected"


@interpreted
@pytest.mark.parametrize("sizes", [(8, 6, 1), (8, 6, 3), (3, 4100, 2)], ids=str)
def test_interpreted_tries_equal_the_reference(sizes: tuple[int, int, int]) -> None:
    check_tries(*sizes, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(60, 6, 3), (60, 6, 5), (40, 50288, 4), (8, 50288, 16)], ids=str)
def test_tries_equal_the_reference(sizes: tuple[int, int, int]) -> None:
    check_tries(*sizes, "cuda")


def check_drawn(num_rows: int, num_scores: int, num_tokens: int, device: str) -> None:
    scores_NBV = random_scores(num_rows, num_scores)
    row_NC = torch.arange(num_rows * num_tokens).view(num_rows, num_tokens)
    seed_B = torch.tensor([0, 5, 7 << 32 | 5, 2**63 - 1])
    out_RB = torch.full((row_NC.numel(), len(seed_B)), -7)
    arguments = (scores_NBV, TEMPERATURES, seed_B, seed_B % 1000, row_NC, out_RB)
    ours, truth = on(device, *arguments), on("cpu", *arguments)
    for op, own in ((kernel, ours), (reference, truth)):
        op.place_drawn_tokens(*own, stream=2**31 + 3)
    differ = (ours[-1].cpu() != truth[-1]).sum().item()
    assert differ <= out_RB.numel() // 500
    assert torch.equal(ours[-1].cpu()[:, 1], truth[-1][:, 1]), "greedy"
    assert ours[-1].min() >= 0


@interpreted
@pytest.mark.parametrize("sizes", [(8, 6, 3), (3, 2100, 16)], ids=str)
def test_interpreted_draws_equal_the_reference(sizes: tuple[int, int, int]) -> None:
    check_drawn(*sizes, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(60, 6, 5), (40, 50288, 4), (2, 131072, 16)], ids=str)
def test_draws_equal_the_reference(sizes: tuple[int, int, int]) -> None:
    check_drawn(*sizes, "cuda")


def refused(op: Any, arguments: list[Tensor], number: int, bad: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(*[bad if index == number else value for index, value in enumerate(arguments)])


def test_buffers_beyond_the_kernels_are_refused() -> None:
    arguments = tries(2, 6, 2)
    op = kernel.try_children
    refused(op, arguments, 0, arguments[0].double(), "^scores, temperatures and numbers: one dtype")
    refused(op, arguments, 5, arguments[5].int(), r"^tokens and tables: one dtype of torch.int64")
    refused(op, arguments, 1, arguments[1][:1], r"^draft scores of this step have the shape \(2, 4")
    refused(op, arguments, 6, arguments[6][..., :1], r"^scores or numbers of tries lies without")
    op = kernel.sample_tokens
    arguments = [torch.zeros(2, 4, 6), TEMPERATURES, torch.zeros(2, 4), torch.zeros(2, 4).long()]
    refused(op, arguments, 2, torch.zeros(1, 4), r"^numbers of this step have the shape \(2, 4\)")
    refused(op, arguments, 3, arguments[2], r"^tokens: one dtype of torch.int64, got torch.float32")
