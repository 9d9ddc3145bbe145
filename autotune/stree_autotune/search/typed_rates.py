"""Off or a chain by acceptance that a user typed: no trace, so no trees and no prompts to resample.

Rates by position say how many tokens a chain keeps. What siblings would keep they do not say, so
trees are left out. The rates count as exact: intervals are the times' alone.
"""

from __future__ import annotations

import numpy as np

from stree_autotune.search.bootstrap import Option
from stree_autotune.search.request import TuneRequest, within_measured
from stree_autotune.search.study import Candidates, CostModel, SearchSetting
from stree_autotune.search.times import load_times
from stree_autotune.search.verdict import Decision, choose
from stree_autotune.store import Library, provenance
from stree_autotune.trace import TYPED, rates_source
from stree_core.errors import ConfigError
from stree_core.profile import GpuRef, Profile, Sources
from stree_core.tree import Tree

NUM_DRAWS = 400


def tune_typed(request: TuneRequest) -> Profile:
    """Decide every batch size of a request with typed rates and return the profile.

    Raises ConfigError when acceptance has another source as well, NoFeasibleTree when a batch size
    does not fit, and what `load_times` raises.
    """
    if request.acceptance_from or request.dataset:
        other = "--acceptance-from" if request.acceptance_from else "--dataset"
        raise ConfigError(f"acceptance has one source, got --rates and {other}; drop one")
    longest = len(request.rates)
    library = Library.open(request.data)
    times = load_times(library, request)
    asked = within_measured(request, times.cost)
    setting = SearchSetting(memory=times.memory(asked), max_token_ms=asked.max_token_ms)
    times.cost.require(asked.batch_sizes, min(longest, asked.max_nodes))
    draws = _draws(times.cost, asked.seed)
    decisions = [_decide(size, asked, times.cost, draws, setting) for size in asked.batch_sizes]
    return Profile(
        target=times.table.target.ref,
        draft=times.table.draft.ref,
        gpu=GpuRef(name=asked.gpu, status=times.source.status),
        dataset=TYPED,
        sampling=asked.sampling,
        context=asked.context,
        policy=tuple(
            d.noted(times.cost.note(d.batch_size, d.tree)).policy_row() for d in decisions
        ),
        sources=Sources(
            runtime=times.source, trace=rates_source(asked.rates, "; chains only, rates as exact")
        ),
        provenance=provenance(asked.seed),
    )


def _draws(cost: CostModel, seed: int) -> list[CostModel]:
    rng = np.random.default_rng(seed)
    return [cost.draw(rng) for _ in range(NUM_DRAWS)]


def _decide(
    batch_size: int,
    request: TuneRequest,
    cost: CostModel,
    draws: list[CostModel],
    setting: SearchSetting,
) -> Decision:
    """Choose off or a chain; one token stands for all prompts, as each takes the same time."""
    found = Candidates(batch_size, cost, setting)
    longest = min(len(request.rates), request.max_nodes)
    for length in range(longest + 1):
        found.score(Tree.chain(length), 1 + sum(request.rates[:length]))
    options = []
    for tree, trial in found.fitting.items():
        rate = trial.tokens_per_step
        drawn_D = np.array([each.step_ms(batch_size, tree, rate) for each in draws])
        token_ms = trial.step_ms / rate
        log_D = np.log(drawn_D / trial.step_ms)
        options.append(Option(trial, np.array([token_ms]), log_D, np.ones((NUM_DRAWS, 1))))
    return choose(batch_size, options, request.max_token_ms, request.prefer)
