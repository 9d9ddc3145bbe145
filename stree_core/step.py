"""One decoding step on the device: draft, verify, accept, commit.

Nothing here waits for the device, so a step can be captured as one CUDA graph. A tree without nodes
is decoding without speculation: the target runs one token, the draft is not touched.

Shape letters: T tree tokens, B slots, L path capacity (tree depth + 1), W rows, C children,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stree_core.acceptance import accept_path
from stree_core.cache import Cache, CacheSize
from stree_core.model import Model
from stree_core.rules import GREEDY, Rule, SamplingSupport, make_rule
from stree_core.tree_plan import DraftLevel, TreePlan


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """What a step reads and leaves behind, in place.

    `latest_2B` holds the last two emitted tokens: the predecessor and the root. `tokens_TB` are the
    tree's. `active_B` (int32, 1 or 0): an inactive slot computes but does not advance. `result_XB`
    is what the host reads, in one copy: row 0 counts a step's tokens, row 1 is the last accepted
    node, then come the L tokens: the accepted ones and the bonus token, those counted are valid.
    """

    latest_2B: Tensor
    tokens_TB: Tensor
    active_B: Tensor
    result_XB: Tensor


def make_buffers(plan: TreePlan, num_slots: int, device: torch.device) -> StepBuffers:
    """Allocate the buffers of a step."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    return StepBuffers(
        zeros(2, num_slots),
        zeros(plan.tree.num_tokens, num_slots),
        zeros(num_slots, dtype=torch.int32),
        zeros(2 + plan.tree.depth + 1, num_slots),
    )


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
        self.buffers.result_XB[1] = last_B

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
        return self.rule.choose(self.target.logits(hidden_TBD), self.buffers.tokens_TB)

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
        b.result_XB.copy_(torch.cat((length_B[None], last_B[None], emitted_LB)))
        self.target_cache.advance(path_BL, length_B)
        self.draft_cache.advance(plan.draft_path_TL[last_B], length_B)
        self.rule.advance(emitted_LB, accepted_B, b.active_B)

    def commit_one(self, chosen_1B: Tensor) -> None:
        """Commit and emit without speculation: the path is the root alone, row 0 of its block."""
        b = self.buffers
        b.latest_2B.copy_(torch.cat((b.latest_2B[1:], chosen_1B)))
        b.result_XB[0] = b.active_B
        b.result_XB[2:] = chosen_1B
        self.target_cache.advance(None, b.active_B)
        self.rule.advance(chosen_1B, torch.zeros_like(b.active_B), b.active_B)


def make_caches(
    models: tuple[Model, Model | None],
    plan: TreePlan,
    num_slots: int,
    num_positions: int,
    device: torch.device | None = None,
) -> tuple[Cache, Cache | None]:
    """Allocate what a target and, for a tree with nodes, its draft remember between steps.

    The caches lie on the models' device unless another is given.
    """
    target, draft = models

    def size(num_rows: int) -> CacheSize:
        return CacheSize(num_slots, num_rows, plan.tree.depth + 1, num_positions)

    draft_cache = None
    if draft is not None and plan.draft_block is not None:
        draft_cache = draft.make_cache(size(plan.draft_block.num_rows), device)
    return target.make_cache(size(plan.tree.num_tokens), device), draft_cache


def make_speculator(
    target: Model, draft: Model | None, plan: TreePlan, num_slots: int, num_positions: int,
    support: SamplingSupport = GREEDY,
) -> Speculator:  # fmt: skip
    """Allocate the memory of a target and, for a tree with nodes, of its draft."""
    caches = make_caches((target, draft), plan, num_slots, num_positions)
    buffers = make_buffers(plan, num_slots, target.device)
    fill_uniforms = target.backend.fill_uniforms
    rule = make_rule(support, plan, num_slots, target.shape.vocab_size, fill_uniforms)
    return Speculator(plan, target, caches[0], draft, caches[1], buffers, rule)
