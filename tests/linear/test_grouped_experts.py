"""Experts of many rows as grouped products, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stree_kernels.launch.settings import Activation
from stree_kernels.linear import experts, experts_ref as reference
from stree_kernels.linear.grouped_experts import FEWEST_ROWS, grouped_expert_mlps, is_grouped
from stree_kernels.testing import TOLERANCES, assert_close, poisoned

ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "relu2")


def tensors(num_rows: int, activation: Activation, num_experts: int = 7) -> list[Tensor]:
    """Return inputs, choice, shares and weights; one expert is chosen by all, one by nobody."""
    random = torch.Generator().manual_seed(num_rows)
    columns, inner = 48, 32
    picked = torch.rand(num_rows, num_experts - 2, generator=random).argsort(1)[:, :3]
    choice = torch.cat((picked, torch.full((num_rows, 1), num_experts - 1)), 1)
    num_products = inner * (2 if activation == "swiglu" else 1)
    sizes = ((num_rows, columns), (num_experts, num_products, columns))
    inputs, up = (torch.randn(*size, generator=random) for size in sizes)
    down = torch.randn(num_experts, columns, inner, generator=random)
    share = torch.rand(num_rows, 4, generator=random)
    return [inputs, choice, share, up / columns**0.5, down / inner**0.5]


def check(op: object, dtype: torch.dtype, device: str, activation: Activation) -> None:
    inputs, choice, share, up, down = tensors(50, activation)
    inputs, up, down = (tensor.to(device, dtype) for tensor in (inputs, up, down))
    choice, share = choice.to(device), share.to(device)
    out = poisoned(*inputs.shape, dtype=torch.float32, device=device)
    op(inputs, choice, share, up, down, out, activation=activation)  # type: ignore[operator]
    truth = torch.empty_like(out, dtype=torch.float64)
    wide = (tensor.double() for tensor in (up, down))
    reference.expert_mlps(
        inputs.double(), choice, share.double(), *wide, truth, activation=activation
    )
    assert_close("out", out, truth, tolerance=TOLERANCES[dtype])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU test covers this")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sorted_rows_equal_the_reference(activation: Activation) -> None:
    check(grouped_expert_mlps, torch.float32, "cpu", activation)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_grouped_products_equal_the_reference(activation: Activation) -> None:
    check(grouped_expert_mlps, torch.bfloat16, "cuda", activation)
    check(experts.expert_mlps, torch.bfloat16, "cuda", activation)


def test_few_rows_and_other_devices_take_the_kernels() -> None:
    weight = torch.zeros(2, 16, 16, dtype=torch.bfloat16)
    assert not is_grouped(1000, weight)
    assert not is_grouped(FEWEST_ROWS - 1, weight)
