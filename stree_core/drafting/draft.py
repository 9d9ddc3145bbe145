"""What proposes the tokens of a tree: one interface for every kind of draft.

A draft keeps rows of its own (a cache) and is asked four things: to score a level of a tree from
its nodes' tokens and what it kept of their ancestors; to take note of a step without speculation;
to take over what an accepted path leaves behind; and to read a prompt. A separate model is one
kind, the target's own MTP head (stree_core.drafting.mtp_draft) another.

Shape letters: T tree tokens, B slots, W rows of a level, D hidden size, V vocabulary, R rows of the
token buffer, X rows of a result, L path capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stree_core.drafting.prefill import Prefill, prefill_cache
from stree_core.drafting.tree_plan import DraftLayout, DraftLevel, ModelRows, TreePlan
from stree_core.families import ModelShape
from stree_core.models import Cache, CacheSize, Model


@dataclass(frozen=True, slots=True)
class StepEnd:
    """What a step leaves to a draft: the target's hidden states, its path (nodes), the result.

    `tokens` of the result that do not count are any tokens. `advances` is False where the root
    alone was committed.
    """

    hidden_TBD: Tensor
    path_LB: Tensor
    result_XB: Tensor
    advances: bool


class PromptReader(Protocol):
    """Reads prompts for a target and its draft, one slot at a time."""

    @property
    def caches(self) -> tuple[Cache, Cache | None]:
        """Where the target and the draft keep what they read: caches of one slot."""

    def read(self, prompt: Sequence[int]) -> Tensor:
        """Read a prompt; return the target's hidden state after it [1, 1, D]."""

    def catch_up(self, tokens: Sequence[int]) -> None:
        """Read the tokens that a draft has to know before the last two, for the draft alone."""


class Draft(Protocol):
    """What a step, an engine and a probe know of a draft."""

    @property
    def shape(self) -> ModelShape:
        """What its passes compute, for their cost."""

    @property
    def num_scored(self) -> int:
        """How many tokens it scores: the target's, or those of its own that the target has."""

    @property
    def layout(self) -> DraftLayout:
        """The order of its rows."""

    @property
    def falls_behind(self) -> bool:
        """True when steps without speculation leave it behind, so that it has to catch up."""

    @property
    def feeds_itself(self) -> bool:
        """True when what it proposes depends on what it made since the step began, not on the
        text alone."""

    def make_cache(self, size: CacheSize, device: torch.device | None = None) -> Cache:
        """Allocate what it keeps, for blocks of its layout, on its device unless one is given."""

    def score(self, level: DraftLevel, plan: TreePlan, tokens_RB: Tensor, cache: Cache) -> Tensor:
        """Run the inner nodes of one level; return logits [W, B, V] of their children."""

    def pass_by(self, plan: TreePlan, tokens_RB: Tensor, cache: Cache) -> None:
        """Take note of the root in a step without speculation, before it ends."""

    def take_over(self, plan: TreePlan, end: StepEnd, cache: Cache) -> None:
        """Take over what the path leaves behind that was just made pending in `cache`."""

    def prompt_reader(self, target: Model, num_positions: int, *, use_graph: bool) -> PromptReader:
        """Return what reads prompts of up to `num_positions` tokens."""

    def prompt_cache(self, num_positions: int, device: torch.device | None = None) -> Cache:
        """Allocate the cache that prompts are read in."""


class TargetReader:
    """Reads prompts for a target without a draft."""

    def __init__(self, target: Model, num_positions: int, *, use_graph: bool) -> None:
        self._target = Prefill(target, num_positions, use_graph=use_graph)

    @property
    def caches(self) -> tuple[Cache, Cache | None]:
        """The target's cache."""
        return self._target.cache, None

    def read(self, prompt: Sequence[int]) -> Tensor:
        """Read a prompt."""
        return self._target.consume(prompt)

    def catch_up(self, tokens: Sequence[int]) -> None:
        """There is nobody to catch up."""


class ModelDraft:
    """A separate model: it reads tokens, and keeps states, keys and values of its own."""

    falls_behind = True
    feeds_itself = False

    def __init__(self, model: Model) -> None:
        self.model = model
        self.shape = model.shape
        self.num_scored = len(model.weights.lm_head_VD)
        self.layout = ModelRows(model.conv_widths)

    def make_cache(self, size: CacheSize, device: torch.device | None = None) -> Cache:
        """Allocate the model's cache."""
        return self.model.make_cache(size, device)

    def score(self, level: DraftLevel, plan: TreePlan, tokens_RB: Tensor, cache: Cache) -> Tensor:
        """Run one level; the root's pass also runs the token before it."""
        assert plan.draft_block is not None
        is_root = level.first == 0
        inputs_WB = tokens_RB[:2] if is_root else tokens_RB[1:][level.inputs]
        hidden_WBD = self.model.forward(
            inputs_WB, plan.draft_block, cache, first=level.first, commit=is_root
        )
        return self.model.logits(hidden_WBD[-1:] if is_root else hidden_WBD)

    def pass_by(self, plan: TreePlan, tokens_RB: Tensor, cache: Cache) -> None:
        """A step without speculation does not touch the draft, which catches up later."""

    def take_over(self, plan: TreePlan, end: StepEnd, cache: Cache) -> None:
        """The accepted rows are replayed by the next pass."""

    def prompt_reader(self, target: Model, num_positions: int, *, use_graph: bool) -> PromptReader:
        """Return what reads prompts with both models, one after the other."""
        return _PairReader(target, self.model, num_positions, use_graph=use_graph)

    def prompt_cache(self, num_positions: int, device: torch.device | None = None) -> Cache:
        """Allocate the cache that prompts are read in."""
        return prefill_cache(self.model, num_positions, device)


class _PairReader:
    """Reads a prompt with the target, and all of it but the last token with the draft."""

    def __init__(self, target: Model, draft: Model, num_positions: int, *, use_graph: bool) -> None:
        self._target = Prefill(target, num_positions, use_graph=use_graph)
        self._draft = Prefill(draft, num_positions, use_graph=use_graph)

    @property
    def caches(self) -> tuple[Cache, Cache | None]:
        """Both models' caches."""
        return self._target.cache, self._draft.cache

    def read(self, prompt: Sequence[int]) -> Tensor:
        """Read a prompt with both."""
        hidden = self._target.consume(prompt)
        self._draft.consume(prompt[:-1])
        return hidden

    def catch_up(self, tokens: Sequence[int]) -> None:
        """Read tokens with the draft."""
        self._draft.consume(tokens)


def as_draft(draft: Draft | Model | None) -> Draft | None:
    """Return a draft as it is, and a model as one."""
    return ModelDraft(draft) if isinstance(draft, Model) else draft
