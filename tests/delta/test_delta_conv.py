"""The conv of gated delta layers against plain sums, and the kernel against the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stree_core.tree import Tree
from stree_kernels.delta import delta_conv as kernel, delta_conv_ref as reference
from stree_kernels.delta.delta_conv_ref import DeltaConvOutput, DeltaProjection
from stree_kernels.delta.rows import NORM_EPS, DeltaHeads
from stree_kernels.launch.rows import Pending, conv_ancestors
from stree_kernels.testing import assert_close, poisoned

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")


@dataclass(frozen=True)
class Case:
    """The tensors of one conv; the block and the previous one end in a row of NaN."""

    state: Tensor
    inputs: DeltaProjection
    weight: Tensor
    heads: DeltaHeads
    ancestors: Tensor
    previous: Tensor
    pending: Pending | None
    key_heads: int
    key_dim: int

    def convolve(self, op: Any, first: int = 0, stop: int | None = None) -> DeltaConvOutput:
        """Return rows first..stop - 1; the state advances in place when a path is pending."""
        stop = len(self.ancestors) if stop is None else stop
        qkv, a, _ = self.inputs
        wide = torch.promote_types(qkv.dtype, torch.float32)

        def like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            batch, *rest = tensor.shape
            # Time-major underneath, as the inputs are.
            return poisoned(rest[0], batch, rest[1], dtype=dtype, device=tensor.device).transpose(
                0, 1
            )

        out = DeltaConvOutput(like(qkv, qkv.dtype), like(a, wide), like(a, wide))
        op.delta_conv(
            self.state, self.inputs, self.weight, self.heads, self.ancestors,
            num_key_heads=self.key_heads, key_head_dim=self.key_dim, first=first,
            num_tokens=stop - first, out=out, previous_BRC=self.previous, pending=self.pending,
        )  # fmt: skip
        for tensor in out:
            outside = torch.cat((tensor[:, :first], tensor[:, stop:]), dim=1)
            assert outside.isnan().all(), "only the rows asked for are written"
        return DeltaConvOutput(*(tensor[:, first:stop] for tensor in out))

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """Return a copy in another dtype; constants are fp32 unless it is float64."""
        wide = torch.promote_types(dtype, torch.float32)
        return dataclasses.replace(
            self,
            state=self.state.to(device, dtype, copy=True),
            inputs=DeltaProjection(*(tensor.to(device, dtype) for tensor in self.inputs)),
            weight=self.weight.to(device, dtype),
            heads=DeltaHeads(*(tensor.to(device, wide) for tensor in self.heads)),
            ancestors=self.ancestors.to(device),
            previous=self.previous.to(device, dtype),
            pending=self.pending and Pending(*(tensor.to(device) for tensor in self.pending)),
        )


def make_case(
    tree: Tree, *, paths: Sequence[Sequence[int]] | None = None, capacity: int = 4,
    key_heads: int = 1, key_dim: int = 16, heads: int = 3, head_dim: int = 8,
) -> Case:  # fmt: skip
    """Build a case of two sequences in float64, with a pending path each if given."""
    random = np.random.default_rng(tree.num_tokens)
    channels = 2 * key_heads * key_dim + heads * head_dim

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape))

    def block(num_rows: int, columns: int) -> Tensor:
        rows = normal(num_rows + 1, 2, columns).transpose(0, 1)
        rows[:, -1] = torch.nan
        return rows

    num_previous = 1 + max((row for path in paths or () for row in path), default=0)
    path_BL = torch.full((2, capacity), num_previous, dtype=torch.int32)
    for sequence, path in enumerate(paths or ()):
        path_BL[sequence, : len(path)] = torch.tensor(path, dtype=torch.int32)
    length_B = torch.tensor([len(path) for path in paths or ()], dtype=torch.int32)
    sizes = (channels, heads, heads)
    return Case(
        state=normal(2, channels, 3),
        inputs=DeltaProjection(*(block(tree.num_tokens, size) for size in sizes)),
        weight=normal(channels, 4),
        heads=DeltaHeads(-normal(heads).exp(), normal(heads)),
        ancestors=torch.tensor(conv_ancestors(tree.parents, 4), dtype=torch.int32),
        previous=block(num_previous, channels),
        pending=None if paths is None else Pending(path_BL, length_B, torch.zeros_like(length_B)),
        key_heads=key_heads,
        key_dim=key_dim,
    )


def by_paths(case: Case, tree: Tree) -> tuple[Tensor, Tensor]:
    """Return the advanced state and q | k | v of all rows, each from its history, in float64."""
    weight = case.weight.double().numpy()
    num_normed = 2 * case.key_heads * case.key_dim
    states, rows = [], []
    for sequence in range(len(case.state)):
        history = list(case.state[sequence].double().numpy().T)
        if case.pending is not None:
            path = case.pending.path_BL[sequence, : case.pending.length_B[sequence]]
            previous = case.previous[sequence].double().numpy()
            history += [previous[row] for row in path.tolist()]
        states.append(np.stack(history[-3:], axis=1))
        for path_rows in tree.node_paths:
            own = [case.inputs.qkv_BRC[sequence, row].double().numpy() for row in path_rows]
            conv = (weight * np.stack((history + own)[-4:], axis=1)).sum(axis=1)
            conv /= 1 + np.exp(-conv)
            normed = conv[:num_normed].reshape(-1, case.key_dim)
            normed /= np.sqrt((normed**2).sum(axis=1, keepdims=True) + NORM_EPS)
            rows.append(np.concatenate((normed.ravel(), conv[num_normed:])))
    stacked = np.stack(rows).reshape(len(states), tree.num_tokens, -1)
    return torch.from_numpy(np.stack(states)), torch.from_numpy(stacked)


TREES = {
    "one token": (Tree.chain(0), [[3], []]),
    "tree": (Tree((-1, 0, 0, 1, 1, 2)), [[0, 1], [0, 1, 2, 3]]),
    "no path": (Tree.chain(4), None),
}


@pytest.mark.parametrize("name", TREES)
def test_reference_equals_the_sums_of_every_path(name: str) -> None:
    tree, paths = TREES[name]
    case = make_case(tree, paths=paths, key_heads=2, key_dim=4)
    state, rows = by_paths(case, tree)
    out = case.convolve(reference)
    assert_close("q, k, v", out.qkv_BRC, rows)
    assert torch.equal(case.state, state)
    a, b = (raw[:, : tree.num_tokens].numpy() for raw in case.inputs[1:])
    decay, bias = (tensor.numpy() for tensor in case.heads)
    assert_close("g", out.g_BRH, torch.from_numpy(decay * np.log1p(np.exp(a + bias))))
    assert_close("beta", out.beta_BRH, torch.from_numpy(1 / (1 + np.exp(-b))))


def check_kernel(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Compare the kernel with the reference in float64 on the values that the kernel sees."""
    ours = case.to(dtype, device)
    truth = ours.to(torch.float64, device)
    for name, mine, true in zip(
        ("q, k, v", "g", "beta"), ours.convolve(kernel), truth.convolve(reference), strict=True
    ):
        assert_close(name, mine, true)
    assert torch.equal(ours.state.double(), truth.state), "a state holds inputs, unchanged"


