"""The inner solver: the best tree of a cell (depth cap, width cap, number of nodes) for one trace.

Growing the paths with the largest shares is optimal for independent ranks only. On real ranks the
starts of the grown tree differ from the average position, and a token is worth more where the next
start falls into easier text; so paths are weighed again at those starts and the tree is regrown, a
few rounds. `refine` then adds, drops or swaps single leaves while an objective on the exact walk
improves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stree_autotune.search.path_counts import PathIndex, Shares, path_worths
from stree_autotune.trace import (
    FlatTrace,
    Ints,
    Trace,
    advance_table,
    count_starts,
    flat_trace,
    level_slices,
    longest_paths,
    pooled_tokens_per_step,
    start_places,
    walk,
)
from stree_core.tree import Tree

MAX_DEPTH = 16
"""The deepest level that is searched."""

ROUNDS = 7
"""Rounds of the solver; most cells settle after three or four, and a tree seen before costs
nothing."""

SIDE_BY_SIDE = 4
"""Trees that one walk takes: more of them need arrays that leave the cache."""

MAX_ADDS = 12
MAX_DROPS = 8
MAX_SWAPS = 24
"""Moves that one refinement step walks: the most promising ones, nearly all of a small tree's."""

MIN_GAIN = 1e-9
"""Relative gain below which a refinement is rounding."""

Objective = Callable[[Tree, float], float]
Move = tuple[int | None, int | None]


@dataclass(frozen=True, slots=True, eq=False)
class GrownTree:
    """A grown tree and, per node, after how many additions it was there (root 0).

    paths: the nodes as paths of the index, breadth-first.
    """

    tree: Tree
    added: tuple[int, ...]
    paths: Ints

    @property
    def key(self) -> bytes:
        """What the paths are called among those of one index."""
        return self.paths.tobytes()


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """A cell's tree as it was grown, and its exact tokens per step on the index's trace."""

    grown: GrownTree
    tokens_per_step: float


@dataclass(frozen=True, slots=True)
class Scored:
    """A tree, its exact tokens per step on a trace, and its score under an objective."""

    tree: Tree
    tokens_per_step: float
    score: float


def grow(index: PathIndex, shares: Shares, *, depth: int, width: int, num_nodes: int) -> GrownTree:
    """Grow a tree by adding the path with the largest share, `num_nodes` times.

    `depth` caps the levels, `width` the children of one node; where the caps or the index leave no
    more paths the tree stays smaller.
    """
    allowed = (index.depths <= depth) & (index.widths <= width)
    order = np.argsort(-shares, kind="stable")
    order = order[allowed[order]][: num_nodes + 1]
    paths = np.sort(order)
    added = np.empty(len(order), np.intp)
    added[np.searchsorted(paths, order)] = np.arange(len(order))
    return GrownTree(sub_tree(index.parents, paths), tuple(added.tolist()), paths)


def solve(index: PathIndex, *, depth: int, width: int, num_nodes: int) -> Solved:
    """Solve one cell: regrow the tree from its own starts, and return the best of all rounds.

    New worths are averaged with those before, or two trees that each look best from the other's
    starts would take turns for ever.
    """
    return solve_depths(index, [depth], width=width, num_nodes=num_nodes)[0]


def solve_depths(
    index: PathIndex, depths: Sequence[int], *, width: int, num_nodes: int
) -> list[Solved]:
    """Solve the cells of several depth caps side by side; see `solve`."""
    shares = [index.shares] * len(depths)
    found: list[dict[bytes, Solved]] = [{} for _ in depths]
    for number in range(ROUNDS):
        grown = [
            grow(index, each, depth=depth, width=width, num_nodes=num_nodes)
            for depth, each in zip(depths, shares, strict=True)
        ]
        evaluated = _evaluate(index, grown)
        for place, (tree, (value, worths)) in enumerate(zip(grown, evaluated, strict=True)):
            found[place].setdefault(tree.key, Solved(tree, value))
            shares[place] = worths if number == 0 else (shares[place] + worths) / 2
    return [max(each.values(), key=lambda solved: solved.tokens_per_step) for each in found]


def _evaluate(index: PathIndex, grown: Sequence[GrownTree]) -> list[tuple[float, Shares]]:
    """Walk grown trees; return each one's tokens per step, and the worths that follow.

    The index keeps what was walked: most caps lead to the same trees in the end.
    """
    new = list({each.key: each for each in grown if each.key not in index.walked}.values())
    for first in range(0, len(new), SIDE_BY_SIDE):
        _walk(index, new[first : first + SIDE_BY_SIDE])
    return [index.walked[each.key] for each in grown]


def _walk(index: PathIndex, grown: Sequence[GrownTree]) -> None:
    """Walk a few grown trees side by side, and keep what comes of it."""
    members_CN = np.zeros((len(grown), len(index.parents)), np.bool_)
    for member_N, each in zip(members_CN, grown, strict=True):
        member_N[each.paths] = True
    advance_CN = advance_table(index.parents, index.levels, members_CN)
    node_E = index.node_S[index.lockstep.place_E]
    starts_K, to_go_EC = index.lockstep.walk(np.ascontiguousarray(advance_CN.T)[node_E])
    worths_CN = path_worths(index, starts_K, to_go_EC)
    num_starts = np.bincount(starts_K % len(grown), minlength=len(grown)).tolist()
    for each, starts, worths in zip(grown, num_starts, worths_CN, strict=True):
        value = pooled_tokens_per_step(index.flat.num_positions, starts)
        index.walked[each.key] = value, worths


