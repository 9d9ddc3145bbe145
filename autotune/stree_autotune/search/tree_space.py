"""The trees that one trace chooses for every cell: depth cap, width cap and number of nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from stree_autotune.search.path_counts import PathIndex, index_paths
from stree_autotune.search.tree_solver import (
    MAX_DEPTH,
    GrownTree,
    solve,
    solve_depths,
    sub_tree,
)
from stree_autotune.trace import FlatTrace, Ints, Trace, walk, walk_nested
from stree_core.errors import ConfigError
from stree_core.tree import MAX_NODES, Tree

WIDTHS = (1, 2, 3, 4, 6, 8, 16)


@dataclass(frozen=True, slots=True)
class Cell:
    """What Optuna chooses; the inner solver finds the tree."""

    depth: int
    width: int
    num_nodes: int

    @classmethod
    def of(cls, tree: Tree) -> Cell:
        """Return the tightest cell that holds `tree`."""
        return cls(tree.depth, tree.max_children, tree.num_nodes)


@dataclass(frozen=True, eq=False)
class TreeSpace:
    """The trees of one trace: each cell solved once, each tree walked once for all batch sizes."""

    flat: FlatTrace
    index: PathIndex
    max_nodes: int
    solved: dict[Cell, Tree] = field(default_factory=dict)
    walked: dict[Tree, float] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: Trace, max_nodes: int, prompts: Ints | None = None) -> TreeSpace:
        """Index a trace, or the prompts with the given indices, for trees up to `max_nodes` nodes.

        Raises ConfigError when max_nodes is out of range.
        """
        if not 1 <= max_nodes <= MAX_NODES:
            raise ConfigError(
                f"max_nodes must lie between 1 and {MAX_NODES}, got {max_nodes}; change --max-nodes"
            )
        flat = FlatTrace.of(trace, prompts)
        return cls(flat, index_paths(flat, max_nodes=max_nodes, max_depth=MAX_DEPTH), max_nodes)

    @property
    def max_depth(self) -> int:
        """The deepest level that is searched: the trace's where it has a depth axis."""
        return min(MAX_DEPTH, self.flat.max_depth)

    @property
    def widths(self) -> tuple[int, ...]:
        """The width caps that the trace can tell apart."""
        return tuple(width for width in WIDTHS if width <= self.flat.num_children)

    def solve(self, cell: Cell) -> Tree:
        """Return the cell's tree; it may have fewer nodes when the caps leave no room for more."""
        if cell not in self.solved:
            self.solved[cell] = self._solve(cell)
        return self.solved[cell]

    def _solve(self, cell: Cell) -> Tree:
        if cell.width == 1 or cell.num_nodes <= 1:
            return Tree.chain(min(cell.depth, cell.num_nodes))
        found = solve(self.index, depth=cell.depth, width=cell.width, num_nodes=cell.num_nodes)
        self.walked[found.grown.tree] = found.tokens_per_step
        return found.grown.tree

    def tokens_per_step(self, tree: Tree) -> float:
        """Return the exact tokens per step of a tree on this trace."""
        if tree not in self.walked:
            self.walked[tree] = walk(self.flat, tree).tokens_per_step
        return self.walked[tree]

    @cached_property
    def survey(self) -> tuple[tuple[Cell, Tree], ...]:
        """Every size of one grown tree per depth cap, walked: the picks that trials start from."""
        depths, width = range(1, self.max_depth + 1), self.widths[-1]
        found = solve_depths(self.index, depths, width=width, num_nodes=self.max_nodes)
        trees: dict[bytes, Tree] = {}
        picks = []
        for depth, solved in zip(depths, found, strict=True):
            nested = self._nested(solved.grown, trees)
            new = {size: tree for size, tree in nested.items() if tree not in self.walked}
            grown = solved.grown
            values = walk_nested(self.flat, grown.tree, grown.added, list(new))
            self.walked.update(zip(new.values(), values.tolist(), strict=True))
            picks += [(Cell(depth, width, size), tree) for size, tree in nested.items()]
        return tuple(picks)

    def _nested(self, grown: GrownTree, trees: dict[bytes, Tree]) -> dict[int, Tree]:
        """Return the trees that a grown one passed through, by size; `trees` are those made yet."""
        nested = {}
        added = np.array(grown.added)
        for size in range(1, len(added)):
            paths = grown.paths[added <= size]
            key = paths.tobytes()
            if key not in trees:
                trees[key] = sub_tree(self.index.parents, paths)
            nested[size] = trees[key]
        return nested
