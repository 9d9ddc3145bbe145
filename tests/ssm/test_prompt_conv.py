"""The conv of packed prompts against the tree conv of a chain, and the kernels against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from packed_case import SPARE_TOKENS, make_packing
from torch import Tensor

from stree_kernels.launch.packing import Packing
from stree_kernels.launch.rows import conv_ancestors
from stree_kernels.ssm import prompt_conv as kernel, prompt_conv_ref as reference, tree_conv_ref
from stree_kernels.testing import assert_close, poisoned

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")
LENGTHS = (1, 2, 0, 3, 31, 32, 33, 100)


class Case(NamedTuple):
    """The tensors of one conv; new slots' states are NaN."""

    state: Tensor
    rows: Tensor
    weight: Tensor
    bias: Tensor
    packing: Packing

    def conv(self, op: Any) -> Tensor:
        """Return the convolved tokens; the states advance in place. Rows lie apart."""
        inputs = self.rows[:, 2:-1]
        out = poisoned(*inputs.shape, dtype=inputs.dtype, device=inputs.device)
        op.prompt_conv(self.state, inputs, self.weight, self.bias, self.packing, out_MC=out)
        return out[: int(self.packing.offsets_S1[-1])]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """Return a copy in another dtype."""
        tensors = (tensor.to(device, dtype, copy=True) for tensor in self[:4])
        return Case(*tensors, Packing(*(table.to(device) for table in self.packing)))


def make_case(lengths: Sequence[int], channels: int, width: int) -> Case:
    generator = torch.Generator().manual_seed(sum(lengths))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    packing = make_packing(lengths, [0, 9, 1, 1] * 2)
    state = normal(len(lengths), channels, width - 1)
    rows = normal(sum(lengths) + SPARE_TOKENS, channels + 3)
    rows[-SPARE_TOKENS:] = torch.nan
    for sequence, slot in enumerate(packing.slots_S.tolist()):
        if not packing.starts_S[sequence] and lengths[sequence]:
            state[slot] = torch.nan
    return Case(state, rows, normal(channels, width), normal(channels), packing)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_reference_equals_a_chain(width: int) -> None:
    case = make_case(LENGTHS, 5, width)
    expected = []
    states = case.state.clone()
    offsets, slots, starts = (table.tolist() for table in case.packing)
    for sequence, slot in enumerate(slots):
        rows = case.rows[None, offsets[sequence] : offsets[sequence + 1], 2:-1]
        if not rows.shape[1]:
            continue
        state = states[slot : slot + 1] if starts[sequence] else states[:1] * 0
        state = state.nan_to_num()
        out, length = torch.empty_like(rows), rows.shape[1]
        ancestors = torch.tensor(conv_ancestors(range(-1, length - 1), width))
        tree_conv_ref.tree_conv(
            state, rows, case.weight, case.bias, ancestors, first=0, num_tokens=length,
            out_BRE=out, previous_BRE=None, pending=None,
        )  # fmt: skip
        expected.append(out[0])
        states[slot] = torch.cat((state, rows.mT), dim=2)[0, :, length:]
    assert_close("rows", case.conv(reference), torch.cat(expected))
    assert torch.equal(case.state, states)


def check_kernel(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    ours, truth = case.to(dtype, device), case.to(dtype, device).to(torch.float64, device)
    assert_close("rows", ours.conv(kernel), truth.conv(reference))
    assert torch.equal(ours.state.double(), truth.state)


@interpreted
@pytest.mark.parametrize("width", [2, 4])
def test_interpreted_kernels_equal_the_reference(width: int) -> None:
    check_kernel(make_case(LENGTHS, 150, width), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_kernels_equal_the_reference(dtype: torch.dtype) -> None:
    check_kernel(make_case((*LENGTHS[:-1], 1000), 5376, 4), dtype, "cuda")


def test_what_the_kernels_cannot_take_is_refused() -> None:
    case = make_case([2], 8, 5).to(torch.float32)
    with pytest.raises(ValueError, match="takes widths"):
        case.conv(kernel)
    case = make_case([2], 8, 4).to(torch.float32)
    with pytest.raises(ValueError, match="have 8 channels"):
        kernel.prompt_conv(
            case.state, case.rows, case.weight, case.bias, case.packing, out_MC=case.rows
        )
