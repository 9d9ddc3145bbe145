"""One decoding step on the device: draft, verify, accept, commit.

Nothing here waits for the device, so a step can be captured as one CUDA graph. A tree without nodes
is decoding without speculation: the target runs one token, the draft is not touched.

Shape letters: T tree tokens, B slots, L path capacity (tree depth + 1), W rows, C children,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stree_core.acceptance import accept_path
from stree_core.cache import Cache, CacheSize
from stree_core.model import Model
from stree_core.row_block import RowBlock
from stree_core.rules import GREEDY, Rule, SamplingSupport, make_rules
from stree_core.tree_plan import DraftLevel, TreePlan

COUNT, LAST_NODE, HEALTHY, FIRST_TOKEN = range(4)
"""Rows of a step's result."""


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """What a step reads and leaves behind, in place; all but the tokens are shared by all trees.

    `latest_2B` holds the last two emitted tokens: the predecessor and the root. `tokens_TB` are the
    tree's. `active_B` (int32, 1 or 0): an inactive slot computes but does not advance. `result_XB`
    is what the host reads, in one copy: a step's number of tokens, the last accepted node, whether
    all logits were finite (1 or 0), then the tokens: the accepted ones and the bonus token.
    """

    latest_2B: Tensor
    tokens_TB: Tensor
    active_B: Tensor
    result_XB: Tensor


def make_buffers(
    plans: Sequence[TreePlan], num_slots: int, device: torch.device
) -> list[StepBuffers]:
    """Allocate the buffers of steps with these trees."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    capacity = max(plan.tree.depth for plan in plans) + 1
    latest_2B = zeros(2, num_slots)
    active_B = zeros(num_slots, dtype=torch.int32)
    result_XB = zeros(FIRST_TOKEN + capacity, num_slots)
    return [
        StepBuffers(latest_2B, zeros(plan.tree.num_tokens, num_slots), active_B, result_XB)
        for plan in plans
    ]


@dataclass(frozen=True, slots=True)
class Speculator:
    """A target, its draft and their memory, bound to one tree and one rule."""

    plan: TreePlan
    target: Model
    target_cache: Cache
    draft: Model | None
    draft_cache: Cache | None
    buffers: StepBuffers
    rule: Rule

    def step(self) -> None:
        """Run one step for all slots; results are in the buffers, the caches are ready to flip."""
        self.propose()
        chosen_TB = self.verify()
        if self.plan.tree.num_nodes == 0:
            self.commit_one(chosen_TB)
        else:
            self.commit(chosen_TB, self.accept(chosen_TB))

    def record(self) -> None:
        """Run a recording step: note the accepted child, emit the target's next token alone."""
        self.propose()
        chosen_TB = self.verify()
        last_B = self.accept(chosen_TB)
        self.commit(chosen_TB, torch.zeros_like(last_B))
        self.buffers.result_XB[LAST_NODE] = last_B

    def propose(self) -> None:
        """Fill the tree's tokens, level by level."""
        self.buffers.tokens_TB[0] = self.buffers.latest_2B[1]
        for level in self.plan.levels:
            self.draft_level(level)

    def draft_level(self, level: DraftLevel) -> None:
        """Run the draft on one level's inner nodes and fill the next level's tokens."""
        assert self.draft is not None
        assert self.draft_cache is not None
        assert self.plan.draft_block is not None
        tokens_TB = self.buffers.tokens_TB
        is_root = level.first == 0
        inputs_WB = self.buffers.latest_2B if is_root else tokens_TB[level.nodes]
        hidden_WBD = self.draft.forward(
            inputs_WB, self.plan.draft_block, self.draft_cache, first=level.first, commit=is_root
        )
        logits_WBV = self.draft.logits(hidden_WBD[-1:] if is_root else hidden_WBD)
        drawn_WBC = self.rule.draw(level, logits_WBV, tokens_TB)
        children_CB = drawn_WBC.transpose(1, 2)[level.source_C, level.rank_C]
        tokens_TB[level.first_child : level.end_child] = children_CB

    def verify(self) -> Tensor:
        """Run the target over the tree; return the token that it picks after each node [T, B]."""
        hidden_TBD = self.target.forward(
            self.buffers.tokens_TB, self.plan.target_block, self.target_cache, first=0, commit=True
        )
        logits_TBV = self.target.logits(hidden_TBD)
        chosen_TB = self.rule.choose(logits_TBV, self.buffers.tokens_TB)
        # The likeliest of logits with NaN is NaN.
        own_TB = logits_TBV.gather(-1, chosen_TB[..., None])[..., 0]
        self.buffers.result_XB[HEALTHY] = own_TB.isfinite().all(0)
        return chosen_TB

    def accept(self, chosen_TB: Tensor) -> Tensor:
        """Return every slot's last accepted node [B]."""
        mask_TT = self.plan.target_block.mask_RR[:, : self.plan.tree.num_tokens]
        return accept_path(
            self.buffers.tokens_TB, chosen_TB, self.plan.parents_T, mask_TT, self.plan.depths_T
        )

    def commit(self, chosen_TB: Tensor, last_B: Tensor) -> None:
        """Make the accepted path pending in both caches, and emit it with the bonus token."""
        b, plan = self.buffers, self.plan
        assert self.draft_cache is not None
        path_BL = plan.target_path_TL[last_B]
        accepted_B = plan.depths_T[last_B]
        emitted_LB = chosen_TB.gather(0, path_BL.t())
        history_LB = torch.cat((b.latest_2B[1:], emitted_LB))
        torch.gather(history_LB, 0, torch.stack((accepted_B, accepted_B + 1)), out=b.latest_2B)
        length_B = (accepted_B + 1) * b.active_B
        b.result_XB[: LAST_NODE + 1] = torch.stack((length_B, last_B))
        b.result_XB[FIRST_TOKEN:][: len(emitted_LB)] = emitted_LB
        self.target_cache.advance(path_BL, length_B)
        self.draft_cache.advance(plan.draft_path_TL[last_B], length_B)
        self.rule.advance(emitted_LB, accepted_B, b.active_B)

    def commit_one(self, chosen_1B: Tensor) -> None:
        """Commit and emit without speculation: the path is the root alone, row 0 of its block."""
        b = self.buffers
        b.latest_2B.copy_(torch.cat((b.latest_2B[1:], chosen_1B)))
        b.result_XB[COUNT] = b.active_B
        b.result_XB[LAST_NODE] = 0
        b.result_XB[FIRST_TOKEN] = chosen_1B[0]
        self.target_cache.advance(None, b.active_B)
        self.rule.advance(chosen_1B, torch.zeros_like(b.active_B), b.active_B)


def make_caches(
    models: tuple[Model, Model | None],
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
    target: Model, draft: Model | None, plans: Sequence[TreePlan], num_slots: int,
    num_positions: int, support: SamplingSupport = GREEDY,
) -> list[Speculator]:  # fmt: skip
    """Allocate the memory of a target and, where a tree has nodes, of its draft, for all trees."""
    caches = make_caches((target, draft), plans, num_slots, num_positions)
    buffers = make_buffers(plans, num_slots, target.device)
    fill_uniforms = target.backend.fill_uniforms
    rules = make_rules(support, plans, num_slots, target.shape.vocab_size, fill_uniforms)
    return [
        Speculator(plan, target, caches[0], draft, caches[1], own, rule)
        for plan, own, rule in zip(plans, buffers, rules, strict=True)
    ]
