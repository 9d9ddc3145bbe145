"""Tokens per step of a static tree, exactly, by walking an acceptance trace.

From a start s the step accepts the longest path of ranks that is in the tree; the next start is
behind the bonus token. The ranks are those of the start: in a trace with a depth axis its row, else
the ranks of the positions from there on. Averaging accept lengths over all positions instead is off
by 10 to 80 % on correlated ranks, because starts cluster where drafting fails.

A *place* is a position, or one of the two end marks behind every prompt (a step may accept the last
position, so that its bonus token falls behind the end). Laid out like this a walk needs no bounds
checks. Shape letters: N positions of the trace, P prompts, S places, D recorded depths, C trees
walked side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stree_autotune.trace.file import Trace
from stree_core.errors import TreeError
from stree_core.tree import Tree

NUM_END_MARKS = 2
BURST_STEPS = 8
"""Steps between two looks at which prompts are through: a look costs as much as a step."""

COUNTED = 1 << 32
"""One start in a number that holds the place where a walk stands as well."""

Ints = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class FlatTrace:
    """The positions of some prompts, prompt after prompt, with end marks.

    ranks_DS: the ranks of a start, or num_children for none and at end marks.
    max_depth: the deepest level of a tree that can be walked.
    positions_S: the position in the trace, -1 at end marks.
    first_P: first place of each prompt. positions_P: number of positions of each prompt.
    """

    ranks_DS: Ints
    positions_S: Ints
    first_P: Ints
    positions_P: Ints
    num_children: int
    max_depth: int

    @classmethod
    def of(cls, trace: Trace, prompts: Ints | None = None) -> FlatTrace:
        """Lay out the chosen prompts (indices), all by default."""
        chosen = np.arange(trace.num_prompts) if prompts is None else np.asarray(prompts, np.intp)
        lengths = np.diff(trace.offsets)[chosen].astype(np.intp)
        ends = np.cumsum(lengths)
        num_chosen = int(lengths.sum())
        prompt_of = np.repeat(np.arange(len(chosen)), lengths)
        source = np.arange(num_chosen) + (trace.offsets[chosen] - (ends - lengths))[prompt_of]
        target = np.arange(num_chosen) + NUM_END_MARKS * prompt_of
        num_places = num_chosen + NUM_END_MARKS * len(chosen)
        positions = np.full(num_places, -1, np.intp)
        positions[target] = source
        num_children = trace.meta.num_children
        ranks = np.full((trace.meta.depths, num_places), num_children, np.intp)
        ranks[:, target] = np.minimum(trace.ranks_ND[source].T, num_children)
        first = ends - lengths + NUM_END_MARKS * np.arange(len(chosen))
        return cls(ranks, positions, first, lengths, num_children, trace.meta.max_depth)

    def ranks_at(self, depth: int) -> Ints:
        """Return the ranks that steps meet at a depth (from 0), by the place where they start.

        Defined where a step comes that far: where the ranks before are ranks.
        """
        return self.ranks_DS[depth] if len(self.ranks_DS) > 1 else self.ranks_DS[0, depth:]

    @property
    def num_positions(self) -> int:
        """Positions of the chosen prompts together."""
        return int(self.positions_P.sum())


@dataclass(frozen=True, slots=True, eq=False)
class WalkResult:
    """One walk: positions and starts of each prompt, and the starts as positions of the trace."""

    positions_P: NDArray[np.int64]
    starts_P: NDArray[np.int64]
    starts: NDArray[np.int64]

    @property
    def tokens_per_step(self) -> float:
        """Positions per start, prompts pooled; 1 when there is nothing to walk."""
        return pooled_tokens_per_step(int(self.positions_P.sum()), int(self.starts_P.sum()))


def walk(trace: Trace | FlatTrace, tree: Tree, prompts: Ints | None = None) -> WalkResult:
    """Walk `tree` over a trace, or over the prompts with the given indices.

    Every prompt starts at its own position 0; a step near a prompt's end covers what is left.
    FlatTrace know their prompts already, so `prompts` is for a trace only. Raises TreeError when a
    node has more children, or the tree more levels, than the trace recorded.
    """
    flat = flat_trace(trace, prompts)
    node_S = longest_paths(flat, _parents_of(tree, flat))
    starts_S = start_places(flat, np.array([*(depth + 1 for depth in tree.depths), 0])[node_S])
    started_S = np.zeros(len(node_S), np.int64)
    started_S[starts_S] = 1
    starts_P = np.add.reduceat(started_S, flat.first_P) if len(flat.first_P) else started_S
    starts = flat.positions_S[np.flatnonzero(started_S)]
    return WalkResult(flat.positions_P, starts_P, starts)


def walk_nested(
    trace: Trace | FlatTrace, tree: Tree, added: Sequence[int], sizes: Sequence[int]
) -> NDArray[np.float64]:
    """Return the tokens per step of the sub-trees that an order of growth passes through.

    `added[i]` tells after how many additions node i of `tree` is there: 0 for the root, then 1, 2
    and so on, parents before children and lower ranks first. One result per entry of `sizes`: the
    walk of the nodes with added <= size.
    Raises TreeError when a node has more children, or the tree more levels, than were recorded.
    """
    flat = flat_trace(trace)
    parents = _parents_of(tree, flat)
    node_S = longest_paths(flat, parents)
    members_CN = np.asarray(sizes)[:, None] >= np.asarray(added)[None, :]
    advance_CN = advance_table(parents, level_slices(parents), members_CN)
    starts_C = count_starts(flat, node_S, advance_CN).sum(axis=1)
    return np.array([pooled_tokens_per_step(flat.num_positions, int(n)) for n in starts_C])


def flat_trace(trace: Trace | FlatTrace, prompts: Ints | None = None) -> FlatTrace:
    """Lay out a trace, unless that was done before."""
    return trace if isinstance(trace, FlatTrace) else FlatTrace.of(trace, prompts)


def pooled_tokens_per_step(num_positions: int, num_starts: int) -> float:
    """Return positions per start; 1 when there is nothing to walk."""
    return num_positions / num_starts if num_starts else 1.0


def longest_paths(flat: FlatTrace, parents: Ints) -> Ints:
    """Return per place [S] the node where the longest matching path ends, from every position.

    `parents` are those of a breadth-first tree, of any number of nodes. End marks get the number of
    nodes, one past the last.
    """
    width = flat.num_children + 1
    # 0 stands for "no such child": the root is nobody's child.
    table = np.zeros(len(parents) * width, np.intp)
    nodes = np.arange(1, len(parents))
    table[parents[1:] * width + sibling_ranks(parents)[1:]] = nodes
    node_S = table.take(flat.ranks_at(0))
    active = np.flatnonzero(node_S)
    node = node_S.take(active)
    depth = 1
    while len(active) and depth < flat.max_depth:
        node = table.take(node * width + flat.ranks_at(depth).take(active))
        matched = np.flatnonzero(node)
        active, node = active.take(matched), node.take(matched)
        node_S[active] = node
        depth += 1
    node_S[flat.positions_S < 0] = len(parents)
    return node_S


def sibling_ranks(parents: Ints) -> Ints:
    """Return the rank of every node of a breadth-first tree; the root's is 0."""
    return np.arange(len(parents)) - np.searchsorted(parents, parents, side="left")


