"""The gated delta scan against a recurrence over nodes, and the kernels against the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from delta_case import (
    OUT_ERRORS,
    SOLVED_ERRORS,
    STATE_ERROR,
    DeltaCase,
    by_recurrence,
    make_case,
    random_tree,
)
from hypothesis import given, settings, strategies as st
from strategies import trees
from torch import Tensor

from stree_core.tree import Tree
from stree_kernels.delta import delta_scan as kernel, delta_scan_ref as reference
from stree_kernels.delta.rows import DeltaRows, DeltaTokens
from stree_kernels.launch.rows import MAX_BUFFERED, Pending, next_num_buffered
from stree_kernels.testing import assert_close, poisoned

FEW = settings(max_examples=20, deadline=None, derandomize=True)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")
WIDE_TREE = Tree((-1, *(node // 3 for node in range(80))))
EXACT = {"tolerance": OUT_ERRORS[torch.float64]}


@FEW
@given(
    tree=trees(max_nodes=14, max_depth=5), kept=st.integers(0, MAX_BUFFERED),
    key_heads=st.sampled_from([1, 2, 4]), gated=st.booleans(), per_channel=st.booleans(),
)  # fmt: skip
def test_reference_equals_the_recurrence_on_every_path(
    tree: Tree, kept: int, key_heads: int, gated: bool, per_channel: bool
) -> None:
    case = make_case(
        tree, paths=[[0, 2, 3], []], kept=[kept, 5], heads=4, key_heads=key_heads, gated=gated,
        per_channel=per_channel,
    )  # fmt: skip
    before = case.state.clone()
    state, o, u = by_recurrence(case, tree.parents)
    rows = [
        torch.cat((case.buffer.u_BRHP[0, :kept], case.buffer.u_BRHP[0, [16, 18, 19]])),
        case.buffer.u_BRHP[1, :5].clone(),
    ]
    assert_close("o", case.scan(reference), o, **EXACT)
    assert_close("u", case.rows.u_BRHP[:, : tree.num_tokens], u, **EXACT)
    for sequence, num_rows in enumerate((kept + 3, 5)):
        if num_rows > MAX_BUFFERED:
            assert_close("state", case.state[sequence], state[sequence], **EXACT)
        else:
            assert torch.equal(case.state[sequence], before[sequence])
            assert torch.equal(case.buffer.u_BRHP[sequence, :num_rows], rows[sequence])


@FEW
@given(tree=trees(max_nodes=14, max_depth=5), kept=st.sampled_from([0, 5, 15]), kda=st.booleans())
def test_scoring_by_levels_equals_scoring_at_once(tree: Tree, kept: int, kda: bool) -> None:
    options: dict[str, Any] = {"paths": [[0, 1, 3], [2]], "kept": [kept, 2], "per_channel": kda}
    by_level, at_once = make_case(tree, **options), make_case(tree, **options)
    levels = [
        by_level.scan(reference, level[0], level[-1] + 1, commit=level[0] == 0)
        for level in tree.levels
    ]
    assert_close("o", torch.cat(levels, dim=1), at_once.scan(reference), **EXACT)


# Keys alike and beta up to 2 make powers of the system huge; decays near 0 and 1 its weights.
HARD: dict[str, dict[str, Any]] = {
    "alike keys": {"alike": 0.97, "beta_range": (0.95, 1.0), "decay_range": (0.0, 1e-3)},
    "beta of 2": {"alike": 0.9, "beta_range": (1.9, 2.0), "decay_range": (0.0, 0.1)},
    "all forgotten": {"decay_range": (20.0, 90.0)},
    "nothing forgotten": {"decay_range": (0.0, 1e-6)},
    "forgotten in turns": {"alike": 0.5, "decay_range": (0.0, 12.0)},
}
TREES = {
    "chain of 64": Tree.chain(63),
    "star of 40": Tree((-1, *(0 for _ in range(40)))),
    "tree of 64": random_tree(np.random.default_rng(64), 64, 9),
    "tree of 33": random_tree(np.random.default_rng(33), 33, 20),
    "tree of 12": random_tree(np.random.default_rng(12), 12, 4),
}


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("tree", TREES)
def test_reference_on_hard_inputs(tree: str, hard: str) -> None:
    case = make_case(
        TREES[tree], paths=[[0, 1, 2]], kept=[14], head_dim=8, state_dim=8, **HARD[hard]
    )
    state, o, u = by_recurrence(case, TREES[tree].parents)
    assert_close("o", case.scan(reference), o, **EXACT)
    assert_close("u", case.rows.u_BRHP[:, : len(u[0])], u, **EXACT)
    assert_close("state", case.state, state, **EXACT)


class Decoder:
    """Steps over random trees, each accepting a random path, as a model takes them."""

    def __init__(self, op: Any, case: DeltaCase, seed: int) -> None:
        self.op, self.case, self.max_tokens = op, case, case.tokens.v_BTHP.shape[1]
        self.random = np.random.default_rng(seed)
        device = case.state.device
        self.set_rows = self.max_tokens + 1
        size = (len(case.state), MAX_BUFFERED + 2 * self.set_rows)
        self.buffer = DeltaRows(
            *(poisoned(*size, *t.shape[2:], dtype=t.dtype, device=device) for t in case.buffer)
        )
        zero = torch.zeros(len(case.state), dtype=torch.int32, device=device)
        path = torch.zeros(len(case.state), self.max_tokens, dtype=torch.int32, device=device)
        self.pending = Pending(path, zero, zero.clone())
        self.truth = case.state.double().clone()
        self.num_flushes = 0

    def step(self, number: int) -> tuple[Tensor, Tensor]:
        """Score one tree; return o along the accepted path, and what it must be."""
        size = int(self.random.integers(1, self.max_tokens + 1))
        tree = random_tree(self.random, size, 6)
        current, previous = (MAX_BUFFERED + (number + turn) % 2 * self.set_rows for turn in (0, 1))
        order = torch.from_numpy(self.random.permutation(self.max_tokens)[:size])
        order = order.to(self.truth.device)
        for mine, theirs in zip(self.buffer[1:], self.case.rows[1:], strict=True):
            mine[:, current : current + size] = theirs[:, order]
        tokens = DeltaTokens(*(tensor[:, order] for tensor in self.case.tokens))
        mask = np.pad(tree.mask, ((0, 0), (0, -size % 64)))
        step = dataclasses.replace(
            self.case, buffer=self.buffer, previous=previous, current=current, tokens=tokens,
            mask=torch.from_numpy(mask).to(self.truth.device), pending=self.pending,
        )  # fmt: skip
        out = step.scan(self.op)
        path = tree.node_paths[int(self.random.integers(size))]
        expected = self._feed(step, path)
        num_buffered = next_num_buffered(self.pending)
        self.num_flushes += int(
            (self.pending.num_buffered_B + self.pending.length_B > MAX_BUFFERED).any()
        )
        table = torch.zeros_like(self.pending.path_BL)
        table[:, : len(path)] = torch.tensor(path, dtype=torch.int32)
        self.pending = Pending(table, torch.full_like(num_buffered, len(path)), num_buffered)
        return out[:, list(path)], expected

    def _feed(self, step: DeltaCase, path: Sequence[int]) -> Tensor:
        """Advance the true state by the path's tokens, one by one, in float64."""
        repeats = self.truth.shape[1] // step.tokens.q_BTGN.shape[2]
        outs = []
        for node in path:
            q, k = (
                tensor[:, node].double().repeat_interleave(repeats, 1)
                for tensor in (step.tokens.q_BTGN, step.rows.k_BRGN)
            )
            v, beta = (tensor[:, node].double() for tensor in step.tokens[1:])
            self.truth *= step.rows.g_BRH[:, node].double().exp()[..., None, None]
            u = beta[..., None] * (v - (self.truth @ k[..., None])[..., 0])
            self.truth += u[..., None] * k[..., None, :]
            outs.append((self.truth @ q[..., None])[..., 0] / self.truth.shape[3] ** 0.5)
        return torch.stack(outs, 1)


