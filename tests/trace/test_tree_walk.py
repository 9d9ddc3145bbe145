"""The walk against a plain loop, and against the averages that are not the walk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import event, given, settings, strategies as st
from synthetic import (
    brute_walk,
    growth_orders,
    latent_trace,
    meta,
    small_traces,
    trace_of,
    with_depths,
)

from stree_autotune.trace.file import NO_RANK, Trace
from stree_autotune.trace.tree_walk import (
    FlatTrace,
    longest_paths,
    walk,
    walk_nested,
)
from stree_core.errors import TreeError
from stree_core.tree import DEFAULT_TREE, Tree

Order = list[tuple[int, ...]]


def added_in(order: Order) -> tuple[Tree, list[int]]:
    """Return the tree of an order and, per node, when it is added."""
    tree = Tree.from_paths(order)
    return tree, [0, *(order.index(path) + 1 for path in tree.paths)]


@given(small_traces(), growth_orders())
def test_walk_equals_a_plain_loop(trace: Trace, order: Order) -> None:
    tree = Tree.from_paths(order)
    starts_P, starts = brute_walk(trace, tree)
    result = walk(trace, tree)
    assert result.starts_P.tolist() == starts_P
    assert result.starts.tolist() == starts
    assert result.positions_P.tolist() == np.diff(trace.offsets).tolist()
    if starts:
        assert result.tokens_per_step == trace.num_positions / len(starts)


@given(small_traces(), growth_orders(), st.data())
def test_walk_of_chosen_prompts(trace: Trace, order: Order, data: st.DataObject) -> None:
    tree = Tree.from_paths(order)
    everyone = walk(trace, tree)
    prompts = data.draw(st.lists(st.integers(0, trace.num_prompts - 1), unique=True))
    result = walk(trace, tree, np.array(prompts, np.intp))
    assert result.starts_P.tolist() == [everyone.starts_P[p] for p in prompts]
    assert result.positions_P.tolist() == [everyone.positions_P[p] for p in prompts]
    inside = [s for p in prompts for s in range(trace.offsets[p], trace.offsets[p + 1])]
    assert set(result.starts.tolist()) == set(everyone.starts.tolist()) & set(inside)


@given(small_traces(), growth_orders())
def test_nested_walk_equals_single_walks(trace: Trace, order: Order) -> None:
    tree, added = added_in(order)
    sizes = range(len(order) + 1)
    nested = walk_nested(trace, tree, added, sizes)
    single = [walk(trace, Tree.from_paths(order[:size])).tokens_per_step for size in sizes]
    assert nested.tolist() == single


def test_by_hand() -> None:
    # prompt 0: accepts 0,0 and passes the miss as bonus; then one step covers the last position
    # prompt 1: accepts rank 1, whose bonus token lies behind the end
    trace = trace_of([[0, 0, NO_RANK, 0], [1], []], 2)
    tree = Tree.from_paths([[0], [1], [0, 0]])
    result = walk(trace, tree)
    assert result.starts.tolist() == [0, 3, 4]
    assert result.starts_P.tolist() == [2, 1, 0]
    assert result.tokens_per_step == 5 / 3


def test_off_makes_one_token_per_step() -> None:
    assert walk(latent_trace(0, num_prompts=7, length=11), Tree.chain(0)).tokens_per_step == 1.0


def test_nothing_to_walk() -> None:
    empty = trace_of([[], []], 2)
    assert walk(empty, Tree.chain(2)).tokens_per_step == 1.0
    assert walk(empty, Tree.chain(2)).starts.tolist() == []
    assert walk(trace_of([[0]], 1), Tree.chain(1), np.array([], np.intp)).tokens_per_step == 1.0


def test_a_period_of_seven_hits_and_a_miss() -> None:
    trace = trace_of([([0] * 7 + [NO_RANK]) * 50] * 3, 1)
    assert walk(trace, Tree.chain(7)).tokens_per_step == 8.0


def position_mean(trace: Trace, tree: Tree) -> float:
    """Average accept length + 1 over all positions, which is not the walk."""
    flat = FlatTrace.of(trace)
    node_S = longest_paths(flat, np.array(tree.parents))
    return float(np.mean([tree.depths[node] + 1 for node in node_S[flat.positions_S >= 0]]))


def test_the_position_mean_is_not_the_walk() -> None:
    independent = latent_trace(0)
    correlated = latent_trace(0, phi=0.6)
    chain = Tree.chain(7)
    for tree in (chain, DEFAULT_TREE):
        walked = walk(independent, tree).tokens_per_step
        assert position_mean(independent, tree) == pytest.approx(walked, rel=0.02)
        walked = walk(correlated, tree).tokens_per_step
        assert position_mean(correlated, tree) > 1.2 * walked
    # a trace whose hits come in blocks exactly as long as the chain is missed the other way round
    periodic = trace_of([([0] * 7 + [NO_RANK]) * 50] * 3, 1)
    assert position_mean(periodic, chain) < 0.6 * walk(periodic, chain).tokens_per_step


def test_independent_ranks_give_the_geometric_series() -> None:
    share = 0.6
    trace = latent_trace(5, num_prompts=400, shares=(share,), num_children=1)
    expected = sum(share**k for k in range(5))
    assert walk(trace, Tree.chain(4)).tokens_per_step == pytest.approx(expected, rel=0.02)


def test_more_children_than_recorded_are_refused() -> None:
    trace = trace_of([[0, 1]], 2)
    with pytest.raises(TreeError, match="at most 2 children per node, got 3; record"):
        walk(trace, DEFAULT_TREE)
    with pytest.raises(TreeError, match="at most 2 children"):
        walk_nested(trace, DEFAULT_TREE, range(13), [12])


@given(small_traces(), growth_orders())
def test_ranks_by_depth_that_say_the_same_walk_the_same(trace: Trace, order: Order) -> None:
    tree = Tree.from_paths(order)
    deep = with_depths(trace, max(2, tree.depth))
    for prompts in (None, np.arange(trace.num_prompts)[::2]):
        mine, theirs = walk(deep, tree, prompts), walk(trace, tree, prompts)
        assert mine.starts.tolist() == theirs.starts.tolist()
        assert mine.starts_P.tolist() == theirs.starts_P.tolist()


@given(st.integers(0, 99), growth_orders())
@settings(max_examples=40, deadline=None)
def test_a_walk_takes_the_row_of_its_start(seed: int, order: Order) -> None:
    trace = latent_trace(seed, num_prompts=6, length=25, phi=0.5, num_children=4, depths=12)
    tree = Tree.from_paths(order)
    result = walk(trace, tree)
    starts_P, starts = brute_walk(trace, tree)
    assert (result.starts_P.tolist(), result.starts.tolist()) == (starts_P, starts)
    first_rows = Trace(trace.ranks[:, 0].copy(), trace.offsets, meta(6, 4))
    if tree.depth > 2 and walk(first_rows, tree).starts.tolist() != starts:
        event("ranks of the first level alone mislead")


def test_levels_that_were_not_recorded_are_refused() -> None:
    trace = latent_trace(0, num_prompts=2, length=9, depths=3)
    walk(trace, Tree.chain(3))
    with pytest.raises(TreeError, match="at most 3 levels, got 4; record the trace with more"):
        walk(trace, Tree.chain(4))
