"""An MTP head started at every position of known texts, side by side, and made to follow them.

A step that begins at a root runs the head on the root's row, then on one row for each depth, each
with what the head made of the row before. Here the tokens of these rows are the text's. Rows of one
depth run in one pass: the roots' rows are a chain, since a later step sees them as they are, and
every root has a chain of its own rows below it.

Shape letters: B slots, W starts of a chunk, N positions of the texts, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stree_core.drafting.mtp_draft import MtpDraft
from stree_core.models import AttentionCache, Cache, CacheSize, Pass, make_block

MOST_ROWS = 256
"""Rows of a chunk: what the attention kernel takes."""


@dataclass(frozen=True, slots=True)
class KnownTexts:
    """Texts that a target has decoded, and what it made of them.

    roots_NB: each start's root, the last token before it; rows behind the last start hold the
    tokens that follow, then zeros. hidden_NBD: the target's hidden states from before each root.
    begin_B (int32): how many rows the head has filed before the first root's.
    """

    roots_NB: Tensor
    hidden_NBD: Tensor
    begin_B: Tensor


class ForcedStarts:
    """Runs a head from starts whose rows, all but the last, `filed` holds as committed."""

    def __init__(self, head: MtpDraft, filed: Cache, depths: int) -> None:
        assert depths <= MOST_ROWS
        self.num_starts = MOST_ROWS // depths
        self._head = head
        self._depths = depths
        num = self.num_starts
        parents = [row - 1 if row < num else row - num for row in range(num * depths)]
        self._block = make_block(parents, frozenset(), head.device)
        self._source_W1 = torch.arange(num, device=head.device)[:, None]
        (layer,) = (part for part in filed.layers if isinstance(part, AttentionCache))
        size = CacheSize(len(filed.committed_B), len(parents), 1, 1)
        self._cache = head.make_cache(size)
        self._cache.layers = [
            AttentionCache(layer.committed, own.rows) if isinstance(own, AttentionCache) else None
            for own in self._cache.layers
        ]

    def run(self, texts: KnownTexts, first: int) -> Iterator[Tensor]:
        """Yield for each depth the logits [W, B, V] of starts first..first + W - 1.

        The texts must have W + depths rows from `first` on.
        """
        num, cache = self.num_starts, self._cache
        cache.committed_B.copy_(texts.begin_B + first)
        hidden_WBD = texts.hidden_NBD[first : first + num]
        for depth in range(self._depths):
            tokens_WB = texts.roots_NB[first + depth : first + depth + num].contiguous()
            source_WB = self._source_W1.expand(-1, tokens_WB.shape[1])
            this = Pass(self._block, cache, depth * num, num, commit=False)
            out_WBD = torch.empty_like(hidden_WBD)
            yield self._head.run(tokens_WB, hidden_WBD, source_WB, this, out_WBD)
            hidden_WBD = out_WBD
