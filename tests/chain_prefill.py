"""Prompts as chains through the kernels of trees: what packed prompts are compared with.

A chain is replayed into the state by the one after it; the last token is a chain of its own, so
that a path of one row stays pending.

Shape letters: R rows of a chain, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stree_core.drafting.prefill import Prefill, PromptPart
from stree_core.models.cache import AttentionCache, Cache, CacheSize, DeltaCache, Mamba2Cache
from stree_core.models.model import Model
from stree_core.models.row_block import make_block
from stree_core.models.state_flush import flush_states
from stree_kernels.launch.rows import MAX_BUFFERED, advance_pending

CHAIN = 64


def advance(cache: Cache, num_rows: int) -> None:
    """Make the first rows of the pass that ran pending; what was pending is committed."""
    length_B = torch.full_like(cache.committed_B, num_rows)
    advance_pending(cache.pending, None, length_B)
    cache.committed_B.add_(length_B)
    cache.flip()


class ChainPrefill:
    """Consumes prompts of up to `num_positions` tokens into a cache of one slot."""

    def __init__(self, model: Model, num_positions: int, chain: int = CHAIN) -> None:
        self.cache = model.make_cache(CacheSize(1, chain, chain, num_positions))
        self._model = model
        self._chain = chain

    def consume(self, tokens: Sequence[int]) -> Tensor:
        """Run tokens into the emptied cache; return the hidden states [M, D] after all of them."""
        self.cache.reset()
        self.cache.pending.path_BL.copy_(torch.arange(self._chain)[None])
        body, found = tokens[:-1], []
        for first in (*range(0, len(body), self._chain), len(body)):
            last = len(body) if first < len(body) else len(tokens)
            part = tokens[first : min(first + self._chain, last)]
            block = make_block(
                range(-1, len(part) - 1), self._model.conv_widths, self._model.device
            )
            inputs_R1 = torch.tensor(part, device=self._model.device)[:, None]
            found.append(
                self._model.forward(inputs_R1, block, self.cache, first=0, commit=True)[:, 0]
            )
            advance(self.cache, len(part))
        return torch.cat(found)

    def states(self) -> list[tuple[Tensor, ...]]:
        """Return each layer's states, or keys and values, of all tokens."""
        return settled(self._model, self.cache)


def settled(model: Model, cache: Cache) -> list[tuple[Tensor, ...]]:
    """Return what a cache of one slot holds, with all that is pending or buffered committed."""
    flush_states(model, cache, 1 - cache.current)
    num = int(cache.committed_B[0])
    found: list[tuple[Tensor, ...]] = []
    for layer in cache.layers:
        if isinstance(layer, Mamba2Cache):
            found.append((layer.conv_BCK[0], layer.ssm_BHPN[0]))
        elif isinstance(layer, DeltaCache):
            found.append((layer.conv_BCK[0], layer.state_BHPN[0]))
        elif isinstance(layer, AttentionCache):
            found.append(tuple(kept[0, :num] for kept in layer.committed))
    return found


def adopt(cache: Cache, slot: int, other: Cache) -> None:
    """Copy slot 0 of `other`, whose pending path is at most its first row, into `slot`."""
    cache.committed_B[slot] = other.committed_B[0]
    cache.pending.path_BL[slot] = 0
    cache.pending.length_B[slot] = other.pending.length_B[0]
    cache.pending.num_buffered_B[slot] = other.pending.num_buffered_B[0]
    here, there = 1 - cache.current, 1 - other.current
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        if isinstance(mine, Mamba2Cache) and isinstance(theirs, Mamba2Cache):
            mine.conv_BCK[slot] = theirs.conv_BCK[0]
            mine.ssm_BHPN[slot] = theirs.ssm_BHPN[0]
            mine.proj_RB[here][0, slot] = theirs.proj_RB[there][0, 0]
            mine.rows_RBE[:MAX_BUFFERED, slot] = theirs.rows_RBE[:MAX_BUFFERED, 0]
            source = theirs.rows_RBE[theirs.sets[there].start, 0]
            mine.rows_RBE[mine.sets[here].start, slot] = source
        elif isinstance(mine, DeltaCache) and isinstance(theirs, DeltaCache):
            mine.conv_BCK[slot] = theirs.conv_BCK[0]
            mine.state_BHPN[slot] = theirs.state_BHPN[0]
            mine.proj_RB[here][0, slot] = theirs.proj_RB[there][0, 0]
            kept = (mine.rows_RBE, theirs.rows_RBE), (mine.solved_RBX, theirs.solved_RBX)
            for to, source in kept:
                to[:MAX_BUFFERED, slot] = source[:MAX_BUFFERED, 0]
                to[mine.sets[here].start, slot] = source[theirs.sets[there].start, 0]
        elif isinstance(mine, AttentionCache) and isinstance(theirs, AttentionCache):
            num = min(mine.committed.key.shape[1], theirs.committed.key.shape[1])
            for to, source in zip(mine.committed, theirs.committed, strict=True):
                to[slot, :num] = source[0, :num]
            for to, source in zip(mine.rows[here], theirs.rows[there], strict=True):
                to[0, slot] = source[0, 0]


def read_prompt(model: Model, tokens: Sequence[int], cache: Cache | None = None) -> Tensor:
    """Read a prompt as an engine does, into slot 0; return the hidden state after it [1, D]."""
    cache = cache or model.make_cache(CacheSize(1, 1, 1, len(tokens)))
    prefill = Prefill(model, cache, use_graph=False)
    hidden_1D = prefill.read([PromptPart(0, tokens, 0, len(tokens))])
    cache.hold(0, len(tokens))
    return hidden_1D
