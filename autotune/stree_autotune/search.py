"""The outer search: per batch size, the fastest trees that Optuna and the inner solver find.

Tokens per step come from the exact walk, milliseconds from a step cost. Optuna chooses a cell
(depth cap, width cap, number of nodes), the inner solver its tree. The first trials are given: off,
chains, the best cells of one growth per depth, and the default tree. The winner is refined with the
true objective. A tree that does not fit the GPU's memory is tried by Optuna as infeasible, and is
no candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import optuna
from optuna.trial import TrialState

from stree_autotune.growth import MAX_DEPTH, refine
from stree_autotune.memory_limit import MemoryLimit
from stree_autotune.study import StudyPlace, optimize
from stree_autotune.tree_space import OFF, Cell, TreeSpace
from stree_autotune.trials import enqueue, suggest, tree_of
from stree_core.errors import NoFeasibleTree
from stree_core.tree import Tree

NUM_PICKS = 6
NUM_TRIALS = 24


class StepCost(Protocol):
    """Milliseconds of one step; an empty tree is one-token decoding with verdict off."""

    def step_ms(self, batch_size: int, tree: Tree, tokens_per_step: float | None = None) -> float:
        """Return the milliseconds of a step that emits so many tokens.

        Raises MissingMeasurement where none is known.
        """

    def draw(self, rng: np.random.Generator) -> StepCost:
        """Return a cost with the runtime's uncertainty drawn once."""


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

    `chain` and `tree` are None when the limits leave no room for one. `too_large` is the fastest
    tree that does not fit the memory, None unless it would be faster than all that do.
    """

    batch_size: int
    off: Trial
    chain: Trial | None
    tree: Trial | None
    trials: tuple[Trial, ...]
    too_large: Trial | None = None

    @property
    def best(self) -> Trial:
        """The fastest trial."""
        return fastest(self.trials)


@dataclass(frozen=True, slots=True)
class SearchSetting:
    """How long to search, where trials are kept, and what fits.

    `num_trials` is per batch size, the enqueued ones included.
    """

    num_trials: int = NUM_TRIALS
    place: StudyPlace = field(default_factory=StudyPlace)
    memory: MemoryLimit | None = None

    def excess(self, batch_size: int, tree: Tree) -> float:
        """Return by which share of the memory a tree is too large; 0 or less means it fits."""
        return -1.0 if self.memory is None else self.memory.excess(batch_size, tree)


@dataclass(slots=True)
class Candidates:
    """The trees that were evaluated at one batch size, those that fit apart from those that do not.

    Raises NoFeasibleTree when not even decoding without speculation fits.
    """

    batch_size: int
    cost: StepCost
    setting: SearchSetting
    fitting: dict[Tree, Trial] = field(default_factory=dict)
    too_large: dict[Tree, Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        memory = self.setting.memory
        if memory is not None and self.excess(OFF) > 0:
            raise NoFeasibleTree(
                f"batch size {self.batch_size} needs {memory.describe(self.batch_size, OFF)}, even "
                "without a draft; lower --batch-size or --context"
            )

    def excess(self, tree: Tree) -> float:
        """Return by which share of the memory a tree is too large; 0 or less means it fits."""
        return self.setting.excess(self.batch_size, tree)

    def score(self, tree: Tree, tokens_per_step: float) -> float:
        """Return the tokens per second of a tree, 0 when it does not fit."""
        if tree in self.fitting:
            return self.fitting[tree].tokens_per_s
        if tree not in self.too_large:
            step_ms = self.cost.step_ms(self.batch_size, tree, tokens_per_step)
            trial = Trial.at(self.batch_size, tree, tokens_per_step, step_ms)
            if self.excess(tree) <= 0:
                self.fitting[tree] = trial
                return trial.tokens_per_s
            self.too_large[tree] = trial
        return 0.0

    def result(self) -> SearchResult:
        """Return the best of each kind."""
        result = search_result(self.batch_size, tuple(self.fitting.values()))
        if self.too_large:
            missed = fastest(tuple(self.too_large.values()))
            if missed.tokens_per_s > result.best.tokens_per_s:
                return replace(result, too_large=missed)
        return result


def search_batch(
    space: TreeSpace,
    cost: StepCost,
    batch_size: int,
    setting: SearchSetting | None = None,
    *,
    seed: int,
) -> SearchResult:
    """Search the fastest tree for one batch size; the same seed gives the same result.

    A study that has trials already goes on with them. Raises MissingMeasurement when the cost knows
    nothing about a shape that is asked for, NoFeasibleTree when nothing fits.
    """
    setting = setting or SearchSetting()
    found = Candidates(batch_size, cost, setting)
    picks = best_picks(space, found)[:NUM_PICKS]
    study = replace(setting.place, seed=seed).open(batch_size)
    enqueue(study, space, [cell for _, cell in picks])

    def evaluate(tree: Tree) -> float:
        tokens_per_step = space.tokens_per_step(tree)
        return found.score(tree, tokens_per_step)

    def objective(trial: optuna.Trial) -> float:
        tree = suggest(trial, space)
        rate = evaluate(tree)
        trial.set_constraint("memory", found.excess(tree))
        return rate

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    for trial in done:
        evaluate(tree_of(trial, space))
    optimize(study, objective, max(0, setting.num_trials - len(done)))
    speculating = [trial for tree, trial in found.fitting.items() if tree != OFF]
    if speculating:
        start = fastest(speculating).tree
        refine(space.slots, start, found.score, max_nodes=space.max_nodes)
    return found.result()


def binding_limit(result: SearchResult, space: TreeSpace, setting: SearchSetting) -> str:
    """Return which limit keeps the search from a faster tree, empty when none does."""
    missed, best = result.too_large, result.best.tree
    if missed is not None:
        assert setting.memory is not None
        return (
            f"memory binds: {missed.tree.num_nodes} nodes would reach {missed.tokens_per_s:.0f} "
            f"tokens/s but need {setting.memory.describe(result.batch_size, missed.tree)}"
        )
    if best.num_nodes == space.max_nodes:
        return f"--max-nodes {space.max_nodes} binds"
    if best.depth == MAX_DEPTH:
        return f"the depth limit of {MAX_DEPTH} binds"
    if best.max_children == space.slots.num_children:
        return f"the {best.max_children} children that the trace recorded bind"
    return ""


def best_picks(space: TreeSpace, found: Candidates) -> list[tuple[float, Cell]]:
    """Score the survey; return the fastest cell of every depth with its rate, fastest first."""
    picks: dict[int, tuple[float, Cell]] = {}
    for cell, tree in space.survey:
        rate = found.score(tree, space.tokens_per_step(tree))
        if rate > picks.get(cell.depth, (0.0, cell))[0]:
            picks[cell.depth] = rate, cell
    return sorted(picks.values(), key=lambda pick: -pick[0])


def fastest(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the highest rate; among equals the one with the fewest nodes."""
    return max(trials, key=lambda trial: (trial.tokens_per_s, -trial.tree.num_nodes))


def search_result(batch_size: int, trials: tuple[Trial, ...]) -> SearchResult:
    """Return the best of each kind among trials, of which one is off."""
    off = next(trial for trial in trials if trial.tree == OFF)
    chains = [trial for trial in trials if trial.tree.is_chain and trial.tree != OFF]
    trees = [trial for trial in trials if not trial.tree.is_chain]
    chain, tree = (fastest(some) if some else None for some in (chains, trees))
    return SearchResult(batch_size, off, chain, tree, trials)