def decode(op: Any, case: DeltaCase, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return o of all accepted tokens and what they must be; the state has been flushed."""
    decoder = Decoder(op, case, num_steps)
    pairs = [decoder.step(number) for number in range(num_steps)]
    assert decoder.num_flushes > num_steps // 25
    o, expected = zip(*pairs, strict=True)
    return torch.cat(o, 1), torch.cat(expected, 1)


def test_replay_equals_feeding_tokens_one_by_one() -> None:
    case = make_case(Tree.chain(11), head_dim=8, state_dim=8, key_heads=1, decay_range=(0.0, 0.1))
    o, expected = decode(reference, case, 100)
    assert_close("o", o, expected, tolerance=1e-10)


def kernel_case(tree: Tree, **changes: Any) -> DeltaCase:
    return make_case(tree, **({"head_dim": 32, "state_dim": 16} | changes))


def check_kernel(
    case: DeltaCase, dtype: torch.dtype, state: torch.dtype, device: str = "cpu", *,
    u_slack: float = 1.0,
) -> None:  # fmt: skip
    """Compare the kernel with the reference in float64 on the values that the kernel sees."""
    ours = case.to(dtype, state, device)
    truth = ours.to(torch.float64, torch.float64, device)
    o, o_true = ours.scan(kernel), truth.scan(reference)
    coarse = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(state, 0.0)
    num_tokens = o.shape[1]
    assert_close("o", o, o_true, tolerance=max(OUT_ERRORS[dtype], coarse))
    u, u_true = (each.rows.u_BRHP[:, :num_tokens] for each in (ours, truth))
    assert_close("u", u, u_true, tolerance=max(u_slack * SOLVED_ERRORS[dtype], coarse))
    assert_close("state", ours.state, truth.state, tolerance=max(STATE_ERROR, coarse))
    assert ours.buffer.u_BRHP[:, ours.current + num_tokens].isnan().all(), "rows behind stay"
    for sequence, num_buffered in enumerate(next_num_buffered(truth.pending).tolist()):
        for mine, theirs in zip(ours.buffer, truth.buffer, strict=True):
            assert torch.equal(
                mine[sequence, :num_buffered].double(), theirs[sequence, :num_buffered]
            )


KERNEL_CASES = {
    "one token": kernel_case(Tree.chain(0), paths=[[3], []], kept=[0, 5], capacity=1),
    "one token, gated": kernel_case(Tree.chain(0), heads=4, key_heads=2, gated=True),
    "one token, path that fits": kernel_case(Tree.chain(0), paths=[[], [0, 4, 5]], kept=[16, 13]),
    "one token, too many rows": kernel_case(Tree.chain(0), paths=[[0, 1], [0]], kept=[15, 16]),
    "5 rows, gated": kernel_case(
        Tree((-1, 0, 0, 1, 2)), paths=[[0, 1, 3], []], kept=[3, 16], heads=4, key_heads=2,
        gated=True,
    ),
    "17 rows": kernel_case(Tree(WIDE_TREE.parents[:17]), paths=[[0], [0, 2, 7, 9]], kept=[2, 14]),
    "chain of 20": kernel_case(Tree.chain(19), alike=0.9, beta_range=(0.9, 2.0)),
    "chain of 20 replayed": kernel_case(
        Tree.chain(3), paths=[list(range(20)), [0, 1]], kept=[7, 0], capacity=20
    ),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_interpreted_kernel_equals_the_reference(name: str) -> None:
    check_kernel(KERNEL_CASES[name], torch.float32, torch.float32)


@interpreted
@pytest.mark.parametrize(
    "tree", [Tree.chain(32), Tree(WIDE_TREE.parents[:33])], ids=["chain", "tree"]
)
@pytest.mark.parametrize("block_rows", [16, 32, 64])
def test_tiles_of_every_size(block_rows: int, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(kernel.FP32_CONFIG, block_rows=block_rows)
    monkeypatch.setattr(kernel, "FP32_CONFIG", config)
    case = kernel_case(tree, paths=[[0, 1]], heads=1, alike=0.9, beta_range=(0.9, 2.0))
    check_kernel(case, torch.float32, torch.float32)


@interpreted
@pytest.mark.parametrize("kept", [3, 15])
def test_interpreted_kernel_scores_by_levels(kept: int) -> None:
    tree = Tree(WIDE_TREE.parents[:30])
    options: dict[str, Any] = {"paths": [[0, 1, 2]], "kept": [kept], "heads": 1}
    case = kernel_case(tree, **options).to(torch.float32, torch.float32)
    levels = [
        case.scan(kernel, level[0], level[-1] + 1, commit=level[0] == 0) for level in tree.levels
    ]
    whole = kernel_case(tree, **options).to(torch.float32, torch.float32)
    assert_close("o", torch.cat(levels, dim=1), whole.scan(reference))


@interpreted
def test_interpreted_kernel_replays() -> None:
    case = kernel_case(Tree.chain(5), head_dim=16, heads=1).to(torch.float32, torch.float32)
    o, expected = decode(kernel, case, 12)
    assert_close("o", o, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNEL_CASES)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_kernel_equals_the_reference(name: str, state: torch.dtype, dtype: torch.dtype) -> None:
    check_kernel(KERNEL_CASES[name], dtype, state, "cuda")


MODEL_SIZES = [(128, 128), (64, 64), (64, 128), (128, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 8, 16, 31, 64, 65, 129, 256])
@pytest.mark.parametrize(("head_dim", "state_dim"), MODEL_SIZES)
def test_kernel_on_sizes_of_models(num_rows: int, head_dim: int, state_dim: int) -> None:
    tree = random_tree(np.random.default_rng(num_rows), num_rows, 12)
    paths = [list(range(64)), [0], [], [0, 1, 4]]
    for gated, dtype in ((False, torch.bfloat16), (True, torch.bfloat16), (False, torch.float16)):
        case = make_case(
            tree, paths=paths, kept=[0, 16, 4, 12], capacity=64, heads=8, key_heads=4,
            head_dim=head_dim, state_dim=state_dim, gated=gated,
        )  # fmt: skip
        check_kernel(case, dtype, torch.float32, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("tree", TREES)
def test_kernel_on_hard_inputs(tree: str, hard: str) -> None:
    paths = [list(range(255)), [0, 1, 2], [], [0]]
    case = make_case(
        TREES[tree], paths=paths, kept=[1, 13, 16, 16], capacity=256, heads=4, key_heads=2,
        head_dim=128, state_dim=128, **HARD[hard],
    )  # fmt: skip
    # Where keys are alike, u is what is left of a difference, and roundings stay.
    check_kernel(case, torch.bfloat16, torch.float32, "cuda", u_slack=2.0)
    check_kernel(case, torch.float16, torch.float32, "cuda", u_slack=2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8, 16, 32, 64])
def test_many_programs_equal_few(num_rows: int) -> None:
    tree = random_tree(np.random.default_rng(num_rows), num_rows, 8)
    case = make_case(
        tree, paths=[[0, 1, 3]] * 32, kept=[*range(16)] * 2, heads=8, key_heads=4, head_dim=128,
        state_dim=128,
    )  # fmt: skip
    check_kernel(case, torch.bfloat16, torch.float32, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tree", [Tree(WIDE_TREE.parents[:64]), Tree.chain(63)], ids=["tree", "chain"]
)
def test_kernel_scores_by_levels(tree: Tree) -> None:
    options: dict[str, Any] = {
        "paths": [[0, 1, 2], [0]],
        "kept": [15, 3],
        "head_dim": 128,
        "state_dim": 128,
    }
    case = make_case(tree, **options).to(torch.bfloat16, torch.float32, "cuda")
    truth = make_case(tree, **options).to(torch.bfloat16, torch.float32, "cuda")
    levels = [
        case.scan(kernel, level[0], level[-1] + 1, commit=level[0] == 0) for level in tree.levels
    ]
    expected = truth.to(torch.float64, torch.float64, "cuda").scan(reference)
    assert_close("o", torch.cat(levels, dim=1), expected, tolerance=OUT_ERRORS[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 12, 40])
def test_kernel_replays(num_tokens: int) -> None:
    case = make_case(
        Tree.chain(num_tokens - 1), heads=8, key_heads=4, head_dim=128, state_dim=128,
        decay_range=(0.0, 0.1),
    )  # fmt: skip
    o, expected = decode(kernel, case.to(torch.bfloat16, torch.float32, "cuda"), 100)
    assert_close("o", o, expected, tolerance=OUT_ERRORS[torch.bfloat16])


@pytest.mark.gpu
def test_sanitized_delta_scan() -> None:
    for num_rows in (1, 12, 40, 80):
        tree = random_tree(np.random.default_rng(num_rows), num_rows, 6)
        case = make_case(
            tree, paths=[[0, 1], [0]], kept=[15, 2], heads=2, key_heads=1, head_dim=64,
            state_dim=64, gated=True,
        )  # fmt: skip
        check_kernel(case, torch.bfloat16, torch.float32, "cuda")


def test_what_the_kernel_cannot_take_is_refused() -> None:
    case = make_case(Tree.chain(1)).to(torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"takes head dims .*, got 4 of v and 3 of k"):
        case.scan(kernel)
    kimi = kernel_case(Tree.chain(1), per_channel=True).to(torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"Kimi Delta Attention \(KDA\).*use the torch backend"):
        kimi.scan(kernel)
    long = kernel_case(Tree.chain(1), paths=[[0], []], capacity=257)
    with pytest.raises(ValueError, match=r"at most 256 rows and path entries .* got 2, 257"):
        long.to(torch.float32, torch.float32).scan(kernel)
    with pytest.raises(ValueError, match=r"one dtype of torch.bfloat16, torch.float16, .*, got"):
        kernel_case(Tree.chain(1)).scan(kernel)
    uneven = kernel_case(Tree.chain(1), heads=3, key_heads=2).to(torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"equally many heads, which divide those of v, got 2, 2"):
        uneven.scan(kernel)
