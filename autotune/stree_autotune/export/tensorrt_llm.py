"""TensorRT-LLM: the `speculative_config` of its YAML, read from llmapi/llm_args.py of 1.3.

A draft model of its own (`Draft_Target`) drafts chains only, and so does the target's own head
(`MTP`). `draft_len_schedule` maps the last batch size of a range to its draft tokens, bonus token
not counted; the smallest key must carry `max_draft_len`, no value may be larger, and above the
largest key there is no speculation. Up to 1.2 a key was the first batch size of its range instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from stree_autotune.export.deployment import (
    LONGEST_CHAIN,
    Deployment,
    Exported,
    chains,
    comments,
    ranges,
)
from stree_core.tree import OFF, Tree

CHAINS_NOTE = (
    "TensorRT-LLM drafts chains, none longer than that of the smallest batch size, so these are "
    "the fastest of such schedules"
)
KEYS_NOTE = (
    "the keys of draft_len_schedule are the last batch sizes of their ranges, as of TensorRT-LLM "
    "1.3; above the largest one it does not speculate"
)


def export_tensorrt_llm(deployment: Deployment) -> Exported:
    """Return the YAML; raise NoFeasibleTree where decoding without speculation is fastest."""
    chosen = longest_first(deployment, deployment.chains())
    schedule = {last: tree.num_nodes for _, last, tree in ranges(chosen)}
    longest = max(schedule.values())
    config: dict[str, object] = {"decoding_type": "MTP", "max_draft_len": longest}
    if deployment.method != "mtp":
        config |= {"decoding_type": "Draft_Target", "speculative_model": deployment.draft}
    notes = deployment.changes(chosen, CHAINS_NOTE) + deployment.rule_note("TensorRT-LLM")
    if len(schedule) > 1:
        config["draft_len_schedule"] = schedule
        notes += (KEYS_NOTE,)
    head = comments([deployment.title, *notes])
    text = head + yaml.safe_dump({"speculative_config": config}, sort_keys=False)
    return Exported(text.encode(), notes)


def longest_first(deployment: Deployment, chosen: Mapping[int, Tree]) -> dict[int, Tree]:
    """Return `chosen`, or where a later row has a longer chain the best schedule that is valid.

    For every longest length the first row takes it, and a row above it the fastest shorter chain.
    """
    first, *later = chosen.values()
    if all(tree.num_nodes <= first.num_nodes for tree in later):
        return dict(chosen)
    options = [dict.fromkeys(chosen, OFF)]
    tried = min(LONGEST_CHAIN, deployment.acceptance.max_depth)
    for longest in range(1, max(tried, *(tree.num_nodes for tree in later)) + 1):
        options.append(_capped(deployment, chosen, longest))
    best = max(options, key=deployment.mean_log_rate)
    if best == options[0]:
        raise deployment.nothing_to_set()
    return best


def _capped(deployment: Deployment, chosen: Mapping[int, Tree], longest: int) -> dict[int, Tree]:
    """Return the schedule that starts with `longest` and has nothing longer."""
    first = deployment.rows[0].batch_size
    capped = {first: Tree.chain(longest)}
    for row in deployment.rows[1:]:
        tree = chosen[row.batch_size]
        fits = tree.num_nodes <= longest
        capped[row.batch_size] = tree if fits else deployment.best(chains(longest), (row,))
    return capped
