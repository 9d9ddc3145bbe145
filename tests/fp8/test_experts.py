"""Experts in FP8: kernels against the reference on the same codes and scales."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from stree_kernels.fp8 import experts as kernel, experts_ref as reference
from stree_kernels.fp8.scaled_weight import Projection, ScaledWeight, random_scaled
from stree_kernels.launch.settings import GATED, Activation
from stree_kernels.testing import TOLERANCES, assert_close, poisoned

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")
BLOCK = {"row_group": 32, "column_block": 64}
TENSOR: dict[str, int] = {}
CHANNEL = {"row_group": 1}


def weights(
    num_experts: int, hidden: int, inner: int, activation: Activation, dtype: torch.dtype,
    device: str, **scheme: int,
) -> tuple[ScaledWeight, ScaledWeight]:  # fmt: skip
    random = torch.Generator(device).manual_seed(1)
    num_products = 2 * inner if activation in GATED else inner
    up = random_scaled((num_experts, num_products, hidden), dtype, random, **scheme)
    return up, random_scaled((num_experts, hidden, inner), dtype, random, **scheme)


def exact(weight: ScaledWeight) -> ScaledWeight:
    return dataclasses.replace(weight, scales=weight.scales.double(), dtype=torch.float64)


def run(
    ops: Any, inputs: Tensor, up: Projection, down: Projection, activation: Activation
) -> Tensor:
    num_experts = len(up)
    random = torch.Generator(inputs.device).manual_seed(2)
    scores = torch.rand(len(inputs), num_experts, generator=random, device=inputs.device)
    share, choice = scores.topk(2, dim=1)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    out = poisoned(*inputs.shape, dtype=wide, device=inputs.device)
    ops.expert_mlps(inputs, choice, share.to(wide), up, down, out, activation=activation)
    return out


@pytest.mark.parametrize("scheme", [BLOCK, TENSOR, CHANNEL], ids=["block", "tensor", "channel"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_reference_equals_the_same_weights_as_tensors(
    activation: Activation, scheme: dict[str, int]
) -> None:
    pair = weights(4, 128, 64, activation, torch.float64, "cpu", **scheme)
    inputs = torch.randn(3, 128, dtype=torch.float64)
    expected = run(reference, inputs, pair[0].dequantised(), pair[1].dequantised(), activation)
    assert_close("out", run(reference, inputs, *pair, activation), expected)


@interpreted
@pytest.mark.parametrize("scheme", [BLOCK, CHANNEL], ids=["block", "channel"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_interpreted_kernels_equal_the_reference(
    activation: Activation, scheme: dict[str, int]
) -> None:
    pair = weights(3, 64, 48, activation, torch.float32, "cpu", **scheme)
    inputs = torch.randn(2, 64)
    expected = run(reference, inputs.double(), *map(exact, pair), activation)
    assert_close("out", run(kernel, inputs, *pair, activation), expected, tolerance=1e-5)


@interpreted
def test_interpreted_kernels_take_more_steps_than_are_loaded_ahead() -> None:
    # The second product: three steps of each of two experts, by threes.
    pair = weights(3, 48, 1040, "relu2", torch.float32, "cpu", row_group=16, column_block=80)
    inputs = torch.randn(1, 48)
    expected = run(reference, inputs.double(), *map(exact, pair), "relu2")
    assert_close("out", run(kernel, inputs, *pair, "relu2"), expected, tolerance=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [{"column_block": 128}, TENSOR, CHANNEL], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu2"])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_kernels_equal_the_reference(
    num_rows: int, activation: Activation, scheme: dict[str, int]
) -> None:
    pair = weights(8, 2688, 1856, activation, torch.bfloat16, "cuda", **scheme)
    inputs = torch.randn(num_rows, 2688, device="cuda", dtype=torch.bfloat16)
    expected = run(reference, inputs.double(), *map(exact, pair), activation)
    actual = run(kernel, inputs, *pair, activation)
    assert_close("out", actual, expected, tolerance=TOLERANCES[torch.bfloat16])


def test_what_the_kernels_cannot_take_is_refused() -> None:
    up, down = weights(2, 64, 48, "relu2", torch.float32, "cpu")
    inputs = torch.randn(2, 64)
    with pytest.raises(ValueError, match="are in FP8 or neither is"):
        run(kernel, inputs, up, down.dequantised(), "relu2")
    with pytest.raises(ValueError, match="have no factor of the columns"):
        run(kernel, inputs, up.times_columns(torch.ones(64)), down, "relu2")
    with pytest.raises(ValueError, match="check the model's config"):
        run(kernel, inputs, up, down, "swiglu")
    small = weights(2, 64, 40, "relu2", torch.float32, "cpu")
    with pytest.raises(ValueError, match="multiples of 16, got 64 and 40"):
        run(kernel, inputs, *small, "relu2")
