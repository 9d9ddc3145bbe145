"""A projection with the conv of a tree behind it: by one launch, by two, and by the reference.

Shape letters: M rows, K columns in, N columns out, B slots, R rows of a block, C conv channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from stree_core.tree import Tree
from stree_kernels.fp8 import in_projection as kernel, in_projection_ref as reference
from stree_kernels.launch.rows import ConvTail, Pending, conv_ancestors
from stree_kernels.linear import linear
from stree_kernels.linear.deferred_norm import DeferredNorm
from stree_kernels.linear.gemv_kernel import GemvConfig
from stree_kernels.linear.linear_kernel import LinearConfig
from stree_kernels.ssm.tree_conv_ref import tree_conv
from stree_kernels.testing import assert_close, poisoned

BEFORE, CHANNELS, BEHIND = 40, 72, 3
"""Columns of a row that the conv leaves alone, that it convolves, and that it passes on."""
NUM_COLUMNS = BEFORE + CHANNELS + BEHIND
EPS = 1e-3
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")


@dataclass(frozen=True)
class Case:
    """Slots that run a block of rows behind an accepted path, in float64 until moved."""

    tree: Tree
    values: Tensor
    weight: Tensor
    state: Tensor
    conv_weight: Tensor
    bias: Tensor
    previous: Tensor
    pending: Pending | None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        names = ("values", "weight", "state", "conv_weight", "bias", "previous")
        moved = {name: getattr(self, name).to(device, dtype, copy=True) for name in names}
        pending = self.pending and Pending(*(t.to(device) for t in self.pending))
        return replace(self, pending=pending, **moved)

    def run(self, project: Any, levels: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return what is written of the product and of the conv [R, B, N], level by level."""
        num_rows, batch, num_inner = self.values.shape
        new = {"dtype": self.values.dtype, "device": self.values.device}
        product = poisoned(num_rows, batch, NUM_COLUMNS, **new)
        out = poisoned(num_rows, batch, CHANNELS + BEHIND, **new)
        width = self.conv_weight.shape[1]
        table = torch.tensor(conv_ancestors(self.tree.parents, width), dtype=torch.int32)
        for first, stop in levels:
            values = self.values[first:stop].reshape(-1, num_inner)
            runs = values.to(torch.promote_types(values.dtype, torch.float32)).unflatten(1, (4, -1))
            pending = None if first else self.pending
            conv = ConvTail(
                self.state, product[..., BEFORE:].transpose(0, 1), self.conv_weight, self.bias,
                table.to(values.device), first, out.transpose(0, 1),
                self.previous if pending else None, pending, BEFORE,
            )  # fmt: skip
            rows = DeferredNorm(values, runs.square().sum(2), 1, EPS)
            project(rows, self.weight, product[first:stop].flatten(0, 1), conv)
        return product, out


def make_case(parents: tuple[int, ...], batch: int, *, width: int = 4, paths: bool = True) -> Case:
    """Build a case whose slots have accepted paths of different lengths, one of them none."""
    random = torch.Generator().manual_seed(len(parents))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    num_previous, num_inner = 6, 64
    previous = normal(num_previous + 1, batch, NUM_COLUMNS)[..., BEFORE:].transpose(0, 1)
    # What stands behind a path is any row, also one that nothing has written.
    previous[:, -1] = torch.nan
    path_BL = torch.full((batch, 5), num_previous, dtype=torch.int32)
    length_B = torch.tensor([(2, 0, 5, 1)[slot % 4] for slot in range(batch)], dtype=torch.int32)
    for slot, length in enumerate(length_B.tolist()):
        path_BL[slot, :length] = torch.tensor([0, 2, 3, 4, 5][:length])
    pending = Pending(path_BL, length_B, torch.zeros_like(length_B))
    return Case(
        Tree(parents), normal(len(parents), batch, num_inner),
        normal(NUM_COLUMNS, num_inner) / num_inner**0.5, normal(batch, CHANNELS, width - 1),
        normal(CHANNELS, width), normal(CHANNELS), previous, pending if paths else None,
    )  # fmt: skip