def refine(
    trace: Trace | FlatTrace,
    tree: Tree,
    objective: Objective,
    *,
    max_nodes: int,
    max_depth: int = MAX_DEPTH,
) -> Scored:
    """Add, drop or swap the one leaf that helps the objective most, until none does.

    The objective gets a tree and its exact tokens per step on the trace; more is better. Added
    nodes respect `max_nodes`, `max_depth` and the children and levels that the trace recorded.
    Raises TreeError when a node of the given tree has more children than the trace recorded.
    """
    flat = flat_trace(trace)
    max_depth = min(max_depth, flat.max_depth)
    tokens_per_step = walk(flat, tree).tokens_per_step
    best = Scored(tree, tokens_per_step, objective(tree, tokens_per_step))
    while True:
        parents, inside = _with_frontier(best.tree, flat.num_children, max_depth)
        neighbours = _neighbours(flat, parents, inside, max_nodes)
        found = max(
            (Scored(tree, value, objective(tree, value)) for tree, value in neighbours),
            key=lambda scored: scored.score,
            default=best,
        )
        if not found.score > best.score * (1 + MIN_GAIN):
            return best
        best = found


def _with_frontier(tree: Tree, num_children: int, max_depth: int) -> tuple[Ints, NDArray[np.bool_]]:
    """Give every node its next child; return the parents, and which nodes are the tree's own."""
    parents, origins = [-1], [0]
    for node, origin in enumerate(origins):  # grows while it is read: breadth-first
        if origin < 0:
            continue
        children = tree.children[origin]
        parents += [node] * len(children)
        origins += children
        if len(children) < num_children and tree.depths[origin] < max_depth:
            parents.append(node)
            origins.append(-1)
    return np.array(parents), np.array(origins) >= 0


def _neighbours(
    flat: FlatTrace, parents: Ints, inside: NDArray[np.bool_], max_nodes: int
) -> Iterator[tuple[Tree, float]]:
    """Yield the trees one move away, the most promising ones, with their tokens per step.

    Every leaf is dropped and every frontier node added on its own; of the swaps only those are
    walked for which the two effects add up best.
    """
    node_S = longest_paths(flat, parents)
    levels = level_slices(parents)

    def count(moves: list[Move]) -> tuple[NDArray[np.bool_], list[int]]:
        members_CN = np.repeat(inside[None, :], len(moves), axis=0)
        for member_N, (drop, add) in zip(members_CN, moves, strict=True):
            member_N[[node for node in (drop, add) if node is not None]] ^= True
        advance_CN = advance_table(parents, levels, members_CN)
        return members_CN, count_starts(flat, node_S, advance_CN).sum(axis=1).tolist()

    advance_N = advance_table(parents, levels, inside[None, :])[0]
    starts_S = start_places(flat, advance_N[node_S])
    ending = np.bincount(node_S[starts_S], minlength=len(parents)).tolist()
    drops, adds = _leaves(parents.tolist(), inside.tolist(), ending)
    singles: list[Move] = [*((drop, None) for drop in drops), *((None, add) for add in adds)]
    members_CN, starts_C = count(singles)
    effect = dict(zip(drops + adds, starts_C, strict=True))
    swaps = [(drop, add) for drop in drops for add in adds if _independent(parents, drop, add)]
    swaps = sorted(swaps, key=lambda swap: effect[swap[0]] + effect[swap[1]])[:MAX_SWAPS]
    swap_members_CN, swap_starts_C = count(list(swaps))
    for member_N, starts in zip(
        [*members_CN, *swap_members_CN], starts_C + swap_starts_C, strict=True
    ):
        if np.count_nonzero(member_N) - 1 <= max_nodes:
            tree = sub_tree(parents, np.flatnonzero(member_N))
            yield tree, pooled_tokens_per_step(flat.num_positions, starts)


def _leaves(
    parents: list[int], inside: list[bool], ending: list[int]
) -> tuple[list[int], list[int]]:
    """Return the leaves to consider dropping and the frontier nodes to consider adding.

    `ending` counts the starts whose longest path ends at a node: at a frontier node they would gain
    from it, at a leaf or its own frontier they lose by its removal.
    """
    used = list(ending)
    droppable = list(inside)
    droppable[0] = False
    for node in range(1, len(parents)):
        if not inside[node]:
            used[parents[node]] += ending[node]
            continue
        droppable[parents[node]] = False
        if parents[node - 1] == parents[node]:
            droppable[node - 1] = False
    leaves = [node for node, is_leaf in enumerate(droppable) if is_leaf]
    frontier = [node for node, is_inside in enumerate(inside) if not is_inside]
    drops = sorted(leaves, key=lambda node: used[node])[:MAX_DROPS]
    adds = sorted(frontier, key=lambda node: -ending[node])[:MAX_ADDS]
    return drops, adds


def _independent(parents: Ints, drop: int, add: int) -> bool:
    """Return whether `add` is neither the child nor the next sibling of `drop`."""
    is_next = add == drop + 1 and parents[add] == parents[drop]
    return parents[add] != drop and not is_next


def sub_tree(parents: Ints, nodes: Ints) -> Tree:
    """Return the tree of some nodes, ascending, of a breadth-first tree."""
    return Tree((-1, *np.searchsorted(nodes, parents[nodes[1:]]).tolist()))
