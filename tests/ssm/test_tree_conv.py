"""The conv against a loop over paths in numpy, and the kernel against the reference.

Shape letters: B batch, R rows of a block buffer, L path capacity, C conv channels, W conv width,
K = W - 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from strategies import trees
from torch import Tensor

from stree_core.tree import Tree
from stree_kernels.launch.rows import Pending, conv_ancestors
from stree_kernels.ssm import tree_conv as kernel, tree_conv_ref as reference
from stree_kernels.testing import assert_close, poisoned

FEW = settings(max_examples=20, deadline=None, derandomize=True)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")


@dataclass(frozen=True)
class Case:
    """The tensors of one conv; the block and the previous one end in a row of NaN."""

    state: Tensor
    inputs: Tensor
    weight: Tensor
    bias: Tensor
    ancestors: Tensor
    previous: Tensor
    pending: Pending | None

    def convolve(self, op: Any, first: int = 0, stop: int | None = None) -> Tensor:
        """Return rows first..stop - 1; the state advances in place when a path is pending."""
        stop = len(self.ancestors) if stop is None else stop
        # Time-major underneath, as the inputs are.
        batch, num_rows, channels = self.inputs.shape
        out = poisoned(
            num_rows, batch, channels, dtype=self.inputs.dtype, device=self.inputs.device
        )
        op.tree_conv(
            self.state, self.inputs, self.weight, self.bias, self.ancestors, first=first,
            num_tokens=stop - first, out_BRE=out.transpose(0, 1), previous_BRE=self.previous,
            pending=self.pending,
        )  # fmt: skip
        outside = torch.cat((out[:first], out[stop:]))
        assert outside.isnan().all(), "only the rows asked for are written"
        return out[first:stop].transpose(0, 1)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """Return a copy in another dtype."""
        names = ("state", "inputs", "weight", "bias", "previous")
        moved = {name: getattr(self, name).to(device, dtype, copy=True) for name in names}
        pending = self.pending and Pending(*(t.to(device) for t in self.pending))
        ancestors = self.ancestors.to(device)
        return dataclasses.replace(self, ancestors=ancestors, pending=pending, **moved)


def make_case(
    tree: Tree, *, paths: Sequence[Sequence[int]] | None = None, capacity: int = 4, width: int = 4,
    channels: int = 5, passed_on: int = 2,
) -> Case:  # fmt: skip
    """Build a case of two sequences in float64, with a pending path each if given."""
    random = np.random.default_rng(tree.num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape))

    def block(num_rows: int) -> Tensor:
        inputs = normal(num_rows + 1, 2, channels + passed_on).transpose(0, 1)
        inputs[:, -1] = torch.nan
        return inputs

    num_previous = 1 + max((row for path in paths or () for row in path), default=0)
    # What stands after a path is any row of the block, also one that nothing has written.
    path_BL = torch.full((2, capacity), num_previous, dtype=torch.int32)
    for sequence, path in enumerate(paths or ()):
        path_BL[sequence, : len(path)] = torch.tensor(path, dtype=torch.int32)
    length_B = torch.tensor([len(path) for path in paths or ()], dtype=torch.int32)
    return Case(
        state=normal(2, channels, width - 1),
        inputs=block(tree.num_tokens),
        weight=normal(channels, width),
        bias=normal(channels),
        ancestors=torch.tensor(conv_ancestors(tree.parents, width), dtype=torch.int32),
        previous=block(num_previous),
        pending=None if paths is None else Pending(path_BL, length_B, torch.zeros_like(length_B)),
    )


def by_paths(case: Case, tree: Tree) -> tuple[Tensor, Tensor]:
    """Return the advanced state and all rows, each from its whole history, in float64."""
    weight, bias = case.weight.double().numpy(), case.bias.double().numpy()
    channels, width = weight.shape
    states, ys = [], []
    for sequence in range(len(case.state)):
        history = list(case.state[sequence].double().numpy().T)
        if case.pending is not None:
            path = case.pending.path_BL[sequence, : case.pending.length_B[sequence]]
            rows = case.previous[sequence, :, :channels].double().numpy()
            history += [rows[row] for row in path.tolist()]
        states.append(np.stack(history[1 - width :], axis=1))
        for path_rows in tree.node_paths:
            own = [case.inputs[sequence, row].double().numpy() for row in path_rows]
            seen = history + [row[:channels] for row in own]
            conv = (weight * np.stack(seen[-width:], axis=1)).sum(axis=1) + bias
            ys.append(np.concatenate((conv / (1 + np.exp(-conv)), own[-1][channels:])))
    y = np.stack(ys).reshape(len(states), tree.num_tokens, -1)
    return torch.from_numpy(np.stack(states)), torch.from_numpy(y)


@FEW
@given(
    tree=trees(max_nodes=14, max_depth=6),
    width=st.sampled_from([2, 3, 4]),
    path=st.lists(st.integers(0, 6), max_size=4),
)
def test_reference_equals_the_conv_of_every_path(tree: Tree, width: int, path: list[int]) -> None:
    case = make_case(tree, width=width, paths=[path, [3]])
    state, y = by_paths(case, tree)
    assert_close("y", case.convolve(reference), y)
    assert torch.equal(case.state, state)


@FEW
@given(tree=trees(max_nodes=14, max_depth=6))
def test_convolving_by_levels_equals_convolving_at_once(tree: Tree) -> None:
    case = make_case(tree)
    levels = [case.convolve(reference, level[0], level[-1] + 1) for level in tree.levels]
    assert_close("y", torch.cat(levels, dim=1), case.convolve(reference))


def test_a_prompt_shorter_than_the_window_reads_zeros() -> None:
    case = make_case(Tree.chain(1))
    case = dataclasses.replace(case, state=torch.zeros_like(case.state))
    window = torch.nn.functional.pad(case.inputs[:, :2, :5].mT, (3, 0))
    conv = torch.nn.functional.conv1d(window, case.weight[:, None], case.bias, groups=5)
    assert_close("y", case.convolve(reference)[..., :5], torch.nn.functional.silu(conv).mT)


def test_the_table_names_state_columns_and_rows() -> None:
    # A forest: row 3 starts a path of its own.
    table = conv_ancestors([-1, 0, 1, -1, 2], width=4)
    assert table == [[2, 1, 0], [3, 2, 1], [4, 3, 2], [2, 1, 0], [5, 4, 3]]


def check_kernel(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Compare the kernel with the reference in float64 on the values that the kernel sees."""
    ours = case.to(dtype, device)
    truth = ours.to(torch.float64, device)
    assert_close("y", ours.convolve(kernel), truth.convolve(reference))
    assert torch.equal(ours.state.double(), truth.state), "a state holds inputs, unchanged"