def check(case: Case, dtype: torch.dtype, project: Any, device: str = "cpu") -> None:
    """Compare with float64: the product, the conv of what was stored of it, and the state."""
    for levels in ([(0, len(case.tree.parents))], spans(case.tree)):
        ours = case.to(dtype, device)
        truth = ours.to(torch.float64, device)
        product, out = ours.run(project, levels)
        product_true, _ = truth.run(reference.project_and_convolve, levels)
        assert_close("product", product, product_true)
        again = replace(truth, state=case.to(dtype, device).state.double())
        out_true = again.run(partial(convolved, product.double()), levels)[1]
        assert_close("conv", out, out_true)
        assert torch.equal(ours.state.double(), truth.state), "a state holds inputs, unchanged"


def spans(tree: Tree) -> list[tuple[int, int]]:
    return [(level[0], level[-1] + 1) for level in tree.levels]


def convolved(product: Tensor, rows: Any, weight: Any, out_MN: Tensor, conv: ConvTail) -> None:
    """The conv alone, of a product that is given [R, B, N]."""
    inputs = product[..., BEFORE:].transpose(0, 1)
    tree_conv(
        conv.state_BCK, inputs, conv.weight_CW, conv.bias_C, conv.ancestors_RK, first=conv.first,
        num_tokens=len(out_MN) // len(conv.state_BCK), out_BRE=conv.out_BRE,
        previous_BRE=conv.previous_BRE, pending=conv.pending,
    )  # fmt: skip


def with_config(config: Any) -> Any:
    """Return what projects and convolves in one launch of a config."""

    def project(rows: DeferredNorm, weight: Tensor, out: Tensor, conv: ConvTail) -> None:
        row = len(rows.values_MK) == 1
        linear.launch(GemvConfig(8, 2, 1, depth=2) if row else config, rows, weight, out, conv=conv)

    return project


CASES = {
    "one token": make_case((-1,), 1),
    "one token, nothing accepted": make_case((-1,), 1, paths=False),
    "one token of three slots": make_case((-1,), 3),
    "a tree": make_case((-1, 0, 0, 1, 1, 2, 4), 1),
    "a chain longer than the window": make_case((-1, 0, 1, 2, 3, 4), 1, width=3),
    "trees of four slots": make_case((-1, 0, 0, 1), 4),
    "a narrow window": make_case((-1, 0, 1), 2, width=2),
}
CONFIGS = (
    LinearConfig(16, 2, depth=2, rows_depth=1, weight_first=True),
    LinearConfig(16, 1, depth=2, rows_depth=2),
)


@interpreted
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("config", CONFIGS, ids=("weight first", "rows first"))
def test_interpreted_kernels_equal_the_reference(name: str, config: LinearConfig) -> None:
    check(CASES[name], torch.float32, with_config(config))


@interpreted
def test_more_rows_than_one_launch_takes_are_convolved_too() -> None:
    check(make_case((-1, *range(19)), 2), torch.float32, kernel.project_and_convolve)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype, kernel.project_and_convolve, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2, 8, 16, 33])
def test_any_number_of_slots(batch: int) -> None:
    check(make_case((-1, 0), batch), torch.bfloat16, kernel.project_and_convolve, "cuda")


def test_sizes_beyond_the_kernels_are_refused() -> None:
    case = replace(make_case((-1,), 1), conv_weight=torch.zeros(CHANNELS, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"takes widths \(2, 3, 4\).* got 5 and 3"):
        case.to(torch.float32).run(kernel.project_and_convolve, [(0, 1)])


def test_short_projections_alone_take_the_conv() -> None:
    narrow, wide = torch.empty(64, 768), torch.empty(64, linear.NARROW)
    assert linear.takes_conv(1, narrow, one_token=True)
    assert not linear.takes_conv(1, wide, one_token=True)
    few_rows = [linear.takes_conv(rows, narrow.bfloat16()) for rows in (2, 8, 9, 16, 17)]
    assert few_rows == [False, False, True, True, False]
