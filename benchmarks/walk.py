"""How many trees of 32 nodes a second the exact walk evaluates on a trace of 100k tokens.

Once with a rank for each position, and once with a depth axis of 8.

The trees are those that refinement tries, each a leaf or two from the present one, with more of
them at a time than tuning asks for, so that what a step does once counts little.

    python benchmarks/walk.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from stree_autotune.search import tree_solver
from stree_autotune.search.path_counts import index_paths
from stree_autotune.search.tree_solver import refine, solve
from stree_autotune.trace.tree_walk import FlatTrace, walk
from stree_core.tree import Tree

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from synthetic import latent_trace, with_depths

NUM_NODES, DEPTHS = 32, 8
SINGLE_WALKS = 20


def main() -> None:
    """Time both kinds of traces, which say the same of trees of up to DEPTHS levels."""
    tree_solver.MAX_ADDS, tree_solver.MAX_DROPS, tree_solver.MAX_SWAPS = 20, 16, 256
    trace = latent_trace(0, num_prompts=880, phi=0.5, prompt_sd=0.5)
    for depths, kind in ((1, trace), (DEPTHS, with_depths(trace, DEPTHS))):
        print(f"{depths} depths: {timed(FlatTrace.of(kind))}")


def timed(flat: FlatTrace) -> str:
    """Time refinement from a tree that leaves it much to do, and single walks."""
    index = index_paths(flat, max_nodes=NUM_NODES, max_depth=DEPTHS)
    good = solve(index, depth=DEPTHS, width=10, num_nodes=NUM_NODES).grown.tree
    tried: list[Tree] = []

    def objective(tree: Tree, tokens_per_step: float) -> float:
        tried.append(tree)
        return tokens_per_step

    started = time.process_time()
    refine(flat, good, objective, max_nodes=NUM_NODES, max_depth=DEPTHS)
    together = len(tried) / (time.process_time() - started)
    started = time.process_time()
    for _ in range(SINGLE_WALKS):
        walk(flat, good)
    alone = SINGLE_WALKS / (time.process_time() - started)
    return (
        f"{flat.num_positions} positions, trees of {NUM_NODES} nodes: {together:.0f} trees per "
        f"CPU second side by side ({len(tried)} tried), {alone:.0f} one by one"
    )


if __name__ == "__main__":
    main()
