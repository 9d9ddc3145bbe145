"""NVIDIA's tools: speculation_profile.json, and flags of aiconfigurator and of Dynamo's mocker.

The profile of a draft (Model-Optimizer, examples/specdec_bench, schema 1.0) has lengths per step
that count the bonus token; aiconfigurator's `--nextn-accepted` does not. Rates are marginal or
conditional and say which. All speak of chains.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

import numpy as np

from stree_autotune.export.deployment import LONGEST_CHAIN, Deployment, Exported, chains, comments
from stree_autotune.store import PairWords, trace_command
from stree_autotune.trace import RATES, conditional_rates, emitted_per_step, marginal_rates, walk
from stree_core.errors import MissingMeasurement
from stree_core.profile import ModelRef
from stree_core.tree import Tree

DIGITS = 6
TOLERANCE = 0.02
LONGEST_NEXTN = 5
"""The most draft tokens that Dynamo's mocker simulates, and aiconfigurator's successor as well."""

CHAIN_NOTE = (
    "these flags are one chain of up to 5 tokens for all batch sizes, the best over the profile's"
)


def export_speculation_profile(deployment: Deployment) -> Exported:
    """Return how good the draft is, whatever the verdict: chains of 1 to 8 tokens, all walked.

    Every length was walked by itself, so `accept_length_model` is measured_per_k. Raises
    MissingMeasurement for borrowed or typed acceptance: the file speaks of this very draft.
    """
    if deployment.profile.sources.trace.status != "measured":
        profile = deployment.profile
        typed = profile.sources.trace.name == RATES
        made, dataset = ("typed", "mine") if typed else ("borrowed", profile.dataset)
        words = PairWords(deployment.target, deployment.draft)
        command = trace_command(words, dataset, profile.sampling)
        raise MissingMeasurement(
            "speculation_profile.json says what was measured of this draft, and this profile's "
            f"acceptance is {made}; record a trace of the pair with `{command}` and tune again"
        )
    longest = min(LONGEST_CHAIN, deployment.trace.meta.max_depth)
    lengths = range(1, longest + 1)
    by_k = {k: walk(deployment.trace, Tree.chain(k)).tokens_per_step for k in lengths}
    content = {
        "schema_version": "1.0",
        "measured": True,
        "method": deployment.method,
        "draft_checkpoint": _checkpoint(deployment.profile.draft),
        "target_model": _checkpoint(deployment.profile.target),
        "num_speculative_tokens": longest,
        "block_size": None,
        "max_supported_k": longest,
        "verification_method": "longest_prefix",
        **_acceptance(deployment, longest),
        "accept_length_model": "measured_per_k",
        "accept_length_by_k": {str(k): round(length, DIGITS) for k, length in by_k.items()},
        "per_category": None,
        "measurement_conditions": _conditions(deployment),
    }
    return Exported((json.dumps(content, indent=2) + "\n").encode())


def _acceptance(deployment: Deployment, longest: int) -> dict[str, Any]:
    """Return the rates and lengths of the longest chain, and the schema's two checks of them."""
    trace, chain = deployment.trace, Tree.chain(longest)
    result, emitted = walk(trace, chain), emitted_per_step(trace, chain)
    marginals = [round(rate, DIGITS) for rate in marginal_rates(trace, longest)]
    conditionals = conditional_rates(marginal_rates(trace, longest))
    spoken = result.starts_P > 0
    per_request = float((result.positions_P[spoken] / result.starts_P[spoken]).mean())
    implied, mean = 1 + sum(marginals), result.tokens_per_step
    rises = [
        {"position": i, "value": marginals[i], "previous": marginals[i - 1]}
        for i in range(1, len(marginals))
        if marginals[i] > marginals[i - 1]
    ]
    return {
        "conditional_accept_rates": [round(rate, DIGITS) for rate in conditionals],
        "marginal_accept_rates": marginals,
        "mean_accept_length": round(mean, DIGITS),
        "mean_accept_length_per_request": round(per_request, DIGITS),
        "acceptance_length_histogram": {
            str(length): int((emitted == length).sum()) for length in np.unique(emitted).tolist()
        },
        "validation": {
            "mean_consistency": {
                "implied_mean_accept_length": round(implied, DIGITS),
                "reported_mean_accept_length": round(mean, DIGITS),
                "abs_delta": round(abs(implied - mean), DIGITS),
                "tolerance": TOLERANCE,
                "passed": abs(implied - mean) <= TOLERANCE,
            },
            "marginal_monotonicity": {"passed": not rises, "violations": rises},
        },
    }


def _checkpoint(model: ModelRef) -> dict[str, Any]:
    return {"name": model.name, "config_sha256": model.config_sha256}


def _conditions(deployment: Deployment) -> dict[str, Any]:
    meta = deployment.trace.meta
    return {
        "dataset": meta.dataset,
        "num_prompts": meta.num_prompts,
        "max_new_tokens": meta.max_new_tokens,
        "temperature": meta.sampling.temperature,
        "top_p": meta.sampling.top_p,
        "rule": meta.sampling.rule,
        "dtype": meta.dtype,
        "seed": meta.seed,
        "engine": "stree",
        "trace_sha256": deployment.profile.sources.trace.sha256,
    }


def export_aiconfigurator(deployment: Deployment) -> Exported:
    """Return `--nextn K --nextn-accepted A`: accepted draft tokens per step, bonus not counted."""
    tree, notes = _short_chain(deployment)
    accepted = deployment.acceptance.tokens_per_step(tree) - 1
    flags = f"--nextn {tree.num_nodes} --nextn-accepted {round(accepted, DIGITS)}"
    return _flags(deployment, flags, notes)


def export_dynamo(deployment: Deployment) -> Exported:
    """Return `--ais-nextn K --ais-nextn-accept-rates C` for Dynamo's mocker, rates conditional."""
    tree, notes = _short_chain(deployment)
    rates = conditional_rates(deployment.acceptance.rates(tree.num_nodes))
    text = ",".join(f"{round(rate, DIGITS):g}" for rate in rates)
    flags = f"--ais-nextn {tree.num_nodes} --ais-nextn-accept-rates {shlex.quote(text)}"
    return _flags(deployment, flags, notes)


def _short_chain(deployment: Deployment) -> tuple[Tree, tuple[str, ...]]:
    """Return the one chain of at most five tokens to simulate, and what that changes."""
    tree = deployment.one_setting(
        lambda tree: tree.is_chain and tree.num_nodes <= LONGEST_NEXTN, chains(LONGEST_NEXTN)
    )
    return tree, deployment.changes({row.batch_size: tree for row in deployment.rows}, CHAIN_NOTE)


def _flags(deployment: Deployment, flags: str, notes: tuple[str, ...]) -> Exported:
    return Exported((comments([deployment.title, *notes]) + flags + "\n").encode(), notes)
