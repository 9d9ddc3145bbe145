"""What the time of a step depends on of its tree."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

from stree_core.tree import Tree

FEWEST_ROWS = 2
"""Rows of a draft's block before the first level below the root: the predecessor and the root."""


class TreeShape(NamedTuple):
    """What the time of a step depends on.

    `widths`: inner nodes of every level below the root that has any; each is one draft pass.
    `rows`: for each of these passes the rows of the draft's block up to its last one.
    `branching`: inner nodes of every level, root included, on which some node has several children.
    `num_inner`: all nodes with children, the root included; `most_children`: of one node.
    """

    num_tokens: int
    depth: int
    widths: tuple[int, ...]
    rows: tuple[int, ...]
    branching: tuple[int, ...]
    num_inner: int
    most_children: int


@lru_cache(maxsize=1 << 14)
def shape_of(tree: Tree) -> TreeShape:
    """Return the shape of a tree that has nodes."""
    inner: list[int] = []
    branching: list[bool] = []
    children = [0] * tree.num_tokens
    for parent in tree.parents[1:]:
        children[parent] += 1
    for count, depth in zip(children, tree.depths, strict=True):
        if count == 0:
            continue
        if depth == len(inner):
            inner.append(0)
            branching.append(False)
        inner[depth] += 1
        branching[depth] |= count > 1
    wide = tuple(width for width, several in zip(inner, branching, strict=True) if several)
    rows = tuple(FEWEST_ROWS + total for total in itertools.accumulate(inner[1:]))
    most = max(children)
    return TreeShape(tree.num_tokens, tree.depth, tuple(inner[1:]), rows, wide, sum(inner), most)
