"""Other ways to choose a static tree, each as a family of trees to take the fastest from."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from stree_autotune.search.path_counts import index_paths, path_shares, rank_distribution
from stree_autotune.search.tree_solver import grow
from stree_autotune.trace.tree_walk import FlatTrace
from stree_core.tree import DEFAULT_TREE, Path, Tree

Floats = NDArray[np.float64]
DEPTH = 10
LONGEST_CHAIN = 64


def path_frequency(flat: FlatTrace, max_nodes: int) -> Iterator[Tree]:
    """Take the n most frequent paths over all positions, smoothed as ours, for every n."""
    index = index_paths(flat, max_nodes=max_nodes, max_depth=DEPTH)
    shares = path_shares(index)
    for size in range(1, max_nodes + 1):
        yield grow(index, shares, depth=DEPTH, width=flat.num_children, num_nodes=size).tree


def iid_best_first(flat: FlatTrace, max_nodes: int) -> Iterator[Tree]:
    """Take the n largest products of the rank distribution, for every n: optimal for independent
    ranks."""
    distribution = rank_distribution(flat)
    yield from _best_first([distribution] * DEPTH, max_nodes)


def medusa_greedy(flat: FlatTrace, max_nodes: int) -> Iterator[Tree]:
    """Take the n largest products of how often each offset's head has each rank right."""
    distributions = []
    for offset in range(DEPTH):
        place = np.flatnonzero(flat.positions_S >= 0)
        inside = place[place + offset < len(flat.positions_S)]
        ranks = flat.ranks_at(offset)[inside[flat.positions_S[inside + offset] >= 0]]
        counts = np.bincount(ranks, minlength=flat.num_children + 1)[: flat.num_children]
        distributions.append(counts / max(len(ranks), 1))
    yield from _best_first(distributions, max_nodes)


def sequoia(flat: FlatTrace, max_nodes: int) -> Iterator[Tree]:
    """Solve the rank vector as counted exactly, for every size and a few depths."""
    ranks = flat.ranks_at(0)[flat.positions_S >= 0]
    counts = np.bincount(ranks, minlength=flat.num_children + 1)[: flat.num_children]
    distribution = counts / max(len(ranks), 1)
    for depth in (1, 2, 3, 4, 6, DEPTH):
        for size in range(1, max_nodes + 1):
            yield best_tree(distribution, size, depth)[1]


def best_chain(flat: FlatTrace, max_nodes: int) -> Iterator[Tree]:
    """Take every chain."""
    for length in range(1, min(max_nodes, LONGEST_CHAIN) + 1):
        yield Tree.chain(length)


def default_tree(flat: FlatTrace, max_nodes: int) -> Iterator[Tree]:
    """Take the tree that STree publishes, as it is."""
    yield DEFAULT_TREE


METHODS: dict[str, Callable[[FlatTrace, int], Iterator[Tree]]] = {
    "path-frequency top-n": path_frequency,
    "iid best-first": iid_best_first,
    "Sequoia-style DP": sequoia,
    "Medusa-style greedy": medusa_greedy,
    "best chain": best_chain,
    "published tree": default_tree,
}

_TABLES: dict[tuple[bytes, int, int], tuple[list[Floats], list[NDArray[np.intp]]]] = {}


def best_tree(
    distribution: Sequence[float] | Floats, num_nodes: int, depth: int
) -> tuple[float, Tree]:
    """Return the most accepted tokens of a tree under independent ranks, and such a tree.

    Exact for any distribution, falling or not: a max-plus recursion over first rank and levels
    left, which splits the nodes between a child's own subtree and its later siblings.
    """
    distribution = np.asarray(distribution, np.float64)
    key = (distribution.tobytes(), 1 << int(num_nodes).bit_length(), depth)
    if key not in _TABLES:
        _TABLES[key] = _solve(distribution, key[1], depth)
    values, splits = _TABLES[key]
    num_ranks = len(distribution)

    def paths(nodes: int, rank: int, level: int, parent: Path) -> Iterator[Path]:
        while nodes and rank < num_ranks and level:
            own = int(splits[level][rank, nodes])
            if own == 0:
                return
            yield (*parent, rank)
            yield from paths(own - 1, 0, level - 1, (*parent, rank))
            nodes, rank = nodes - own, rank + 1

    return float(values[depth][0, num_nodes]), Tree.from_paths(paths(num_nodes, 0, depth, ()))


def _solve(
    distribution: Floats, max_nodes: int, depth: int
) -> tuple[list[Floats], list[NDArray[np.intp]]]:
    """Return values and splits [ranks + 1, nodes + 1] by levels left."""
    shape = (len(distribution) + 1, max_nodes + 1)
    values, splits = [np.zeros(shape)], [np.zeros(shape, np.intp)]
    for _ in range(depth):
        value, split = np.zeros(shape), np.zeros(shape, np.intp)
        for rank in reversed(range(len(distribution))):
            own = distribution[rank] * (1 + values[-1][0])
            for nodes in range(1, max_nodes + 1):
                # m nodes go to this rank, itself included; none means that the siblings end here
                sums = own[:nodes] + value[rank + 1, :nodes][::-1]
                best = int(np.argmax(sums))
                value[rank, nodes], split[rank, nodes] = sums[best], best + 1
        values.append(value)
        splits.append(split)
    return values, splits


def _best_first(distributions: Sequence[Floats], max_nodes: int) -> Iterator[Tree]:
    """Yield the tree of the n largest products that are reachable, for every n."""
    heap: list[tuple[float, Path]] = [(-float(distributions[0][0]), (0,))]
    paths: list[Path] = []
    while heap and len(paths) < max_nodes:
        negative, path = heapq.heappop(heap)
        paths.append(path)
        yield Tree.from_paths(paths)
        rank, level = path[-1], len(path)
        parent_share = -negative / max(float(distributions[level - 1][rank]), 1e-12)
        if rank + 1 < len(distributions[level - 1]):
            share = parent_share * float(distributions[level - 1][rank + 1])
            heapq.heappush(heap, (-share, (*path[:-1], rank + 1)))
        if level < len(distributions):
            heapq.heappush(heap, (negative * float(distributions[level][0]), (*path, 0)))
