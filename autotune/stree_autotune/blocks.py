"""All blocks of a trace: what a step might cover from each start, and the paths that it needs.

A *block* is a start s and an accept length a: the step covers the positions s to s + a, bonus token
included, if the path of the a ranks from s is in the tree and the next one is not. Blocks stand
start after start, accept lengths ascending, so that the block before has one token less.

Paths form one large tree, breadth-first, siblings by rank. A path that no block has is left out; a
tree needs it all the same to have the next rank, so `new_nodes` counts it there.
Shape letters: S slots, E blocks, N paths (path 0 is the root).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stree_autotune.trace_walk import Ints, Slots

ROOT = 0


@dataclass(frozen=True, slots=True)
class Family:
    """Paths of one depth with the same place among the siblings that are there.

    `before` are the paths that a tree must have to have these: the sibling before, or the parent.
    """

    paths: slice
    before: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """The blocks of some prompts, for trees up to a depth.

    first_E: where each start's blocks begin, for every position. start_E, end_E: the slots where
    the step starts and where the next one does. path_E: the path that the block needs.
    new_nodes_N: nodes that a tree with the path before needs more to have this path.
    families: the paths by depth and place, families that others need first.
    """

    num_slots: int
    positions: Ints
    first_E: Ints
    start_E: Ints
    end_E: Ints
    path_E: Ints
    new_nodes_N: Ints
    families: tuple[Family, ...]

    @classmethod
    def of(
        cls, slots: Slots, max_depth: int, *, deeper: bool = False, min_count: int = 1
    ) -> Blocks:
        """List the blocks for trees of at most `max_depth` levels, or of any depth (`deeper`).

        Paths that fewer than `min_count` blocks have are left out with all below. With `deeper` a
        block of `max_depth` covers all ranks from its start, as if such a path came with everything
        below: where weights are not negative, what holds for these blocks holds for every tree.
        """
        positions = np.flatnonzero(slots.positions_S >= 0)
        width = slots.num_children
        start, path = positions, np.zeros(len(positions), np.intp)
        levels = [(start, np.zeros(len(start), np.intp), path)]
        new_nodes, families = [np.zeros(1, np.intp)], []
        num_paths, first_of_level = 1, 0
        for depth in range(1, max_depth + 1):
            rank = slots.ranks_S[start + depth - 1]
            hit = np.flatnonzero(rank < width)
            key = (path[hit] - first_of_level) * width + rank[hit]
            counts = np.bincount(key, minlength=1)
            kept = np.flatnonzero(counts >= max(min_count, 1))
            if not len(kept):
                break
            order, place, skipped, before = _siblings(kept, width, first_of_level, num_paths)
            number = np.full(len(counts), -1)
            number[kept[order]] = np.arange(len(kept))
            child = number[key]
            inside = np.flatnonzero(child >= 0)
            first_of_level = num_paths
            start, path = start[hit[inside]], child[inside] + num_paths
            new_nodes.append(skipped)
            families += _families(place, before, num_paths)
            num_paths += len(kept)
            levels.append((start, np.full(len(start), depth), path))
        start_E, length_E, path_E = (np.concatenate(parts) for parts in zip(*levels, strict=True))
        order_E = np.lexsort((length_E, start_E))
        start_E, length_E, path_E = start_E[order_E], length_E[order_E], path_E[order_E]
        covered_E = length_E
        if deeper:
            covered_E = np.where(length_E == max_depth, _run_lengths(slots)[start_E], length_E)
        return cls(
            num_slots=len(slots.ranks_S),
            positions=positions,
            first_E=np.flatnonzero(length_E == 0),
            start_E=start_E,
            end_E=start_E + covered_E + 1,
            path_E=path_E,
            new_nodes_N=np.concatenate(new_nodes),
            families=tuple(families),
        )


def _run_lengths(slots: Slots) -> Ints:
    """Return per slot how many positions from there on have a rank."""
    missed = np.flatnonzero(slots.ranks_S >= slots.num_children)
    every = np.arange(len(slots.ranks_S))
    # the last slot is an end mark, which has none
    return missed[np.searchsorted(missed, every)] - every if len(missed) else every * 0


def _siblings(
    kept: Ints, width: int, first_parent: int, first: int
) -> tuple[Ints, Ints, Ints, Ints]:
    """Order the children `kept` (parent * width + rank, ascending) by place among their siblings.

    Returns the order, and in that order their places, the nodes that each adds, and the path that
    each needs.
    """
    parent, rank = kept // width, kept % width
    every = np.arange(len(kept))
    is_first = np.append(True, parent[1:] != parent[:-1])
    place = every - np.maximum.accumulate(np.where(is_first, every, 0))
    skipped = rank - np.where(is_first, -1, np.append(-1, rank[:-1]))
    order = np.lexsort((every, place))
    number = np.empty_like(every)
    number[order] = every
    before = np.where(is_first, first_parent + parent, first + np.append(0, number[:-1]))
    return order, place[order], skipped[order], before[order]


def _families(place: Ints, before: Ints, first: int) -> list[Family]:
    ends = np.cumsum(np.bincount(place)).tolist()
    return [
        Family(slice(first + begin, first + end), before[begin:end])
        for begin, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
