"""Attention against a loop over rows in numpy, and the kernel against the reference.

Shape letters: B slots, R rows of a block buffer, T rows of a pass, S cache positions, H heads or
kv heads, D head dim.
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

from stree_core.models.row_block import make_block
from stree_core.tree import Tree
from stree_kernels.attention import tree_attention as kernel, tree_attention_ref as reference
from stree_kernels.attention.rope_kv_write_ref import KeyValues
from stree_kernels.testing import assert_close, poisoned

FEW = settings(max_examples=20, deadline=None, derandomize=True)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")


@dataclass(frozen=True)
class Case:
    """The tensors of one pass over a whole block, whose buffers have one row more."""

    q: Tensor
    cache: KeyValues
    rows: KeyValues
    mask: Tensor
    committed: Tensor

    def attend(self, op: Any, first: int = 0, stop: int | None = None) -> Tensor:
        """Return rows first..stop - 1."""
        stop = len(self.q) if stop is None else stop
        q = self.q[first:stop]
        out = poisoned(*q.shape, dtype=q.dtype, device=q.device)
        num_values = op.workspace_size(
            len(self.q), *q.shape[1:3], self.rows.key.shape[2], q.shape[3], q.dtype
        )
        op.tree_attention(
            q, self.cache, self.rows, self.mask, self.committed, first=first, scale=0.3,
            out_TBHD=out, workspace=poisoned(num_values, dtype=torch.float32, device=q.device),
        )  # fmt: skip
        return out

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """Return a copy in another dtype."""
        return Case(
            self.q.to(device, dtype),
            KeyValues(*(buffer.to(device, dtype) for buffer in self.cache)),
            KeyValues(*(buffer.to(device, dtype) for buffer in self.rows)),
            self.mask.to(device),
            self.committed.to(device),
        )

    def poison(self) -> Case:
        """Return a copy with NaN wherever there is no token."""
        cache = KeyValues(*(buffer.clone() for buffer in self.cache))
        rows = KeyValues(*(buffer.clone() for buffer in self.rows))
        for buffer in cache:
            for slot, length in enumerate(self.committed.tolist()):
                buffer[slot, length:] = torch.nan
        for buffer in rows:
            buffer[len(self.q) :] = torch.nan
        return dataclasses.replace(self, cache=cache, rows=rows)


def make_case(
    tree: Tree, *, committed: Sequence[int], positions: int = 0, num_heads: int = 2,
    num_kv_heads: int = 1, head_dim: int = 16,
) -> Case:  # fmt: skip
    """Build a case in float64, one slot for each committed length."""
    generator = torch.Generator().manual_seed(tree.num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    slots, heads = len(committed), (num_kv_heads, head_dim)
    positions = positions or max(1, *committed)
    block = make_block(tree.parents, frozenset(), torch.device("cpu"))
    return Case(
        q=normal(tree.num_tokens, slots, num_heads, head_dim),
        cache=KeyValues(*(normal(slots, positions, *heads) for _ in range(2))),
        rows=KeyValues(*(normal(tree.num_tokens + 1, slots, *heads) for _ in range(2))),
        mask=block.mask_RR,
        committed=torch.tensor(committed, dtype=torch.int32),
    )


def by_rows(case: Case, tree: Tree) -> Tensor:
    """Return the attention of every row, from the keys and values along its own path."""
    out = np.empty(tuple(case.q.shape))
    group = case.q.shape[2] // case.rows.key.shape[2]
    for row, slot, head in np.ndindex(*case.q.shape[:3]):
        path, length = list(tree.node_paths[row]), int(case.committed[slot])
        key, value = (
            np.concatenate((kept[slot, :length, head // group], new[path, slot, head // group]))
            for kept, new in zip(case.cache, case.rows, strict=True)
        )
        weight = np.exp(0.3 * (key @ case.q[row, slot, head].numpy()))
        out[row, slot, head] = weight @ value / weight.sum()
    return torch.from_numpy(out)


@FEW
@given(
    tree=trees(max_nodes=14, max_depth=6),
    committed=st.lists(st.integers(0, 20), min_size=1, max_size=3),
)
def test_reference_equals_the_attention_of_every_row(tree: Tree, committed: list[int]) -> None:
    case = make_case(tree, committed=committed, num_heads=6, num_kv_heads=2, head_dim=4)
    assert_close("out", case.attend(reference), by_rows(case, tree))


@FEW
@given(tree=trees(max_nodes=14, max_depth=6), committed=st.integers(0, 20))
def test_a_node_attends_as_its_path_decoded_alone(tree: Tree, committed: int) -> None:
    """Decoding a node's ancestors one at a time, each into the cache, ends in the same output."""
    case = make_case(tree, committed=[committed], positions=40, num_heads=4, num_kv_heads=2)
    out = case.attend(reference)
    for row, path in enumerate(tree.node_paths):
        length = committed + len(path) - 1
        cache = KeyValues(*(buffer.clone() for buffer in case.cache))
        for buffer, rows in zip(cache, case.rows, strict=True):
            buffer[0, committed:length] = rows[list(path[:-1]), 0]
        own = KeyValues(*(rows[row, None] for rows in case.rows))
        committed_B = torch.tensor([length], dtype=torch.int32)
        alone = Case(case.q[row, None], cache, own, case.mask[:1, :1], committed_B)
        assert_close("out", alone.attend(reference)[0], out[row])


