"""How often a step accepts each path: counts over a trace, smoothed, for tree solver.

The *share* of a path is the estimated fraction of starts whose step would accept it, were it in the
tree. Shares never rise from a parent to its child nor from a rank to the next, so the n best paths
are a tree, for every n and under every cap on depth and children.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from stree_autotune.trace import FlatTrace, Ints, level_slices, longest_paths, sibling_ranks

PRIOR_WEIGHT = 32.0
"""Starts that the rank distribution counts for against what was seen behind one path."""

PATHS_PER_NODE = 8
PATHS_PER_DEPTH_CAP = 2
"""Indexed paths per node of the largest tree, in all and under each depth cap."""

Shares = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class PathIndex:
    """The most frequent paths of a trace, as one large breadth-first tree.

    parents, ranks, depths: per path, path 0 is the root. levels: the paths of each depth.
    widths: the children per node that a tree needs to contain the path.
    node_S: per place the longest indexed path from there, one past the last path at end marks.
    priors: per path the share of positions with its rank at its depth; 1 for the root.
    """

    flat: FlatTrace
    parents: Ints
    ranks: Ints
    depths: Ints
    widths: Ints
    levels: tuple[slice, ...]
    node_S: Ints
    priors: Shares


def index_paths(flat: FlatTrace, *, max_nodes: int, max_depth: int) -> PathIndex:
    """Index the paths with the largest shares over all positions, for trees up to `max_nodes`.

    Every depth cap has paths of its own, so that shallow trees do not lack nodes.
    """
    parents, shares = [np.full(1, -1)], [np.ones(1)]
    # The places that reach a path of the deepest level so far, and which one.
    place = np.flatnonzero(flat.positions_S >= 0)
    path = np.zeros(len(place), np.intp)
    for depth in range(min(max_depth, flat.max_depth)):
        rank = flat.ranks_at(depth)[place]
        distribution = rank_distribution(flat, depth)
        child_shares = _child_shares(shares[-1], path, rank, distribution)
        kept = _largest(child_shares, PATHS_PER_NODE * max_nodes)
        first = sum(map(len, shares[:-1]))
        parents.append(first + kept // len(distribution))
        shares.append(child_shares[kept])
        child_of = np.full(len(child_shares), -1)
        child_of[kept] = np.arange(len(kept))
        matched = np.flatnonzero(rank < len(distribution))
        child = child_of[path[matched] * len(distribution) + rank[matched]]
        place, path = place[matched[child >= 0]], child[child >= 0]
    ends = np.cumsum([len(level) for level in shares])
    all_shares = np.concatenate(shares)
    chosen = [_largest(all_shares, PATHS_PER_NODE * max_nodes + 1)]
    chosen += [_largest(all_shares[:end], PATHS_PER_DEPTH_CAP * max_nodes + 1) for end in ends]
    paths = np.unique(np.concatenate(chosen))
    chosen_parents = np.searchsorted(paths, np.concatenate(parents)[paths[1:]])
    return _index(flat, np.append(-1, chosen_parents))


def path_shares(index: PathIndex, starts_S: Ints | None = None) -> Shares:
    """Return the share of every indexed path among the given start places, all places by default.

    Counts behind each path are shrunk towards the rank distribution, as PRIOR_WEIGHT extra starts
    that obey it, so a path seen twice is not believed; a child's share is its parent's times the
    result, so the shrinkage is passed down.
    """
    nodes = index.node_S if starts_S is None else index.node_S[starts_S]
    num_paths = len(index.parents)
    counts = np.bincount(nodes, minlength=num_paths)[:num_paths].astype(np.float64)
    for level in reversed(index.levels[1:]):
        parents = index.parents[level]
        counts[: level.start] += np.bincount(parents, weights=counts[level], minlength=level.start)
    parents = index.parents[1:]
    conditional = np.ones(num_paths)
    conditional[1:] = (counts[1:] + PRIOR_WEIGHT * index.priors[1:]) / (
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
    place to its prompt's end under the present tree. The worth of a path is its share times the
    mean saving of the starts that reach it, shrunk towards the mean over all positions: one step of
    policy improvement, where the share alone would take every token for equally hard to come by.
    """
    num_paths = len(index.parents)
    num_starts, savings = np.zeros(num_paths), np.zeros(num_paths)
    saving_S = (to_go_S[:-1] - to_go_S[1:]).astype(np.float64)
    place, path = starts_S, index.node_S.take(starts_S)
    while len(path):
        below = np.flatnonzero(path)
        place, path = place.take(below), path.take(below)
        saving = saving_S.take(place + index.depths.take(path))
        num_starts += np.bincount(path, minlength=num_paths)
        savings += np.bincount(path, weights=saving, minlength=num_paths)
        path = index.parents.take(path)
    mean = len(starts_S) / max(index.flat.num_positions, 1)
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


def rank_distribution(flat: FlatTrace, depth: int = 0) -> Shares:
    """Return the share of each rank among all positions, never rising, never 0.

    Without a depth axis it is that of depth 0 at every depth.
    """
    ranks_S = flat.ranks_DS[min(depth, len(flat.ranks_DS) - 1)]
    counts = np.bincount(ranks_S[flat.positions_S >= 0], minlength=flat.num_children + 1)
    distribution = (counts[:-1] + 1.0) / (counts.sum() + flat.num_children + 1)
    return _falling(distribution, np.zeros(len(distribution), np.intp))


def _child_shares(shares: Shares, path: Ints, rank: Ints, distribution: Shares) -> Shares:
    """Return the shares [paths * K] of all children of the paths with the given shares.

    `path` and `rank` tell per place that reaches such a path which rank comes next, K for none.
    """
    num_ranks = len(distribution)
    counts = np.bincount(path * (num_ranks + 1) + rank, minlength=len(shares) * (num_ranks + 1))
    counts = counts.reshape(len(shares), num_ranks + 1)
    conditional = (counts[:, :-1] + PRIOR_WEIGHT * distribution) / (
        counts.sum(axis=1, keepdims=True) + PRIOR_WEIGHT
    )
    parents = np.repeat(np.arange(len(shares)), num_ranks)
    child_shares: Shares = np.repeat(shares, num_ranks) * _falling(conditional.ravel(), parents)
    return child_shares


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


def _index(flat: FlatTrace, parents: Ints) -> PathIndex:
    levels = level_slices(parents)
    depths = np.repeat(np.arange(len(levels)), [level.stop - level.start for level in levels])
    node_S = longest_paths(flat, parents)
    ranks = sibling_ranks(parents)
    widths = ranks + 1
    priors = np.ones(len(parents))
    for depth, level in enumerate(levels[1:]):
        widths[level] = np.maximum(widths[level], widths[parents[level]])
        priors[level] = rank_distribution(flat, depth)[ranks[level]]
    return PathIndex(flat, parents, ranks, depths, widths, levels, node_S, priors)
