"""An engine in the middle of its work, for as many steps as a measurement takes."""

from __future__ import annotations

import torch

from stree_core.engine import Engine
from stree_core.step import Speculator
from stree_kernels.rows import MAX_KEPT


def occupy(speculator: Speculator, num_tokens: int) -> None:
    """Set every slot to hold `num_tokens`, the last step's path of two still pending.

    Slots keep different numbers of rows, as in a running decoder: only some advance their state.
    """
    speculator.buffers.active_B.fill_(1)
    for cache in (speculator.target_cache, speculator.draft_cache):
        if cache is not None:
            cache.committed_B.fill_(num_tokens)
            cache.pending.length_B.fill_(min(2, cache.pending.path_BL.shape[1]))
            kept = cache.pending.num_kept_B
            kept.copy_(torch.arange(len(kept), device=kept.device) * 3 % (MAX_KEPT + 1))


class Stepper:
    """Steps an engine for ever, on a GPU a step ahead of what it reads, as a session does.

    It goes back to half its positions before they run out.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._start = engine.config.num_positions // 2
        self._period = max(1, self._start // (engine.depth + 1) - 1)
        self._num_steps = 0
        if engine.target.device.type == "cuda":
            self._occupy_and_launch()

    def __call__(self) -> None:
        self._occupy_and_launch()
        self.engine.collect()

    def _occupy_and_launch(self) -> None:
        if self._num_steps % self._period == 0:
            with torch.inference_mode():
                occupy(self.engine.speculator, self._start)
        self._num_steps += 1
        self.engine.launch()
