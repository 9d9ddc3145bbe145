"""Live times of steps that accept what a trace says, whatever the models compute.

Many trees run on one engine's caches, in turns. How often a state is stored depends on how many
tokens a step accepts, so the time of a step does as well. Here the draft's child of rank c is token
c, and the target picks the token of the rank that the trace has, or a token that is no child. All
passes are computed as ever; a step has four tiny kernels more (a few microseconds). Where experts
are routed, tokens decide how many of them are read: there ranks count from another token at every
position, drawn at random once (five kernels more).

Only times are measured. Tokens per step come from the walk over the whole trace, which decoding
reproduces exactly; runs short enough to be affordable would miss it by several percent.

Shape letters: T tree tokens, B slots, V vocabulary, W rows of a level, L path capacity, N trace
positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from stree_autotune.live.corrected_cost import LiveStep
from stree_autotune.probe import (
    Effort,
    SteadyEngine,
    Stepper,
    Work,
    free,
    prompt_reader,
    time_interleaved,
)
from stree_autotune.trace import Trace
from stree_core.drafting import DraftLevel, Pair, TreePlan
from stree_core.engine import EngineConfig, GreedyRule, Rule, SamplingParams
from stree_core.families import ModelShape, MoeShape
from stree_core.models import Backend
from stree_core.tree import OFF, Tree

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
        script = script_of(pair, trace, batch_size, context)
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


def script_of(pair: Pair, trace: Trace, num_slots: int, room: int) -> TraceScript:
    """Return the script by which a pair's slots accept what a trace says."""
    shape = pair.target.shape
    vocab_size = shape.vocab_size if _routes_experts(shape) else None
    return TraceScript(trace, num_slots, room, pair.device, vocab_size)


def _routes_experts(shape: ModelShape) -> bool:
    return any(isinstance(part.mixer, MoeShape) for part in shape.parts)


class TraceScript:
    """A trace on the device and each slot's position in it, shared by the rules of an engine.

    A request begins at the prompt of the trace that its own prompt names (`prompt_for`), `restart`
    puts all slots anywhere; `room` is how many positions a slot may go on from there. With a
    `vocab_size` every position has a first token, to which the ranks behind it are added.
    """

    def __init__(
        self,
        trace: Trace,
        num_slots: int,
        room: int,
        device: torch.device,
        vocab_size: int | None = None,
    ) -> None:
        num_children, depths = trace.meta.num_children, trace.meta.depths
        ranks_ND = np.minimum(trace.ranks_ND.astype(np.int64), num_children)
        self._num_positions = len(ranks_ND)
        self._first_positions = trace.offsets.tolist()
        self._max_depth = trace.meta.max_depth
        padded_ND = np.resize(ranks_ND, (len(ranks_ND) + room + 1, depths))
        # without a depth axis the next depth is the next position
        self._stride = 1 if depths == 1 else len(padded_ND)
        if depths > 1:
            # below its deepest level a tree has no child
            padded_ND = np.pad(padded_ND, ((0, 0), (0, 1)), constant_values=num_children)
        tokens_X = np.ascontiguousarray(padded_ND.T).ravel()
        self._first_tokens_X: Tensor | None = None
        if vocab_size is not None:
            rng = np.random.default_rng(1)
            first_tokens_X = rng.integers(0, vocab_size - num_children, len(tokens_X))
            self._first_tokens_X = torch.from_numpy(first_tokens_X).to(device)
            tokens_X = tokens_X + first_tokens_X
        self._tokens_X = torch.from_numpy(tokens_X).to(device)
        self.position_B = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._rng = np.random.default_rng(0)

    def start(self, slot: int, prompt: Sequence[int]) -> None:
        """Put a slot where the prompt of the trace begins that `prompt` names."""
        self.position_B[slot] = self._first_positions[prompt[0] - 1]

    def restart(self) -> None:
        """Put every slot at a position drawn at random."""
        drawn = self._rng.integers(0, self._num_positions, len(self.position_B))
        self.position_B.copy_(torch.from_numpy(drawn))

    def tokens(self, depths_T1: Tensor) -> Tensor:
        """Return the tokens [T, B] that the target picks after nodes at these depths."""
        return self._tokens_X.take(self.position_B + depths_T1 * self._stride)

    def children(self, ranks_TB: Tensor, depths_T1: Tensor) -> Tensor:
        """Return the tokens [T, B] of nodes with these ranks, whose parents are that deep."""
        if self._first_tokens_X is None:
            return ranks_TB
        return ranks_TB + self._first_tokens_X.take(self.position_B + depths_T1 * self._stride)

    def rules(self, plans: Sequence[TreePlan], backend: Backend) -> list[Rule]:
        """Return the rules of some trees; they have no more levels than the trace."""
        assert all(plan.tree.depth <= self._max_depth for plan in plans)
        return [TraceRule(plan, backend, self) for plan in plans]


def prompt_for(index: int) -> list[int]:
    """Return a prompt of four tokens that stands for prompt number `index` of a trace."""
    return [index + 1, 2, 3, 4]


class TraceRule(GreedyRule):
    """Draws and chooses by a script; the logits' likeliest tokens are found and not used."""

    def __init__(self, plan: TreePlan, backend: Backend, script: TraceScript) -> None:
        super().__init__(plan, backend)
        self._script = script
        self._depths_T1 = plan.tables.depths_T[:, None].long()
        ranks = torch.tensor(plan.tree.ranks, device=script.position_B.device)
        self._unused_TB = ranks[:, None].repeat(1, len(script.position_B))
        self._ranks_TB = self._unused_TB[1:].clone()

    def start(self, slot: int, params: SamplingParams, prompt: Sequence[int]) -> None:
        """Begin where the prompt says."""
        self._script.start(slot, prompt)

    def draw(self, level: DraftLevel, logits_WBV: Tensor, tokens_TB: Tensor) -> None:
        """Fill in every node's token, all of them with the first level."""
        super().draw(level, logits_WBV, self._unused_TB)
        if level.first == 0:
            tokens_TB[1:] = self._script.children(self._ranks_TB, self._depths_T1[1:] - 1)

    def choose(self, logits_TBV: Tensor, tokens_TB: Tensor) -> Tensor:
        """Return the tokens of the ranks that the trace has at each node's depth."""
        super().choose(logits_TBV, tokens_TB)
        return self._script.tokens(self._depths_T1)

    def advance(self, emitted_LB: Tensor, count_B: Tensor) -> None:
        """Move on in the trace."""
        self._script.position_B.add_(count_B)
