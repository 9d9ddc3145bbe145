"""The end of a step: paths, results and pending rows, and the kernel against the reference.

Shape letters: T tree tokens, B slots, V vocabulary, L tree depth + 1, R rows of a token buffer, X
rows of a result.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stree_core.drafting.tree_plan import ModelRows, make_plan
from stree_core.tree import DEFAULT_TREE, Tree
from stree_kernels.launch.rows import MAX_BUFFERED, Pending
from stree_kernels.sampling import commit_path as kernel, commit_path_ref as reference
from stree_kernels.sampling.commit_path_ref import (
    COUNT,
    FIRST_TOKEN,
    HEALTHY,
    LAST_NODE,
    PathMemory,
    TreeTables,
)

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")
NUM_TOKENS = 7
WIDTHS = frozenset({4})
SPARE = 3
"""Rows and entries that a deeper or larger tree of the same engine would need."""

TREES = {
    "off": Tree.chain(0),
    "chain": Tree.chain(3),
    "published": DEFAULT_TREE,
    "ragged": Tree.from_paths([[0], [1], [2], [1, 0], [1, 1], [1, 1, 0], [1, 1, 0, 0]]),
    "long": Tree.chain(40),
}


@dataclass(frozen=True)
class Step:
    """All arguments of `commit_path`."""

    tokens_RB: Tensor
    chosen_TB: Tensor
    logits_TBV: Tensor
    tables: TreeTables
    active_B: Tensor
    result_XB: Tensor
    memories: tuple[PathMemory, ...]

    def run(self, op: Any, *, advance: bool = True) -> Step:
        """Return a copy after the op."""
        after = copy.deepcopy(self)
        op.commit_path(
            after.tokens_RB, after.chosen_TB, after.logits_TBV, after.tables, after.active_B,
            after.result_XB, after.memories, advance=advance,
        )  # fmt: skip
        return after

    def tensors(self) -> dict[str, Tensor]:
        """Return what the op may write."""
        named = {"tokens": self.tokens_RB, "result": self.result_XB}
        for number, memory in enumerate(self.memories):
            tensors = (*memory.pending, memory.committed_B)
            for name, tensor in zip(("path", "length", "kept", "committed"), tensors, strict=True):
                named[f"{name} {number}"] = tensor
        return named


def make_step(tree: Tree, num_slots: int, device: str = "cpu") -> Step:
    """Return a step whose slots accept all lengths, one of them inactive, one with NaN."""
    generator = torch.Generator().manual_seed(num_slots)

    def draw(high: int, *sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, sizes, generator=generator, dtype=dtype)

    plan = make_plan(tree, WIDTHS, ModelRows(WIDTHS), torch.device("cpu"))
    tokens_RB = draw(1000, 1 + tree.num_tokens + SPARE, num_slots)
    for children in tree.children:
        # Siblings differ.
        for rank, child in enumerate(children):
            tokens_RB[1 + child] = draw(1, num_slots) + rank
    chosen_TB = draw(NUM_TOKENS, tree.num_tokens, num_slots)
    for slot in range(num_slots):
        # This path is accepted at least.
        path = tree.node_paths[int(draw(tree.num_tokens, 1))]
        for parent, child in itertools.pairwise(path):
            chosen_TB[parent, slot] = tokens_RB[1 + child, slot]
    logits_TBV = torch.randn(tree.num_tokens, num_slots, NUM_TOKENS, generator=generator)
    logits_TBV[-1, -1] = torch.nan
    active_B = torch.ones(num_slots, dtype=torch.int32)
    active_B[0] = 0
    capacity = tree.depth + 1 + SPARE
    memories = [
        PathMemory(
            path_TL,
            Pending(
                draw(50, num_slots, capacity, dtype=torch.int32),
                draw(MAX_BUFFERED, num_slots, dtype=torch.int32),
                draw(MAX_BUFFERED, num_slots, dtype=torch.int32),
            ),
            draw(500, num_slots, dtype=torch.int32),
        )
        for path_TL in (plan.target_path_TL, plan.draft_path_TL)
        # A model takes no part in a step without speculation.
        if path_TL is not None
    ]
    step = Step(
        tokens_RB, chosen_TB, logits_TBV, plan.tables, active_B,
        torch.full((FIRST_TOKEN + capacity, num_slots), -7), tuple(memories),
    )  # fmt: skip
    return moved(step, device)


def moved(step: Step, device: str) -> Step:
    """Return a step whose tensors lie on `device`."""

    def to(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        parts = [to(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)

    return Step(*(to(getattr(step, name)) for name in Step.__dataclass_fields__))


def assert_equal_steps(ours: Step, truth: Step) -> None:
    for name, expected in truth.tensors().items():
        assert torch.equal(ours.tensors()[name].cpu(), expected), name


@pytest.mark.parametrize("name", TREES)
def test_a_path_is_followed_as_far_as_it_matches(name: str) -> None:
    tree, num_slots = TREES[name], 40
    before = make_step(tree, num_slots)
    after = before.run(reference)
    depths = set()
    for slot in range(num_slots):
        tokens = before.tokens_RB[:, slot].tolist()
        chosen = before.chosen_TB[:, slot].tolist()
        node, emitted = 0, [chosen[0]]
        while fitting := [n for n in tree.children[node] if tokens[1 + n] == chosen[node]]:
            (node,) = fitting
            emitted.append(chosen[node])
        result = after.result_XB[:, slot].tolist()
        active = int(before.active_B[slot])
        depths.add(tree.depths[node])
        assert result[LAST_NODE] == node
        assert result[COUNT] == len(emitted) * active
        assert result[FIRST_TOKEN:][: len(emitted)] == emitted
        assert after.tokens_RB[:2, slot].tolist() == [tokens[1], *emitted][-2:]
        own = before.logits_TBV[range(tree.num_tokens), slot, chosen]
        assert result[HEALTHY] == own.isfinite().all()
        for old, new in zip(before.memories, after.memories, strict=True):
            total = int(old.pending.num_buffered_B[slot] + old.pending.length_B[slot])
            assert new.pending.num_buffered_B[slot] == (total if total <= MAX_BUFFERED else 0)
            assert new.pending.length_B[slot] == len(emitted) * active
            assert new.committed_B[slot] == old.committed_B[slot] + len(emitted) * active
            assert torch.equal(new.pending.path_BL[slot][: tree.depth + 1], old.path_TL[node].int())
    assert depths >= {0, tree.depth}, "no path and the longest one occur"
    assert after.result_XB[HEALTHY].tolist() == [1] * (num_slots - 1) + [0]


@pytest.mark.parametrize("name", TREES)
def test_without_advance_the_root_alone_is_committed(name: str) -> None:
    before = make_step(TREES[name], 40)
    walked, after = before.run(reference), before.run(reference, advance=False)
    assert torch.equal(after.result_XB[LAST_NODE], walked.result_XB[LAST_NODE])
    assert torch.equal(after.result_XB[COUNT], before.active_B.long())
    assert torch.equal(after.tokens_RB[1], before.chosen_TB[0])
    assert torch.equal(after.tokens_RB[0], before.tokens_RB[1])


@interpreted
@pytest.mark.parametrize("advance", [True, False], ids=["advance", "stay"])
@pytest.mark.parametrize("name", TREES)
def test_interpreted_kernel_equals_the_reference(name: str, *, advance: bool) -> None:
    before = make_step(TREES[name], 5)
    truth = before.run(reference, advance=advance)
    assert_equal_steps(before.run(kernel, advance=advance), truth)
    alone = replace(before, memories=before.memories[:1])
    assert_equal_steps(alone.run(kernel, advance=advance), alone.run(reference, advance=advance))


@pytest.mark.gpu
@pytest.mark.parametrize("advance", [True, False], ids=["advance", "stay"])
@pytest.mark.parametrize("name", TREES)
def test_kernel_equals_the_reference(name: str, *, advance: bool) -> None:
    before = make_step(TREES[name], 33)
    truth = before.run(reference, advance=advance)
    assert_equal_steps(moved(before, "cuda").run(kernel, advance=advance), truth)


def test_buffers_beyond_the_kernel_are_refused() -> None:
    step = make_step(TREES["chain"], 4)
    with pytest.raises(ValueError, match=r"^tokens, tables and results: one dtype of torch.int64"):
        replace(step, tokens_RB=step.tokens_RB.int()).run(kernel)
    with pytest.raises(ValueError, match=r"^logits: one dtype of torch.float32, got torch.float64"):
        replace(step, logits_TBV=step.logits_TBV.double()).run(kernel)
    with pytest.raises(ValueError, match=r"^lengths and active slots: one dtype of torch.int32"):
        replace(step, active_B=step.active_B.long()).run(kernel)
    with pytest.raises(ValueError, match=r"^the logits lies without gaps, got strides"):
        replace(step, logits_TBV=step.logits_TBV.transpose(1, 2)).run(kernel)
    for change in ({"tokens_RB": step.tokens_RB[:4]}, {"result_XB": step.result_XB[:6]}):
        with pytest.raises(ValueError, match=r"^a step of 4 tokens, 4 slots and paths of 4 takes"):
            replace(step, **change).run(kernel)
