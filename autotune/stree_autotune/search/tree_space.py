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
FEWEST_SURVEYED = 16
"""Sizes of a grown tree that are walked at once; from there on twice as many as before."""


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


@dataclass(frozen=True, slots=True, eq=False)
class _Cap:
    """The tree that was grown under a depth cap, and its beginnings that were walked, by size."""

    depth: int
    grown: GrownTree
    trees: list[Tree]


@dataclass(frozen=True, eq=False)
class TreeSpace:
    """The trees of one trace: each cell solved once, each tree walked once for all batch sizes.

    `nested` are beginnings of grown trees, by their paths.
    """

    flat: FlatTrace
    index: PathIndex
    max_nodes: int
    solved: dict[Cell, Tree] = field(default_factory=dict)
    walked: dict[Tree, float] = field(default_factory=dict)
    nested: dict[bytes, Tree] = field(default_factory=dict)

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
        return self.surveyed(self.max_nodes)

    def surveyed(self, most_nodes: int) -> tuple[tuple[Cell, Tree], ...]:
        """Return the survey up to a number of nodes; larger trees are not walked before asked."""
        wanted = max(FEWEST_SURVEYED, 1 << max(0, most_nodes - 1).bit_length())
        for cap in self._caps:
            self._extend(cap, wanted)
        width = self.widths[-1]
        return tuple(
            (Cell(cap.depth, width, size), tree)
            for cap in self._caps
            for size, tree in enumerate(cap.trees[:most_nodes], start=1)
        )

    @cached_property
    def _caps(self) -> tuple[_Cap, ...]:
        depths = range(1, self.max_depth + 1)
        found = solve_depths(self.index, depths, width=self.widths[-1], num_nodes=self.max_nodes)
        return tuple(
            _Cap(depth, solved.grown, []) for depth, solved in zip(depths, found, strict=True)
        )

    def _extend(self, cap: _Cap, most_nodes: int) -> None:
        """Walk the next sizes of a cap's tree, up to a number of nodes."""
        grown, first = cap.grown, len(cap.trees) + 1
        added = np.array(grown.added)
        for size in range(first, min(most_nodes + 1, len(added))):
            paths = grown.paths[added <= size]
            key = paths.tobytes()
            if key not in self.nested:
                self.nested[key] = sub_tree(self.index.parents, paths)
            cap.trees.append(self.nested[key])
        new = {tree: tree.num_nodes for tree in cap.trees[first - 1 :] if tree not in self.walked}
        if new:
            values = walk_nested(self.flat, grown.tree, grown.added, list(new.values()))
            self.walked.update(zip(new, values.tolist(), strict=True))
