"""vLLM: the JSON of `--speculative-config`, read from vllm/config/speculative.py of 0.28.

A step drafts a chain of K tokens, the bonus token not counted; token trees were removed in 2026.
`num_speculative_tokens_per_batch_size` holds [first, last, K], both ends included, starting at 1; K
is at most `num_speculative_tokens`, and above the last range the last K stays in use. Drafts are
the likeliest tokens unless `draft_sample_method` is probabilistic. The target's own head is the
method `mtp`, without a model.
"""

from __future__ import annotations

import json
from typing import Any

from stree_autotune.export.deployment import Deployment, Exported, ranges
from stree_core.tree import Tree

RATE_DIGITS = 6

CHAINS_NOTE = (
    "vLLM drafts chains, so a tree gives way to the fastest chain of up to 8 tokens, or off"
)
SYNTHETIC_NOTE = (
    "vLLM accepts draft tokens at random with these rates, whatever they are: for measuring speed, "
    "never for serving"
)
TABLE_NOTE = (
    "vLLM tests the table with EAGLE and DFlash drafts, drops it under data parallelism, and "
    "captures whole CUDA graphs for it with model runner V2 only"
)


def export_vllm(deployment: Deployment) -> Exported:
    """Return the config to serve with; raise NoFeasibleTree where off is best throughout."""
    chosen = deployment.chains()
    config = _config(deployment, chosen)
    notes = deployment.changes(chosen, CHAINS_NOTE)
    if "num_speculative_tokens_per_batch_size" in config:
        notes += (TABLE_NOTE,)
    return Exported(_line(config), notes)


def export_vllm_synthetic(deployment: Deployment) -> Exported:
    """Return the config that replays the profile's acceptance, for benchmarks on any GPU.

    The rates are marginal, those of the longest chain in the config.
    """
    chosen = deployment.chains()
    config = _config(deployment, chosen)
    rates = deployment.acceptance.rates(config["num_speculative_tokens"])
    config["rejection_sample_method"] = "synthetic"
    config["synthetic_acceptance_rates"] = [round(rate, RATE_DIGITS) for rate in rates]
    return Exported(_line(config), (*deployment.changes(chosen, CHAINS_NOTE), SYNTHETIC_NOTE))


def _config(deployment: Deployment, chosen: dict[int, Tree]) -> dict[str, Any]:
    config: dict[str, Any] = {"method": deployment.method}
    if deployment.drafts_with_model:
        config["model"] = deployment.draft
    config["num_speculative_tokens"] = max(tree.num_nodes for tree in chosen.values())
    if deployment.profile.sampling.rule == "mss":
        config["draft_sample_method"] = "probabilistic"
    table = [[first, last, tree.num_nodes] for first, last, tree in ranges(chosen)]
    if len(table) > 1:
        config["num_speculative_tokens_per_batch_size"] = table
    return config


def _line(config: dict[str, Any]) -> bytes:
    return (json.dumps(config) + "\n").encode()
