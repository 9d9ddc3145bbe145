"""The verdict: off, chain or tree per batch size, and how sure that is.

Options are compared by *paired* ratios of the time that the same prompts take, with the runtime's
uncertainty drawn once per resample. Every option is timed on prompts that had no part in choosing
it (see cross_fit). The simplest option wins over which the best is no sure gain: whose 95 %
interval of best/option over resamples includes 1. Or the fastest, where that is preferred. The
interval that is shown reaches lower, though never below 1 for a sure gain (see bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from stree_autotune.search.bootstrap import Option
from stree_autotune.search.cross_fit import CrossFit
from stree_autotune.search.study import (
    CostModel,
    SearchResult,
    SearchSetting,
    Trial,
    binding_limit,
    fastest,
    search_batch,
)
from stree_autotune.search.tree_space import TreeSpace
from stree_autotune.store import digits
from stree_autotune.trace import Trace
from stree_core.profile import Interval, PolicyRow, Predicted, TreeText
from stree_core.tree import OFF, Tree, Verdict

Preference = Literal["simple", "fast"]
"""simple: the simplest option that may be as fast as the fastest. fast: the fastest."""

MOST_WORDS = 500
"""Characters of a reason, see stree_core.profile.Note."""
SMALLER_TREES = (0.25, 0.5, 0.75)
"""Node counts, as shares of the best tree's, up to which a smaller tree is offered as well."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to run at a batch size.

    tokens_per_step is the walk of the tree over the whole trace, which live decoding of the same
    prompts reproduces; tokens_per_s counts all sequences of the batch together. speedup is over
    verdict off, on prompts that had no part in the choice, with its 95 % interval: with the tree
    that all prompts chose tokens_per_s may be a little more than that.
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

    def noted(self, note: str) -> Decision:
        """Return the decision with a note behind its reason, as far as there is room for it."""
        longer = f"{self.reason}; {note}" if note else self.reason
        return replace(self, reason=longer) if len(longer) <= MOST_WORDS else self

    def policy_row(self, gap: float | None = None) -> PolicyRow:
        """Return the row of a profile; `gap` is what any other tree may at most be faster."""
        low, high = self.speedup_interval
        return PolicyRow(
            batch_size=self.batch_size,
            verdict=self.verdict,
            tree=TreeText(paths=self.tree.paths),
            predicted=Predicted(
                tokens_per_step=_rounded(self.tokens_per_step),
                step_ms=_rounded(self.step_ms),
                tokens_per_s=_rounded(self.tokens_per_s),
                speedup=_rounded(self.speedup),
                speedup_interval=Interval(low=_rounded(low), high=_rounded(high)),
                gap=None if gap is None else _rounded(gap),
            ),
            reason=self.reason,
        )


def _rounded(value: float) -> float:
    """Return `value` to six digits: what rounding hides, no measurement resolves."""
    return float(f"{value:.6g}")


