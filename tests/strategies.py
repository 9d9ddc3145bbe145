"""Hypothesis strategies that several tests share."""

from __future__ import annotations

from hypothesis import strategies as st

from stree_core.tree import Tree


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 24, max_depth: int = 8, min_nodes: int = 0) -> Tree:
    """Draw a tree, grown by hanging one next-ranked child at a time under any node in reach."""
    paths: list[tuple[int, ...]] = [()]
    children: dict[tuple[int, ...], int] = {}
    for _ in range(draw(st.integers(min_nodes, max_nodes))):
        parent = draw(st.sampled_from([path for path in paths if len(path) < max_depth]))
        rank = children.get(parent, 0)
        children[parent] = rank + 1
        paths.append((*parent, rank))
    return Tree.from_paths(paths[1:])
