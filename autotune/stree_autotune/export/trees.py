"""Static trees: the list of paths that Medusa and EAGLE-1 read, and Sequoia's growmap.

Each holds one tree: that of `--batch-size`, or of batch size 1 when none is named.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace

from stree_autotune.export.deployment import LONGEST_CHAIN, Deployment, Exported, chains, stars
from stree_core.tree import Tree

TOP_K = 10
"""The children per node that Medusa's and EAGLE-1's code has room for, its constant TOPK."""

WIDTH_NOTE = (
    "Medusa and EAGLE-1 have room for 10 children per node, so this is the fastest of the tree's "
    "own narrow part, chains and trees of one level"
)


def export_choices(deployment: Deployment) -> Exported:
    """Return paths of child ranks without the root, `[[0], [1], [0, 0]]`, parents first.

    Source: medusa/model/medusa_choices.py, eagle/model/choices.py. A wider tree gives way to the
    fastest of its own narrow part, chains and stars.
    """
    deployment = _one_row(deployment)
    own = deployment.rows[0].tree.build()
    narrow = Tree.from_paths(path for path in own.paths if max(path) < TOP_K)
    tree = deployment.one_setting(
        lambda tree: tree.max_children <= TOP_K,
        [*chains(LONGEST_CHAIN), *stars(TOP_K), narrow],
    )
    notes = deployment.changes({deployment.rows[0].batch_size: tree}, WIDTH_NOTE)
    return Exported((json.dumps(tree.paths) + "\n").encode(), notes)


def export_sequoia(deployment: Deployment) -> Exported:
    """Return Sequoia's growmap: a torch file of lists, integers and integer tensors alone.

    Source: tree_search.py of Infini-AI-Lab/Sequoia. Nodes are numbered breadth-first, the root
    counts. `roots` are the nodes of each level, `branches` their numbers of children, `Successors`
    the children of every node, `mask` is 1 where the column is the row's ancestor or itself.
    """
    import torch

    deployment = _one_row(deployment)
    tree = deployment.one_setting(lambda _: True, ())
    growmap = {
        "roots": [list(level) for level in tree.levels],
        "branches": [[len(tree.children[node]) for node in level] for level in tree.levels],
        "Successors": [list(children) for children in tree.children],
        "mask": torch.tensor(tree.mask.tolist(), dtype=torch.long),
        "depth": torch.tensor(tree.depths, dtype=torch.long),
        "size": tree.num_tokens,
    }
    file = io.BytesIO()
    torch.save(growmap, file)
    return Exported(file.getvalue())


def _one_row(deployment: Deployment) -> Deployment:
    return replace(deployment, batch_size=deployment.batch_size or 1)
