"""Live times of steps: many trees on one engine's caches, in turns, accepting what a trace says.

Only times are measured. Tokens per step come from the walk over the whole trace, which decoding
reproduces exactly; runs short enough to be affordable would miss it by several percent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from stree_autotune.live.corrected_cost import LiveStep
from stree_autotune.live.trace_rule import TraceScript
from stree_autotune.probe import (
    Effort,
    SteadyEngine,
    Stepper,
    Work,
    free,
    prompt_reader,
    time_interleaved,
)
from stree_autotune.search import OFF
from stree_autotune.trace import Trace
from stree_core.drafting import Pair
from stree_core.engine import EngineConfig, SamplingParams
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
    config = EngineConfig(batch_size, context)
    if OFF in trees:
        off = SteadyEngine(pair.target, None, [OFF], config)
        works[OFF] = Stepper(off, SamplingParams()).step
    speculating = [tree for tree in trees if tree != OFF]
    if speculating:
        script = TraceScript(trace, batch_size, context, pair.device)
        stepper = Stepper(traced_engine(pair, script, config, speculating), SamplingParams())
        works |= {tree: partial(stepper.step, which) for which, tree in enumerate(speculating)}
    return works


def traced_engine(
    pair: Pair, script: TraceScript, config: EngineConfig, trees: Sequence[Tree]
) -> SteadyEngine:
    """Return an engine whose slots accept what a trace says, from positions drawn at random.

    They begin elsewhere whenever the engine goes back.
    """
    models = pair.target, pair.draft
    return SteadyEngine(*models, trees, config, rules=script.rules, restart=script.restart)
