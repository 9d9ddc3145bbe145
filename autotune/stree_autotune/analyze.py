"""Should I scale the tree? What each further node brings and costs, and where that stops to pay.

For every number of nodes the fastest of the surveyed trees is taken. A node's gain is the growth of
tokens per step, its cost the growth of the step's time, both in percent; a tree is worth growing
while the gain is the larger one. Times go in stairs, so every size is looked at: the *break-even
size* is the one with the most tokens per second, 0 when decoding without speculation has more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stree_autotune.memory_limit import MemoryLimit
from stree_autotune.search import StepCost, Trial
from stree_autotune.tree_space import OFF, TreeSpace
from stree_core.tree import Tree


@dataclass(frozen=True, slots=True)
class Size:
    """The fastest tree of one size, and what a node more than in the size before brought and cost.

    `gain` and `cost` are relative changes per added node of tokens per step and of step time.
    """

    nodes: int
    depth: int
    tokens_per_step: float
    step_ms: float
    speedup: float
    gain: float
    cost: float


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

    @property
    def beyond(self) -> Size | None:
        """The next size behind the break-even size, None when there is none."""
        return next((size for size in self.sizes if size.nodes > self.best.nodes), None)

    def sentence(self) -> str:
        """Answer the question in a line."""
        best, beyond = self.best, self.beyond
        if best.nodes == 0:
            first = self.sizes[1] if len(self.sizes) > 1 else None
            why = "" if first is None else f": the first node brings {_change(first)}"
            return f"batch size {self.batch_size}: do not speculate{why}"
        text = f"batch size {self.batch_size}: up to {best.nodes} nodes ({best.speedup:.2f}x off)"
        if beyond is None:
            return f"{text}, the largest tree looked at: more may pay, raise --max-nodes"
        return f"{text}; node {beyond.nodes} would bring {_change(beyond)}"


def scaling(
    space: TreeSpace, cost: StepCost, batch_size: int, memory: MemoryLimit | None = None
) -> Scaling:
    """Return how speed grows with the number of nodes; sizes that do not fit are left out.

    Raises MissingMeasurement when the cost knows nothing about a shape that is asked for.
    """
    off = Trial.at(batch_size, OFF, 1.0, cost.step_ms(batch_size, OFF))
    best: dict[int, Trial] = {}
    for tree in _trees(space):
        if memory is not None and memory.excess(batch_size, tree) > 0:
            continue
        tokens_per_step = space.tokens_per_step(tree)
        step_ms = cost.step_ms(batch_size, tree, tokens_per_step)
        trial = Trial.at(batch_size, tree, tokens_per_step, step_ms)
        known = best.get(tree.num_nodes)
        if known is None or trial.tokens_per_s > known.tokens_per_s:
            best[tree.num_nodes] = trial
    sizes = [Size(0, 0, 1.0, off.step_ms, 1.0, 0.0, 0.0)]
    before = off
    for nodes in sorted(best):
        trial = best[nodes]
        added = nodes - before.tree.num_nodes
        sizes.append(
            Size(
                nodes,
                trial.tree.depth,
                trial.tokens_per_step,
                trial.step_ms,
                trial.tokens_per_s / off.tokens_per_s,
                (trial.tokens_per_step / before.tokens_per_step - 1) / added,
                (trial.step_ms / before.step_ms - 1) / added,
            )
        )
        before = trial
    return Scaling(batch_size, tuple(sizes))


def _trees(space: TreeSpace) -> Iterable[Tree]:
    return dict.fromkeys(tree for _, tree in space.survey if tree.num_nodes)


def _change(size: Size) -> str:
    return f"{100 * size.gain:+.1f} % tokens for {100 * size.cost:+.1f} % time"
