"""Consume a prompt: as chains, each replayed into the state by the pass after it.

Shape letters: D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stree_core.cache import Cache, CacheSize
from stree_core.model import Model
from stree_core.row_block import make_block

PREFILL_CHUNK = 64
"""Prompt tokens per prefill pass."""


def prefill_cache(model: Model, num_positions: int, device: torch.device | None = None) -> Cache:
    """Allocate the one-slot cache that prompts of up to `num_positions` tokens are consumed in.

    It lies on the model's device unless another is given.
    """
    return model.make_cache(CacheSize(1, PREFILL_CHUNK, PREFILL_CHUNK, num_positions), device)


def consume(model: Model, tokens: Sequence[int], cache: Cache) -> Tensor:
    """Run `tokens` through `model` into an emptied `cache` of one slot.

    The last token is a chain of its own, so that what stays pending is a path of one row. Returns
    the hidden state after the last token [1, 1, D], empty when there are no tokens.
    """
    cache.reset()
    cache.pending.path_BL.copy_(torch.arange(PREFILL_CHUNK, device=model.device)[None])
    hidden = torch.empty(0, device=model.device)
    for chunk in _chunks(tokens):
        block = make_block(range(-1, len(chunk) - 1), model.conv_widths, model.device)
        inputs = torch.tensor(chunk, device=model.device)[:, None]
        hidden = model.forward(inputs, block, cache, first=0, commit=True)
        cache.advance(torch.full_like(cache.committed_B, len(chunk)))
        cache.flip()
    return hidden


def _chunks(tokens: Sequence[int]) -> list[Sequence[int]]:
    """Split tokens into chains of at most PREFILL_CHUNK, the last token on its own."""
    body = tokens[:-1]
    chunks = [body[i : i + PREFILL_CHUNK] for i in range(0, len(body), PREFILL_CHUNK)]
    return [*chunks, tokens[-1:]] if tokens else []
