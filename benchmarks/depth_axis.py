"""How wrong a trace without a depth axis would be about an MTP head.

    python benchmarks/depth_axis.py [TRACE ...]

A head feeds on its own features, so it proposes other tokens at depth 2 of a step than at depth 1
of the next one. The shipped traces of the head hold both. Walked with the ranks of the first depth
alone, as a trace of the first schema would have them, they say what such a trace would predict.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from report import table

from stree_autotune.live.validation import RAGGED
from stree_autotune.trace.file import Trace, load_trace
from stree_autotune.trace.tree_walk import walk
from stree_core.tree import DEFAULT_TREE, Tree

TRACES = Path(__file__).parents[1] / "profiles" / "traces"
TREES = {
    "chain 1": Tree.chain(1), "chain 3": Tree.chain(3), "chain 5": Tree.chain(5),
    "published tree": DEFAULT_TREE, "ragged tree": RAGGED,
}  # fmt: skip


def main() -> None:
    """Print a row for each trace: tokens per step, and the error without the depth axis."""
    paths = [Path(name) for name in sys.argv[1:]] or sorted(TRACES.glob("*--mtp--*.safetensors"))
    rows, errors = [], []
    for path in paths:
        trace = load_trace(path)
        flat = without_depths(trace)
        row: dict[str, object] = {"trace": path.stem}
        for name, tree in TREES.items():
            right, wrong = (walk(each, tree).tokens_per_step for each in (trace, flat))
            row[name] = f"{right:.2f} ({100 * (wrong / right - 1):+.1f} %)"
            if tree.depth > 1:
                errors.append(wrong / right - 1)
        rows.append(row)
    print(table(rows, ("trace", *TREES)), end="")
    print(
        f"trees of several levels: median error {100 * np.median(errors):+.1f} %, "
        f"{100 * min(errors):+.1f} to {100 * max(errors):+.1f} %"
    )


def without_depths(trace: Trace) -> Trace:
    """Return what a trace of the first schema would hold of the same draft."""
    meta = trace.meta.model_copy(update={"schema_version": 1, "depths": 1})
    return Trace(np.ascontiguousarray(trace.ranks_ND[:, 0]), trace.offsets, meta)


if __name__ == "__main__":
    main()
