"""The outer search: per batch size, the fastest trees that Optuna and the inner solver find.

Tokens per step come from the exact walk, milliseconds from a step cost. Optuna chooses a cell
(depth cap, width cap, number of nodes), the inner solver its tree. The first trials are given: off,
chains, the best cells of one growth per depth, and the default tree. The winner is refined with the
true objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import optuna

from stree_autotune.growth import MAX_DEPTH, refine, solve, sub_tree
from stree_autotune.path_counts import PathIndex, index_paths
from stree_autotune.trace_file import Trace
from stree_autotune.trace_walk import Ints, Slots, walk, walk_nested
from stree_core.errors import ConfigError
from stree_core.tree import DEFAULT_TREE, MAX_NODES, Tree

WIDTHS = (1, 2, 3, 4, 6, 8, 16)
LONGEST_CHAIN = 8
NUM_PICKS = 6
NUM_TRIALS = 24
"""Trials per batch size, the enqueued ones included."""

OFF = Tree.chain(0)


class StepCost(Protocol):
    """Milliseconds of one step; an empty tree is one-token decoding with verdict off."""

    def step_ms(self, batch_size: int, tree: Tree) -> float:
        """Return the milliseconds of a step; raise MissingMeasurement where none is known."""

    def draw(self, rng: np.random.Generator) -> StepCost:
        """Return a cost with the runtime's uncertainty drawn once."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What Optuna chooses; the inner solver finds the tree."""

    depth: int
    width: int
    num_nodes: int

    @classmethod
    def of(cls, tree: Tree) -> Cell:
        """Return the tightest cell that holds `tree`."""
        return cls(tree.depth, tree.max_children, tree.num_nodes)


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluated tree; tokens_per_s counts all sequences of the batch together."""

    tree: Tree
    tokens_per_step: float
    step_ms: float
    tokens_per_s: float

    @classmethod
    def at(cls, batch_size: int, tree: Tree, tokens_per_step: float, step_ms: float) -> Trial:
        """Derive the rate of a tree at a batch size."""
        return cls(tree, tokens_per_step, step_ms, 1000 * batch_size * tokens_per_step / step_ms)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The best of each kind, and everything evaluated on the way, in order.

    `tree` is None when the limits leave no room for a tree that is not a chain.
    """

    batch_size: int
    off: Trial
    chain: Trial
    tree: Trial | None
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The fastest trial."""
        return fastest(self.trials)


@dataclass(frozen=True, eq=False)
class TreeSpace:
    """The trees of one trace: each cell solved once, each tree walked once for all batch sizes."""

    slots: Slots
    index: PathIndex
    max_nodes: int
    solved: dict[Cell, Tree] = field(default_factory=dict)
    walked: dict[Tree, float] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: Trace, max_nodes: int, prompts: Ints | None = None) -> TreeSpace:
        """Index a trace, or the prompts with the given indices, for trees up to `max_nodes` nodes.

        Raises ConfigError when max_nodes is out of range.
        """
        if not 1 <= max_nodes <= MAX_NODES:
            raise ConfigError(
                f"max_nodes must lie between 1 and {MAX_NODES}, got {max_nodes}; change --max-nodes"
            )
        slots = Slots.of(trace, prompts)
        return cls(slots, index_paths(slots, max_nodes=max_nodes, max_depth=MAX_DEPTH), max_nodes)

    @property
    def widths(self) -> tuple[int, ...]:
        """The width caps that the trace can tell apart."""
        return tuple(width for width in WIDTHS if width <= self.slots.num_children)

    def solve(self, cell: Cell) -> Tree:
        """Return the cell's tree; it may have fewer nodes when the caps leave no room for more."""
        if cell not in self.solved:
            self.solved[cell] = self._solve(cell)
        return self.solved[cell]

    def _solve(self, cell: Cell) -> Tree:
        if cell.width == 1 or cell.num_nodes <= 1:
            return Tree.chain(min(cell.depth, cell.num_nodes))
        found = solve(self.index, depth=cell.depth, width=cell.width, num_nodes=cell.num_nodes)
        self.walked[found.growth.tree] = found.tokens_per_step
        return found.growth.tree

    def tokens_per_step(self, tree: Tree) -> float:
        """Return the exact tokens per step of a tree on this trace."""
        if tree not in self.walked:
            self.walked[tree] = walk(self.slots, tree).tokens_per_step
        return self.walked[tree]

    @cached_property
    def survey(self) -> tuple[tuple[Cell, Tree], ...]:
        """Every size of one growth per depth cap, walked: the picks that trials start from."""
        picks = []
        width = self.widths[-1]
        for depth in range(1, MAX_DEPTH + 1):
            found = solve(self.index, depth=depth, width=width, num_nodes=self.max_nodes)
            growth = found.growth
            sizes = range(1, len(growth.added))
            values = walk_nested(self.slots, growth.tree, growth.added, sizes)
            parents, added = np.array(growth.tree.parents), np.array(growth.added)
            for size, value in zip(sizes, values.tolist(), strict=True):
                tree = sub_tree(parents, np.flatnonzero(added <= size))
                self.walked[tree] = value
                picks.append((Cell(depth, width, size), tree))
        return tuple(picks)


