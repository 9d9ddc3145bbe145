"""The likeliest tokens: order, ties, broken rows, and the kernels against the reference.

Shape letters: N rows of scores of a slot, B slots, V vocabulary, C tokens of a row, R rows of a
token buffer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stree_kernels.sampling import top_tokens as kernel, top_tokens_ref as reference
from stree_kernels.sampling.top_tokens_ref import top_tokens

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")
UNWRITTEN = -7
NAN = float("nan")


def tied_scores(*sizes: int) -> Tensor:
    """Return scores [N, B, V] with many equal numbers, infinities and both zeros."""
    generator = torch.Generator().manual_seed(sum(sizes))
    scores = (2 * torch.randn(*sizes, generator=generator)).round()
    scores[torch.rand(sizes, generator=generator) < 0.1] = -torch.inf
    return torch.where(torch.rand(sizes, generator=generator) < 0.1, -0.0, scores)


def placed(op: Any, scores_NBV: Tensor, num_tokens: int, device: str = "cpu") -> Tensor:
    """Return a token buffer with a free row between all others, and every third token left out."""
    num_rows = len(scores_NBV)
    row_NC = 2 * torch.arange(num_rows * num_tokens).view(num_rows, num_tokens)
    row_NC[row_NC % 3 == 2] = -1
    out_RB = torch.full((2 * num_rows * num_tokens, scores_NBV.shape[1]), UNWRITTEN)
    buffers = [tensor.to(device) for tensor in (scores_NBV, row_NC, out_RB)]
    op.place_top_tokens(*buffers)
    assert (buffers[2][1::2] == UNWRITTEN).all()
    return buffers[2].cpu()


def test_equal_scores_come_by_id() -> None:
    scores_V = torch.tensor([-1.0, -0.0, 2.0, 0.0, -torch.inf, 2.0, -torch.inf, -1.0])
    for num_tokens in range(1, 9):
        expected = [2, 5, 1, 3, 0, 7, 4, 6][:num_tokens]
        assert top_tokens(scores_V, num_tokens).tolist() == expected


def test_fewer_tokens_are_the_first_of_more() -> None:
    scores_NBV = tied_scores(50, 3, 40)
    all_NBC = top_tokens(scores_NBV, 40)
    for c in range(1, 40):
        assert torch.equal(top_tokens(scores_NBV, c), all_NBC[..., :c]), c


@pytest.mark.parametrize("op", [kernel, reference], ids=["kernel", "reference"])
def test_not_a_number_comes_first(op: Any) -> None:
    if op is kernel and torch.cuda.is_available():
        pytest.skip("the GPU tests cover this")
    for bad in (NAN, -torch.tensor(NAN)):
        scores_V = torch.tensor([1.0, torch.inf, bad, 3.0, bad])
        for num_tokens in range(1, 5):
            out_RB = torch.full((num_tokens, 1), UNWRITTEN)
            op.place_top_tokens(scores_V[None, None], torch.arange(num_tokens)[None], out_RB)
            assert out_RB[:, 0].tolist() == [2, 4, 1, 3][:num_tokens]


def test_tokens_go_where_the_table_says() -> None:
    scores_NBV = torch.tensor([[[1.0, 3.0, 2.0]], [[5.0, 4.0, 6.0]]])
    out_RB = torch.full((4, 1), UNWRITTEN)
    reference.place_top_tokens(scores_NBV, torch.tensor([[3, 0], [-1, 2]]), out_RB)
    assert out_RB[:, 0].tolist() == [2, UNWRITTEN, 0, 1]


SIZES = [(1, 1, 5, 1), (3, 2, 1030, 4), (2, 3, 2100, 16), (4, 1, 17, 16)]


@interpreted
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_interpreted_kernel_equals_the_reference(sizes: tuple[int, int, int, int]) -> None:
    scores_NBV = tied_scores(*sizes[:3])
    ours = placed(kernel, scores_NBV, sizes[3])
    assert torch.equal(ours, placed(reference, scores_NBV, sizes[3]))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes",
    [*SIZES, (1, 1, 50288, 1), (65, 1, 50288, 1), (9, 8, 50288, 4), (1, 32, 131072, 16)],
    ids=str,
)
def test_kernel_equals_the_reference(sizes: tuple[int, int, int, int]) -> None:
    scores_NBV = tied_scores(*sizes[:3])
    scores_NBV[0, 0, sizes[2] // 2] = NAN
    ours = placed(kernel, scores_NBV, sizes[3], device="cuda")
    assert torch.equal(ours, placed(reference, scores_NBV, sizes[3]))


def test_buffers_beyond_the_kernel_are_refused() -> None:
    scores, rows, out = torch.zeros(2, 3, 8), torch.zeros(2, 4).long(), torch.zeros(8, 3).long()
    with pytest.raises(ValueError, match=r"^scores: one dtype of torch.float32, got torch.float64"):
        kernel.place_top_tokens(scores.double(), rows, out)
    with pytest.raises(ValueError, match=r"^tokens and their rows: one dtype of torch.int64, got"):
        kernel.place_top_tokens(scores, rows.int(), out)
    with pytest.raises(ValueError, match=r"^the scores lies without gaps, got strides"):
        kernel.place_top_tokens(scores.transpose(0, 1), rows, out)
    with pytest.raises(ValueError, match=r"^tokens and their rows lies without gaps, got strides"):
        kernel.place_top_tokens(scores, rows, out.t().contiguous().t())
    for bad in (rows[:1], torch.zeros(2, 9).long()):
        with pytest.raises(ValueError, match=r"^scores \(2, 3, 8\) take a table of as many rows"):
            kernel.place_top_tokens(scores, bad, out)
