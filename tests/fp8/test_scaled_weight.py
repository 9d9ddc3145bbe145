"""Weights in FP8: how codes and scales become numbers."""

from __future__ import annotations

import pytest
import torch

from stree_kernels.fp8.scaled_weight import CODES, ScaledWeight, dense, random_scaled


def all_codes() -> torch.Tensor:
    """Return every finite code as a matrix [2, 127]."""
    codes = torch.arange(256, dtype=torch.uint8)
    return codes[codes % 128 != 127].view(2, 127)


def by_formula(code: int) -> float:
    """Return a code's value by the format's definition: 4 bits of exponent, 3 of mantissa."""
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def test_every_code_has_the_value_of_the_format() -> None:
    codes = all_codes()
    weight = ScaledWeight(codes.view(CODES), torch.ones(1, 1), 2, 127, torch.float32)
    expected = [[by_formula(code) for code in row] for row in codes.tolist()]
    assert weight.dequantised().tolist() == expected
    assert max(map(max, expected)) == 448


def test_a_value_is_rounded_once_and_ragged_blocks_keep_their_pitch() -> None:
    codes = torch.randint(0, 120, (10, 7), dtype=torch.uint8)
    scales = torch.rand(3, 3) + 0.3
    weight = ScaledWeight(codes.view(CODES), scales, 4, 3, torch.bfloat16)
    actual = weight.dequantised()
    for i in range(10):
        for j in range(7):
            value = torch.tensor(by_formula(int(codes[i, j]))) * scales[i // 4, j // 3]
            assert actual[i, j] == value.bfloat16()


def test_multipliers_go_into_scales_and_norms_beside_the_codes() -> None:
    weight = random_scaled((12, 8), torch.float32, torch.Generator(), row_group=4, column_block=4)
    rows, columns = torch.tensor([2.0] * 4 + [0.7] * 8), torch.rand(8) + 0.5
    both = weight.times_rows(rows).times_columns(columns)
    assert torch.equal(both.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    assert both.column_factor_K is columns
    expected = weight.dequantised() * rows[:, None] * columns
    torch.testing.assert_close(both.dequantised(), expected)
    assert torch.equal(dense(both), both.dequantised())


@pytest.mark.parametrize("exact", [True, False])
def test_a_factor_is_narrow_where_that_is_exact(exact: bool) -> None:
    weight = random_scaled((4, 8), torch.bfloat16, torch.Generator())
    factor = torch.full((8,), 1.25 if exact else 1.001)
    kept = weight.times_columns(factor).column_factor_K
    assert kept is not None
    assert kept.dtype == (torch.bfloat16 if exact else torch.float32)


def test_multipliers_of_experts_go_into_their_scales() -> None:
    weight = random_scaled((3, 8, 8), torch.float32, torch.Generator(), row_group=4)
    factor = torch.tensor([1.0, 2.0, 0.5])
    expected = weight.dequantised() * factor[:, None, None]
    torch.testing.assert_close(weight.times_rows(factor).dequantised(), expected)