def level_slices(parents: Ints) -> tuple[slice, ...]:
    """Return the nodes of each depth of a breadth-first tree."""
    levels = [slice(0, 1)]
    while levels[-1].start < levels[-1].stop:
        level = levels[-1]
        first, end = np.searchsorted(parents, (level.start, level.stop))
        levels.append(slice(int(first), int(end)))
    return tuple(levels[:-1])


def advance_table(parents: Ints, levels: tuple[slice, ...], members_CN: NDArray[np.bool_]) -> Ints:
    """Return how far a step moves on, [C, nodes + 1], when its longest path ends at a node.

    `members_CN` tells which nodes of the large tree each of C trees has, parents with every child.
    The step accepts up to the deepest member on the path; the last column is the end marks' 0.
    """
    advance_CN = np.ones((len(members_CN), len(parents) + 1), np.intp)
    for depth, level in enumerate(levels[1:], start=1):
        above = advance_CN[:, parents[level]]
        advance_CN[:, level] = np.where(members_CN[:, level], depth + 1, above)
    advance_CN[:, -1] = 0
    return advance_CN


def start_places(flat: FlatTrace, advance_S: Ints) -> Ints:
    """Return the places where steps start, unordered; all prompts advance side by side."""
    visited = []
    place = flat.first_P
    while len(place):
        for _ in range(BURST_STEPS):
            visited.append(place)
            place = place + advance_S[place]
        place = place[advance_S[place] > 0]
    if not visited:
        return np.empty(0, np.intp)
    starts = np.concatenate(visited)
    return starts[advance_S[starts] > 0]


