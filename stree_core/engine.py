"""A step-level engine: fixed slots, one tree, one captured graph per row set.

Shape letters: B slots, L path capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stree_core.acceptance import top_tokens
from stree_core.cache import Cache, CacheSize
from stree_core.errors import ConfigError
from stree_core.model import Model
from stree_core.row_block import RowBlock, make_block
from stree_core.step import Speculator, make_buffers
from stree_core.tree import Tree
from stree_core.tree_plan import make_plan

PREFILL_CHUNK = 64
"""Prompt tokens per prefill pass."""

_WARM_UP_STEPS = 2


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Slots that run together, positions that each may fill (prompt and output)."""

    num_slots: int = 1
    num_positions: int = 1024
    use_graph: bool = True


class Engine:
    """Prefills slots and steps them all at once.

    A step is `draft -> verify -> accept -> commit` of stree_core.step. On CUDA it is captured once
    per row set and replayed; on the CPU it runs as it stands. Raises ConfigError when a tree needs
    a draft and there is none, or a prompt does not fit.
    """

    def __init__(
        self, target: Model, draft: Model | None, tree: Tree, config: EngineConfig | None = None
    ) -> None:
        if tree.num_nodes > 0 and draft is None:
            raise ConfigError(
                f"a tree of {tree.num_nodes} nodes needs a draft model, got none; pass a draft"
            )
        self.config = config or EngineConfig()
        self.target = target
        self.draft = draft if tree.num_nodes > 0 else None
        draft_widths = self.draft.conv_widths if self.draft else frozenset()
        self.plan = make_plan(tree, target.conv_widths, draft_widths, target.device)
        with torch.inference_mode():
            self._speculator = self._make_speculator()
            self._prefill_caches = {id(m): self._prefill_cache(m) for m in self._models()}
            self._run = self._captured_step()

    @property
    def speculator(self) -> Speculator:
        """The step's parts, one by one, for the probe."""
        return self._speculator

    @property
    def cache_bytes(self) -> int:
        """Bytes of device memory in states, keys, values and row buffers."""
        caches = [*self._prefill_caches.values(), *self._caches()]
        return sum(cache.num_bytes for cache in caches)

    @torch.inference_mode()
    def prefill(self, slot: int, prompt: Sequence[int]) -> int:
        """Consume a prompt into `slot`, make it active and return the first token.

        Raises ConfigError when the prompt is empty or leaves no position for output.
        """
        if not prompt:
            raise ConfigError("a prompt must hold at least one token, got none; write something")
        if len(prompt) + self.plan.tree.depth + 1 >= self.config.num_positions:
            raise ConfigError(
                f"prompt and output must fit {self.config.num_positions} positions, the prompt "
                f"alone has {len(prompt)} tokens; shorten it or raise --context"
            )
        hidden = self._consume(self.target, prompt, slot, self._speculator.target_cache)
        first = int(top_tokens(self.target.logits(hidden[-1:]), 1))
        buffers = self._speculator.buffers
        buffers.root_B[slot] = first
        buffers.predecessor_B[slot] = prompt[-1]
        buffers.active_B[slot] = 1
        if self.draft is not None and self._speculator.draft_cache is not None:
            self._consume(self.draft, prompt[:-1], slot, self._speculator.draft_cache)
        return first

    @torch.inference_mode()
    def step(self) -> list[list[int]]:
        """Run one step; return the tokens that every slot emitted (none where inactive)."""
        self._run()
        buffers = self._speculator.buffers
        rows = torch.cat((buffers.num_emitted_B[None].long(), buffers.emitted_LB)).t().tolist()
        return [row[1 : 1 + row[0]] for row in rows]

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Make a slot inactive: it still computes, but no longer advances."""
        self._speculator.buffers.active_B[slot] = 0

    def _models(self) -> list[Model]:
        return [self.target] if self.draft is None else [self.target, self.draft]

    def _caches(self) -> list[Cache]:
        caches = (self._speculator.target_cache, self._speculator.draft_cache)
        return [cache for cache in caches if cache is not None]

    def _make_speculator(self) -> Speculator:
        def size(num_rows: int) -> CacheSize:
            return CacheSize(
                self.config.num_slots, num_rows, self.plan.tree.depth + 1,
                self.config.num_positions,
            )  # fmt: skip

        draft_cache = None
        if self.draft is not None and self.plan.draft_block is not None:
            draft_cache = self.draft.make_cache(size(self.plan.draft_block.num_rows))
        return Speculator(
            self.plan,
            self.target,
            self.target.make_cache(size(self.plan.tree.num_tokens)),
            self.draft,
            draft_cache,
            make_buffers(self.plan, self.config.num_slots, self.target.device),
        )

    def _prefill_cache(self, model: Model) -> Cache:
        size = CacheSize(1, PREFILL_CHUNK, PREFILL_CHUNK, self.config.num_positions)
        return model.make_cache(size)

    def _consume(
        self, model: Model, tokens: Sequence[int], slot: int, cache: Cache
    ) -> torch.Tensor:
        """Run `tokens` through `model` as chains, each replayed by the next, into `slot`.

        The last token is a chain of its own, so that what stays pending is a path of one row.
        Returns the hidden states of the last chain.
        """
        scratch = self._prefill_caches[id(model)]
        scratch.reset()
        hidden = torch.empty(0)
        path_row = torch.arange(PREFILL_CHUNK, dtype=torch.int32, device=model.device)
        scratch.pending.path_BL.copy_(path_row[None])
        for chunk in _chunks(tokens):
            block = _chain_block(len(chunk), model)
            inputs = torch.tensor(chunk, device=model.device)[:, None]
            hidden = model.forward(inputs, block, scratch, first=0, commit=True)
            scratch.pending.length_B.fill_(len(chunk))
            scratch.committed_B.add_(len(chunk))
            scratch.flip()
        cache.adopt(slot, scratch)
        return hidden

    def _captured_step(self) -> Callable[[], None]:
        """Return a function that runs one step and flips the caches."""
        if self.target.device.type != "cuda" or not self.config.use_graph:
            return self._plain_step
        for _ in range(_WARM_UP_STEPS):
            self._plain_step()
        graphs = []
        for _ in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._speculator.step()
            graphs.append(graph)
            self._flip()
        for cache in self._caches():
            cache.reset()

        def replay() -> None:
            graphs[self._speculator.target_cache.current].replay()
            self._flip()

        return replay

    def _plain_step(self) -> None:
        self._speculator.step()
        self._flip()

    def _flip(self) -> None:
        for cache in self._caches():
            cache.flip()


def _chunks(tokens: Sequence[int]) -> list[Sequence[int]]:
    """Split tokens into chains of at most PREFILL_CHUNK, the last token on its own."""
    body = tokens[:-1]
    chunks = [body[i : i + PREFILL_CHUNK] for i in range(0, len(body), PREFILL_CHUNK)]
    return [*chunks, tokens[-1:]] if tokens else []


def _chain_block(length: int, model: Model) -> RowBlock:
    return make_block(range(-1, length - 1), model.conv_widths, model.device)
