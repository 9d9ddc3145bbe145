"""The gate of an attention's output against numpy, and the kernel against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stree_kernels.attention import output_gate as kernel, output_gate_ref as reference
from stree_kernels.testing import assert_close

SIZES = {"one row": (1, 64), "several blocks": (3, 1100), "many rows": (40, 16)}


def tensors(size: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """Return gates, which are columns of a wider buffer, and outputs."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.full((size[0], size[1] + 24), torch.nan, dtype=torch.float64)
    wide[:, 8:-16] = 4 * torch.randn(size, generator=generator, dtype=torch.float64)
    out = torch.randn(size, generator=generator, dtype=torch.float64)
    return wide.to(device, dtype)[:, 8:-16], out.to(device, dtype)


def gated(op: Any, gate: Tensor, out: Tensor) -> Tensor:
    out = out.clone()
    op.gate_output(gate, out)
    return out


def check_kernel(name: str, dtype: torch.dtype, device: str) -> None:
    gate, out = tensors(SIZES[name], dtype, device)
    expected = gated(reference, gate.double(), out.double())
    assert_close("output", gated(kernel, gate, out), expected)


def test_reference_is_the_formula() -> None:
    gate, out = tensors((5, 7), torch.float64)
    expected = out.numpy() / (1 + np.exp(-gate.numpy()))
    assert_close("output", gated(reference, gate, out), torch.from_numpy(expected))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU test covers this")
@pytest.mark.parametrize("name", SIZES)
def test_interpreted_kernel_equals_the_reference(name: str) -> None:
    check_kernel(name, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_kernel_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    check_kernel(name, dtype, "cuda")


def test_gates_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a gate for each value, got \(2, 4\) for \(2, 8\)"):
        kernel.gate_output(torch.zeros(2, 4), torch.zeros(2, 8))