def search_batch(
    space: TreeSpace, cost: StepCost, batch_size: int, *, seed: int, num_trials: int = NUM_TRIALS
) -> SearchResult:
    """Search the fastest tree for one batch size; the same seed gives the same result.

    Raises MissingMeasurement when the cost knows nothing about a shape that is asked for.
    """
    trials: dict[Tree, Trial] = {}

    def score(tree: Tree, tokens_per_step: float) -> float:
        if tree not in trials:
            step_ms = cost.step_ms(batch_size, tree)
            trials[tree] = Trial.at(batch_size, tree, tokens_per_step, step_ms)
        return trials[tree].tokens_per_s

    picks: dict[int, tuple[float, Cell]] = {}
    for cell, tree in space.survey:
        rate = score(tree, space.tokens_per_step(tree))
        if rate > picks.get(cell.depth, (0.0, cell))[0]:
            picks[cell.depth] = rate, cell
    best_picks = sorted(picks.values(), key=lambda pick: -pick[0])[:NUM_PICKS]

    def objective(trial: optuna.Trial) -> float:
        cell = _suggest(trial, space)
        tree = DEFAULT_TREE if trial.user_attrs.get("tree") == "default" else space.solve(cell)
        return score(tree, space.tokens_per_step(tree))

    study = _new_study(seed)
    _enqueue(study, space, [cell for _, cell in best_picks])
    study.optimize(objective, n_trials=num_trials)
    start = fastest([trial for trial in trials.values() if trial.tree != OFF])
    refine(space.slots, start.tree, score, max_nodes=space.max_nodes)
    return _result(batch_size, tuple(trials.values()))


def fastest(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the highest rate; among equals the one with the fewest nodes."""
    return max(trials, key=lambda trial: (trial.tokens_per_s, -trial.tree.num_nodes))


def _new_study(seed: int) -> optuna.Study:
    # Optuna reports trials, and errors that are raised anyway, on stderr by a handler of its own.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed % 2**32)
    return optuna.create_study(direction="maximize", sampler=sampler)


def _suggest(trial: optuna.Trial, space: TreeSpace) -> Cell:
    return Cell(
        depth=trial.suggest_int("depth", 1, MAX_DEPTH),
        width=trial.suggest_categorical("width", space.widths),
        num_nodes=trial.suggest_int("num_nodes", 0, space.max_nodes),
    )


def _enqueue(study: optuna.Study, space: TreeSpace, picks: Sequence[Cell]) -> None:
    """Queue off, the chains, the picked cells, and the default tree where it fits the limits."""
    study.enqueue_trial(asdict(Cell(1, 1, 0)))
    for length in range(1, min(LONGEST_CHAIN, space.max_nodes) + 1):
        study.enqueue_trial(asdict(Cell(length, 1, length)))
    for cell in picks:
        study.enqueue_trial(asdict(cell))
    fits_trace = DEFAULT_TREE.max_children <= space.slots.num_children
    if fits_trace and DEFAULT_TREE.num_nodes <= space.max_nodes:
        study.enqueue_trial(asdict(Cell.of(DEFAULT_TREE)), user_attrs={"tree": "default"})


def _result(batch_size: int, trials: tuple[Trial, ...]) -> SearchResult:
    off = next(trial for trial in trials if trial.tree == OFF)
    chains = [trial for trial in trials if trial.tree.is_chain and trial.tree != OFF]
    trees = [trial for trial in trials if not trial.tree.is_chain]
    return SearchResult(batch_size, off, fastest(chains), fastest(trees) if trees else None, trials)
