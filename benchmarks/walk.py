"""How many trees of 32 nodes a second the exact walk evaluates on a trace of 100k tokens.

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
from synthetic import latent_trace

NUM_NODES = 32
SINGLE_WALKS = 20


def main() -> None:
    """Time refinement from a tree that leaves it much to do, and single walks."""
    flat = FlatTrace.of(latent_trace(0, num_prompts=880, phi=0.5, prompt_sd=0.5))
    index = index_paths(flat, max_nodes=NUM_NODES, max_depth=10)
    good = solve(index, depth=10, width=10, num_nodes=NUM_NODES).grown.tree
    tried: list[Tree] = []
    tree_solver.MAX_ADDS, tree_solver.MAX_DROPS, tree_solver.MAX_SWAPS = 20, 16, 256

    def objective(tree: Tree, tokens_per_step: float) -> float:
        tried.append(tree)
        return tokens_per_step

    started = time.process_time()
    refine(flat, good, objective, max_nodes=NUM_NODES)
    together = len(tried) / (time.process_time() - started)
    started = time.process_time()
    for _ in range(SINGLE_WALKS):
        walk(flat, good)
    alone = SINGLE_WALKS / (time.process_time() - started)
    print(
        f"{flat.num_positions} positions, trees of {NUM_NODES} nodes: {together:.0f} trees per "
        f"CPU second side by side ({len(tried)} tried), {alone:.0f} one by one"
    )


if __name__ == "__main__":
    main()
