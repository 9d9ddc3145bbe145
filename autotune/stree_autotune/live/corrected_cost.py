"""A step cost put right by live measurements, by how near a tree is to a measured one.

The residual of a tree is its measured time over the model's. A tree that was measured has its own;
another has the mean residual of the measured trees with its tokens and depth, else with its pad
bucket and depth, its pad bucket, or of all.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stree_autotune.search import CostModel
from stree_core.tree import Tree

PAD = 16
"""Kernels work on blocks of this many tokens, so times change in steps."""

MEDIAN_ERROR = 0.56
"""Standard error of a median over the standard deviation of its repeats, which are five or more."""


@dataclass(frozen=True, slots=True)
class LiveStep:
    """The median measured time of a step, and the standard deviation of its repeats."""

    ms: float
    spread_ms: float


def pad_bucket(tree: Tree) -> int:
    """Return how many blocks of tokens a tree is verified in."""
    return -(-tree.num_tokens // PAD)


@dataclass(frozen=True)
class CorrectedCost:
    """A model's times at one batch size, each multiplied by the nearest residual."""

    model: CostModel
    batch_size: int
    steps: Mapping[Tree, LiveStep]

    def step_ms(self, batch_size: int, tree: Tree, tokens_per_step: float | None = None) -> float:
        """Return the time of a step, the measured one for a tree that was measured."""
        assert batch_size == self.batch_size
        if tree in self.steps:
            return self.steps[tree].ms
        factor = next(self._factors[key] for key in _keys(tree) if key in self._factors)
        return self.model.step_ms(batch_size, tree, tokens_per_step) * factor

    def draw(self, rng: np.random.Generator) -> CorrectedCost:
        """Return the cost as another measurement might have found it: each by its own error."""
        drawn = {}
        for tree, step in self.steps.items():
            error = MEDIAN_ERROR * step.spread_ms / step.ms
            drawn[tree] = LiveStep(
                step.ms * math.exp(error * rng.standard_normal()), step.spread_ms
            )
        return CorrectedCost(self.model, self.batch_size, drawn)

    @cached_property
    def _factors(self) -> dict[Hashable, float]:
        """Return the geometric mean of the residuals of every group of measured trees."""
        logs: dict[Hashable, list[float]] = defaultdict(list, {(): []})
        for tree, step in self.steps.items():
            residual = math.log(step.ms / self.model.step_ms(self.batch_size, tree))
            for key in _keys(tree):
                logs[key].append(residual)
        return {key: math.exp(sum(some) / max(1, len(some))) for key, some in logs.items()}


def _keys(tree: Tree) -> Iterator[Hashable]:
    """Yield what a tree has in common with others, the most telling first."""
    if tree.num_nodes == 0:
        yield "off"
        return
    yield "cell", tree.num_tokens, tree.depth
    yield "bucket and depth", pad_bucket(tree), tree.depth
    yield "bucket", pad_bucket(tree)
    yield ()
