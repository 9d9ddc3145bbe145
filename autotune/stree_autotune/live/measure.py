"""Live times of steps: many trees on one engine's caches, in turns, accepting what a trace says.

Only times are measured. Tokens per step come from the walk over the whole trace, which decoding
reproduces exactly; runs short enough to be affordable would miss it by several percent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from stree_autotune.live.corrected_cost import LiveStep
from stree_autotune.live.trace_rule import TraceScript
from stree_autotune.probe import (
    Effort,
    SteadyEngine,
    Stepper,
    Work,
    free,
    occupy,
    prompt_reader,
    time_interleaved,
)
from stree_autotune.search import OFF
from stree_autotune.trace import Trace
from stree_core.drafting import Pair
from stree_core.engine import Engine, EngineConfig, SamplingParams, SamplingSupport
from stree_core.tree import Tree

FIRST_LOOK = Effort(min_rounds=5, max_rounds=30, seconds=0.1)
FINAL = Effort(min_rounds=9, max_rounds=60, seconds=0.3)

Measure = Callable[[int, Sequence[Tree], Effort], dict[Tree, LiveStep]]


def live_measure(pair: Pair, trace: Trace, context: int) -> Measure:
    """Return a function that times steps of a pair with some trees at a batch size."""
    return partial(measure_steps, pair, trace, context)


def measure_steps(
    pair: Pair, trace: Trace, context: int, batch_size: int, trees: Sequence[Tree], effort: Effort,
    *, apart: bool = False,
) -> dict[Tree, LiveStep]:  # fmt: skip
    """Time whole steps, host included: the trees in turns, off on an engine of its own.

    With `apart` every tree has an engine of its own. Raises NotEnoughMemory when the caches do not
    fit.
    """
    distinct = list(dict.fromkeys(trees))
    works: dict[Tree, Work] = {}
    for group in [[tree] for tree in distinct] if apart else [distinct]:
        works |= _works(pair, trace, context, batch_size, group)
    prompt_reader(pair.target)()
    timings = time_interleaved(works, pair.device, effort, wall=True)
    works.clear()
    free(pair.device)
    return {tree: LiveStep(timing.ms, timing.spread_ms) for tree, timing in timings.items()}


def _works(
    pair: Pair, trace: Trace, context: int, batch_size: int, trees: Sequence[Tree]
) -> dict[Tree, Work]:
    """Return what runs a step with each tree; all but off share an engine."""
    works: dict[Tree, Work] = {}
    if OFF in trees:
        config = EngineConfig(batch_size, context)
        engine = SteadyEngine(pair.target, None, [OFF], config)
        works[OFF] = Stepper(engine, SamplingParams()).step
    speculating = [tree for tree in trees if tree != OFF]
    if speculating:
        steps = TracedSteps(pair, trace, context, batch_size, speculating)
        works |= {tree: partial(steps.step, which) for which, tree in enumerate(speculating)}
    return works


class TracedSteps:
    """Steps one engine with any of its trees for ever, on a GPU a step ahead of what it reads.

    Slots go from a quarter of their positions to three, then back and elsewhere in the trace.
    """

    def __init__(
        self, pair: Pair, trace: Trace, context: int, batch_size: int, trees: Sequence[Tree]
    ) -> None:
        self._start, self._room = context // 4, context // 2
        self.script = TraceScript(trace, batch_size, context, pair.device)
        support = SamplingSupport(stand_in=self.script.rules)
        config = EngineConfig(batch_size, context, sampling=support)
        self.engine = Engine(pair.target, pair.draft, trees, config)
        self._left = 0
        self._on_gpu = pair.device.type == "cuda"
        self._num_under_way = 0

    def step(self, which: int) -> None:
        """Start a step with tree number `which`; on a GPU wait for the one before only."""
        longest = self.engine.trees[which].depth + 1
        if self._left < longest:
            with torch.inference_mode():
                occupy(self.engine.speculator, self._start)
                self.script.restart()
            self._left = self._room - self.engine.depth - 1
        self._left -= longest
        self.engine.launch(which)
        self._num_under_way += 1
        if self._num_under_way > self._on_gpu:
            self.engine.collect()
            self._num_under_way -= 1
