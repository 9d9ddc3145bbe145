"""One decoding step on the device: draft, verify, accept and commit.

Nothing here waits for the device, so a step can be captured as one CUDA graph. A tree without nodes
is decoding without speculation: the target runs one token, the draft is not touched.

Shape letters: T tree tokens, B slots, L path capacity (tree depth + 1), W rows, V vocabulary, R
rows of the token buffer, X rows of a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stree_core.drafting import Draft, DraftLevel, StepEnd, TreePlan
from stree_core.engine.rules import GREEDY, Rule, make_rules
from stree_core.models import Cache, CacheSize, Model, RowBlock
from stree_kernels.sampling.commit_path_ref import COUNT, FIRST_TOKEN, PathMemory


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """What steps read and leave behind, in place, whichever tree they have.

    `tokens_RB` holds the last two emitted tokens, the predecessor and the root, and behind the root
    the tree's other tokens. `active_B` (int32, 1 or 0): an inactive slot computes but does not
    advance. `result_XB` is what the host reads, in one copy: see `commit_path`.
    """

    tokens_RB: Tensor
    active_B: Tensor
    result_XB: Tensor


def make_buffers(plans: Sequence[TreePlan], num_slots: int, device: torch.device) -> StepBuffers:
    """Allocate the buffers of steps with these trees."""

    def zeros(num_rows: int) -> Tensor:
        return torch.zeros(num_rows, num_slots, dtype=torch.int64, device=device)

    num_rows = 1 + max(plan.tree.num_tokens for plan in plans)
    capacity = max(plan.tree.depth for plan in plans) + 1
    active_B = torch.zeros(num_slots, dtype=torch.int32, device=device)
    return StepBuffers(zeros(num_rows), active_B, zeros(FIRST_TOKEN + capacity))


class Verified(NamedTuple):
    """The target's hidden states and logits after each node, and the token that the rule picks."""

    hidden_TBD: Tensor
    logits_TBV: Tensor
    chosen_TB: Tensor


@dataclass(frozen=True, slots=True)
class Speculator:
    """A target, its draft and their memory, bound to one tree and one rule."""

    plan: TreePlan
    target: Model
    target_cache: Cache
    draft: Draft | None
    draft_cache: Cache | None
    buffers: StepBuffers
    rule: Rule

    @property
    def tokens_TB(self) -> Tensor:
        """The tree's tokens, root first."""
        tokens_TB: Tensor = self.buffers.tokens_RB[1 : 1 + self.plan.tree.num_tokens]
        return tokens_TB

    def step(self) -> None:
        """Run one step for all slots; results are in the buffers, the caches are ready to flip."""
        self.propose()
        self.commit(self.verify())

    def record(self) -> None:
        """Run a recording step: note the accepted child, emit the target's next token alone."""
        self.propose()
        self.commit(self.verify(), advance=False)

    def propose(self) -> None:
        """Fill the tree's tokens behind the root, level by level."""
        for level in self.plan.levels:
            self.draft_level(level)
        if self.draft is not None and self.draft_cache is not None and not self.plan.levels:
            self.draft.pass_by(self.plan, self.buffers.tokens_RB, self.draft_cache)

    def draft_level(self, level: DraftLevel) -> None:
        """Run the draft on one level's inner nodes and fill the next level's tokens."""
        assert self.draft is not None
        assert self.draft_cache is not None
        logits_WBV = self.draft.score(level, self.plan, self.buffers.tokens_RB, self.draft_cache)
        self.rule.draw(level, logits_WBV, self.tokens_TB)

    def verify(self) -> Verified:
        """Run the target over the tree."""
        hidden_TBD = self.target.forward(
            self.tokens_TB, self.plan.target_block, self.target_cache, first=0, commit=True
        )
        logits_TBV = self.target.logits(hidden_TBD)
        return Verified(hidden_TBD, logits_TBV, self.rule.choose(logits_TBV, self.tokens_TB))

    def commit(self, verified: Verified, *, advance: bool = True) -> None:
        """Accept a path, emit it with the bonus token and make it pending in both caches.

        Without `advance` the result names the last accepted node, but one token alone is emitted.
        """
        b, plan, cache = self.buffers, self.plan, self.draft_cache
        memories = [_memory(plan.target_path_TL, self.target_cache)]
        if plan.draft_path_TL is not None and cache is not None:
            memories.append(_memory(plan.draft_path_TL, cache))
        self.target.backend.commit_path(
            b.tokens_RB, verified.chosen_TB, verified.logits_TBV, plan.tables, b.active_B,
            b.result_XB, memories, advance=advance,
        )  # fmt: skip
        if self.draft is not None and cache is not None:
            path_LB = self.target_cache.pending.path_BL.t()
            end = StepEnd(verified.hidden_TBD, path_LB, b.result_XB, advance)
            self.draft.take_over(plan, end, cache)
        self.rule.advance(b.result_XB[FIRST_TOKEN:], b.result_XB[COUNT])


def _memory(path_TL: Tensor, cache: Cache) -> PathMemory:
    return PathMemory(path_TL, cache.pending, cache.committed_B)


def make_caches(
    models: tuple[Model, Draft | None],
    plans: Sequence[TreePlan],
    num_slots: int,
    num_positions: int,
    device: torch.device | None = None,
) -> tuple[Cache, Cache | None]:
    """Allocate what a target and, where a tree has nodes, its draft remember between steps.

    The caches serve all trees of `plans` in any order. They lie on the models' device unless
    another is given.
    """
    target, draft = models
    capacity = max(plan.tree.depth for plan in plans) + 1

    def size(blocks: Sequence[RowBlock]) -> CacheSize:
        num_rows = max(block.num_rows for block in blocks)
        return CacheSize(num_slots, num_rows, capacity, num_positions)

    draft_cache = None
    draft_blocks = [plan.draft_block for plan in plans if plan.draft_block is not None]
    if draft is not None and draft_blocks:
        draft_cache = draft.make_cache(size(draft_blocks), device)
    return target.make_cache(size([plan.target_block for plan in plans]), device), draft_cache


def make_speculators(
    target: Model, draft: Draft | None, plans: Sequence[TreePlan], num_slots: int,
    num_positions: int, rules: Sequence[Rule] | None = None,
) -> list[Speculator]:  # fmt: skip
    """Allocate the memory of a target and, where a tree has nodes, of its draft, for all trees.

    `rules` holds one for each tree, by default the greedy one.
    """
    caches = make_caches((target, draft), plans, num_slots, num_positions)
    buffers = make_buffers(plans, num_slots, target.device)
    if rules is None:
        rules = make_rules(GREEDY, plans, num_slots, target.shape.vocab_size, target.backend)
    return [
        Speculator(plan, target, caches[0], draft, caches[1], buffers, rule)
        for plan, rule in zip(plans, rules, strict=True)
    ]
