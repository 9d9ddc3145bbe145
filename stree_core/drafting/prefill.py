"""Read prompts into the slots of a cache, many side by side, a piece of each at a time.

On a GPU a pass over few tokens is a captured graph of its length, filled up with tokens of nobody,
since the host would take longer to launch it than the device to run it.

Shape letters: M packed tokens, S prompts, D hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stree_core.models import Cache, Model, PromptPass, capture
from stree_kernels.launch.packing import Packing

CAPTURED_TOKENS = (64, 256, 512, 1024)
"""Lengths of captured passes; the host launches a pass over more tokens in less time."""
_WARM_UP_PASSES = 2


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Tokens `begin` to `end` - 1 of a slot's prompt, behind those that the slot has read."""

    slot: int
    prompt: Sequence[int]
    begin: int
    end: int

    @property
    def ends(self) -> bool:
        """True when the prompt has no more tokens."""
        return self.end == len(self.prompt)

    def without_last(self) -> PromptPart:
        """Return the same part of the prompt without its last token."""
        return PromptPart(self.slot, self.prompt[:-1], self.begin, self.end - self.ends)


Follower = Callable[[Tensor, Tensor, Packing], None]
"""Takes note of a pass's tokens behind each [M], any where none is known, and hidden states."""


class Prefill:
    """Reads prompts into the slots of `cache`; the slots' steps must not advance meanwhile."""

    def __init__(
        self, model: Model, cache: Cache, follower: Follower | None = None, *, use_graph: bool
    ) -> None:
        self.cache = cache
        self._model = model
        self._follower = follower
        self._captures = use_graph and model.device.type == "cuda"
        self._pool: Any = torch.cuda.graph_pool_handle() if self._captures else None
        self._captured: dict[int, _CapturedPass] = {}

    def read(self, parts: Sequence[PromptPart]) -> Tensor:
        """Read parts of prompts, of different slots; return the hidden states after each [S, D].

        Parts without tokens have none.
        """
        parts = [part for part in parts if part.end > part.begin]
        lengths = [part.end - part.begin for part in parts]
        offsets = [0, *itertools.accumulate(lengths)]
        tokens = [token for part in parts for token in part.prompt[part.begin : part.end]]
        following = [
            token
            for part in parts
            for token in (*part.prompt[part.begin + 1 : part.end + 1], *([0] * part.ends))
        ]
        tables = (offsets, [part.slot for part in parts], [part.begin for part in parts])
        room = next((most for most in CAPTURED_TOKENS if len(tokens) <= most), None)
        if not parts:
            hidden_MD = self._model.weights.embed_VD.new_empty(1, self._model.shape.hidden_size)
            return hidden_MD[:0]
        if room is not None and self._captures:
            hidden_MD = self._captured_pass(room)(tokens, following, tables)
        else:
            hidden_MD = self._run(
                self._put(tokens), self._put(following),
                Packing(*(self._put(table, torch.int32) for table in tables)), max(lengths),
            )  # fmt: skip
        return hidden_MD[self._put([end - 1 for end in offsets[1:]])]

    def _put(self, numbers: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        """Return numbers on the device, without waiting for it."""
        tensor = torch.tensor(numbers, dtype=dtype)
        if self._model.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._model.device, non_blocking=True)

    def _run(self, tokens_M: Tensor, next_M: Tensor, packing: Packing, longest: int) -> Tensor:
        hidden_MD = self._model.read(tokens_M, PromptPass(self.cache, packing, longest))
        if self._follower is not None:
            self._follower(next_M, hidden_MD, packing)
        return hidden_MD

    def _captured_pass(self, num_tokens: int) -> _CapturedPass:
        if num_tokens not in self._captured:
            num_slots, device = len(self.cache.committed_B), self._model.device
            self._captured[num_tokens] = _CapturedPass(
                self._run, num_tokens, num_slots, device, self._pool
            )
        return self._captured[num_tokens]


class _CapturedPass:
    """A graph of a pass over up to `num_tokens` tokens of any slots."""

    def __init__(
        self, run: Callable[[Tensor, Tensor, Packing, int], Tensor], num_tokens: int,
        num_slots: int, device: torch.device, pool: Any,
    ) -> None:  # fmt: skip
        def zeros(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._tokens_2M = zeros(2 * num_tokens, torch.int64).view(2, num_tokens)
        # One buffer, so that one copy fills all tables. Nobody has tokens while it is captured.
        self._tables = zeros(3 * num_slots + 1)
        packing = Packing(*self._tables.split((num_slots + 1, num_slots, num_slots)))
        self._num_slots = num_slots
        tokens_M, next_M = self._tokens_2M.unbind()
        for _ in range(_WARM_UP_PASSES):
            run(tokens_M, next_M, packing, num_tokens)
        with capture(device, pool) as self._graph:
            self._hidden_MD = run(tokens_M, next_M, packing, num_tokens)

    def __call__(
        self, tokens: Sequence[int], following: Sequence[int],
        tables: tuple[Sequence[int], Sequence[int], Sequence[int]],
    ) -> Tensor:  # fmt: skip
        """Run the pass; return its hidden states, which the next pass of any graph overwrites."""
        both = torch.tensor([tokens, following]).pin_memory()
        self._tokens_2M[:, : len(tokens)].copy_(both, non_blocking=True)
        offsets, slots, starts = tables
        spare = self._num_slots - len(slots)
        # Sequences that are not there have no tokens, behind all others.
        numbers = [*offsets, *[offsets[-1]] * spare, *slots, *[0] * spare, *starts, *[0] * spare]
        filled = torch.tensor(numbers, dtype=torch.int32).pin_memory()
        self._tables.copy_(filled, non_blocking=True)
        self._graph.replay()
        return self._hidden_MD
