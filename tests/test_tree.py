"""The tree: equal shapes are equal trees, and derived arrays agree with the paths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st
from strategies import trees

from stree_core.errors import TreeError
from stree_core.tree import DEFAULT_TREE, MAX_NODES, Tree


@given(tree=trees(), data=st.data())
def test_paths_round_trip_in_any_order(tree: Tree, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(tree.paths))
    assert Tree.from_paths(shuffled) == tree
    assert Tree(tree.parents) == tree
    assert hash(Tree.from_paths(shuffled)) == hash(tree)


@given(tree=trees())
def test_mask_is_the_ancestor_closure(tree: Tree) -> None:
    parents = np.zeros((tree.num_tokens, tree.num_tokens), dtype=np.int64)
    for node, parent in enumerate(tree.parents[1:], start=1):
        parents[node, parent] = 1
    reach = np.linalg.matrix_power(parents + np.eye(tree.num_tokens, dtype=np.int64), 16) > 0
    assert np.array_equal(tree.mask, reach)


@given(tree=trees())
def test_derived_values_agree_with_the_paths(tree: Tree) -> None:
    paths = ((), *tree.paths)
    assert tree.depths == tuple(map(len, paths))
    assert tree.depth == max(map(len, paths))
    assert tree.num_nodes == len(paths) - 1 == tree.num_tokens - 1
    assert tree.ranks[1:] == tuple(path[-1] for path in paths[1:])
    for node, path in enumerate(paths):
        wanted = [i for i, other in enumerate(paths) if other[:-1] == path and other]
        assert list(tree.children[node]) == wanted
        assert tree.node_paths[node] == tuple(paths.index(path[:d]) for d in range(len(path) + 1))
    assert [n for level in tree.levels for n in level] == list(range(tree.num_tokens))
    assert tree.max_children == max(map(len, tree.children))
    assert tree.is_chain == all(set(path) <= {0} for path in paths)


def test_number_of_trees_up_to_four_nodes() -> None:
    # plane trees with n edges are counted by the Catalan numbers 1, 1, 2, 5, 14
    for num_nodes, count in enumerate([1, 1, 2, 5, 14]):
        candidates = itertools.product(range(num_nodes), repeat=num_nodes)
        found = set()
        for parents in candidates:
            try:
                found.add(Tree((-1, *parents)))
            except TreeError:
                continue
        assert len(found) == count


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ((), "starts with its root"),
        ((0, 0), "starts with its root"),
        ((-1, 1), "node 1 has parent 1"),
        ((-1, 2, 1), "node 1 has parent 2"),
        ((-1, 0, 1, 0), "node 3 has parent 0"),
        ((-1, -1), "node 1 has parent -1"),
        (tuple(range(-1, MAX_NODES + 1)), "at most 255 nodes, got 256"),
    ],
)
def test_bad_parents(parents: tuple[int, ...], message: str) -> None:
    with pytest.raises(TreeError, match=message):
        Tree(parents)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([[]], "child ranks from 0"),
        ([[-1]], "child ranks from 0"),
        ([[0], [0]], r"\[0\] twice"),
        ([[0, 0]], r"stands without \[0\]"),
        ([[1]], r"stands without \[0\]"),
        ([[0], [0, 1]], r"stands without \[0, 0\]"),
        ([[0]] * 256, "twice|at most 255"),
        ([[i] for i in range(256)], "at most 255"),
    ],
)
def test_bad_paths(paths: list[list[int]], message: str) -> None:
    with pytest.raises(TreeError, match=message):
        Tree.from_paths(paths)


def test_endless_paths_end_at_the_limit() -> None:
    with pytest.raises(TreeError, match="at most 255"):
        Tree.from_paths([i] for i in itertools.count())


def test_largest_trees_are_allowed() -> None:
    assert Tree.chain(MAX_NODES).depth == MAX_NODES
    assert Tree.from_paths([i] for i in range(MAX_NODES)).max_children == MAX_NODES


def test_chain_and_published_tree() -> None:
    assert Tree.chain(3).paths == ((0,), (0, 0), (0, 0, 0))
    assert Tree.chain(0).is_chain
    assert (DEFAULT_TREE.num_nodes, DEFAULT_TREE.depth) == (12, 4)
    assert not DEFAULT_TREE.is_chain


def test_mask_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        DEFAULT_TREE.mask[0, 1] = True
