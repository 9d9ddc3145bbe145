"""Which experts a row goes to: the reference against a loop that follows the papers' words, the
kernels against the reference.

Shape letters: M rows, D columns, E experts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stree_kernels.launch.settings import Routing
from stree_kernels.linear.deferred_norm import COLUMNS_PER_SUM, DeferredNorm
from stree_kernels.routing import router as kernel, router_ref as reference
from stree_kernels.routing.router_ref import Router, add_shared, choose_experts
from stree_kernels.testing import assert_close, poisoned

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")

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


def test_equal_scores_go_to_the_lower_expert() -> None:
    choice, _ = choose_experts(torch.zeros(2, 12), None, LAWS["softmax"])
    assert choice.tolist() == [[0, 1, 2]] * 2
    choice, _ = choose_experts(torch.zeros(2, 12), None, LAWS["groups"])
    assert choice.tolist() == [[0, 1, 2]] * 2


def make_router(
    columns: int, num_experts: int, routing: Routing, num_shared: int = 0, device: str = "cpu"
) -> Router:
    """Return a router in fp32; sigmoid routing has a bias."""
    num_rows = num_experts + (num_shared > 0)
    tensors = (
        1 + 0.3 * normal(columns), normal(num_rows, columns) / columns**0.5,
        0.3 * normal(num_experts) if routing.kind == "sigmoid" else None,
    )  # fmt: skip
    moved = (None if tensor is None else tensor.to(device, torch.float32) for tensor in tensors)
    norm_D, weight_XD, bias_E = moved
    assert norm_D is not None
    assert weight_XD is not None
    return Router(norm_D, weight_XD, bias_E, routing, num_shared)


def wide(router: Router) -> Router:
    """Return a router in float64."""
    bias_E = None if router.bias_E is None else router.bias_E.double()
    return Router(router.norm_D.double(), router.weight_XD.double(), bias_E, *router[3:])


def make_rows(num_rows: int, columns: int, dtype: torch.dtype, device: str) -> DeferredNorm:
    """Return rows whose sums of squares are those of a residual stream."""
    values = (1.5 * normal(num_rows, columns)).to(device, dtype)
    squares = values.float().square().unflatten(1, (-1, COLUMNS_PER_SUM))
    return DeferredNorm(values, squares.sum(2), 1, 1e-5)


def poison_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what an op allocates with NaN, or with an expert that is none."""

    empty = torch.Tensor.new_empty

    def filled(tensor: Tensor, *sizes: Any, **options: Any) -> Tensor:
        made = empty(tensor, *sizes, **options)
        return made.fill_(math.nan if made.is_floating_point() else 1 << 40)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def check_route(rows: DeferredNorm, router: Router) -> None:
    """Compare the kernels with the reference in float64 on the rows that they have rounded."""
    values = rows.values_MK
    hidden = poisoned(*values.shape, dtype=values.dtype, device=values.device)
    choice, share = kernel.route(rows, router, hidden)
    sums = None if rows.square_sums_MQ is None else rows.square_sums_MQ.double()
    truth = torch.empty_like(values, dtype=torch.float64)
    reference.scale_rows(rows._replace(square_sums_MQ=sums), router.norm_D.double(), truth)
    assert_close("rows", hidden, truth)
    logits = hidden.double() @ router.weight_XD.double().T
    true_choice, true_share = reference.choose(logits, wide(router))
    assert (choice.dtype, share.dtype) == (torch.int64, torch.float32)
    assert choice.tolist() == true_choice.tolist()
    assert_close("shares", share, true_share)


def check_choice(logits: Tensor, router: Router) -> None:
    """Compare choices of the kernel and the reference, in fp32, bit for bit but for the shares."""
    choice, share = kernel.choose(logits, router)
    true_choice, true_share = reference.choose(logits, router)
    assert choice.tolist() == true_choice.tolist()
    torch.testing.assert_close(share, true_share, rtol=1e-5, atol=1e-6, equal_nan=True)


