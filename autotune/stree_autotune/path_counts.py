"""How often a step accepts each path: counts over a trace, smoothed, for tree growth.

The *share* of a path is the estimated fraction of starts whose step would accept it, were it in the
tree. Shares never rise from a parent to its child nor from a rank to the next, so the n best paths
are a tree, for every n and under every cap on depth and children.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from stree_autotune.trace_walk import (
    Ints,
    Slots,
    level_slices,
    longest_paths,
    sibling_ranks,
)

PRIOR_WEIGHT = 32.0
"""Starts that the rank law counts for against what was seen behind one path."""

Shares = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class PathIndex:
    """The most frequent paths of a trace, as one large breadth-first tree.

    parents, ranks, depths: per path, path 0 is the root. levels: the paths of each depth.
    widths: the children per node that a tree needs to contain the path.
    node_S: per slot the longest indexed path from there, one past the last path at end marks.
    rank_law_K: the share of positions with each rank, isotonic.
    """

    slots: Slots
    parents: Ints
    ranks: Ints
    depths: Ints
    widths: Ints
    levels: tuple[slice, ...]
    node_S: Ints
    rank_law_K: Shares


def index_paths(slots: Slots, *, max_paths: int, max_depth: int) -> PathIndex:
    """Index the `max_paths` paths with the largest shares over all positions, root not counted."""
    law = rank_law(slots)
    level_parents: list[Ints] = []
    level_shares: list[Shares] = []
    # Of the level above: its paths' shares, first index, and the slots that reach them.
    shares, first = np.ones(1), 0
    reaching = np.flatnonzero(slots.positions_S >= 0)
    path = np.zeros(len(reaching), np.intp)
    for depth in range(max_depth):
        rank = slots.ranks_S[reaching + depth]
        child_counts = np.bincount(
            path * (slots.num_children + 1) + rank,
            minlength=len(shares) * (slots.num_children + 1),
        ).reshape(len(shares), -1)
        child_shares = _child_shares(shares, child_counts, law).ravel()
        kept = _largest(child_shares, max_paths)
        level_parents.append(first + kept // slots.num_children)
        level_shares.append(child_shares[kept])
        child_of = np.full(len(child_shares), -1, np.intp)
        child_of[kept] = np.arange(len(kept))
        hit = np.flatnonzero(rank < slots.num_children)
        child = child_of[path[hit] * slots.num_children + rank[hit]]
        known = np.flatnonzero(child >= 0)
        reaching, path = reaching[hit[known]], child[known]
        first = 1 + sum(map(len, level_parents[:-1]))
        shares = level_shares[-1]
    parents = np.concatenate([[-1], *level_parents])
    best = np.append(0, 1 + _largest(np.concatenate(level_shares), max_paths))
    return _index(slots, np.append(-1, np.searchsorted(best, parents[best[1:]])), law)


def path_shares(index: PathIndex, starts_S: Ints | None = None) -> Shares:
    """Return the share of every indexed path among the given start slots, all slots by default.

    Counts behind each path are shrunk towards the rank law, as PRIOR_WEIGHT extra starts that obey
    it, so a path seen twice is not believed; a child's share is its parent's times the result, so
    the shrinkage is passed down.
    """
    nodes = index.node_S if starts_S is None else index.node_S[starts_S]
    num_paths = len(index.parents)
    counts = np.bincount(nodes, minlength=num_paths)[:num_paths].astype(np.float64)
    for level in reversed(index.levels[1:]):
        parents = index.parents[level]
        counts[: level.start] += np.bincount(parents, weights=counts[level], minlength=level.start)
    parents = index.parents[1:]
    conditional = np.ones(num_paths)
    conditional[1:] = (counts[1:] + PRIOR_WEIGHT * index.rank_law_K[index.ranks[1:]]) / (
        counts[parents] + PRIOR_WEIGHT
    )
    conditional[1:] = _falling(conditional[1:], parents)
    shares = conditional
    for level in index.levels[1:]:
        shares[level] *= shares[index.parents[level]]
    return shares


def path_worths(index: PathIndex, starts_S: Ints, to_go_S: Ints) -> Shares:
    """Return the estimated starts that every indexed path saves per start.

    A start s whose step accepts one token more, at depth d, goes on from s + d + 1 instead of
    s + d, and saves to_go[s + d] - to_go[s + d + 1] starts, where to_go counts the starts from a
    slot to its prompt's end under the present tree. The worth of a path is its share times the mean
    saving of the starts that reach it, shrunk towards the mean over all positions: one step of
    policy improvement, where the share alone would take every token for equally hard to come by.
    """
    num_paths = len(index.parents)
    num_starts, savings = np.zeros(num_paths), np.zeros(num_paths)
    saving_S = (to_go_S[:-1] - to_go_S[1:]).astype(np.float64)
    slot, path = starts_S, index.node_S.take(starts_S)
    while len(path):
        below = np.flatnonzero(path)
        slot, path = slot.take(below), path.take(below)
        saving = saving_S.take(slot + index.depths.take(path))
        num_starts += np.bincount(path, minlength=num_paths)
        savings += np.bincount(path, weights=saving, minlength=num_paths)
        path = index.parents.take(path)
    mean = len(starts_S) / max(index.slots.num_positions, 1)
    mean_saving = (savings + PRIOR_WEIGHT * mean) / (num_starts + PRIOR_WEIGHT)
    worths = path_shares(index, starts_S) * np.clip(mean_saving, 0.0, 1.0)
    worths[0] = 1.0
    _cap_by_parent(index, worths)
    worths[1:] = _falling(worths[1:], index.parents[1:])
    _cap_by_parent(index, worths)
    return worths


def _cap_by_parent(index: PathIndex, worths: Shares) -> None:
    for level in index.levels[1:]:
        worths[level] = np.minimum(worths[level], worths[index.parents[level]])


def rank_law(slots: Slots) -> Shares:
    """Return the share of each rank among all positions, never rising, never 0."""
    counts = np.bincount(slots.ranks_S[slots.positions_S >= 0], minlength=slots.num_children + 1)
    law = (counts[:-1] + 1.0) / (counts.sum() + slots.num_children + 1)
    return _falling(law, np.zeros(len(law), np.intp))


def _child_shares(shares: Shares, counts: NDArray[np.int64], law: Shares) -> Shares:
    """Return the shares [paths, K] of all children, from the parents' shares and rank counts."""
    conditional = (counts[:, :-1] + PRIOR_WEIGHT * law) / (
        counts.sum(axis=1, keepdims=True) + PRIOR_WEIGHT
    )
    groups = np.repeat(np.arange(len(shares)), len(law))
    falling: Shares = _falling(conditional.ravel(), groups).reshape(conditional.shape)
    return shares[:, None] * falling


def _falling(values: Shares, groups: Ints) -> Shares:
    """Fit values in [0, 1] by ones that never rise within a group; equal groups stand together.

    One regression serves all groups: shifted apart by 2 each, groups cannot be pooled.
    """
    if not len(values):
        return values
    shift = 2.0 * np.cumsum(np.append(0, np.diff(groups) != 0))
    fitted = isotonic_regression(values - shift, increasing=False).x + shift
    clipped: Shares = np.clip(fitted, 0.0, 1.0)
    return clipped


def _largest(shares: Shares, count: int) -> Ints:
    """Return the indices of the `count` largest shares, ascending; ties go to the lower index."""
    return np.sort(np.argsort(-shares, kind="stable")[:count])


def _index(slots: Slots, parents: Ints, law: Shares) -> PathIndex:
    levels = level_slices(parents)
    depths = np.repeat(np.arange(len(levels)), [level.stop - level.start for level in levels])
    node_S = longest_paths(slots, parents)
    ranks = sibling_ranks(parents)
    widths = ranks + 1
    for level in levels[1:]:
        widths[level] = np.maximum(widths[level], widths[parents[level]])
    return PathIndex(slots, parents, ranks, depths, widths, levels, node_S, law)
