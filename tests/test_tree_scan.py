"""The scan against a recurrence over nodes in numpy, and the kernel against the reference.

Shape letters: B batch, R rows of a block buffer, T rows scored, L path capacity, H heads,
P head dim, N state dim, G groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import trees
from torch import Tensor

from stree_core.tree import Tree
from stree_kernels import tree_scan as kernel
from stree_kernels import tree_scan_ref as reference
from stree_kernels.rows import Pending, ScanHeads, ScanRows
from stree_kernels.testing import TOLERANCES, assert_close, poisoned

UNLIMITED = (0.0, float("inf"))
FEW = settings(max_examples=20, deadline=None, derandomize=True)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")
WIDE_TREE = Tree((-1, *(node // 3 for node in range(80))))


@dataclass(frozen=True)
class Case:
    """The tensors of one scan; the block and the previous one end in a row of NaN."""

    state: Tensor
    rows: ScanRows
    c: Tensor
    mask: Tensor
    heads: ScanHeads
    previous: ScanRows
    pending: Pending | None = None
    dt_limit: tuple[float, float] = UNLIMITED

    def scan(self, op: Any, first: int = 0, stop: int | None = None) -> Tensor:
        """Return y of rows first..stop - 1; the state advances in place when a path is pending."""
        c = self.c[:, first:stop]
        out = poisoned(*c.shape[:2], *self.state.shape[1:3], dtype=c.dtype, device=c.device)
        op.tree_scan(
            self.state, self.rows, c, self.mask, self.heads, first=first, dt_limit=self.dt_limit,
            out_BTHP=out, previous=self.previous, pending=self.pending,
        )  # fmt: skip
        return out

    def to(self, dtype: torch.dtype, state: torch.dtype, device: str = "cpu") -> Case:
        """Return a copy in other dtypes; constants are fp32 unless the state is float64."""
        constants = torch.promote_types(state, torch.float32)
        pending = self.pending and Pending(*(t.to(device) for t in self.pending))
        return dataclasses.replace(
            self,
            state=self.state.to(device, state, copy=True),
            rows=ScanRows(*(t.to(device, dtype) for t in self.rows)),
            c=self.c.to(device, dtype),
            mask=self.mask.to(device),
            heads=ScanHeads(*(t.to(device, constants) for t in self.heads)),
            previous=ScanRows(*(t.to(device, dtype) for t in self.previous)),
            pending=pending,
        )


def make_case(
    tree: Tree, *, paths: Sequence[Sequence[int]] | None = None, capacity: int = 4, batch: int = 2,
    heads: int = 2, head_dim: int = 4, state_dim: int = 3, groups: int = 1, dt_mean: float = 0.0,
    dt_limit: tuple[float, float] = UNLIMITED,
) -> Case:  # fmt: skip
    """Build a case in float64, buffers time-major, with a pending path per sequence if given."""
    random = np.random.default_rng(tree.num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape))

    def block(num_rows: int) -> ScanRows:
        sizes = ((heads, head_dim), (heads,), (groups, state_dim))
        x, dt, b = (normal(num_rows + 1, batch, *size).transpose(0, 1) for size in sizes)
        dt += dt_mean
        for tensor in (x, dt, b):
            tensor[:, -1] = torch.nan
        return ScanRows(x, dt, b)

    num_previous = 1 + max((row for path in paths or () for row in path), default=0)
    # What stands after a path is any row of the block, also one that nothing has written.
    path_BL = torch.full((batch, capacity), num_previous, dtype=torch.int32)
    for sequence, path in enumerate(paths or ()):
        path_BL[sequence, : len(path)] = torch.tensor(path, dtype=torch.int32)
    length_B = torch.tensor([len(path) for path in paths or ()], dtype=torch.int32)
    return Case(
        state=normal(batch, heads, head_dim, state_dim),
        rows=block(tree.num_tokens),
        c=normal(batch, tree.num_tokens, groups, state_dim),
        mask=torch.from_numpy(np.pad(tree.mask, (0, 2))),
        heads=ScanHeads(-normal(heads).abs() - 0.1, normal(heads), normal(heads)),
        previous=block(num_previous),
        pending=None if paths is None else Pending(path_BL, length_B),
        dt_limit=dt_limit,
    )


def step(case: Case, block: ScanRows, sequence: int, row: int, state: Any) -> Any:
    """The recurrence's state after one more row, heads spelled out, in numpy."""
    x, dt, b = (tensor[sequence, row].double().numpy() for tensor in block)
    a, _, dt_bias = (tensor.double().numpy() for tensor in case.heads)
    after = np.empty_like(state)
    for head in range(len(a)):
        d = np.clip(np.log1p(np.exp(dt[head] + dt_bias[head])), *case.dt_limit)
        b_head = b[head * len(b) // len(a)]
        after[head] = np.exp(d * a[head]) * state[head] + d * np.outer(x[head], b_head)
    return after


def by_recurrence(case: Case, parents: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the advanced state and y of all rows, one node after another, in float64."""
    states, ys = case.state.double().numpy().copy(), []
    skip = case.heads.d_H.double().numpy()[:, None]
    for sequence, committed in enumerate(states):
        if case.pending is not None:
            path = case.pending.path_BL[sequence, : case.pending.length_B[sequence]]
            for row in path.tolist():
                committed[:] = step(case, case.previous, sequence, row, committed)
        after: dict[int, Any] = {-1: committed}
        for node, parent in enumerate(parents):
            after[node] = step(case, case.rows, sequence, node, after[parent])
            c = case.c[sequence, node].double().numpy()
            c_heads = np.repeat(c, len(skip) // len(c), axis=0)
            y = np.einsum("hpn,hn->hp", after[node], c_heads)
            ys.append(y + skip * case.rows.x_BRHP[sequence, node].double().numpy())
    y_all = np.stack(ys).reshape(len(states), len(parents), *ys[0].shape)
    return torch.from_numpy(states), torch.from_numpy(y_all)


@FEW
@given(tree=trees(max_nodes=14, max_depth=5), groups=st.sampled_from([1, 2, 4]))
def test_reference_equals_the_recurrence_on_every_path(tree: Tree, groups: int) -> None:
    case = make_case(tree, paths=[[0, 2, 3], []], heads=4, groups=groups, dt_limit=(0.2, 0.9))
    state, y = by_recurrence(case, tree.parents)
    assert_close("y", case.scan(reference), y)
    assert_close("state", case.state, state)


@FEW
@given(tree=trees(max_nodes=14, max_depth=5))
def test_scoring_by_levels_equals_scoring_at_once(tree: Tree) -> None:
    case = make_case(tree)
    levels = [case.scan(reference, level[0], level[-1] + 1) for level in tree.levels]
    assert_close("y", torch.cat(levels, dim=1), case.scan(reference))


def test_a_path_of_length_zero_and_a_missing_one_leave_the_state_alone() -> None:
    empty: list[list[int]] = [[], []]
    for paths in (empty, None):
        case = make_case(Tree.chain(2), paths=paths)
        before = case.state.clone()
        case.scan(reference)
        assert torch.equal(case.state, before)


@pytest.mark.parametrize("dt_mean", [-4.0, 0.0, 12.0])
def test_replay_of_a_long_chain_keeps_fp32_digits(dt_mean: float) -> None:
    paths = [list(range(256)), list(range(100, 200))]
    case = make_case(Tree.chain(0), paths=paths, capacity=256, dt_mean=dt_mean)
    single = case.to(torch.float32, torch.float32)
    state, _ = by_recurrence(single, [-1])
    single.scan(reference)
    assert_close("state", single.state, state, tolerance=1e-6)


def test_replay_equals_feeding_the_tokens_one_by_one() -> None:
    chain = make_case(Tree.chain(5))
    y = chain.scan(reference)
    lengths = torch.tensor([6, 3], dtype=torch.int32)
    path = torch.arange(6, dtype=torch.int32).expand(2, 6)
    replayed = chain.state.clone()
    limit = {"dt_limit": UNLIMITED}
    reference.replay(replayed, chain.rows, Pending(path, lengths), chain.heads, **limit)

    for row in range(6):
        pending = Pending(path[:, row : row + 1], (row < lengths).int())
        rows = ScanRows(*(tensor[:, row:] for tensor in chain.rows))
        token = dataclasses.replace(chain, rows=rows, c=chain.c[:, row:])
        assert_close(f"y of token {row}", token.scan(reference, 0, 1)[:1], y[:1, row : row + 1])
        reference.replay(chain.state, chain.rows, pending, chain.heads, **limit)
    assert_close("state", chain.state, replayed)


def kernel_case(tree: Tree, **changes: Any) -> Case:
    sizes: dict[str, Any] = {"head_dim": 32, "state_dim": 16, "dt_limit": (0.05, 2.0)}
    return make_case(tree, **(sizes | changes))


def check_kernel(case: Case, dtype: torch.dtype, state: torch.dtype, device: str = "cpu") -> None:
    """Compare the kernel with the reference in float64 on the values that the kernel sees."""
    ours = case.to(dtype, state, device)
    truth = ours.to(torch.float64, torch.float64, device)
    coarse = TOLERANCES[torch.bfloat16] if torch.bfloat16 in (dtype, state) else None
    assert_close("y", ours.scan(kernel), truth.scan(reference), tolerance=coarse)
    # An fp32 state takes bf16 inputs in two parts each, so it stays finer than they are.
    fine = 1e-3 if coarse and state == torch.float32 else None
    assert_close("state", ours.state, truth.state, tolerance=fine)


KERNEL_CASES = {
    "one token": kernel_case(Tree.chain(0), paths=[[3], []], capacity=1),
    "one token, no path": kernel_case(Tree.chain(0), heads=4, groups=2),
    "one token, long path": kernel_case(Tree.chain(0), paths=[[], [0, 4, 5]]),
    "one token after a chunk": kernel_case(Tree.chain(0), paths=[list(range(18)), []], capacity=18),
    "5 rows": kernel_case(Tree((-1, 0, 0, 1, 2)), paths=[[0, 1, 3], []], heads=4, groups=2),
    "17 rows": kernel_case(Tree(WIDE_TREE.parents[:17]), paths=[[0], [0, 2, 7, 9]]),
    "33 rows": kernel_case(Tree(WIDE_TREE.parents[:33])),
    "chain of 20 replayed": kernel_case(
        Tree.chain(3), paths=[list(range(20)), [0, 1]], capacity=20
    ),
}


@interpreted
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_interpreted_kernel_equals_the_reference(name: str) -> None:
    check_kernel(KERNEL_CASES[name], torch.float32, torch.float32)


@interpreted
@pytest.mark.parametrize("config", kernel.CONFIGS, ids=lambda c: f"up to {c.max_rows}")
def test_every_tile_size_and_several_tiles(
    config: kernel.ScanConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "FP32_CONFIG", config)
    tree = Tree(WIDE_TREE.parents[: config.max_rows])
    check_kernel(kernel_case(tree, batch=1, heads=1), torch.float32, torch.float32)


@interpreted
def test_interpreted_kernel_scores_by_levels() -> None:
    tree = Tree(WIDE_TREE.parents[:30])
    case = kernel_case(tree, batch=1).to(torch.float32, torch.float32)
    levels = [case.scan(kernel, level[0], level[-1] + 1) for level in tree.levels]
    assert_close("y", torch.cat(levels, dim=1), case.scan(reference))


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNEL_CASES)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernel_equals_the_reference(name: str, state: torch.dtype, dtype: torch.dtype) -> None:
    check_kernel(KERNEL_CASES[name], dtype, state, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 16, 31, 64, 65, 129, 256])
@pytest.mark.parametrize(("head_dim", "state_dim"), [(64, 128), (128, 256), (32, 64)])
def test_kernel_on_sizes_of_models(num_rows: int, head_dim: int, state_dim: int) -> None:
    tree = Tree((-1, *(node // 3 for node in range(num_rows - 1))))
    paths = [list(range(64)), [0], [], [0, 1, 4]]
    case = kernel_case(
        tree, paths=paths, capacity=64, batch=4, heads=8, groups=2, head_dim=head_dim,
        state_dim=state_dim, dt_mean=-3.0,
    )  # fmt: skip
    check_kernel(case, torch.bfloat16, torch.float32, "cuda")


def test_sizes_beyond_the_kernel_are_refused() -> None:
    case = make_case(Tree.chain(1)).to(torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"takes head dims .* got 4 and 3"):
        case.scan(kernel)
    case = kernel_case(Tree.chain(1), paths=[[0], []], capacity=257)
    with pytest.raises(ValueError, match=r"at most 256 rows and path entries, got 2 and 257"):
        case.to(torch.float32, torch.float32).scan(kernel)
    with pytest.raises(ValueError, match=r"one dtype of torch.bfloat16, torch.float32, got"):
        kernel_case(Tree.chain(1)).scan(kernel)
    case = kernel_case(Tree.chain(1)).to(torch.float32, torch.float32)
    case.rows.x_BRHP.transpose_(2, 3)
    with pytest.raises(ValueError, match=r"row of x, B, C or the output lies without gaps"):
        case.scan(kernel)
