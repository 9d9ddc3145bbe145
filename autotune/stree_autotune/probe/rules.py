"""Time what rules cost beyond the greedy one, by rows of logits; no model runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from stree_autotune.probe.plan import Key, even_tree
from stree_autotune.probe.steps import StepSetting, free
from stree_autotune.probe.timing import Timing, Work, captured, time_interleaved
from stree_autotune.store import SEVERAL, RulePoint, StepRule
from stree_core.drafting import ModelRows, Pair, make_plan
from stree_core.engine import Rule, SampledRule, SamplingSupport, make_rules
from stree_core.profile import Sampling
from stree_core.tree import Tree

_MOST_TOKENS = 64
_ONE, _WIDE = Tree.chain(1), even_tree(SEVERAL, SEVERAL)


class _Side(NamedTuple):
    """What is done: draw the root's children or choose after every node, by a rule for a tree."""

    draws: bool
    tree: Tree
    rule: StepRule


_WORKS = {
    "branch": (_Side(True, _WIDE, StepRule.GREEDY), _Side(True, _ONE, StepRule.GREEDY)),
    "draw": (_Side(True, _ONE, StepRule.MSS), _Side(True, _ONE, StepRule.GREEDY)),
    "draw_truncated": (
        _Side(True, _ONE, StepRule.MSS_TRUNCATED),
        _Side(True, _ONE, StepRule.GREEDY),
    ),
    "try": (_Side(False, _ONE, StepRule.MSS), _Side(False, _ONE, StepRule.NAIVE)),
    "tries": (_Side(False, _WIDE, StepRule.MSS), _Side(False, _WIDE, StepRule.NAIVE)),
}
"""What is timed and what it is compared with, one node of each slot in question."""

_SAMPLES = {"sample": StepRule.NAIVE, "sample_truncated": StepRule.NAIVE_TRUNCATED}
"""The same of rules that choose after every node alike."""


def time_rules(pair: Pair, keys: Sequence[Key], setting: StepSetting) -> list[RulePoint]:
    """Time what `keys` (work, rows) name; what has no room is left out, larger steps go by rest."""
    works: dict[tuple[str, int, bool], Work] = {}
    pool = torch.cuda.graph_pool_handle() if pair.device.type == "cuda" else None
    done = []
    with torch.inference_mode():
        logits_RV = torch.randn(1, pair.target.shape.vocab_size, device=pair.device)
        for work, rows in sorted(keys, key=lambda key: int(key[1])):
            try:
                need = rows * (1 if work in _SAMPLES else _WIDE.num_tokens)
                if need > len(logits_RV):
                    logits_RV = torch.randn(need, logits_RV.shape[1], device=pair.device)
                both = [_work(pair, side, slots, logits_RV) for side, slots in _sides(work, rows)]
                more, less = (captured(one, pair.device, pool) for one in both)
            except torch.OutOfMemoryError:
                free(pair.device)
                continue
            works[work, rows, True], works[work, rows, False] = more, less
            done.append((work, rows))
        timings = time_interleaved(works, pair.device, setting.effort, until=setting.until)
        works.clear()
    free(pair.device)
    return [_rule_point(work, rows, timings) for work, rows in done]


def _sides(work: str, rows: int) -> list[tuple[_Side, int]]:
    """Return both sides with their slots."""
    if work not in _SAMPLES:
        return [(side, rows) for side in _WORKS[work]]
    tokens = min(rows, _MOST_TOKENS)
    tree = Tree.chain(tokens - 1)
    return [(_Side(False, tree, s), rows // tokens) for s in (_SAMPLES[work], StepRule.GREEDY)]


def _rule_point(work: str, rows: int, timings: dict[tuple[str, int, bool], Timing]) -> RulePoint:
    more, less = timings[work, rows, True], timings[work, rows, False]
    return RulePoint(
        work,  # type: ignore[arg-type]
        rows,
        max(0.0, more.ms - less.ms),
        more.spread_ms,
    )


def _work(pair: Pair, side: _Side, num_slots: int, logits_RV: Tensor) -> Work:
    """Return one side's work on logits that all share."""
    plan = make_plan(side.tree, frozenset(), ModelRows(frozenset()), pair.device)
    support = SamplingSupport.of(side.rule.sampling)
    (rule,) = make_rules(support, [plan], num_slots, logits_RV.shape[1], pair.target.backend)
    _set_all(rule, side.rule.sampling)
    tokens_TB = torch.zeros(plan.tree.num_tokens, num_slots, dtype=torch.int64, device=pair.device)
    num_nodes = 1 if side.draws else len(tokens_TB)
    logits_NBV = logits_RV[: num_nodes * num_slots].view(num_nodes, num_slots, -1)
    if side.draws:
        return partial(rule.draw, plan.levels[0], logits_NBV, tokens_TB)
    return partial(rule.choose, logits_NBV, tokens_TB)


def _set_all(rule: Rule, sampling: Sampling) -> None:
    """Give every slot the same setting."""
    if isinstance(rule, SampledRule):
        rule.settings.temperature_B.fill_(sampling.temperature)
        rule.settings.top_p_B.fill_(sampling.top_p)
