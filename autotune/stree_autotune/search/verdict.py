"""The verdict: off, chain or tree per batch size, and how sure that is.

Options are compared by *paired* ratios of the time that the same resampled prompts take, with the
runtime's uncertainty drawn once per resample. The simplest option wins whose 95 % interval of
best/option includes 1. A tree is never judged on prompts it was chosen on: its cell is solved again
on every second prompt and timed on the others, and the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from stree_autotune.search.bootstrap import Floats, PairedBootstrap, interval
from stree_autotune.search.study import (
    CostModel,
    SearchResult,
    SearchSetting,
    Trial,
    binding_limit,
    fastest,
    search_batch,
)
from stree_autotune.search.tree_space import Cell, TreeSpace
from stree_autotune.trace import Trace, walk
from stree_core.errors import ConfigError
from stree_core.tree import DEFAULT_TREE, OFF, Tree, Verdict

NUM_RESAMPLES = 1000
NUM_RUNTIME_DRAWS = 100
SMALLER_TREES = (0.25, 0.5, 0.75)
"""Node counts, as shares of the best tree's, up to which a smaller tree is offered as well."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to run at a batch size.

    tokens_per_step is the walk of the tree over the whole trace, which live decoding of the same
    prompts reproduces; tokens_per_s counts all sequences of the batch together; speedup is
    tokens_per_s over that of verdict off. speedup_interval is the 95 % interval on prompts that the
    tree was not chosen on, so it may lie a little below the speedup.
    """

    batch_size: int
    verdict: Verdict
    tree: Tree
    tokens_per_step: float
    step_ms: float
    tokens_per_s: float
    speedup: float
    speedup_interval: tuple[float, float]
    reason: str


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster one option is than another: estimate and 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        ratios = (self.value, self.low, self.high)
        # Adding 0 turns -0.0 into 0.0.
        value, low, high = (round(100 * (ratio - 1), 1) + 0.0 for ratio in ratios)
        return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """A trial as cross-fitted: its expected time for all prompts, and one time per resample [R]."""

    trial: Trial
    whole_ms: float
    resampled_ms_R: Floats

    def ratio_to(self, other: Option) -> Ratio:
        """Return how many times faster this option is than the other, on the same resamples."""
        low, high = interval(other.resampled_ms_R / self.resampled_ms_R)
        return Ratio(other.whole_ms / self.whole_ms, low, high)


@dataclass(frozen=True, slots=True, eq=False)
class CrossFit:
    """Two halves of a trace's prompts, each with its part of one bootstrap."""

    halves: tuple[TreeSpace, TreeSpace]
    bootstraps: tuple[PairedBootstrap, PairedBootstrap]
    cost: CostModel
    counted: dict[tuple[int, Tree], NDArray[np.int64]] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: Trace, cost: CostModel, *, max_nodes: int, seed: int) -> CrossFit:
        """Split the prompts that have positions by turns, and draw prompts and costs.

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
        first, second = (TreeSpace.of(trace, max_nodes, prompts[half::2]) for half in (0, 1))
        return cls((first, second), (bootstrap.part(0, 2), bootstrap.part(1, 2)), cost)

    def option(self, batch_size: int, trial: Trial) -> Option:
        """Time a trial on each half, with the tree that the other half's prompts would choose."""
        fixed = trial.tree.is_chain or trial.tree == DEFAULT_TREE
        whole_ms = 0.0
        resampled_ms_R = np.zeros(NUM_RESAMPLES)
        for half, bootstrap in enumerate(self.bootstraps):
            other = self.halves[1 - half]
            tree = trial.tree if fixed else other.solve(Cell.of(trial.tree))
            starts_P = self._starts(half, tree)
            rate = self.halves[half].flat.num_positions / float(starts_P.sum())
            whole_ms += float(starts_P.sum()) * self.cost.step_ms(batch_size, tree, rate)
            resampled_ms_R += bootstrap.times_R(starts_P, batch_size, tree, rate)
        return Option(trial, whole_ms, resampled_ms_R)

    def _starts(self, half: int, tree: Tree) -> NDArray[np.int64]:
        if (half, tree) not in self.counted:
            self.counted[half, tree] = walk(self.halves[half].flat, tree).starts_P
        return self.counted[half, tree]


