"""Shares, growing and refining trees: against counting, brute force, and within their limits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import isotonic_regression
from synthetic import growth_orders, latent_trace, ordered_trees, small_traces, trace_of

from stree_autotune.search import path_counts
from stree_autotune.search.path_counts import (
    PRIOR_WEIGHT,
    PathIndex,
    index_paths,
    path_shares,
    path_worths,
    rank_distribution,
)
from stree_autotune.search.tree_solver import grow, refine, solve, solve_depths
from stree_autotune.trace.file import NO_RANK, Trace
from stree_autotune.trace.tree_walk import (
    FlatTrace,
    advance_table,
    level_slices,
    longest_paths,
    walk,
)
from stree_core.errors import TreeError
from stree_core.tree import DEFAULT_TREE, Tree

KINDS = {
    "independent": {},
    "phi 0.3": {"phi": 0.3},
    "phi 0.6": {"phi": 0.6},
    "phi 0.9": {"phi": 0.9},
    "phi -0.6": {"phi": -0.6},
    "prompts": {"prompt_sd": 1.0},
    "phi 0.5 and prompts": {"phi": 0.5, "prompt_sd": 0.5},
    "depths": {"phi": 0.5, "depths": 7},
}


def small_latent(kind: str, seed: int = 0) -> Trace:
    return latent_trace(seed, num_prompts=64, length=80, **KINDS[kind])


def index_of(trace: Trace, max_nodes: int = 8, max_depth: int = 10) -> PathIndex:
    return index_paths(FlatTrace.of(trace), max_nodes=max_nodes, max_depth=max_depth)


def paths_of(index: PathIndex) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for parent, rank in zip(index.parents[1:].tolist(), index.ranks[1:].tolist(), strict=True):
        paths.append((*paths[parent], rank))
    return paths


def walked_worths(index: PathIndex, tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    """Return the start places of a tree, and what every path is worth then."""
    parents = np.array(tree.parents)
    everything = np.ones((1, tree.num_tokens), np.bool_)
    advance_N = advance_table(parents, level_slices(parents), everything)[0]
    places = index.lockstep.place_E
    advance_EC = advance_N[longest_paths(index.flat, parents)][places][:, None]
    starts_K, to_go_EC = index.lockstep.walk(advance_EC)
    return places[starts_K], path_worths(index, starts_K, to_go_EC)[0]


def tokens_per_step(tree: Tree, value: float) -> float:
    return value


def test_rank_law_counts_ranks_and_never_rises() -> None:
    distribution = rank_distribution(FlatTrace.of(trace_of([[0, 0, 0, 1, 2, 2], [NO_RANK]], 4)))
    # ranks 1 and 2 are pooled; one is added to every rank and to the misses
    assert distribution.tolist() == pytest.approx([4 / 12, 2.5 / 12, 2.5 / 12, 1 / 12])


def test_shares_are_smoothed_counts() -> None:
    trace = trace_of([[0, 1, 0, 0, NO_RANK, 0, 1], [1, 0, 0]], 2)
    index = index_of(trace, max_nodes=1, max_depth=2)
    assert paths_of(index) == [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    distribution = [7 / 13, 4 / 13]
    w = PRIOR_WEIGHT
    # counted by hand: 6 of 10 positions have rank 0, 3 rank 1; (0,0) twice, (0,1) twice, (1,0)
    # twice, (1,1) never
    zero = (6 + w * distribution[0]) / (10 + w)
    one = (3 + w * distribution[1]) / (10 + w)
    expected = [1.0, zero, one]
    expected += [
        zero * (2 + w * distribution[0]) / (6 + w),
        zero * (2 + w * distribution[1]) / (6 + w),
    ]
    expected += [
        one * (2 + w * distribution[0]) / (3 + w),
        one * (0 + w * distribution[1]) / (3 + w),
    ]
    assert path_shares(index).tolist() == pytest.approx(expected)


def test_shares_at_some_starts() -> None:
    trace = trace_of([[0, 1, 0, 0, NO_RANK, 0, 1]], 2)
    index = index_of(trace, max_nodes=1, max_depth=1)
    shares = path_shares(index, np.array([0, 2, 3]))
    distribution = rank_distribution(index.flat)
    assert shares.tolist() == pytest.approx(
        [1.0, *((np.array([3, 0]) + PRIOR_WEIGHT * distribution) / (3 + PRIOR_WEIGHT))]
    )


@given(small_traces(), growth_orders())
@settings(max_examples=50)
def test_shares_and_worths_never_rise(trace: Trace, order: list[tuple[int, ...]]) -> None:
    index = index_of(trace, max_nodes=5, max_depth=6)
    starts_S, worths = walked_worths(index, Tree.from_paths(order))
    for values in (path_shares(index), path_shares(index, starts_S), worths):
        named = dict(zip(paths_of(index), values.tolist(), strict=True))
        for path, value in named.items():
            assert 0 <= value <= 1
            if path:
                assert value <= named[path[:-1]]
                assert path[-1] == 0 or value <= named[*path[:-1], path[-1] - 1]


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1)), min_size=1, max_size=30))
def test_falling_fits_each_group_on_its_own(pairs: list[tuple[int, float]]) -> None:
    pairs.sort(key=lambda pair: pair[0])
    groups, values = (np.array(column) for column in zip(*pairs, strict=True))
    expected = [
        isotonic_regression(values[groups == group], increasing=False).x
        for group in np.unique(groups)
    ]
    fitted = path_counts._falling(values, groups)
    assert fitted == pytest.approx(np.concatenate(expected), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_worth_predicts_the_starts_that_a_node_saves(kind: str) -> None:
    index = index_of(latent_trace(3, num_prompts=200, length=80, **KINDS[kind]))
    paths = paths_of(index)
    tree = DEFAULT_TREE
    starts_S, worths = walked_worths(index, tree)
    inside = {(), *tree.paths}
    predicted, actual = [], []
    for path, worth in zip(paths[1:], worths[1:].tolist(), strict=True):
        has_sibling = path[-1] == 0 or (*path[:-1], path[-1] - 1) in inside
        if path not in inside and path[:-1] in inside and has_sibling:
            larger = Tree.from_paths([*tree.paths, path])
            predicted.append(worth * len(starts_S))
            actual.append(len(starts_S) - int(walk(index.flat, larger).starts_P.sum()))
    assert len(actual) >= 8
    # Each start is judged as if the others stayed where they are: near, not exact.
    assert np.corrcoef(predicted, actual)[0, 1] > 0.95
    assert sum(predicted) == pytest.approx(sum(actual), rel=0.25)


@given(small_traces(), st.integers(1, 6), st.integers(1, 4), st.integers(0, 20))
@settings(max_examples=50)
def test_growth_keeps_its_caps_and_is_nested(
    trace: Trace, depth: int, width: int, num_nodes: int
) -> None:
    index = index_of(trace, max_nodes=20)
    shares = path_shares(index)
    grown = grow(index, shares, depth=depth, width=width, num_nodes=num_nodes)
    tree = grown.tree
    assert tree.num_nodes <= num_nodes
    assert tree.depth <= depth
    assert tree.max_children <= width
    assert sorted(grown.added) == list(range(tree.num_tokens))
    order = sorted(zip(grown.added[1:], tree.paths, strict=True))
    for size in range(tree.num_nodes):
        smaller = grow(index, shares, depth=depth, width=width, num_nodes=size).tree
        assert smaller == Tree.from_paths(path for _, path in order[:size])
    assert [paths_of(index)[path] for path in grown.paths[1:]] == list(tree.paths)


def test_independent_ranks_grow_by_the_rank_product() -> None:
    shares = (0.5, 0.25, 0.1)
    trace = latent_trace(0, num_prompts=600, shares=shares, num_children=3)
    tree = solve(index_of(trace), depth=10, width=3, num_nodes=7).grown.tree
    # products: 0.5, 0.25, 0.25, 0.125, 0.125, 0.125, 0.1 against 0.0625
    assert tree == Tree.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_nodes", [4, 7])
def test_against_every_tree(kind: str, num_nodes: int) -> None:
    trace = small_latent(kind)
    flat = FlatTrace.of(trace)
    best = max(walk(flat, tree).tokens_per_step for tree in ordered_trees(num_nodes))
    solved = solve(index_of(trace), depth=10, width=10, num_nodes=num_nodes)
    refined = refine(flat, solved.grown.tree, tokens_per_step, max_nodes=num_nodes)
    assert solved.tokens_per_step == walk(flat, solved.grown.tree).tokens_per_step
    assert solved.tokens_per_step >= 0.995 * best
    assert refined.tokens_per_step == walk(flat, refined.tree).tokens_per_step == best


def test_there_are_as_many_trees_as_catalan_numbers() -> None:
    assert [len(ordered_trees(n)) for n in range(1, 8)] == [1, 2, 5, 14, 42, 132, 429]


@pytest.mark.parametrize("kind", ["phi 0.6", "prompts"])
def test_reweighting_beats_the_position_average(kind: str) -> None:
    index = index_of(latent_trace(1, num_prompts=100, **KINDS[kind]), max_nodes=32)
    for num_nodes in (8, 16, 32):
        naive = grow(index, path_shares(index), depth=10, width=10, num_nodes=num_nodes).tree
        solved = solve(index, depth=10, width=10, num_nodes=num_nodes)
        assert solved.tokens_per_step > 1.005 * walk(index.flat, naive).tokens_per_step


def test_refine_climbs_from_a_bad_tree() -> None:
    flat = FlatTrace.of(small_latent("phi 0.5 and prompts"))
    best = max(walk(flat, tree).tokens_per_step for tree in ordered_trees(5))
    wide = Tree.from_paths([[rank] for rank in range(5)])
    found = refine(flat, wide, tokens_per_step, max_nodes=5)
    assert found.tokens_per_step >= 0.998 * best
    assert found.tokens_per_step > 1.05 * walk(flat, wide).tokens_per_step


def test_refine_weighs_tokens_against_time() -> None:
    flat = FlatTrace.of(small_latent("independent"))

    def rate(per_node: float):  # type: ignore[no-untyped-def]
        return lambda tree, value: value / (1 + per_node * tree.num_nodes)

    sizes = [
        refine(flat, DEFAULT_TREE, rate(per_node), max_nodes=40).tree.num_nodes
        for per_node in (0.001, 0.01, 0.05, 0.2, 2.0)
    ]
    assert all(large > small for large, small in pairwise(sizes))
    assert sizes[0] > 12
    assert sizes[-1] == 0


def test_refine_keeps_its_limits() -> None:
    flat = FlatTrace.of(latent_trace(2, num_prompts=40, num_children=3))
    found = refine(flat, Tree.chain(2), tokens_per_step, max_nodes=20, max_depth=2)
    assert found.tree.num_nodes == 12
    assert found.tree.depth == 2
    assert found.tree.max_children == 3
    with pytest.raises(TreeError, match="at most 3 children"):
        refine(flat, Tree.from_paths([[0], [1], [2], [3]]), tokens_per_step, max_nodes=20)


def test_refine_returns_what_it_was_given_when_nothing_helps() -> None:
    flat = FlatTrace.of(trace_of([[0, NO_RANK] * 30] * 3, 2))
    found = refine(flat, Tree.chain(1), tokens_per_step, max_nodes=9)
    assert found.tree == Tree.chain(1)
    assert found.score == found.tokens_per_step == 2.0


@pytest.mark.parametrize("kind", ["phi 0.6", "depths"])
def test_depths_are_solved_side_by_side_as_one_by_one(kind: str) -> None:
    trace, caps = small_latent(kind), range(1, 7)
    together = solve_depths(index_of(trace, max_nodes=12), caps, width=4, num_nodes=12)
    for depth, solved in zip(caps, together, strict=True):
        # an index of its own, which knows no tree of another cap
        alone = solve(index_of(trace, max_nodes=12), depth=depth, width=4, num_nodes=12)
        assert alone.grown.tree == solved.grown.tree
        assert alone.grown.added == solved.grown.added
        assert alone.tokens_per_step == solved.tokens_per_step
        assert walk(trace, solved.grown.tree).tokens_per_step == solved.tokens_per_step
