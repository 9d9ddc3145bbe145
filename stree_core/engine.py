"""A step-level engine: fixed slots, one tree, one captured graph per row set.

Shape letters: B slots, L path capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stree_core.cache import Cache
from stree_core.errors import ConfigError
from stree_core.memory import explain_oom, require_memory
from stree_core.model import Model
from stree_core.prefill import consume, prefill_cache
from stree_core.rules import GREEDY, SamplingSupport
from stree_core.sampling import SamplingParams
from stree_core.step import Speculator, make_caches, make_speculator
from stree_core.tree import Tree
from stree_core.tree_plan import make_plan

_WARM_UP_STEPS = 2


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Slots that run together, positions that each may fill (prompt and output).

    With `record` a step notes which child of the root was accepted but emits one token alone.
    `sampling` is what requests may ask for.
    """

    num_slots: int = 1
    num_positions: int = 1024
    use_graph: bool = True
    record: bool = False
    sampling: SamplingSupport = GREEDY


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
        self._accepted = [0] * self.config.num_slots
        draft_widths = self.draft.conv_widths if self.draft else frozenset()
        self.plan = make_plan(tree, target.conv_widths, draft_widths, target.device)
        slots, positions = self.config.num_slots, self.config.num_positions
        num_bytes = self.needed_bytes()
        what = f"remembering {slots} sequences of {positions} positions"
        require_memory(num_bytes, what, target.device)
        with torch.inference_mode(), explain_oom(what, num_bytes, target.device):
            self._speculator = make_speculator(
                target, self.draft, self.plan, slots, positions, self.config.sampling
            )
            self._prefill_caches = {id(m): prefill_cache(m, positions) for m in self._models()}
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

    def require_fits(self, prompt_tokens: int, new_tokens: int) -> None:
        """Raise ConfigError unless a slot has the positions for a prompt and its output."""
        # The last step may write a whole path behind the last token that is kept.
        needed = prompt_tokens + new_tokens + self.plan.tree.depth
        if needed > self.config.num_positions:
            raise ConfigError(
                f"prompt and output must fit {self.config.num_positions} positions, they need "
                f"{needed}; shorten them or raise the context"
            )

    @torch.inference_mode()
    def prefill(
        self, slot: int, prompt: Sequence[int], params: SamplingParams | None = None
    ) -> int:
        """Consume a prompt into `slot`, make it active and return the first token.

        Raises ConfigError when the prompt is empty, leaves no position for output, or asks for
        sampling that the engine was not made for.
        """
        params = params or SamplingParams()
        self.config.sampling.require(params)
        if not prompt:
            raise ConfigError("a prompt must hold at least one token, got none; write something")
        self.require_fits(len(prompt), 1)
        hidden = self._consume(self.target, prompt, slot, self._speculator.target_cache)
        rule = self._speculator.rule
        rule.start(slot, params, prompt)
        first = int(rule.first(slot, self.target.logits(hidden[-1:])[0, 0]))
        buffers = self._speculator.buffers
        buffers.latest_2B[:, slot] = torch.tensor([prompt[-1], first], device=self.target.device)
        buffers.active_B[slot] = 1
        if self.draft is not None and self._speculator.draft_cache is not None:
            self._consume(self.draft, prompt[:-1], slot, self._speculator.draft_cache)
        return first

    @torch.inference_mode()
    def step(self) -> list[list[int]]:
        """Run one step; return the tokens that every slot emitted (none where inactive)."""
        self._run()
        counts, self._accepted, *tokens = self._speculator.buffers.result_XB.tolist()
        return [
            list(column[:n]) for n, column in zip(counts, zip(*tokens, strict=True), strict=True)
        ]

    def accepted_nodes(self) -> list[int]:
        """Return the last node that each slot's last step accepted, 0 when it was the root.

        A recording step accepts nothing and says what it would have accepted.
        """
        return self._accepted

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Make a slot inactive: it still computes, but no longer advances."""
        self._speculator.buffers.active_B[slot] = 0

    def needed_bytes(self) -> int:
        """Return what all caches will take: their sizes, summed up without memory behind them."""
        nowhere = torch.device("meta")
        slots, positions = self.config.num_slots, self.config.num_positions
        caches = [
            *make_caches((self.target, self.draft), self.plan, slots, positions, nowhere),
            *(prefill_cache(model, positions, nowhere) for model in self._models()),
        ]
        return sum(cache.num_bytes for cache in caches if cache is not None)

    def _models(self) -> list[Model]:
        return [self.target] if self.draft is None else [self.target, self.draft]

    def _caches(self) -> list[Cache]:
        caches = (self._speculator.target_cache, self._speculator.draft_cache)
        return [cache for cache in caches if cache is not None]

    def _consume(
        self, model: Model, tokens: Sequence[int], slot: int, cache: Cache
    ) -> torch.Tensor:
        scratch = self._prefill_caches[id(model)]
        hidden = consume(model, tokens, scratch)
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
                self._step()
            graphs.append(graph)
            self._flip()
        for cache in self._caches():
            cache.reset()

        def replay() -> None:
            graphs[self._speculator.target_cache.current].replay()
            self._flip()

        return replay

    def _plain_step(self) -> None:
        self._step()
        self._flip()

    def _step(self) -> None:
        if self.config.record:
            self._speculator.record()
        else:
            self._speculator.step()

    def _flip(self) -> None:
        for cache in self._caches():
            cache.flip()