def check_laws(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check every law, with and without a bias and shared experts."""
    poison_allocations(monkeypatch)
    for law, num_shared in itertools.product(LAWS.values(), (0, 1, 2)):
        router = make_router(80, 12, law, num_shared, device)
        check_route(make_rows(3, 80, torch.float32, device), router)
        check_route(make_rows(1, 80, torch.float32, device), router._replace(bias_E=None))


def check_ties(device: str) -> None:
    """Check scores of which many are equal."""
    random = torch.Generator().manual_seed(3)
    few = torch.tensor([0.3, 1.1, 2.7, -0.4])
    picks = torch.randint(4, (5, 13), generator=random)
    for law, num_shared in itertools.product(LAWS.values(), (0, 1)):
        router = make_router(16, 12, law, num_shared, device)
        logits = few[picks[:, : 12 + num_shared]].contiguous().to(device)
        # Biases that part scores without rounding them alike.
        bias = (2.0 * (picks[0, :12] % 2)).to(device)
        check_choice(logits, router._replace(bias_E=None))
        check_choice(logits[:1].sign() * 0.0, router._replace(bias_E=None))
        if law.kind == "sigmoid":
            check_choice(logits, router._replace(bias_E=bias))


def check_broken_numbers(device: str) -> None:
    """Check NaN and infinities, one in a row and in all of it."""
    for law, value in itertools.product(LAWS.values(), (math.nan, math.inf, -math.inf)):
        router = make_router(16, 12, law, 1, device)._replace(bias_E=None)
        logits = normal(6, 13).float().to(device)
        logits[0, 5] = logits[1, 0] = logits[1, 11] = logits[2, 12] = value
        logits[3] = value
        logits[4, 1:12] = value
        check_choice(logits, router)


@interpreted
def test_interpreted_kernels_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    check_laws("cpu", monkeypatch)


@interpreted
@pytest.mark.parametrize("num_rows", [2, 5, 65])
def test_interpreted_kernels_take_rows_and_more_steps_than_are_loaded_ahead(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_allocations(monkeypatch)
    monkeypatch.setattr(kernel, "DEPTH", 2)
    monkeypatch.setattr(kernel, "ROWS_DEPTH", 1)
    monkeypatch.setattr(kernel, "NUM_WARPS", 1)
    rows = make_rows(num_rows, 528, torch.float32, "cpu")
    check_route(rows, make_router(528, 5, LAWS["softmax"], 1))
    check_route(rows._replace(square_sums_MQ=None), make_router(528, 5, LAWS["softmax"]))


@interpreted
def test_interpreted_kernel_breaks_ties_as_the_reference_does() -> None:
    check_ties("cpu")


@interpreted
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_interpreted_kernel_ranks_broken_numbers_as_the_reference_does() -> None:
    check_broken_numbers("cpu")


@pytest.mark.gpu
def test_kernels_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    check_laws("cuda", monkeypatch)


@pytest.mark.gpu
def test_kernel_breaks_ties_as_the_reference_does() -> None:
    check_ties("cuda")


@pytest.mark.gpu
def test_kernel_ranks_broken_numbers_as_the_reference_does() -> None:
    check_broken_numbers("cuda")


SIZES = {
    "nemotron 3 nano": (2688, 128, 0, Routing("sigmoid", 6, scale=2.5)),
    "nemotron 3 super": (4096, 512, 0, Routing("sigmoid", 22, scale=5.0)),
    "groups": (1024, 256, 0, Routing("sigmoid", 8, num_groups=8, num_open_groups=4, scale=2.5)),
    "granite 4 tiny": (1536, 64, 0, Routing("softmax", 6)),
    "granite 4 small": (4096, 72, 0, Routing("softmax", 10)),
    "qwen3.5-35b-a3b": (2048, 256, 1, Routing("softmax", 8)),
    "qwen3-next": (2048, 512, 1, Routing("softmax", 10)),
    "wide": (8192, 16, 2, Routing("softmax", 16, normalised=False)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 4, 7, 64, 300])
@pytest.mark.parametrize("name", SIZES)
def test_kernels_on_sizes_of_models(
    name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_allocations(monkeypatch)
    columns, num_experts, num_shared, routing = SIZES[name]
    router = make_router(columns, num_experts, routing, num_shared, "cuda")
    for dtype in (torch.bfloat16, torch.float16):
        check_route(make_rows(num_rows, columns, dtype, "cuda"), router)


@pytest.mark.gpu
def test_kernels_in_a_graph_give_the_same_bits_for_other_rows() -> None:
    router = make_router(2048, 256, Routing("softmax", 8), 1, "cuda")
    first = make_rows(5, 2048, torch.bfloat16, "cuda")
    assert first.square_sums_MQ is not None
    other = first._replace(
        values_MK=first.values_MK.flip(0).contiguous(),
        square_sums_MQ=first.square_sums_MQ.flip(0).contiguous(),
    )
    hidden = torch.empty_like(first.values_MK)
    values, sums = first.values_MK.clone(), first.square_sums_MQ.clone()
    kernel.route(first, router, hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = kernel.route(DeferredNorm(values, sums, 1, 1e-5), router, hidden)
    for rows in (other, first, other, *[first] * 20):
        assert rows.square_sums_MQ is not None
        values.copy_(rows.values_MK)
        sums.copy_(rows.square_sums_MQ)
        graph.replay()
        wanted = kernel.route(rows, router, torch.empty_like(hidden))
        assert all(torch.equal(*pair) for pair in zip(made, wanted, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    law = LAWS["softmax"]
    parted = dataclasses.replace(law, num_groups=5)
    rows = make_rows(2, 80, torch.float32, "cpu")
    router, hidden = make_router(80, 12, law), torch.empty(2, 80)
    with pytest.raises(ValueError, match=r"the router: one dtype of torch.float32, got"):
        kernel.route(rows, wide(router), hidden)
    with pytest.raises(ValueError, match=r"each of the 80 of the rows, got \(96,\), 96"):
        kernel.route(rows, make_router(96, 12, law), hidden)
    with pytest.raises(ValueError, match=r"a multiple of 16 columns, got 1 and 72; use"):
        kernel.route(
            make_rows(2, 72, torch.float32, "cpu"), make_router(72, 12, law), torch.empty(2, 72)
        )
    with pytest.raises(ValueError, match=r"up to 1024 experts in equal groups .* got 12 in 5"):
        kernel.choose(torch.empty(2, 12), router._replace(routing=parted))
    with pytest.raises(ValueError, match=r"chooses among 12 experts, got 13; check"):
        kernel.choose(torch.empty(2, 12), make_router(80, 12, Routing("softmax", 13)))
