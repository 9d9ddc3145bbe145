"""Which rows a draft runs for a tree, in which order, and which of them an accepted path replays.

A draft of its own kind of state says so by a layout; the tree's tables are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from stree_core.tree import Tree


@dataclass(frozen=True, slots=True)
class DraftRows:
    """The rows of one tree.

    `parents` are those of the rows' block, `row_of` names the row of every node with children, and
    `paths` has for each node the rows that are replayed when it is the last accepted. Where a tree
    has no nodes, and the draft takes no part in its steps, all are empty.
    """

    parents: list[int]
    row_of: dict[int, int]
    paths: list[list[int]]


class DraftLayout(Protocol):
    """How a draft orders its rows."""

    @property
    def conv_widths(self) -> frozenset[int]:
        """Widths of the convolutions that its rows pass."""

    def rows(self, tree: Tree) -> DraftRows:
        """Return the rows for a tree; the root is in the first level's pass, whose row 0 is."""


@dataclass(frozen=True, slots=True)
class ModelRows:
    """Rows of a model: the token before the root, the root, every other node with children.

    The model runs the token before the root again in every step: its last accepted token may be a
    leaf, which it never saw, and running one row more costs a launch-bound pass nothing.
    """

    conv_widths: frozenset[int]

    def rows(self, tree: Tree) -> DraftRows:
        """Return the rows for a tree."""
        if not tree.num_nodes:
            return DraftRows([], {}, [])
        inner = _inner_nodes(tree)
        row_of = {node: 1 + i for i, node in enumerate(inner)}
        parents = [-1, 0, *(row_of[tree.parents[node]] for node in inner[1:])]
        paths = [[0, *(row_of[node] for node in path[:-1])] for path in tree.node_paths]
        return DraftRows(parents, row_of, paths)


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Rows of an MTP head: a row is a token and what came before it, the root's is the first.

    What an accepted path leaves behind is filed anew, in order, so it is replayed from row 0 on:
    the last row is there for an accepted leaf. Steps without speculation file the root's row.
    """

    conv_widths: frozenset[int] = frozenset()

    def rows(self, tree: Tree) -> DraftRows:
        """Return the rows for a tree."""
        inner = _inner_nodes(tree) or [0]
        row_of = {node: i for i, node in enumerate(inner)}
        parents = [-1, *(row_of[tree.parents[node]] for node in inner[1:]), 0]
        return DraftRows(parents, row_of, [list(range(depth + 1)) for depth in tree.depths])


def _inner_nodes(tree: Tree) -> list[int]:
    return [node for node in range(tree.num_tokens) if tree.children[node]]
