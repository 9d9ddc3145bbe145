"""Options as they do on prompts that had no part in choosing them.

The prompts are dealt into folds. For each fold the other folds choose: which chain of at most so
many nodes is the fastest, which tree. The fold's prompts are timed with that. A kind of option
(chains up to a length, trees up to a size) is judged so, and what is run of it is what all prompts
together choose.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stree_autotune.search.bootstrap import Floats, Option, PairedBootstrap
from stree_autotune.search.study import CostModel, Trial
from stree_autotune.search.tree_space import TreeSpace
from stree_autotune.trace import FlatTrace, Trace, walk
from stree_core.errors import ConfigError
from stree_core.tree import DEFAULT_TREE, OFF, Tree

NUM_FOLDS = 5
NUM_RESAMPLES = 2000
NUM_RUNTIME_DRAWS = 100


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """Some prompts, by their places among all that have positions, and the space of the others."""

    places: NDArray[np.intp]
    held: FlatTrace
    others: TreeSpace
    starts: dict[Tree, NDArray[np.int64]] = field(default_factory=dict)

    def starts_P(self, tree: Tree) -> NDArray[np.int64]:
        """Return the steps that each prompt of the fold takes with a tree."""
        if tree not in self.starts:
            self.starts[tree] = walk(self.held, tree).starts_P
        return self.starts[tree]


@dataclass(frozen=True, slots=True, eq=False)
class CrossFit:
    """The folds of a trace's prompts and one bootstrap of all of them."""

    folds: tuple[Fold, ...]
    bootstrap: PairedBootstrap
    cost: CostModel

    @classmethod
    def of(cls, trace: Trace, cost: CostModel, *, max_nodes: int, seed: int) -> CrossFit:
        """Deal the prompts that have positions by turns, and draw prompts and costs.

        Raises ConfigError when fewer than two prompts have positions.
        """
        prompts = np.flatnonzero(np.diff(trace.offsets))
        if len(prompts) < 2:
            raise ConfigError(
                f"a decision needs two prompts with output, the trace has {len(prompts)}; record "
                "a trace of more prompts"
            )
        bootstrap = PairedBootstrap.of(
            len(prompts), cost, num_resamples=NUM_RESAMPLES, num_draws=NUM_RUNTIME_DRAWS, seed=seed
        )
        num_folds = min(NUM_FOLDS, len(prompts))
        turns = np.arange(len(prompts)) % num_folds
        folds = [
            Fold(
                np.flatnonzero(turns == fold),
                FlatTrace.of(trace, prompts[turns == fold]),
                TreeSpace.of(trace, max_nodes, prompts[turns != fold]),
            )
            for fold in range(num_folds)
        ]
        return cls(tuple(folds), bootstrap, cost)

    def option(self, batch_size: int, trial: Trial, most_nodes: int) -> Option:
        """Time what stands for a trial: off, or chains or trees of at most `most_nodes`.

        In each fold the fastest one is timed that the other folds know.
        """
        ms_P = np.zeros(self.bootstrap.weights_RP.shape[1])
        drawn_D = np.zeros(len(self.bootstrap.costs))
        for fold in self.folds:
            tree = self._choice(batch_size, trial.tree, most_nodes, fold.others)
            starts_P = fold.starts_P(tree)
            total = float(starts_P.sum())
            rate = fold.held.num_positions / total
            ms_P[fold.places] = starts_P * self.cost.step_ms(batch_size, tree, rate)
            costs = self.bootstrap.costs
            drawn_D += [total * cost.step_ms(batch_size, tree, rate) for cost in costs]
        log_D: Floats = np.log(drawn_D / ms_P.sum())
        return Option(trial, ms_P, log_D, self.bootstrap.weights_RP)

    def _choice(self, batch_size: int, tree: Tree, most_nodes: int, space: TreeSpace) -> Tree:
        """Return the fastest tree of the same kind and of at most so many nodes."""
        if tree == OFF:
            return OFF
        if tree.is_chain:
            longest = min(most_nodes, space.max_depth)
            found = [Tree.chain(length) for length in range(1, longest + 1)]
        else:
            grown = (tree for _, tree in space.surveyed(most_nodes))
            found = [each for each in grown if not each.is_chain]
            if tree == DEFAULT_TREE or not found:
                found.append(tree)
        return max(found, key=lambda each: (self._rate(batch_size, each, space), -each.num_nodes))

    def _rate(self, batch_size: int, tree: Tree, space: TreeSpace) -> float:
        tokens_per_step = space.tokens_per_step(tree)
        return tokens_per_step / self.cost.step_ms(batch_size, tree, tokens_per_step)
