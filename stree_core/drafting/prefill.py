"""Consume a prompt: as chains, each replayed into the state by the pass after it.

On a GPU every length of chain is one captured graph, so that the host does not slow a pass down; a
chain that is not full is filled up with rows that nobody reads.

Shape letters: R rows of a chain, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stree_core.models import Cache, CacheSize, Model, capture, make_block

CHAINS = {"cpu": (64,), "cuda": (64, 256)}
"""Tokens of a pass, by device: long ones for long prompts, where a row more costs next to nothing.

The reference scan's work grows with the square of a chain's length.
"""

_WARM_UP_PASSES = 2


class Caching(Protocol):
    """What keeps something of the tokens it has seen."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def make_cache(self, size: CacheSize, device: torch.device | None = None) -> Cache:
        """Allocate an empty cache, on its device unless another is given."""


class Follower(Protocol):
    """What files rows of its own along with a model's prompt: one for every token but the first."""

    cache: Cache

    def follow(self, next_R1: Tensor, hidden_R1D: Tensor) -> None:
        """Take note of a chain's hidden states and of the tokens behind each of its own."""

    def end(self, hidden_11D: Tensor) -> None:
        """Take note of the hidden state after the prompt."""


def prefill_cache(model: Caching, num_positions: int, device: torch.device | None = None) -> Cache:
    """Allocate the one-slot cache that prompts of up to `num_positions` tokens are consumed in.

    It lies on the model's device unless another is given.
    """
    longest = max(CHAINS[model.device.type])
    return model.make_cache(CacheSize(1, longest, longest, num_positions), device)


class Prefill:
    """Consumes prompts of up to `num_positions` tokens into `cache`, one after another.

    With `use_graph`, on a GPU, the first prompt that needs a length of chain captures its passes.
    """

    def __init__(
        self, model: Model, num_positions: int, follower: Follower | None = None, *,
        use_graph: bool,
    ) -> None:  # fmt: skip
        self.cache = prefill_cache(model, num_positions)
        self._model = model
        self._follower = follower
        self._lengths = CHAINS[model.device.type]
        self._captures = use_graph and model.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None
        self._chains: dict[int, _Chain] = {}

    def consume(self, tokens: Sequence[int]) -> Tensor:
        """Run `tokens` through the model into the emptied cache.

        The last token is a chain of its own, so that what stays pending is a path of one row.
        Returns the hidden state after the last token [1, 1, D], empty when there are no tokens.
        """
        # Captures run passes, so they come before what is kept.
        chains = [(part, self._chain(len(part))) for part in self._parts(tokens)]
        for cache in self._caches():
            cache.reset()
            rows = torch.arange(cache.pending.path_BL.shape[1], device=self._model.device)
            cache.pending.path_BL.copy_(rows[None])
        hidden = torch.empty(0, device=self._model.device)
        done = 0
        for part, chain in chains:
            done += len(part)
            # Nobody knows yet what follows the last token: a follower has a row less.
            following = tokens[done - len(part) + 1 : done + 1]
            hidden = chain(part, following)
            for cache, count in zip(self._caches(), (len(part), len(following)), strict=False):
                cache.advance(torch.full_like(cache.committed_B, count))
                cache.flip()
        if self._follower is not None and chains:
            self._follower.end(hidden)
        return hidden

    def _caches(self) -> list[Cache]:
        return [self.cache] if self._follower is None else [self.cache, self._follower.cache]

    def _parts(self, tokens: Sequence[int]) -> Iterator[Sequence[int]]:
        """Yield chains: long ones as long as they are full, a rest, and the last token."""
        body = tokens[:-1]
        first, longest = 0, max(self._lengths)
        while first < len(body):
            yield body[first : first + longest]
            first += longest
        if tokens:
            yield tokens[-1:]

    def _chain(self, num_tokens: int) -> _Chain:
        """Return the passes of a chain with room for so many tokens."""
        length = num_tokens
        if self._captures:
            length = min(room for room in (1, *self._lengths) if room >= num_tokens)
        if length not in self._chains:
            chain = _Chain(self._model, self.cache, length, self._follower)
            if not self._captures:
                # Made for this chain alone, whose length may never come again.
                return chain
            chain.capture(self._pool)
            self._chains[length] = chain
        return self._chains[length]


class _Chain:
    """Passes of a chain of some length, on either row set."""

    def __init__(self, model: Model, cache: Cache, length: int, follower: Follower | None) -> None:
        self._model = model
        self._cache = cache
        self._follower = follower
        self._tokens_R1 = torch.zeros(length, 1, dtype=torch.int64, device=model.device)
        self._following_R1 = torch.zeros_like(self._tokens_R1)
        self._block = make_block(range(-1, length - 1), model.conv_widths, model.device)
        self._replays: dict[int, Callable[[], Tensor]] = {}

    def __call__(self, tokens: Sequence[int], following: Sequence[int]) -> Tensor:
        """Run a pass; return the hidden state after the last token.

        `following` are the tokens behind each, as far as they are known.
        """
        self._tokens_R1[: len(tokens), 0] = torch.tensor(tokens, device=self._model.device)
        if self._follower is not None:
            known = torch.tensor(following, dtype=torch.int64, device=self._model.device)
            self._following_R1[: len(following), 0] = known
        hidden_R1D = self._replays.get(self._cache.current, self._run)()
        return hidden_R1D[len(tokens) - 1 : len(tokens)]

    def capture(self, pool: Any) -> None:
        """Make graphs of the pass, one for each row set.

        What they return is overwritten by the next pass of any graph of the pool.
        """
        for _ in range(_WARM_UP_PASSES):
            self._run()
        for _ in range(2):
            with capture(self._model.device, pool) as graph:
                hidden_R1D = self._run()
            self._replays[self._cache.current] = _replay(graph, hidden_R1D)
            self._cache.flip()
            if self._follower is not None:
                self._follower.cache.flip()

    def _run(self) -> Tensor:
        hidden_R1D = self._model.forward(
            self._tokens_R1, self._block, self._cache, first=0, commit=True
        )
        if self._follower is not None:
            self._follower.follow(self._following_R1, hidden_R1D)
        return hidden_R1D


def _replay(graph: torch.cuda.CUDAGraph, hidden_R1D: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        graph.replay()
        return hidden_R1D

    return run