KERNEL_CASES = {
    "one token": make_case(Tree.chain(0), paths=[[3], []], capacity=1, channels=130),
    "one token, no path": make_case(Tree.chain(0), channels=70),
    "path shorter than the state": make_case(Tree((-1, 0, 0, 1)), paths=[[2], [0, 2]]),
    "path longer than the state": make_case(Tree.chain(5), paths=[[0, 1, 4, 5], []], width=3),
    "two rows of state": make_case(Tree.chain(3), paths=[[0], [0, 1, 2, 3]], width=2),
    "33 rows": make_case(Tree((-1, *(node // 2 for node in range(32)))), channels=64),
}


@interpreted
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_interpreted_kernel_equals_the_reference(name: str) -> None:
    check_kernel(KERNEL_CASES[name], torch.float32)


@interpreted
def test_interpreted_kernel_convolves_by_levels() -> None:
    tree = Tree((-1, 0, 0, 1, 1, 2, 4))
    case = make_case(tree).to(torch.float32)
    levels = [case.convolve(kernel, level[0], level[-1] + 1) for level in tree.levels]
    assert_close("y", torch.cat(levels, dim=1), case.convolve(reference))


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNEL_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_kernel_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    check_kernel(KERNEL_CASES[name], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 16, 31, 64, 65, 256])
def test_kernel_on_sizes_of_models(num_rows: int) -> None:
    tree = Tree((-1, *(node // 3 for node in range(num_rows - 1))))
    case = make_case(tree, paths=[list(range(64)), [0, 2]], capacity=64, channels=5376)
    check_kernel(case, torch.bfloat16, "cuda")


def test_sizes_beyond_the_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes widths \(2, 3, 4\).* got 5 and 4"):
        make_case(Tree.chain(1), width=5).to(torch.float32).convolve(kernel)
    case = make_case(Tree.chain(1)).to(torch.float32)
    with pytest.raises(ValueError, match=r"cover every row up to the last one scored, 9"):
        case.convolve(kernel, 0, 9)
    with pytest.raises(ValueError, match=r"one dtype of torch.bfloat16, torch.float16, .*, got"):
        make_case(Tree.chain(1)).convolve(kernel)
