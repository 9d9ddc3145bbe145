"""How often a step accepts each path: counts over a trace, smoothed, for tree solver.

The *share* of a path is the estimated fraction of starts whose step would accept it, were it in the
tree. Shares never rise from a parent to its child nor from a rank to the next, so the n best paths
are a tree, for every n and under every cap on depth and children.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from stree_autotune.trace import (
    FlatTrace,
    Ints,
    Lockstep,
    level_slices,
    longest_paths,
    sibling_ranks,
)

PRIOR_WEIGHT = 32.0
"""Starts that the rank distribution counts for against what was seen behind one path."""

PATHS_PER_NODE = 8
PATHS_PER_DEPTH_CAP = 2
"""Indexed paths per node of the largest tree, in all and under each depth cap."""

Shares = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PathIndex:
    """The most frequent paths of a trace, as one large breadth-first tree.

    parents, ranks, depths: per path, path 0 is the root. levels: the paths of each depth.
    widths: the children per node that a tree needs to contain the path.
    node_S: per place the longest indexed path from there, one past the last path at end marks.
    priors: per path the share of positions with its rank at its depth; 1 for the root.
    walked: of trees that were walked, by their paths: the tokens per step, and the worths then.
    """

    flat: FlatTrace
    parents: Ints
    ranks: Ints
    depths: Ints
    widths: Ints
    levels: tuple[slice, ...]
    node_S: Ints
    priors: Shares
    walked: dict[bytes, tuple[float, Shares]] = field(default_factory=dict)

    @cached_property
    def shares(self) -> Shares:
        """The share of every path among all places."""
        return path_shares(self)

    @cached_property
    def lockstep(self) -> Lockstep:
        """What walks many trees of the index side by side."""
        return Lockstep.of(self.flat)


def index_paths(flat: FlatTrace, *, max_nodes: int, max_depth: int) -> PathIndex:
    """Index the paths with the largest shares over all positions, for trees up to `max_nodes`.

    Every depth cap has paths of its own, so that shallow trees do not lack nodes.
    """
    parents, shares = [np.full(1, -1)], [np.ones(1)]
    distributions = [rank_distribution(flat, depth) for depth in range(len(flat.ranks_DS))]
    # The places that reach a path of the deepest level so far, and which one.
    place = np.flatnonzero(flat.positions_S >= 0)
    path = np.zeros(len(place), np.intp)
    for depth in range(min(max_depth, flat.max_depth)):
        rank = flat.ranks_at(depth)[place]
        distribution = distributions[min(depth, len(distributions) - 1)]
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
    return _index(flat, np.append(-1, chosen_parents), distributions)


def path_shares(index: PathIndex, starts_S: Ints | None = None) -> Shares:
    """Return the share of every indexed path among the given start places, all places by default.

    Counts behind each path are shrunk towards the rank distribution, as PRIOR_WEIGHT extra starts
    that obey it, so a path seen twice is not believed; a child's share is its parent's times the
    result, so the shrinkage is passed down.
    """
    nodes = index.node_S if starts_S is None else index.node_S[starts_S]
    num_paths = len(index.parents)
    ends_N = np.bincount(nodes, minlength=num_paths)[:num_paths].astype(np.float64)
    shares: Shares = _shares(index, _reached(index, ends_N[None, :]))[0]
    return shares


def path_worths(index: PathIndex, starts_K: Ints, to_go_EC: Ints) -> Shares:
    """Return the estimated starts that every indexed path saves per start, for every tree [C, N].

    A start s whose step accepts one token more, at depth d, goes on from s + d + 1 instead of
    s + d, and saves to_go[s + d] - to_go[s + d + 1] starts, where to_go counts the starts from a
    place to its prompt's end under the present tree. The worth of a path is its share times the
    mean saving of the starts that reach it, shrunk towards the mean over all positions: one step of
    policy improvement, where the share alone would take every token for equally hard to come by.
    Starts are spots, see stree_autotune.trace.lockstep.
    """
    num_trees, num_paths = to_go_EC.shape[1], len(index.parents)
    to_go_SC = to_go_EC[index.lockstep.entry_S]
    saving_SC = np.zeros(to_go_SC.shape)
    np.subtract(to_go_SC[:-1], to_go_SC[1:], out=saving_SC[:-1])
    entry = starts_K // num_trees
    tree = starts_K - num_trees * entry
    place = index.lockstep.place_E.take(entry)
    # a path of one tree is tree * N + path, a place of one tree is place * C + tree
    path, at = index.node_S.take(place) + num_paths * tree, num_trees * place + tree
    size = num_trees * num_paths
    depths = np.tile(index.depths, num_trees)
    parents = (index.parents + num_paths * np.arange(num_trees)[:, None]).ravel()
    ends_CN = np.bincount(path, minlength=size).astype(np.float64).reshape(num_trees, num_paths)
    savings_CN = np.zeros(size)
    while len(path):
        depth = depths.take(path)
        below = np.flatnonzero(depth > 0)
        path, at = path.take(below), at.take(below)
        saving = saving_SC.take(at + num_trees * depth.take(below))
        savings_CN += np.bincount(path, weights=saving, minlength=size)
        path = parents.take(path)
    savings_CN = savings_CN.reshape(num_trees, num_paths)
    reached_CN = _reached(index, ends_CN)
    mean_CN = ends_CN.sum(axis=1, keepdims=True) / max(index.flat.num_positions, 1)
    mean_saving_CN = (savings_CN + PRIOR_WEIGHT * mean_CN) / (reached_CN + PRIOR_WEIGHT)
    worths_CN: Shares = _shares(index, reached_CN) * np.clip(mean_saving_CN, 0.0, 1.0)
    worths_CN[:, 0] = 1.0
    _cap_by_parent(index, worths_CN)
    for worths in worths_CN:
        worths[1:] = _falling(worths[1:], index.parents[1:])
    _cap_by_parent(index, worths_CN)
    return worths_CN


def _reached(index: PathIndex, ends_CN: Shares) -> Shares:
    """Return how many starts reach every path, from how many end there."""
    reached_CN = ends_CN.copy()
    for level in reversed(index.levels[1:]):
        # children of one path stand together
        first = np.flatnonzero(np.diff(index.parents[level], prepend=-1))
        above = index.parents[level][first]
        reached_CN[:, above] += np.add.reduceat(reached_CN[:, level], first, axis=1)
    return reached_CN


def _shares(index: PathIndex, reached_CN: Shares) -> Shares:
    parents = index.parents[1:]
    shares_CN = np.ones_like(reached_CN)
    shares_CN[:, 1:] = (reached_CN[:, 1:] + PRIOR_WEIGHT * index.priors[1:]) / (
        reached_CN[:, parents] + PRIOR_WEIGHT
    )
    for shares in shares_CN:
        shares[1:] = _falling(shares[1:], parents)
    for level in index.levels[1:]:
        shares_CN[:, level] *= shares_CN[:, index.parents[level]]
    return shares_CN


def _cap_by_parent(index: PathIndex, worths_CN: Shares) -> None:
    for level in index.levels[1:]:
        worths_CN[:, level] = np.minimum(worths_CN[:, level], worths_CN[:, index.parents[level]])


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
    if count >= len(shares):
        return np.arange(len(shares))
    least = np.partition(shares, len(shares) - count)[len(shares) - count]
    larger = np.flatnonzero(shares > least)
    ties = np.flatnonzero(shares == least)[: count - len(larger)]
    return np.sort(np.concatenate([larger, ties]))


def _index(flat: FlatTrace, parents: Ints, distributions: Sequence[Shares]) -> PathIndex:
    levels = level_slices(parents)
    depths = np.repeat(np.arange(len(levels)), [level.stop - level.start for level in levels])
    node_S = longest_paths(flat, parents)
    ranks = sibling_ranks(parents)
    widths = ranks + 1
    priors = np.ones(len(parents))
    for depth, level in enumerate(levels[1:]):
        widths[level] = np.maximum(widths[level], widths[parents[level]])
        priors[level] = distributions[min(depth, len(distributions) - 1)][ranks[level]]
    return PathIndex(flat, parents, ranks, depths, widths, levels, node_S, priors)