def decide_policy(
    trace: Trace,
    cost: CostModel,
    batch_sizes: Sequence[int],
    *,
    max_nodes: int,
    seed: int,
    setting: SearchSetting | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Decision, ...]:
    """Decide off, chain or tree for every batch size; the same seed gives the same decisions.

    `progress` gets one line per batch size. Raises ConfigError when the trace or max_nodes cannot
    be used, NoFeasibleTree when a batch size does not fit, and whatever the cost raises when it
    lacks a measurement.
    """
    setting = setting or SearchSetting()
    space = TreeSpace.of(trace, max_nodes)
    fit = CrossFit.of(trace, cost, max_nodes=max_nodes, seed=seed)
    decisions = []
    for batch_size in batch_sizes:
        result = search_batch(space, cost, batch_size, setting, seed=seed)
        decision = decide(result, fit, setting.max_token_ms)
        limit = binding_limit(result, space, setting)
        if limit:
            decision = replace(decision, reason=f"{decision.reason}; {limit}")
        decisions.append(decision)
        if progress is not None:
            progress(f"batch size {batch_size}: {decisions[-1].reason}")
    return tuple(decisions)


def decide(result: SearchResult, fit: CrossFit, max_token_ms: float = math.inf) -> Decision:
    """Choose among the options of one search; see the module's first lines for the rule.

    `max_token_ms` limits the time per output token of one sequence. At one batch size the fastest
    option has the least, so the limit may rule out a simpler one that would do otherwise.
    """
    options = [fit.option(result.batch_size, trial) for trial in _candidates(result)]
    # Simplest first; an option slower than a simpler one is never chosen.
    front = options[:1]
    for option in options[1:]:
        if option.whole_ms < front[-1].whole_ms:
            front.append(option)
    best = front[-1]
    good = [option for option in front if option is best or best.ratio_to(option).low <= 1.0]
    chosen = next((option for option in good if _token_ms(option) <= max_token_ms), best)
    off = options[0]
    trial = chosen.trial
    to_off = chosen.ratio_to(off)
    return Decision(
        batch_size=result.batch_size,
        verdict=trial.tree.kind,
        tree=trial.tree,
        tokens_per_step=trial.tokens_per_step,
        step_ms=trial.step_ms,
        tokens_per_s=trial.tokens_per_s,
        speedup=trial.tokens_per_s / off.trial.tokens_per_s,
        speedup_interval=(to_off.low, to_off.high),
        reason=_reason(chosen, best, options) + _limit_note(chosen, good[0], max_token_ms),
    )


def _token_ms(option: Option) -> float:
    """Return the time per output token of one sequence."""
    return option.trial.step_ms / option.trial.tokens_per_step


def _limit_note(chosen: Option, otherwise: Option, max_token_ms: float) -> str:
    """Say that the limit on the time per token binds, nothing where it does not."""
    binds = f"; --max-token-ms {max_token_ms:g} binds: "
    if _token_ms(chosen) > max_token_ms:
        return f"{binds}a token takes {_token_ms(chosen):.3g} ms here, serve fewer sequences"
    if chosen is not otherwise:
        return f"{binds}{otherwise.trial.tree.label} takes {_token_ms(otherwise):.3g} ms per token"
    return ""


def _candidates(result: SearchResult) -> list[Trial]:
    """Return off, the chains, and the fastest trees of a few sizes, simplest first."""
    chains = [trial for trial in result.trials if trial.tree.is_chain and trial.tree != OFF]
    chains.sort(key=lambda trial: trial.tree.num_nodes)
    trees: list[Trial] = []
    if result.tree is not None:
        for share in SMALLER_TREES:
            limit = share * result.tree.tree.num_nodes
            small = [
                trial
                for trial in result.trials
                if not trial.tree.is_chain and trial.tree.num_nodes <= limit
            ]
            trees += [fastest(small)] if small else []
        trees.append(result.tree)
    return [result.off, *chains, *dict.fromkeys(trees)]


def _reason(chosen: Option, best: Option, options: list[Option]) -> str:
    """Say what the choice gains over the best option of a simpler kind, and what it leaves out."""
    if len(options) == 1:
        return "off: no speculation fits"
    if chosen is options[0]:
        rival = best if best is not chosen else min(options[1:], key=lambda other: other.whole_ms)
        change = f"off: {rival.trial.tree.label} would change speed by {rival.ratio_to(chosen)}"
        return change if best is chosen else f"{change}, so maybe not at all"
    simpler = ("off",) if chosen.trial.tree.is_chain else ("off", "chain")
    rivals = [option for option in options if option.trial.tree.kind in simpler]
    rival = min(rivals, key=lambda option: option.whole_ms)
    tokens = chosen.trial.tokens_per_step - rival.trial.tokens_per_step
    step_ms = chosen.trial.step_ms - rival.trial.step_ms
    text = (
        f"{chosen.trial.tree.label} gains {chosen.ratio_to(rival)} over {rival.trial.tree.label}: "
        f"{tokens:+.2f} tokens per step for {step_ms:+.3f} ms"
    )
    if best is not chosen:
        text += f"; {best.trial.tree.label} would gain {best.ratio_to(chosen)}, so maybe nothing"
    return text
