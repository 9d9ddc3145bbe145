"""Should I scale the tree? The fastest tree of every size, and what its next node brings.

Trees of neighbouring sizes need not contain each other, so their difference says nothing about a
node. What a node brings is told by nested trees: the fastest tree of a size, and the same with the
node that its own growth adds next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stree_autotune.cost import MemoryModel
from stree_autotune.search import CostModel, PairedBootstrap, TreeSpace, Trial, interval
from stree_autotune.store import percent
from stree_autotune.trace import FlatTrace, walk
from stree_core.tree import OFF, Tree

NUM_RESAMPLES = 400
NUM_COST_DRAWS = 60


@dataclass(frozen=True, slots=True)
class Size:
    """The fastest tree of one size, and what one node more brings and costs.

    `gain` and `cost` are the relative changes of tokens per step and of step time with the node
    that is added next, None where no larger tree was looked at.
    """

    nodes: int
    depth: int
    tokens_per_step: float
    step_ms: float
    speedup: float
    gain: float | None
    cost: float | None


@dataclass(frozen=True, slots=True)
class Scaling:
    """How speed grows with the tree at one batch size; sizes ascend from 0 (off)."""

    batch_size: int
    sizes: tuple[Size, ...]

    @property
    def best(self) -> Size:
        """The break-even size: beyond it further nodes cost more than they bring."""
        return max(self.sizes, key=lambda size: (size.speedup, -size.nodes))

    @property
    def faster_up_to(self) -> int:
        """The largest size that is still faster than off, 0 when none is."""
        return max(size.nodes for size in self.sizes if size.nodes == 0 or size.speedup > 1)

    def sentence(self) -> str:
        """Answer the question in a line."""
        best = self.best
        if best.nodes == 0:
            why = "" if best.gain is None else f": the first node brings {_change(best)}"
            return f"batch size {self.batch_size}: do not speculate{why}"
        gain = percent(best.speedup - 1, signed=True)
        most = "1 node" if best.nodes == 1 else f"up to {best.nodes} nodes"
        text = f"batch size {self.batch_size}: {most} ({gain} over off)"
        if best.gain is None:
            return f"{text}, the largest tree looked at: more may pay, raise --max-nodes"
        return f"{text}; the next node would bring {_change(best)}"


def _change(size: Size) -> str:
    assert size.gain is not None
    assert size.cost is not None
    gain, cost = (percent(change, signed=True) for change in (size.gain, size.cost))
    return f"{gain} tokens for {cost} time"


def scaling(
    space: TreeSpace, cost: CostModel, batch_size: int, memory: MemoryModel | None = None
) -> Scaling:
    """Return how speed grows with the number of nodes; sizes that do not fit are left out.

    Raises MissingMeasurement when the cost knows nothing about a shape that is asked for.
    """
    found = trials(space, cost, batch_size, memory)
    return scaling_of(batch_size, found, grown_next(space))


def trials(
    space: TreeSpace, cost: CostModel, batch_size: int, memory: MemoryModel | None = None
) -> dict[Tree, Trial]:
    """Return every grown tree that fits, and off, with its speed."""
    found = {OFF: Trial.at(batch_size, OFF, 1.0, cost.step_ms(batch_size, OFF))}
    for _, tree in space.survey:
        if tree in found or (memory is not None and memory.excess(batch_size, tree) > 0):
            continue
        tokens_per_step = space.tokens_per_step(tree)
        step_ms = cost.step_ms(batch_size, tree, tokens_per_step)
        found[tree] = Trial.at(batch_size, tree, tokens_per_step, step_ms)
    return found


def grown_next(space: TreeSpace) -> dict[Tree, set[Tree]]:
    """Return the trees that a node more makes of each grown one, under any depth cap."""
    following: dict[Tree, set[Tree]] = {}
    before, cap = OFF, 0
    for cell, tree in space.survey:
        if cell.depth != cap:
            before, cap = OFF, cell.depth
        if tree.num_nodes == before.num_nodes + 1:
            following.setdefault(before, set()).add(tree)
        before = tree
    return following


def scaling_of(
    batch_size: int, found: Mapping[Tree, Trial], following: Mapping[Tree, set[Tree]]
) -> Scaling:
    """Pick the fastest tree of every size, and the fastest that a node more makes of it."""
    off = found[OFF]
    sizes = []
    for trial in best_of_sizes(found.values()):
        more = [found[tree] for tree in following.get(trial.tree, ()) if tree in found]
        grown = max(more, key=lambda other: other.tokens_per_s, default=None)
        sizes.append(
            Size(
                trial.tree.num_nodes,
                trial.tree.depth,
                trial.tokens_per_step,
                trial.step_ms,
                trial.tokens_per_s / off.tokens_per_s,
                None if grown is None else grown.tokens_per_step / trial.tokens_per_step - 1,
                None if grown is None else grown.step_ms / trial.step_ms - 1,
            )
        )
    return Scaling(batch_size, tuple(sizes))


def best_of_sizes(found: Iterable[Trial]) -> list[Trial]:
    """Return the fastest trial of every size, ascending."""
    best: dict[int, Trial] = {}
    for trial in sorted(found, key=lambda trial: trial.tokens_per_s):
        best[trial.tree.num_nodes] = trial
    return [best[size] for size in sorted(best)]


@dataclass(frozen=True, slots=True)
class Banded:
    """A trial, and the 95 % intervals of its tokens per step and of its step time."""

    trial: Trial
    tokens: tuple[float, float]
    step_ms: tuple[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Bands:
    """Draws that all trees share: which prompts, and what a step costs."""

    flat: FlatTrace
    spoken_P: NDArray[np.bool_]
    bootstrap: PairedBootstrap
    known: dict[Tree, tuple[float, float]]

    @classmethod
    def of(cls, space: TreeSpace, cost: CostModel) -> Bands:
        """Draw resamples of the trace's prompts that have output, and costs."""
        spoken_P = walk(space.flat, OFF).starts_P > 0
        num_prompts = int(spoken_P.sum())
        bootstrap = PairedBootstrap.of(
            num_prompts, cost, num_resamples=NUM_RESAMPLES, num_draws=NUM_COST_DRAWS, seed=0
        )
        return cls(space.flat, spoken_P, bootstrap, {OFF: (1.0, 1.0)})

    def around(self, batch_size: int, trial: Trial) -> Banded:
        """Return a trial with its bands."""
        tree = trial.tree
        if tree not in self.known:
            weights_RP, result = self.bootstrap.weights_RP, walk(self.flat, tree)
            positions_P = result.positions_P[self.spoken_P]
            starts_P = result.starts_P[self.spoken_P]
            tokens_R = (weights_RP @ positions_P) / (weights_RP @ starts_P)
            self.known[tree] = interval(tokens_R)
        drawn = [
            cost.step_ms(batch_size, tree, trial.tokens_per_step) for cost in self.bootstrap.costs
        ]
        return Banded(trial, self.known[tree], interval(np.array(drawn)))
