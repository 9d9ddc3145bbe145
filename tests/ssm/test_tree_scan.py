"""The scan against a recurrence over nodes in numpy, and the kernel against the reference.

Shape letters: B batch, R rows of a buffer, T rows scored, L path capacity, H heads, P head dim,
N state dim, G groups, Q partial sums of a row.
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
from stree_kernels.launch.rows import (
    MASK_MULTIPLE,
    MAX_BUFFERED,
    Gate,
    Past,
    Pending,
    ScanHeads,
    ScanRows,
    gate_width,
    next_num_buffered,
)
from stree_kernels.ssm import tree_scan as kernel, tree_scan_ref as reference
from stree_kernels.testing import TOLERANCES, assert_close, poisoned

UNLIMITED = (0.0, float("inf"))
FEW = settings(max_examples=20, deadline=None, derandomize=True)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")
WIDE_TREE = Tree((-1, *(node // 3 for node in range(80))))


@dataclass(frozen=True)
class Case:
    """The tensors of one scan: buffers of buffered rows, the previous block and this one, each
    block followed by a row of NaN, and the NaN of what is not kept."""

    state: Tensor
    buffer: ScanRows
    previous: int
    current: int
    c: Tensor
    mask: Tensor
    heads: ScanHeads
    pending: Pending
    dt_limit: tuple[float, float] = UNLIMITED
    z: Tensor | None = None

    @property
    def rows(self) -> ScanRows:
        """The block that is scored."""
        return ScanRows(*(tensor[:, self.current :] for tensor in self.buffer))

    def scan(
        self, op: Any, first: int = 0, stop: int | None = None, *, commit: bool = True
    ) -> Tensor:
        """Return y of rows first..stop - 1; the state and the buffered rows change in place."""
        c = self.c[:, first:stop]
        out = poisoned(*c.shape[:2], *self.state.shape[1:3], dtype=c.dtype, device=c.device)
        gate = None
        if self.z is not None:
            z = self.z[:, first:stop]
            width = gate_width(*self.state.shape[2:], c.dtype)
            wide = torch.promote_types(torch.float32, c.dtype)
            sums = poisoned(*c.shape[:2], z[0, 0].numel() // width, dtype=wide, device=c.device)
            gate = Gate(z, sums)
        op.tree_scan(
            self.state, self.rows, c, self.mask, self.heads, first=first, dt_limit=self.dt_limit,
            out_BTHP=out, gate=gate, past=Past(self.buffer, self.previous, self.pending, commit),
        )  # fmt: skip
        if gate is not None:
            squares = out.double().flatten(2).unflatten(2, (gate.square_sums_BTQ.shape[2], -1))
            # The sums are of values that are not rounded yet.
            coarse = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(c.dtype)
            sums = gate.square_sums_BTQ
            assert_close("sums of squares", sums, squares.square().sum(3), tolerance=coarse)
        return out

    def to(self, dtype: torch.dtype, state: torch.dtype, device: str = "cpu") -> Case:
        """Return a copy in other dtypes; constants are fp32 unless the state is float64."""
        constants = torch.promote_types(state, torch.float32)
        return dataclasses.replace(
            self,
            state=self.state.to(device, state, copy=True),
            buffer=ScanRows(*(t.to(device, dtype, copy=True) for t in self.buffer)),
            c=self.c.to(device, dtype),
            mask=self.mask.to(device),
            heads=ScanHeads(*(t.to(device, constants) for t in self.heads)),
            pending=Pending(*(t.to(device) for t in self.pending)),
            z=None if self.z is None else self.z.to(device, dtype),
        )


def make_case(
    tree: Tree, *, paths: Sequence[Sequence[int]] = ((), ()), kept: Sequence[int] | None = None,
    capacity: int = 4, heads: int = 2, x_heads: int | None = None, head_dim: int = 4,
    state_dim: int = 3, groups: int = 1, c_groups: int | None = None, dt_mean: float = 0.0,
    dt_limit: tuple[float, float] = UNLIMITED, gated: bool = False, skip_per_channel: bool = False,
) -> Case:  # fmt: skip
    """Build a case in float64, buffers time-major, with buffered rows and a path per sequence."""
    random = np.random.default_rng(tree.num_tokens)
    batch = len(paths)
    kept = kept or [0] * batch

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape))

    num_previous = 1 + max((row for path in paths for row in path), default=0)
    previous, current = MAX_BUFFERED, MAX_BUFFERED + num_previous + 1
    num_rows = current + tree.num_tokens + 1
    sizes = ((x_heads or heads, head_dim), (heads,), (groups, state_dim))
    buffer = ScanRows(*(normal(num_rows, batch, *size).transpose(0, 1) for size in sizes))
    buffer.dt_BRH.add_(dt_mean)
    for tensor in buffer:
        tensor[:, [current - 1, num_rows - 1]] = torch.nan
        for sequence, count in enumerate(kept):
            tensor[sequence, count:MAX_BUFFERED] = torch.nan
    # What stands after a path is any row of the block, also one that nothing has written.
    path_BL = torch.full((batch, capacity), num_previous, dtype=torch.int32)
    for sequence, path in enumerate(paths):
        path_BL[sequence, : len(path)] = torch.tensor(path, dtype=torch.int32)
    length_B = torch.tensor([len(path) for path in paths], dtype=torch.int32)
    c = normal(batch, tree.num_tokens, c_groups or groups, state_dim)
    skip = normal(heads, head_dim) if skip_per_channel else normal(heads)
    return Case(
        state=normal(batch, heads, head_dim, state_dim),
        buffer=buffer,
        previous=previous,
        current=current,
        c=c,
        mask=torch.from_numpy(np.pad(tree.mask, ((0, 0), (0, -tree.num_tokens % MASK_MULTIPLE)))),
        heads=ScanHeads(-normal(heads).abs() - 0.1, skip, normal(heads)),
        pending=Pending(path_BL, length_B, torch.tensor(kept, dtype=torch.int32)),
        dt_limit=dt_limit,
        z=normal(batch, tree.num_tokens, heads, head_dim) if gated else None,
    )


def step(case: Case, sequence: int, row: int, state: Any) -> Any:
    """The recurrence's state after one more row of the buffer, heads spelled out, in numpy."""
    x, dt, b = (tensor[sequence, row].double().numpy() for tensor in case.buffer)
    a, _, dt_bias = (tensor.double().numpy() for tensor in case.heads)
    after = np.empty_like(state)
    for head in range(len(a)):
        d = np.clip(np.log1p(np.exp(dt[head] + dt_bias[head])), *case.dt_limit)
        x_head, b_head = (rows[head * len(rows) // len(a)] for rows in (x, b))
        after[head] = np.exp(d * a[head]) * state[head] + d * np.outer(x_head, b_head)
    return after


def by_recurrence(case: Case, parents: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the state after all accepted rows and y of all rows, node after node, in float64."""
    states, ys = case.state.double().numpy().copy(), []
    num_heads, head_dim = states.shape[1:3]
    skip = np.broadcast_to(case.heads.d_H.double().numpy().T, (head_dim, num_heads)).T
    path_BL, length_B, num_buffered_B = case.pending
    for sequence, committed in enumerate(states):
        path = path_BL[sequence, : length_B[sequence]].tolist()
        for row in (*range(num_buffered_B[sequence]), *(case.previous + row for row in path)):
            committed[:] = step(case, sequence, row, committed)
        after: dict[int, Any] = {-1: committed}
        for node, parent in enumerate(parents):
            after[node] = step(case, sequence, case.current + node, after[parent])
            c = case.c[sequence, node].double().numpy()
            c_heads = np.repeat(c, num_heads // len(c), axis=0)
            x = case.rows.x_BRXP[sequence, node].double().numpy()
            y = np.einsum("hpn,hn->hp", after[node], c_heads)
            y += skip * np.repeat(x, num_heads // len(x), axis=0)
            if case.z is not None:
                z = case.z[sequence, node].double().numpy()
                y *= z / (1 + np.exp(-z))
            ys.append(y)
    y_all = np.stack(ys).reshape(len(states), len(parents), num_heads, head_dim)
    return torch.from_numpy(states), torch.from_numpy(y_all)


def buffered_rows(case: Case) -> list[list[Tensor]]:
    """Return every sequence's rows of x that are kept before its scan, or come to be by it."""
    path_BL, length_B, num_buffered_B = case.pending
    kept = []
    for sequence in range(len(length_B)):
        path = path_BL[sequence, : length_B[sequence]].tolist()
        rows = [*range(num_buffered_B[sequence]), *(case.previous + row for row in path)]
        kept.append([case.buffer.x_BRXP[sequence, row].clone() for row in rows])
    return kept


@FEW
@given(
    tree=trees(max_nodes=14, max_depth=5), groups=st.sampled_from([(1, 1), (2, 4), (4, 2)]),
    kept=st.integers(0, MAX_BUFFERED), x_heads=st.sampled_from([1, 2, 4]), gated=st.booleans(),
)  # fmt: skip
def test_reference_equals_the_recurrence_on_every_path(
    tree: Tree, groups: tuple[int, int], kept: int, x_heads: int, gated: bool
) -> None:
    case = make_case(
        tree, paths=[[0, 2, 3], []], kept=[kept, 5], heads=4, x_heads=x_heads, groups=groups[0],
        c_groups=groups[1], dt_limit=(0.2, 0.9), gated=gated, skip_per_channel=gated,
    )  # fmt: skip
    before, rows = case.state.clone(), buffered_rows(case)
    state, y = by_recurrence(case, tree.parents)
    assert_close("y", case.scan(reference), y)
    for sequence, num_rows in enumerate((kept + 3, 5)):
        if num_rows > MAX_BUFFERED:
            assert_close("state", case.state[sequence], state[sequence])
        else:
            assert torch.equal(case.state[sequence], before[sequence])
            stored = case.buffer.x_BRXP[sequence, :num_rows]
            assert torch.equal(stored, torch.stack(rows[sequence]))


@FEW
@given(tree=trees(max_nodes=14, max_depth=5), kept=st.sampled_from([0, 5, 15]))
def test_scoring_by_levels_equals_scoring_at_once(tree: Tree, kept: int) -> None:
    paths = {"paths": [[0, 1, 3], [2]], "kept": [kept, 2]}
    by_level, at_once = make_case(tree, **paths), make_case(tree, **paths)
    levels = [
        by_level.scan(reference, level[0], level[-1] + 1, commit=level[0] == 0)
        for level in tree.levels
    ]
    assert_close("y", torch.cat(levels, dim=1), at_once.scan(reference))


@pytest.mark.parametrize("dt_mean", [-4.0, 0.0, 12.0])
def test_replay_of_a_long_chain_keeps_fp32_digits(dt_mean: float) -> None:
    paths = [list(range(256)), list(range(100, 200))]
    case = make_case(Tree.chain(0), paths=paths, capacity=256, dt_mean=dt_mean)
    single = case.to(torch.float32, torch.float32)
    state, _ = by_recurrence(single, [-1])
    single.scan(reference)
    assert_close("state", single.state, state, tolerance=1e-6)


def decode_one_by_one(op: Any, chain: Case, num_tokens: int) -> Tensor:
    """Return y of a chain's tokens, each scored in a pass of its own that commits the one before.

    Two rows behind the buffered ones take turns, as the two row sets of a cache do.
    """
    batch = len(chain.state)
    rows = ScanRows(*(t[:, : MAX_BUFFERED + 2].clone().fill_(torch.nan) for t in chain.buffer))
    pending = Pending(*(torch.zeros_like(t) for t in chain.pending))
    ys = []
    for token in range(num_tokens):
        current = MAX_BUFFERED + token % 2
        for mine, theirs in zip(rows, chain.rows, strict=True):
            mine[:, current] = theirs[:, token]
        step = dataclasses.replace(
            chain, buffer=rows, previous=MAX_BUFFERED + 1 - token % 2, current=current,
            c=chain.c[:, token : token + 1], pending=pending,
        )  # fmt: skip
        ys.append(step.scan(op))
        num_buffered = next_num_buffered(pending)
        length = torch.ones(batch, dtype=torch.int32, device=num_buffered.device)
        pending = pending._replace(length_B=length, num_buffered_B=num_buffered)
    return torch.cat(ys, dim=1)


def test_committing_tokens_one_by_one_equals_the_recurrence() -> None:
    chain = make_case(Tree.chain(39))
    _, y = by_recurrence(chain, Tree.chain(39).parents)
    assert_close("y", decode_one_by_one(reference, chain, 40), y)


def kernel_case(tree: Tree, **changes: Any) -> Case:
    sizes: dict[str, Any] = {"head_dim": 32, "state_dim": 16, "dt_limit": (0.05, 2.0)}
    return make_case(tree, **(sizes | changes))


def check_kernel(case: Case, dtype: torch.dtype, state: torch.dtype, device: str = "cpu") -> None:
    """Compare the kernel with the reference in float64 on the values that the kernel sees."""
    ours = case.to(dtype, state, device)
    truth = ours.to(torch.float64, torch.float64, device)
    narrow = [each for each in (state, dtype) if each in (torch.bfloat16, torch.float16)]
    coarse = TOLERANCES[narrow[0]] if narrow else None
    assert_close("y", ours.scan(kernel), truth.scan(reference), tolerance=coarse)
    # An fp32 state takes narrow inputs in two parts each, so it stays finer than they are.
    fine = 1e-3 if coarse and state == torch.float32 else None
    assert_close("state", ours.state, truth.state, tolerance=fine)
    for sequence, num_buffered in enumerate(next_num_buffered(truth.pending).tolist()):
        for mine, theirs in zip(ours.buffer, truth.buffer, strict=True):
            assert torch.equal(
                mine[sequence, :num_buffered].double(), theirs[sequence, :num_buffered]
            )


KERNEL_CASES = {
    "one token": kernel_case(Tree.chain(0), paths=[[3], []], kept=[0, 5], capacity=1),
    "one token, gated": kernel_case(Tree.chain(0), heads=4, groups=2, gated=True),
    "one token, path that fits": kernel_case(Tree.chain(0), paths=[[], [0, 4, 5]], kept=[16, 13]),
    "one token, too many rows": kernel_case(Tree.chain(0), paths=[[0, 1], [0]], kept=[15, 16]),
    "one token after a chunk": kernel_case(Tree.chain(0), paths=[list(range(18)), []], capacity=18),
    "5 rows": kernel_case(
        Tree((-1, 0, 0, 1, 2)), paths=[[0, 1, 3], []], kept=[3, 16], heads=4, groups=2, gated=True
    ),
    "shared x, groups of C": kernel_case(
        Tree((-1, 0, 0, 1, 2)), paths=[[0, 1], [0]], kept=[15, 2], heads=4, x_heads=2, groups=2,
        c_groups=4, skip_per_channel=True,
    ),
    "17 rows": kernel_case(Tree(WIDE_TREE.parents[:17]), paths=[[0], [0, 2, 7, 9]], kept=[2, 14]),
    "33 rows": kernel_case(Tree(WIDE_TREE.parents[:33]), gated=True),
    "chain of 20 replayed": kernel_case(
        Tree.chain(3), paths=[list(range(20)), [0, 1]], kept=[7, 0], capacity=20
    ),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_interpreted_kernel_equals_the_reference(name: str) -> None:
    check_kernel(KERNEL_CASES[name], torch.float32, torch.float32)


@interpreted
@pytest.mark.parametrize("pair", kernel.CONFIGS, ids=lambda pair: f"up to {pair[0].max_rows}")
def test_every_tile_size_and_several_tiles(
    pair: tuple[kernel.ScanConfig, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "FP32_CONFIG", dataclasses.replace(pair[0], max_registers=None))
    tree = Tree(WIDE_TREE.parents[: pair[0].max_rows])
    check_kernel(kernel_case(tree, paths=[[0, 1]], heads=1), torch.float32, torch.float32)


@interpreted
@pytest.mark.parametrize("kept", [3, 15])
def test_interpreted_kernel_scores_by_levels(kept: int) -> None:
    tree = Tree(WIDE_TREE.parents[:30])
    paths = {"paths": [[0, 1, 2]], "kept": [kept]}
    case = kernel_case(tree, **paths).to(torch.float32, torch.float32)
    levels = [
        case.scan(kernel, level[0], level[-1] + 1, commit=level[0] == 0) for level in tree.levels
    ]
    whole = kernel_case(tree, **paths).to(torch.float32, torch.float32)
    assert_close("y", torch.cat(levels, dim=1), whole.scan(reference))


@interpreted
def test_interpreted_kernel_commits_tokens_one_by_one() -> None:
    chain = kernel_case(Tree.chain(19), head_dim=16).to(torch.float32, torch.float32)
    y = chain.to(torch.float64, torch.float64).scan(reference)
    assert_close("y", decode_one_by_one(kernel, chain, 20), y)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNEL_CASES)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_kernel_equals_the_reference(name: str, state: torch.dtype, dtype: torch.dtype) -> None:
    check_kernel(KERNEL_CASES[name], dtype, state, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 16, 31, 64, 65, 129, 256])
@pytest.mark.parametrize(
    ("head_dim", "state_dim"),
    [(32, 16), (32, 64), (32, 128), (64, 64), (64, 128), (64, 256), (128, 128), (128, 256)],
)
def test_kernel_on_sizes_of_models(num_rows: int, head_dim: int, state_dim: int) -> None:
    tree = Tree((-1, *(node // 3 for node in range(num_rows - 1))))
    paths = [list(range(64)), [0], [], [0, 1, 4]]
    case = kernel_case(
        tree, paths=paths, kept=[0, 16, 4, 12], capacity=64, heads=8, groups=2, head_dim=head_dim,
        state_dim=state_dim, dt_mean=-3.0, gated=True,
    )  # fmt: skip
    check_kernel(case, torch.bfloat16, torch.float32, "cuda")
    check_kernel(case, torch.float16, torch.float32, "cuda")


ADVERSARIAL = {
    "chain of 256": Tree.chain(255),
    "star of 255": Tree((-1, *(0 for _ in range(255)))),
    "chain of 64": Tree.chain(63),
    "star of 15": Tree((-1, *(0 for _ in range(15)))),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dt_mean", [-12.0, -3.0, 12.0])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_kernel_on_hard_inputs(name: str, dt_mean: float) -> None:
    paths = [list(range(255)), [0, 1, 2], [], [0]]
    case = make_case(
        ADVERSARIAL[name], paths=paths, kept=[1, 13, 16, 16], capacity=256, heads=4, head_dim=64,
        state_dim=128, dt_mean=dt_mean,
    )  # fmt: skip
    check_kernel(case, torch.bfloat16, torch.float32, "cuda")
    check_kernel(case, torch.float16, torch.float32, "cuda")


@pytest.mark.gpu
def test_many_programs_equal_few() -> None:
    tree = Tree((-1, *(node // 2 for node in range(31))))
    for num_rows in (1, 16, 32):
        part = Tree(tree.parents[:num_rows])
        case = make_case(
            part, paths=[[0, 1, 3]] * 128, kept=[*range(16)] * 8, heads=8, head_dim=64,
            state_dim=128, dt_mean=-3.0,
        )  # fmt: skip
        check_kernel(case, torch.bfloat16, torch.float32, "cuda")


@pytest.mark.gpu
def test_kernel_commits_tokens_one_by_one() -> None:
    chain = make_case(Tree.chain(39), heads=8, head_dim=64, state_dim=128, dt_mean=-3.0)
    chain = chain.to(torch.bfloat16, torch.float32, "cuda")
    y = chain.to(torch.float64, torch.float64, "cuda").scan(reference)
    assert_close("y", decode_one_by_one(kernel, chain, 40), y)


def test_sizes_beyond_the_kernel_are_refused() -> None:
    case = make_case(Tree.chain(1)).to(torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"takes head dims .* got 4 and 3"):
        case.scan(kernel)
    case = kernel_case(Tree.chain(1), paths=[[0], []], capacity=257)
    with pytest.raises(ValueError, match=r"at most 256 rows and path entries, got 2 and 257"):
        case.to(torch.float32, torch.float32).scan(kernel)
    with pytest.raises(ValueError, match=r"one dtype of torch.bfloat16, torch.float16, .*, got"):
        kernel_case(Tree.chain(1)).scan(kernel)
    case = kernel_case(Tree.chain(1)).to(torch.float32, torch.float32)
    x = case.buffer.x_BRXP.mT.contiguous().mT
    case = dataclasses.replace(case, buffer=case.buffer._replace(x_BRXP=x))
    with pytest.raises(ValueError, match=r"row of x, B, C, z or the output lies without gaps"):
        case.scan(kernel)
