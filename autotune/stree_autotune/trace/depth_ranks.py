"""Ranks by depth: a draft that feeds itself, started at every position and led along the text.

The text is decoded first, without speculation, while the target's hidden states are kept. Then all
starts are run side by side (stree_core.drafting.forced_starts), and each token's rank is found
among the children that the draft would have proposed there.

With MSS children are drawn, so the rank of a token is random even where the text is known. It is
drawn from its distribution given the token: child i is that token with probability min(1, q / p);
else the child was another one that was rejected, which has the distribution of the positive part of
q - p whatever follows. So trace and text together are distributed as in decoding, and starts are
independent of each other given the text.

Shape letters: B slots, W starts of a chunk, N positions of the texts, H hidden states (N + 1), D
depths, C children, V vocabulary, M rows (a start of a slot each).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stree_autotune.trace.file import NO_RANK
from stree_core.drafting import ForcedStarts, KnownTexts, MtpDraft
from stree_core.engine import Engine, SampledRule, SlotSettings, processed
from stree_core.models import Backend
from stree_kernels.sampling.children_ref import sample_from, softmax_distribution
from stree_kernels.sampling.top_tokens_ref import top_tokens

_STREAM = 1 << 16
"""The first stream of random numbers; lower ones belong to decoding."""


class DepthRanks:
    """Follows texts while an engine decodes them without speculation, then ranks their tokens."""

    def __init__(self, engine: Engine, num_children: int, depths: int) -> None:
        speculator = engine.speculator
        assert isinstance(engine.draft, MtpDraft)
        assert speculator.draft_cache is not None
        self._engine = engine
        self._cache = speculator.draft_cache
        self._starts = ForcedStarts(engine.draft, self._cache, depths)
        self._num_children = num_children
        self._depths = depths
        self._hidden: list[Tensor] = []

    def begin(self) -> None:
        """Take note of prompts that were just read."""
        self._hidden = []
        self._begin_B = self._cache.committed_B.clone()
        rule = self._engine.speculator.rule
        seen_BV = rule.seen_BV if isinstance(rule, SampledRule) else None
        self._prompt_BV = None if seen_BV is None else seen_BV.clone()
        self.look()

    def look(self) -> None:
        """Take note of a step."""
        assert self._cache.features_RBD is not None
        self._hidden.append(self._cache.features_RBD[0].clone())

    @torch.inference_mode()
    def ranks(self, texts: Mapping[int, Sequence[int]]) -> dict[int, NDArray[np.uint8]]:
        """Return the ranks [N, D] of each slot's text, the first token of which has none."""
        num_positions = max(len(text) for text in texts.values()) - 1
        width = self._starts.num_starts
        num_rows = -(-num_positions // width) * width + self._depths + 1
        roots = np.zeros((num_rows, self._engine.config.num_slots), np.int64)
        for slot, text in texts.items():
            roots[: len(text), slot] = text
        spare = [torch.zeros_like(self._hidden[0])] * (num_rows - len(self._hidden))
        hidden_HBD = torch.stack([*self._hidden, *spare][:num_rows])
        roots_NB = torch.from_numpy(roots).to(hidden_HBD.device)
        known = KnownTexts(roots_NB, hidden_HBD, self._begin_B)
        chunks = [self._chunk(known, first) for first in range(0, num_positions, width)]
        if not chunks:
            return {slot: np.zeros((0, self._depths), np.uint8) for slot in texts}
        ranks_NBD = torch.cat(chunks).to(torch.uint8).cpu().numpy()
        return {slot: self._own(ranks_NBD[:, slot], len(text) - 1) for slot, text in texts.items()}

    def _own(self, ranks_ND: NDArray[np.uint8], num_positions: int) -> NDArray[np.uint8]:
        """Return the rows of one text, without ranks behind its end."""
        own_ND = ranks_ND[:num_positions].copy()
        position_ND = np.arange(num_positions)[:, None] + np.arange(self._depths)
        own_ND[position_ND >= num_positions] = NO_RANK
        return own_ND

    def _chunk(self, known: KnownTexts, first: int) -> Tensor:
        """Return the ranks [W, B, D] of some starts."""
        width = self._starts.num_starts
        finder = self._finder(known, first)
        ranks = []
        for depth, logits_WBV in enumerate(self._starts.run(known, first)):
            begin = first + depth + 1
            ranks.append(finder(logits_WBV, known.roots_NB[begin : begin + width], depth))
        return torch.stack(ranks, dim=-1)

    def _finder(self, known: KnownTexts, first: int) -> Finder:
        """Return what finds the ranks of a chunk's tokens."""
        config, rule = self._engine.config.sampling, self._engine.speculator.rule
        if config.rule != "mss":
            return partial(_likeliest_rank, self._num_children)
        assert isinstance(rule, SampledRule)
        end = first + self._starts.num_starts + self._depths - 1
        logits_NBV = self._engine.target.logits(known.hidden_NBD[first + 1 : end + 1])
        seen_NBV = None
        if self._prompt_BV is not None:
            seen_NBV = seen_along(self._prompt_BV, known.roots_NB[:end], first)
        scores = partial(processed, settings=rule.settings, truncates=config.truncates)
        p_NBV = softmax_distribution(
            scores(logits_NBV, seen_NBV=seen_NBV), rule.settings.temperature_B
        )
        draws = _Draws(rule.settings, self._engine.target.backend, self._num_children, first)
        return _DrawnRank(scores, seen_NBV, p_NBV, draws)


Finder = Callable[[Tensor, Tensor, int], Tensor]


def _likeliest_rank(num_children: int, logits_WBV: Tensor, token_WB: Tensor, depth: int) -> Tensor:
    """Return where tokens stand among the likeliest ones, NO_RANK for none of them."""
    is_child_WBC = top_tokens(logits_WBV, num_children) == token_WB[..., None]
    none = torch.full_like(token_WB, NO_RANK)
    return torch.where(is_child_WBC.any(-1), is_child_WBC.int().argmax(-1), none)


def seen_along(prompt_BV: Tensor, roots_NB: Tensor, first: int) -> Tensor:
    """Return which tokens [N - first, B, V] (bool) are seen after each root from `first` on."""
    before_BV = prompt_BV.scatter(1, roots_NB[:first].t(), value=True)
    here_NBV = torch.zeros(
        len(roots_NB) - first, *prompt_BV.shape, dtype=torch.uint8, device=prompt_BV.device
    ).scatter_(2, roots_NB[first:, :, None], 1)
    seen_NBV: Tensor = here_NBV.cummax(0).values.bool() | before_BV
    return seen_NBV


@dataclass(frozen=True, slots=True)
class _Draws:
    """Where a chunk's random numbers come from: they depend on a prompt's seed, start and depth."""

    settings: SlotSettings
    backend: Backend
    num_children: int
    first: int

    def uniforms(self, like_WB: Tensor, depth: int) -> Tensor:
        """Return two numbers for each child [W, B, 2 C]."""
        uniform_WBX = torch.empty(*like_WB.shape, 2 * self.num_children, device=like_WB.device)
        start_B = torch.full_like(self.settings.step_B, self.first)
        self.backend.fill_uniforms(
            self.settings.seed_B, start_B, uniform_WBX, stream=_STREAM + depth
        )
        return uniform_WBX


class _DrawnRank:
    """Draws the ranks of a chunk's tokens."""

    def __init__(
        self, scores: Callable[..., Tensor], seen_NBV: Tensor | None, p_NBV: Tensor, draws: _Draws
    ) -> None:
        self._scores = scores
        self._seen_NBV = seen_NBV
        self._p_NBV = p_NBV
        self._draws = draws

    def __call__(self, logits_WBV: Tensor, token_WB: Tensor, depth: int) -> Tensor:
        """Return the ranks [W, B] of tokens that the target chose at a depth of each start."""
        rows = slice(depth, depth + len(token_WB))
        seen_WBV = None if self._seen_NBV is None else self._seen_NBV[rows]
        q_WBV = softmax_distribution(
            self._scores(logits_WBV, seen_NBV=seen_WBV), self._draws.settings.temperature_B
        )
        rank_M = drawn_rank(
            self._p_NBV[rows].flatten(0, 1), q_WBV.flatten(0, 1), token_WB.flatten(),
            self._draws.uniforms(token_WB, depth).flatten(0, 1),
        )  # fmt: skip
        return rank_M.view_as(token_WB)


def drawn_rank(p_MV: Tensor, q_MV: Tensor, token_M: Tensor, uniform_MX: Tensor) -> Tensor:
    """Return which draw of multi-step speculative sampling a token was, NO_RANK for none.

    `token_M` was drawn from `p_MV`; the ranks' distribution is that of the rule's, with children
    drawn from `q_MV`, given its outcome. Two of the uniforms [M, 2 C] decide each of C children.
    """
    rank_M = torch.full_like(token_M, NO_RANK)
    row_R = torch.arange(len(token_M), device=token_M.device)
    for child in range(uniform_MX.shape[1] // 2):
        p_R, q_R = (x.gather(1, token_M[row_R, None])[:, 0] for x in (p_MV, q_MV))
        taken_R = uniform_MX[row_R, 2 * child] * p_R < q_R
        rank_M[row_R[taken_R]] = child
        over_RV = (q_MV - p_MV).clamp(min=0)
        # nothing is left to reject where q is used up, or is p but for rounding
        kept_R = ~taken_R & (over_RV.sum(1) > 0)
        row_R, p_MV, q_MV, over_RV = (x[kept_R] for x in (row_R, p_MV, q_MV, over_RV))
        if not len(row_R):
            break
        other_R = sample_from(over_RV, uniform_MX[row_R, 2 * child + 1])
        p_MV = _normalised((p_MV - q_MV).clamp(min=0))
        q_MV = _normalised(q_MV.scatter(1, other_R[:, None], 0.0))
    return rank_M


def _normalised(mass_RV: Tensor) -> Tensor:
    """Return mass as a distribution; none stays none."""
    return mass_RV / mass_RV.sum(1, keepdim=True).clamp(min=torch.finfo(mass_RV.dtype).tiny)
