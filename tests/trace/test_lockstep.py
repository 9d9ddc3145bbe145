"""Trees walked side by side: against one walk after the other."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings, strategies as st
from synthetic import growth_orders, small_traces, trace_of

from stree_autotune.trace.file import NO_RANK, Trace
from stree_autotune.trace.lockstep import Lockstep
from stree_autotune.trace.tree_walk import (
    FlatTrace,
    Ints,
    advance_table,
    level_slices,
    longest_paths,
    walk,
)
from stree_core.tree import Tree


def advance_of(flat: FlatTrace, tree: Tree) -> Ints:
    parents = np.array(tree.parents)
    everything = np.ones((1, tree.num_tokens), np.bool_)
    advance_N = advance_table(parents, level_slices(parents), everything)[0]
    return advance_N[longest_paths(flat, parents)]


def side_by_side(flat: FlatTrace, trees: list[Tree]) -> tuple[list[list[int]], Ints]:
    """Return the starts of every tree as positions, and the starts to go [S, C]."""
    lockstep = Lockstep.of(flat)
    advance_SC = np.stack([advance_of(flat, tree) for tree in trees], axis=1)
    spots, to_go_EC = lockstep.walk(advance_SC[lockstep.place_E])
    entry, number = np.divmod(spots, len(trees))
    positions = flat.positions_S[lockstep.place_E[entry]]
    starts = [sorted(positions[number == tree].tolist()) for tree in range(len(trees))]
    return starts, to_go_EC[lockstep.entry_S]


@given(small_traces(), st.lists(growth_orders(), min_size=1, max_size=3))
@settings(max_examples=60)
def test_every_tree_walks_as_it_does_alone(
    trace: Trace, orders: list[list[tuple[int, ...]]]
) -> None:
    trees, flat = [Tree.from_paths(order) for order in orders], FlatTrace.of(trace)
    starts, to_go_SC = side_by_side(flat, trees)
    for number, tree in enumerate(trees):
        assert starts[number] == sorted(walk(flat, tree).starts.tolist())
        for place, position in enumerate(flat.positions_S.tolist()):
            if position < 0:
                assert to_go_SC[place, number] == 0
                continue
            end = int(trace.offsets[np.searchsorted(trace.offsets, position, side="right")])
            rest = trace_of([trace.ranks[position:end].tolist()], 4)
            assert to_go_SC[place, number] == walk(rest, tree).starts_P[0]


def test_some_prompts_of_a_trace_and_empty_ones() -> None:
    trace = trace_of([[0, 0, NO_RANK], [], [1, 0, 0, NO_RANK], [0]], 2)
    tree = Tree.from_paths([[0], [1], [0, 0]])
    flat = FlatTrace.of(trace, np.array([1, 2, 3]))
    starts, _ = side_by_side(flat, [tree, Tree.chain(1)])
    # after rank 1 the bonus token of the first step is the second position
    assert starts == [[3, 5, 7], [3, 4, 6, 7]]
    assert side_by_side(FlatTrace.of(trace, np.array([1])), [tree])[0] == [[]]