def decide_policy(
    trace: Trace,
    cost: CostModel,
    batch_sizes: Sequence[int],
    *,
    max_nodes: int,
    seed: int,
    setting: SearchSetting | None = None,
    prefer: Preference = "simple",
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
        decision = decide(result, fit, setting.max_token_ms, prefer)
        limit = binding_limit(result, space, setting)
        if limit:
            decision = replace(decision, reason=f"{decision.reason}; {limit}")
        decisions.append(decision)
        if progress is not None:
            progress(f"batch size {batch_size}: {decisions[-1].reason}")
    return tuple(decisions)


def decide(
    result: SearchResult,
    fit: CrossFit,
    max_token_ms: float = math.inf,
    prefer: Preference = "simple",
) -> Decision:
    """Choose among the options of one search; see the module's first lines for the rule.

    `max_token_ms` limits the time per output token of one sequence. At one batch size the fastest
    option has the least, so the limit may rule out a simpler one that would do otherwise.
    """
    options = [fit.option(result.batch_size, trial, most) for trial, most in _kinds(result)]
    return choose(result.batch_size, options, max_token_ms, prefer)


def choose(
    batch_size: int, options: Sequence[Option], max_token_ms: float, prefer: Preference
) -> Decision:
    """Choose among options, simplest first, of which the first is off."""
    # An option slower than a simpler one is never chosen.
    front = [options[0]]
    for option in options[1:]:
        if option.whole_ms < front[-1].whole_ms:
            front.append(option)
    best = front[-1]
    good = [best]
    if prefer == "simple":
        good = [option for option in front if option is best or not best.ratio_to(option).is_gain]
    chosen = next((option for option in good if _token_ms(option) <= max_token_ms), best)
    trial, to_off = chosen.trial, chosen.ratio_to(options[0])
    return Decision(
        batch_size=batch_size,
        verdict=trial.tree.kind,
        tree=trial.tree,
        tokens_per_step=trial.tokens_per_step,
        step_ms=trial.step_ms,
        tokens_per_s=trial.tokens_per_s,
        speedup=to_off.value,
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


def _kinds(result: SearchResult) -> list[tuple[Trial, int]]:
    """Return off, chains up to a length and trees up to a few sizes, simplest first.

    Each with the fastest trial of its kind, and the most nodes of the kind.
    """
    kinds = {result.off: 0}
    chains = [trial for trial in result.trials if trial.tree.is_chain and trial.tree != OFF]
    for longest in sorted({trial.tree.num_nodes for trial in chains}):
        within = [trial for trial in chains if trial.tree.num_nodes <= longest]
        kinds.setdefault(fastest(within), longest)
    trees = [trial for trial in result.trials if not trial.tree.is_chain]
    if result.tree is not None:
        num_nodes = result.tree.tree.num_nodes
        for most in (*(int(share * num_nodes) for share in SMALLER_TREES), num_nodes):
            small = [trial for trial in trees if trial.tree.num_nodes <= most]
            if small:
                kinds.setdefault(fastest(small), most)
    return list(kinds.items())


def _reason(chosen: Option, best: Option, options: Sequence[Option]) -> str:
    """Say what the choice gains over the best option of a simpler kind, and what it leaves out."""
    off = options[0]
    if len(options) == 1:
        return "off: no speculation fits"
    if chosen is off:
        rival = best if best is not chosen else min(options[1:], key=lambda other: other.whole_ms)
        change = f"off: {rival.trial.tree.label} would change speed by {rival.ratio_to(chosen)}"
        if best is chosen:
            return change
        return f"{change}, so maybe not at all; --prefer fast takes it"
    simpler = ("off",) if chosen.trial.tree.is_chain else ("off", "chain")
    rivals = [option for option in options if option.trial.tree.kind in simpler]
    rival = min(rivals, key=lambda option: option.whole_ms)
    gain = chosen.ratio_to(rival)
    text = f"{chosen.trial.tree.label} gains {gain} over {rival.trial.tree.label}"
    if gain.value <= 1:
        text = f"{chosen.trial.tree.label} changes speed by {gain} over {rival.trial.tree.label}"
    text += _because(chosen.trial, rival.trial)
    if not gain.is_gain and chosen is best:
        text += "; maybe it gains nothing, --prefer simple would say so"
    if best is not chosen:
        text += f"; {best.trial.tree.label} would gain {best.ratio_to(chosen)}, so maybe nothing"
    return text


def _because(chosen: Trial, rival: Trial) -> str:
    """Say where a gain comes from; nothing where the trees themselves show none."""
    tokens = chosen.tokens_per_step - rival.tokens_per_step
    step_ms = chosen.step_ms - rival.step_ms
    if chosen.tokens_per_s <= rival.tokens_per_s:
        return ""
    if step_ms < 0:
        fewer = "more" if tokens >= 0 else "fewer"
        return f": a step {digits(-step_ms)} ms shorter, with {digits(abs(tokens))} {fewer} tokens"
    sign = "+" * (tokens >= 0)
    return f": {sign}{digits(tokens)} tokens per step for +{digits(step_ms)} ms"
