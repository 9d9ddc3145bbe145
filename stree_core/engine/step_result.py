"""What steps did, copied to the host behind their backs.

Shape letters: X rows of a result, B slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stree_kernels.sampling.commit_path_ref import COUNT, FIRST_TOKEN, HEALTHY, LAST_NODE


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did in every slot.

    `tokens` are those it emitted, none where the slot was inactive. `last_nodes` is the last node
    it accepted, 0 for the root; a recording step accepts nothing and says what it would have
    accepted. `healthy` is False where the target's logits were not finite. `epochs` counts the
    prefills of every slot when the step was launched.
    """

    tokens: list[list[int]]
    last_nodes: list[int]
    healthy: list[bool]
    epochs: tuple[int, ...]

    def since(self, epochs: Sequence[int]) -> StepResult:
        """Return the result without slots that another request has taken over."""
        if self.epochs == tuple(epochs):
            return self
        same = [mine == now for mine, now in zip(self.epochs, epochs, strict=True)]
        tokens = [own if keep else [] for own, keep in zip(self.tokens, same, strict=True)]
        healthy = [own or not keep for own, keep in zip(self.healthy, same, strict=True)]
        return StepResult(tokens, self.last_nodes, healthy, self.epochs)


class ResultQueue:
    """Copies of what steps left behind, read by the host when it gets to them."""

    def __init__(self, result_XB: Tensor) -> None:
        self._source = result_XB
        self._on_gpu = result_XB.device.type == "cuda"
        # Locked memory is slow to get, so copies that have been read are used again.
        self._free: list[Tensor] = []
        self._on_the_way: deque[tuple[Tensor, torch.cuda.Event | None, tuple[int, ...]]] = deque()
        self.waiting: deque[StepResult] = deque()

    def __len__(self) -> int:
        return len(self.waiting) + len(self._on_the_way)

    def keep(self, epochs: tuple[int, ...]) -> None:
        """Copy the result of the step that was just started, without waiting for it."""
        copy = self._free.pop() if self._free else self._new_copy()
        copy.copy_(self._source, non_blocking=self._on_gpu)
        event = None
        if self._on_gpu:
            event = torch.cuda.Event()
            event.record()
        self._on_the_way.append((copy, event, epochs))

    def gather(self, num_steps: int | None = None) -> None:
        """Wait for all steps that were started, or for the oldest of those not collected.

        An interrupt while it waits loses nothing.
        """
        while self._on_the_way and (num_steps is None or len(self.waiting) < num_steps):
            self.waiting.append(self._arrived())
            self._free.append(self._on_the_way.popleft()[0])

    def drop(self) -> None:
        """Wait for all steps that were started, and forget what they did."""
        self.gather()
        self.waiting.clear()

    def next(self, epochs: Sequence[int]) -> StepResult:
        """Return the oldest result, of slots that nobody has taken over."""
        self.gather(1)
        return self.waiting.popleft().since(epochs)

    def _new_copy(self) -> Tensor:
        return torch.empty(self._source.shape, dtype=self._source.dtype, pin_memory=self._on_gpu)

    def _arrived(self) -> StepResult:
        """Wait for the oldest step that is still on its way and read its copy."""
        copy, event, epochs = self._on_the_way[0]
        if event is not None:
            event.synchronize()
        rows = copy.tolist()
        columns = zip(*rows[FIRST_TOKEN:], strict=True)
        tokens = [list(column[:n]) for n, column in zip(rows[COUNT], columns, strict=True)]
        return StepResult(tokens, rows[LAST_NODE], [bool(flag) for flag in rows[HEALTHY]], epochs)
