"""The outer search on live steps: measure picks of every kind, correct the model, ask again.

First come off, the chains, the default tree and the best pick per pad bucket and depth, by the
model. Their residuals correct the model of their buckets; the corrected model's favourites and
Optuna's proposals are measured next, in rounds, until the study has its trials. At last the fastest
are measured once more, side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import optuna

from stree_autotune.live.corrected_cost import CorrectedCost, LiveStep, pad_bucket
from stree_autotune.live.measure import FINAL, FIRST_LOOK, Measure
from stree_autotune.live.workers import PATIENCE_S, Claim, Evaluated, Worker, evaluated
from stree_autotune.search import (
    Candidates,
    CostModel,
    SearchResult,
    SearchSetting,
    TreeSpace,
    Trial,
    enqueue,
    enqueue_tree,
    fastest,
    search_batch,
    search_result,
)
from stree_autotune.store import digits
from stree_core.tree import OFF, Tree

NUM_LIVE_TRIALS = 40
PICKED_SHARE = 0.6
"""Of the trials, for the first picks; the others follow what those have shown."""

FIRST_ROUND, NEXT_ROUND = 24, 8
FAVOURITES = 3
"""Per round: the corrected model's fastest trees that nobody has measured."""

FINALISTS = 6

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LiveResult:
    """What a live search found: only measured trees are candidates; `cost` knows their times."""

    search: SearchResult
    cost: CorrectedCost


@dataclass(frozen=True, slots=True)
class LiveSearch:
    """The search of one pair's trees by live steps; see the module for its stages."""

    space: TreeSpace
    model: CostModel
    measure: Measure
    setting: SearchSetting
    seed: int
    progress: Progress
    patience_s: float = PATIENCE_S

    def run(self, batch_size: int) -> LiveResult:
        """Measure until the batch size's study has its trials, then the finalists once more."""
        study = replace(self.setting.place, seed=self.seed).open(batch_size)
        known = len(evaluated(study))
        if known:
            self.progress(f"batch size {batch_size}: going on after {known} measured trees")
        self._queue_picks(study, batch_size)

        def excess(tree: Tree) -> float:
            return self.setting.excess(batch_size, tree)

        budget = self.setting.num_trials
        with Worker(study, self.space, budget, excess, self.patience_s) as worker:
            most = FIRST_ROUND
            while True:
                claims = worker.claim(most)
                if claims:
                    self._evaluate(worker, batch_size, claims)
                    most = NEXT_ROUND
                    self._queue_favourites(study, batch_size)
                elif not worker.wait():
                    break
        return self._final(batch_size, evaluated(study))

    def _queue_picks(self, study: optuna.Study, batch_size: int) -> None:
        found = Candidates(batch_size, self.model, self.setting)
        best: dict[tuple[int, int], Trial] = {}
        for cell, tree in self.space.survey:
            found.score(tree, self.space.tokens_per_step(tree))
            trial = found.fitting.get(tree)
            key = pad_bucket(tree), cell.depth
            if trial is not None and not tree.is_chain:
                best[key] = fastest([trial, *([best[key]] if key in best else [])])
        memory = SearchSetting(memory=self.setting.memory)
        offline = search_batch(self.space, self.model, batch_size, memory, seed=self.seed)
        enqueue(study, self.space, [])
        enqueue_tree(study, self.space, offline.best.tree)
        ranked = sorted(best.values(), key=lambda trial: -trial.tokens_per_s)
        for trial in ranked[: int(PICKED_SHARE * self.setting.num_trials)]:
            enqueue_tree(study, self.space, trial.tree)

    def _queue_favourites(self, study: optuna.Study, batch_size: int) -> None:
        cost = self._corrected(batch_size, evaluated(study))
        memory = SearchSetting(memory=self.setting.memory)
        trials = search_batch(self.space, cost, batch_size, memory, seed=self.seed).trials
        fresh = [trial for trial in trials if trial.tree not in cost.steps]
        for trial in sorted(fresh, key=lambda trial: -trial.tokens_per_s)[:FAVOURITES]:
            enqueue_tree(study, self.space, trial.tree)

    def _evaluate(self, worker: Worker, batch_size: int, claims: list[Claim]) -> None:
        steps = self.measure(batch_size, [claim.tree for claim in claims], FIRST_LOOK)
        for claim in claims:
            step = steps[claim.tree]
            tokens = self.space.tokens_per_step(claim.tree)
            trial = Trial.at(batch_size, claim.tree, tokens, step.ms)
            found = Evaluated(claim.tree, tokens, step.ms, step.spread_ms, trial.tokens_per_s)
            worker.tell(claim, found)
            self.progress(
                f"batch size {batch_size}, trial {claim.trial.number}: {claim.tree.num_nodes} "
                f"nodes, depth {claim.tree.depth}, {digits(step.ms)} ms, "
                f"{digits(trial.tokens_per_s)} tokens/s"
            )

    def _corrected(self, batch_size: int, found: list[Evaluated]) -> CorrectedCost:
        steps = {one.tree: LiveStep(one.step_ms, one.spread_ms) for one in found}
        return CorrectedCost(self.model, batch_size, steps)

    def _final(self, batch_size: int, found: list[Evaluated]) -> LiveResult:
        """Measure off and the fastest again, and bring the others' times to the same scale."""
        first = self._corrected(batch_size, found).steps
        ranked = sorted(found, key=lambda one: -one.tokens_per_s)
        chosen = dict.fromkeys([OFF, *(one.tree for one in ranked[:FINALISTS])])
        again = self.measure(batch_size, list(chosen), FINAL)
        # The machine may have drifted since.
        ratios = [math.log(again[tree].ms / first[tree].ms) for tree in chosen if tree in first]
        drift = math.exp(sum(ratios) / len(ratios))
        steps = {
            tree: LiveStep(drift * step.ms, drift * step.spread_ms) for tree, step in first.items()
        } | again
        cost = CorrectedCost(self.model, batch_size, steps)
        trials = tuple(
            Trial.at(batch_size, tree, self.space.tokens_per_step(tree), step.ms)
            for tree, step in steps.items()
        )
        return LiveResult(search_result(batch_size, trials), cost)
