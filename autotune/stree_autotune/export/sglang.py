"""SGLang: a launch command, and the JSON of `--speculative-adaptive-config`, as of August 2026.

Read from sglang/srt: arg_groups/speculative_hook.py and speculative/adaptive_spec_params.py. Of
`--speculative-num-draft-tokens` the root counts as one; with `--speculative-eagle-topk` 1 it is
`--speculative-num-steps` + 1. SGLang grows its trees by the draft's scores, another one in every
step, so that a shape cannot be given; only one step of top-k W is the same W children every time.
The target's own MTP head is the algorithm NEXTN, which needs no draft's path and counts as EAGLE.
"""

from __future__ import annotations

import json
import shlex

from stree_autotune.export.deployment import (
    LONGEST_CHAIN,
    Deployment,
    Exported,
    chains,
    comments,
    ranges,
    stars,
)
from stree_core.tree import Tree

WIDEST_STAR = 16
ALGORITHMS = {"draft_model": "STANDALONE", "mtp": "NEXTN"}

ONE_NOTE = (
    "SGLang has one setting for all batch sizes and takes no tree shape, so this is the best over "
    "the profile's batch sizes of off, chains and trees of one level"
)
CHAINS_NOTE = (
    "SGLang adapts chains, so a tree gives way to the fastest chain of up to 8 tokens, or off"
)
STANDALONE_NOTE = (
    "SGLang adapts EAGLE and EAGLE3 drafts only; with STANDALONE, the algorithm of a draft model "
    "of its own, it warns and keeps --speculative-num-steps"
)


def export_sglang(deployment: Deployment) -> Exported:
    """Return a shell script that launches the server and passes further flags on.

    One setting serves all batch sizes; raises NoFeasibleTree where off is the best of them.
    """
    tree = deployment.one_setting(can_say, [*chains(LONGEST_CHAIN), *stars(WIDEST_STAR)])
    notes = deployment.changes({row.batch_size: tree for row in deployment.rows}, ONE_NOTE)
    notes += deployment.rule_note("SGLang")
    flags = {
        "--model-path": deployment.target,
        "--speculative-algorithm": ALGORITHMS.get(deployment.method, deployment.method.upper()),
        **(
            {"--speculative-draft-model-path": deployment.draft}
            if deployment.drafts_with_model
            else {}
        ),
        "--speculative-num-steps": tree.depth,
        "--speculative-eagle-topk": tree.max_children,
        "--speculative-num-draft-tokens": tree.num_tokens,
    }
    parts = [f"{flag} {shlex.quote(str(value))}" for flag, value in flags.items()]
    command = " \\\n  ".join(["exec python -m sglang.launch_server", *parts, '"$@"'])
    head = comments([deployment.title, *notes])
    return Exported(f"#!/bin/sh\n{head}{command}\n".encode(), notes)


def can_say(tree: Tree) -> bool:
    """True for off, chains and stars."""
    return tree.is_chain or tree.depth == 1


def export_sglang_adaptive(deployment: Deployment) -> Exported:
    """Return steps by batch size, one candidate each: the lower bounds of ranges are the keys.

    Raises NoFeasibleTree where off is best throughout.
    """
    chosen = deployment.chains()
    config = {
        str(first): {"candidate_steps": [tree.num_nodes]} for first, _, tree in ranges(chosen)
    }
    most = max(tree.num_nodes for tree in chosen.values())
    notes = (
        *deployment.changes(chosen, CHAINS_NOTE),
        *deployment.rule_note("SGLang"),
        "pass it with --speculative-adaptive --speculative-adaptive-config FILE "
        f"--speculative-eagle-topk 1 --speculative-num-steps {most}",
    )
    if deployment.method == "draft_model":
        notes += (STANDALONE_NOTE,)
    return Exported((json.dumps(config) + "\n").encode(), notes)