@FEW
@given(tree=trees(max_nodes=14, max_depth=6))
def test_attending_by_levels_equals_attending_at_once(tree: Tree) -> None:
    case = make_case(tree, committed=[9, 0])
    levels = [case.attend(reference, level[0], level[-1] + 1) for level in tree.levels]
    assert_close("out", torch.cat(levels), case.attend(reference))


def check_kernel(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Compare the kernel, NaN around its tokens, with the reference in float64 on its values."""
    ours = case.to(dtype, device)
    truth = ours.to(torch.float64, device)
    assert_close("out", ours.poison().attend(kernel), truth.attend(reference))


def ternary(num_rows: int) -> Tree:
    """Return a tree of this many rows."""
    return Tree((-1, *(node // 3 for node in range(num_rows - 1))))


KERNEL_CASES = {
    "one token": make_case(Tree.chain(0), committed=[40]),
    "nothing committed": make_case(ternary(5), committed=[0, 0], positions=40),
    "ragged": make_case(ternary(5), committed=[33, 0, 70], num_heads=6, num_kv_heads=2),
    "several tiles of queries": make_case(ternary(17), committed=[31], num_heads=3),
    "several tiles of rows": make_case(ternary(37), committed=[3]),
}


@interpreted
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_interpreted_kernel_equals_the_reference(name: str) -> None:
    check_kernel(KERNEL_CASES[name], torch.float32)


@interpreted
def test_interpreted_kernel_in_one_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "NUM_PROGRAMS", 1)
    check_kernel(KERNEL_CASES["ragged"], torch.float32)


@interpreted
def test_interpreted_kernel_attends_by_levels() -> None:
    tree = ternary(8)
    case = make_case(tree, committed=[9, 40]).to(torch.float32)
    levels = [case.attend(kernel, level[0], level[-1] + 1) for level in tree.levels]
    assert_close("out", torch.cat(levels), case.attend(reference))


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNEL_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_kernel_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    check_kernel(KERNEL_CASES[name], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 5, 16, 33, 64, 129, 256])
@pytest.mark.parametrize("heads", [(32, 8, 128), (32, 2, 128), (8, 2, 64), (5, 1, 256)], ids=str)
@pytest.mark.parametrize("committed", [(1000,), (1000, 0, 17, 64, 65, 999, 512, 3)], ids=len)
def test_kernel_on_sizes_of_models(
    num_rows: int, heads: tuple[int, int, int], committed: tuple[int, ...]
) -> None:
    case = make_case(
        ternary(num_rows), committed=committed, positions=1024, num_heads=heads[0],
        num_kv_heads=heads[1], head_dim=heads[2],
    )  # fmt: skip
    check_kernel(case, torch.bfloat16, "cuda")


@pytest.mark.gpu
def test_kernel_gives_the_same_bits_again() -> None:
    case = make_case(ternary(16), committed=[5000], num_heads=32, num_kv_heads=8, head_dim=128)
    case = case.to(torch.bfloat16, "cuda")
    once = case.attend(kernel)
    assert all(torch.equal(case.attend(kernel), once) for _ in range(5))


def test_the_workspace_is_enough_for_fewer_rows() -> None:
    shape = (8, 32, 8, 128, torch.bfloat16)
    sizes = [kernel.workspace_size(num_tokens, *shape) for num_tokens in range(1, 65)]
    assert sizes == sorted(sizes)
    case = make_case(ternary(8), committed=[70]).to(torch.float32)
    with pytest.raises(ValueError, match=r"the workspace holds \d+ fp32 values, got 7 of"):
        kernel.tree_attention(
            case.q, case.cache, case.rows, case.mask, case.committed, first=0, scale=1.0,
            out_TBHD=case.q.clone(), workspace=torch.empty(7),
        )  # fmt: skip


def test_sizes_beyond_the_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes head dims .* got 8"):
        make_case(Tree.chain(1), committed=[1], head_dim=8).to(torch.float32).attend(kernel)
    with pytest.raises(ValueError, match=r"1 to 16 query heads for each kv head, got 17 and 1"):
        make_case(Tree.chain(1), committed=[1], num_heads=17).to(torch.float32).attend(kernel)
    far = torch.empty(1, (1 << 20) + 1, 1, 16)
    case = make_case(Tree.chain(1), committed=[1]).to(torch.float32)
    with pytest.raises(ValueError, match=r"head dims .* up to 128 in torch.float32, got 256; use"):
        kernel.workspace_size(1, 1, 4, 1, 256, torch.float32)
    with pytest.raises(ValueError, match=r"256 rows and 1048576 positions, got 2 and 1048577;"):
        dataclasses.replace(case, cache=KeyValues(far, far)).attend(kernel)
    with pytest.raises(ValueError, match=r"one dtype of torch.bfloat16, torch.float16, .*, got"):
        make_case(Tree.chain(1), committed=[1]).attend(kernel)