def count_starts(flat: FlatTrace, node_S: Ints, advance_CN: Ints) -> NDArray[np.int64]:
    """Count the starts [C, P] of several trees at once.

    `node_S` comes from `longest_paths` of a tree that contains them all; `advance_CN` tells per
    tree how far a step moves on when it ends at a node, 0 in the last column (the end marks).
    """
    num_trees, num_columns = advance_CN.shape
    # Long prompts first, so that the prompts still walking stay a leading block.
    order = np.argsort(-flat.positions_P, kind="stable")
    # A step moves the place in the lower bits, and counts itself in the upper ones.
    table = (advance_CN + (advance_CN > 0) * COUNTED).ravel()
    row_C = np.arange(num_trees) * num_columns
    walked_PC = np.repeat(flat.first_P[order][:, None], num_trees, axis=1)
    place_PC, ends_PC = np.empty_like(walked_PC), np.empty_like(walked_PC)
    live = len(order) if num_trees else 0
    while live:
        walked, place, ends = walked_PC[:live], place_PC[:live], ends_PC[:live]
        for _ in range(BURST_STEPS):
            np.bitwise_and(walked, COUNTED - 1, out=place)
            # without clip numpy writes to a buffer first
            node_S.take(place, out=ends, mode="clip")
            ends += row_C
            step = table.take(ends, out=place, mode="clip")
            walked += step
        walking = np.flatnonzero(step.any(axis=1))
        live = int(walking[-1]) + 1 if len(walking) else 0
    result_PC = np.empty_like(walked_PC)
    result_PC[order] = walked_PC // COUNTED
    return result_PC.T


def _parents_of(tree: Tree, flat: FlatTrace) -> Ints:
    if tree.max_children > flat.num_children:
        raise TreeError(
            f"a tree walked on this trace has at most {flat.num_children} children per node, got "
            f"{tree.max_children}; record the trace with more children"
        )
    if tree.depth > flat.max_depth:
        raise TreeError(
            f"a tree walked on this trace has at most {flat.max_depth} levels, got {tree.depth}; "
            "record the trace with more --depths"
        )
    return np.asarray(tree.parents, np.intp)


def emitted_per_step(trace: Trace, tree: Tree) -> NDArray[np.int64]:
    """Return how many tokens each step of a walk emits, in the trace's order.

    A prompt's first step starts where the prompt before it ends, so that steps lie end to end; the
    last step of a prompt counts what is left of it. The mean is the walk's tokens per step.
    """
    starts = walk(trace, tree).starts
    return np.diff(np.append(starts, trace.num_positions))


def marginal_rates(trace: Trace, length: int) -> list[float]:
    """Return the marginal rates of a chain; they never rise, and 1 + sum is tokens per step."""
    emitted = emitted_per_step(trace, Tree.chain(length))
    return [float((emitted > depth).mean()) for depth in range(1, length + 1)]


def conditional_rates(marginals: Sequence[float]) -> list[float]:
    """Return the conditional rates; 0 where no step comes that far."""
    before = [1.0, *marginals[:-1]]
    return [now / then if then else 0.0 for now, then in zip(marginals, before, strict=True)]