KERNEL_CASES = {
    "one token": make_case(Tree.chain(0), paths=[[3], []], capacity=1),
    "no path": make_case(Tree.chain(2), heads=5),
    "tree": make_case(Tree((-1, 0, 0, 1, 1, 2)), paths=[[2], [0, 2, 3]], key_heads=2),
    "17 rows": make_case(Tree((-1, *(node // 2 for node in range(16)))), key_dim=32),
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
    for parts, whole in zip(zip(*levels, strict=True), case.convolve(reference), strict=True):
        assert_close("rows", torch.cat(parts, dim=1), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNEL_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_kernel_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    check_kernel(KERNEL_CASES[name], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 16, 31, 64, 256])
@pytest.mark.parametrize(("key_dim", "head_dim"), [(128, 128), (64, 64), (128, 64)])
def test_kernel_on_sizes_of_models(num_rows: int, key_dim: int, head_dim: int) -> None:
    tree = Tree((-1, *(node // 3 for node in range(num_rows - 1))))
    case = make_case(
        tree, paths=[list(range(64)), [0, 2]], capacity=64, key_heads=16, key_dim=key_dim,
        heads=32, head_dim=head_dim,
    )  # fmt: skip
    check_kernel(case, torch.bfloat16, "cuda")


@pytest.mark.gpu
def test_sanitized_delta_conv() -> None:
    check_kernel(KERNEL_CASES["tree"], torch.bfloat16, "cuda")
    check_kernel(KERNEL_CASES["one token"], torch.bfloat16, "cuda")


def test_what_the_kernel_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"key head dims \(16, 32, 64, 128\) .* got 8"):
        make_case(Tree.chain(1), key_dim=8).to(torch.float32).convolve(kernel)
    case = make_case(Tree.chain(1)).to(torch.float32)
    with pytest.raises(ValueError, match=r"cover every row up to the last one scored, 9"):
        case.convolve(kernel, 0, 9)
    with pytest.raises(ValueError, match=r"one dtype of torch.bfloat16, torch.float16, .*, got"):
        make_case(Tree.chain(1)).convolve(kernel)
