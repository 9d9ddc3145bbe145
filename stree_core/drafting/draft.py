"""What proposes the tokens of a tree: one interface for every kind of draft.

A draft keeps rows of its own (a cache) and is asked four things: to score a level of a tree from
its nodes' tokens and what it kept of their ancestors; to take note of a step without speculation;
to take over what an accepted path leaves behind; and to read a prompt. A separate model is one
kind, the target's own MTP head (stree_core.drafting.mtp_draft) another.

Shape letters: T tree tokens, B slots, W rows of a level, D hidden size, V vocabulary, R rows of the
token buffer, X rows of a result, L path capacity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stree_core.drafting.prefill import Prefill, PromptPart
from stree_core.drafting.tree_plan import DraftLayout, DraftLevel, ModelRows, TreePlan
from stree_core.families import ModelShape
from stree_core.models import Cache, CacheSize, Model, flush_states


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
    """Reads prompts into the slots of a target and its draft."""

    def begin(self, slot: int) -> None:
        """Make a slot ready for a prompt."""

    def read(self, parts: Sequence[PromptPart]) -> Tensor:
        """Read parts of prompts; return the target's hidden states after each [S, D]."""

    def end(self, slot: int, num_tokens: int) -> None:
        """Make a slot, whose prompt of so many tokens is read, ready for steps."""

    def missing(self, texts: Mapping[int, Sequence[int]]) -> list[PromptPart]:
        """Return what a draft that fell behind has not read of slots' texts, for `catch_up`."""

    def fall_behind(self) -> None:
        """Take note that the next step leaves the draft behind."""

    def catch_up(self, parts: Sequence[PromptPart]) -> None:
        """Read parts with the draft alone."""


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

    def prompt_reader(
        self, target: Model, target_cache: Cache, cache: Cache, *, use_graph: bool
    ) -> PromptReader:
        """Return what reads prompts."""


class TargetReader:
    """Reads prompts for a target without a draft."""

    def __init__(self, target: Model, cache: Cache, *, use_graph: bool) -> None:
        self._cache = cache
        self._target = Prefill(target, cache, use_graph=use_graph)

    def begin(self, slot: int) -> None:
        """Make a slot ready for a prompt."""
        self._cache.hold(slot, 0)

    def read(self, parts: Sequence[PromptPart]) -> Tensor:
        """Read parts of prompts."""
        return self._target.read(parts)

    def end(self, slot: int, num_tokens: int) -> None:
        """Make a slot ready for steps."""
        self._cache.hold(slot, num_tokens)

    def missing(self, texts: Mapping[int, Sequence[int]]) -> list[PromptPart]:
        """There is nobody to catch up."""
        return []

    def fall_behind(self) -> None:
        """There is nobody to fall behind."""

    def catch_up(self, parts: Sequence[PromptPart]) -> None:
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

    def prompt_reader(
        self, target: Model, target_cache: Cache, cache: Cache, *, use_graph: bool
    ) -> PromptReader:
        """Return what reads prompts with both models, one after the other."""
        return _PairReader(target, target_cache, self.model, cache, use_graph=use_graph)


class _PairReader(TargetReader):
    """Reads a prompt with the target, and all of it but the last token with the draft."""

    def __init__(
        self, target: Model, target_cache: Cache, draft: Model, cache: Cache, *, use_graph: bool
    ) -> None:
        super().__init__(target, target_cache, use_graph=use_graph)
        self._draft_cache = cache
        self._model = draft
        self._draft = Prefill(draft, cache, use_graph=use_graph)
        # The row set of the draft's pending path, since steps left it behind.
        self._path_set = 0

    def begin(self, slot: int) -> None:
        """Make a slot ready for a prompt."""
        super().begin(slot)
        self._draft_cache.hold(slot, 0)

    def read(self, parts: Sequence[PromptPart]) -> Tensor:
        """Read parts of prompts with both."""
        hidden_SD = super().read(parts)
        self._draft.read([part.without_last() for part in parts])
        return hidden_SD

    def end(self, slot: int, num_tokens: int) -> None:
        """Make a slot ready for steps."""
        super().end(slot, num_tokens)
        if num_tokens > 1:
            self._draft_cache.hold(slot, num_tokens - 1)
        else:
            self._draft_cache.forget(slot)

    def missing(self, texts: Mapping[int, Sequence[int]]) -> list[PromptPart]:
        """Return what the draft has not read of all but the last two tokens of each text."""
        flush_states(self._model, self._draft_cache, self._path_set)
        known = self._draft_cache.committed_B.tolist()
        return [
            PromptPart(slot, text[:-2], known[slot], len(text) - 2) for slot, text in texts.items()
        ]

    def fall_behind(self) -> None:
        """Take note of where the pending path lies: steps turn the row sets without the draft."""
        self._path_set = 1 - self._draft_cache.current

    def catch_up(self, parts: Sequence[PromptPart]) -> None:
        """Read parts with the draft."""
        self._draft.read(parts)
        for part in parts:
            self._draft_cache.hold(part.slot, part.end)


def as_draft(draft: Draft | Model | None) -> Draft | None:
    """Return a draft as it is, and a model as one."""
    return ModelDraft(draft) if isinstance(draft, Model) else draft
