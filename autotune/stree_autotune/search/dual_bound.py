"""A bound on every tree: the least starts that a walk with n nodes can have on a trace.

Give every position a weight. The steps of a walk cover every position once, so if no step ever
covered more than weight 1, there would be at least as many starts as there is weight. What a step
from s covers beyond 1 is its *excess*; it depends on the tree only by the accept length there. So

    starts(tree) >= sum of weights - sum over all s of excess(s, accept length of the tree at s)

for every tree, whatever the weights. The second sum is a sum over the tree's paths: each is worth
what it adds to the excesses of the starts that reach it. With a price per node it is at most

    price * nodes + the most that any tree can have of: worth of its paths - price * its nodes

and that tree falls out of one pass over all paths, from the leaves up, because a path needs but the
one before it. `bound` computes the result exactly; `fit_weights` looks for weights that make it
large. It is concave in the weights; kinks are rounded so that a quasi-Newton method gets on, and
rounding errs to the safe side. Shape letters as in blocks.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stree_autotune.trace import FlatTrace, Ints

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

    first_E: where each start's blocks begin, for every position. start_E, end_E: the places where
    the step starts and where the next one does. path_E: the path that the block needs.
    new_nodes_N: nodes that a tree with the path before needs more to have this path.
    families: the paths by depth and place, families that others need first.
    """

    num_places: int
    positions: Ints
    first_E: Ints
    start_E: Ints
    end_E: Ints
    path_E: Ints
    new_nodes_N: Ints
    families: tuple[Family, ...]

    @classmethod
    def of(
        cls, flat: FlatTrace, max_depth: int, *, deeper: bool = False, min_count: int = 1
    ) -> Blocks:
        """List the blocks for trees of at most `max_depth` levels, or of any depth (`deeper`).

        Paths that fewer than `min_count` blocks have are left out with all below. With `deeper` a
        block of `max_depth` covers all ranks from its start, as if such a path came with everything
        below: where weights are not negative, what holds for these blocks holds for every tree.
        """
        positions = np.flatnonzero(flat.positions_S >= 0)
        width = flat.num_children
        start, path = positions, np.zeros(len(positions), np.intp)
        levels = [(start, np.zeros(len(start), np.intp), path)]
        new_nodes, families = [np.zeros(1, np.intp)], []
        num_paths, first_of_level = 1, 0
        for depth in range(1, max_depth + 1):
            rank = flat.ranks_at(depth - 1)[start]
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
            covered_E = np.where(length_E == max_depth, _run_lengths(flat)[start_E], length_E)
        return cls(
            num_places=len(flat.positions_S),
            positions=positions,
            first_E=np.flatnonzero(length_E == 0),
            start_E=start_E,
            end_E=start_E + covered_E + 1,
            path_E=path_E,
            new_nodes_N=np.concatenate(new_nodes),
            families=tuple(families),
        )


def _run_lengths(flat: FlatTrace) -> Ints:
    """Return per place how many positions from there on have a rank; without a depth axis."""
    (ranks_S,) = flat.ranks_DS
    missed = np.flatnonzero(ranks_S >= flat.num_children)
    every = np.arange(len(ranks_S))
    # the last place is an end mark, which has none
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


Floats = NDArray[np.float64]

MEMORY = 12
"""Steps that the quasi-Newton method remembers."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of the optimiser: the width of rounded kinks (excesses in starts, worths in prices).

    `summed` moves the weight behind every position instead of each weight alone: the two take turns
    because each is slow where the other is fast.
    """

    rounding: float
    max_steps: int
    summed: bool


TOLERANCE = 1e-7
"""Relative change of the bound in one step that ends a stage: small traces settle early."""

FIRST_STAGES = (Stage(0.2, 40, False), Stage(0.1, 40, True))
STAGES = (Stage(0.05, 40, False), Stage(0.03, 60, True))


def bound(blocks: Blocks, weights: Floats, price: float) -> float:
    """Return B such that every tree with n nodes has at least B - price * n starts.

    `weights` are per position; they must not be negative when the blocks stand for deeper ones.
    """
    return _evaluate(blocks, weights, price, 0.0)[0]


def fit_weights(
    blocks: Blocks, weights: Floats, price: float, stages: tuple[Stage, ...] = STAGES
) -> Floats:
    """Return weights, starting from the given ones, that bring the bound near its largest."""
    for stage in stages:
        weights = _fit(blocks, weights, price, stage)
    return weights


def _fit(blocks: Blocks, weights: Floats, price: float, stage: Stage) -> Floats:
    # half a second to import, for one command
    from scipy.optimize import minimize

    if not len(weights):
        return weights
    is_last = np.append(np.diff(blocks.positions) != 1, True)
    ends = np.flatnonzero(is_last)
    last = np.repeat(ends, np.diff(ends, prepend=-1))

    def weights_of(point: Floats) -> Floats:
        return point - np.where(is_last, 0.0, np.append(point[1:], 0.0)) if stage.summed else point

    def loss(point: Floats) -> tuple[float, Floats]:
        value, slope = _evaluate(blocks, weights_of(point), price, stage.rounding)
        if stage.summed:
            slope = np.diff(np.where(is_last, 0.0, slope), prepend=0.0) + np.where(
                is_last, slope, 0.0
            )
        return -value, -slope

    point = weights
    if stage.summed:
        behind = np.cumsum(weights)
        point = behind[last] - behind + weights
    options = {"maxiter": stage.max_steps, "maxcor": MEMORY, "ftol": TOLERANCE, "gtol": 0.0}
    result = minimize(loss, point, jac=True, method="L-BFGS-B", options=options)
    return np.asarray(weights_of(result.x))


def _evaluate(
    blocks: Blocks, weights: Floats, price: float, rounding: float
) -> tuple[float, Floats]:
    """Return the bound, its kinks rounded, and how it changes with each weight."""
    before_S = np.zeros(blocks.num_places + 1)
    before_S[blocks.positions + 1] = weights
    np.cumsum(before_S, out=before_S)
    over_E = before_S.take(blocks.end_E) - before_S.take(blocks.start_E) - 1.0
    excess_E, steep_E = _positive_part(over_E, rounding)
    # a start's first block belongs to the root, whose sum is not a worth
    added_E = np.diff(excess_E, prepend=0.0)
    num_paths = len(blocks.new_nodes_N)
    worth_N = np.bincount(blocks.path_E, weights=added_E, minlength=num_paths).astype(np.float64)
    worth_N -= price * blocks.new_nodes_N
    most, member_N = _best_tree(blocks, worth_N, price * rounding)
    value = weights.sum() - excess_E.take(blocks.first_E).sum() - most
    if rounding == 0:
        return float(value), weights
    # how much of every block the tree accepts, and goes no further
    member_E = member_N.take(blocks.path_E)
    further_E = np.append(member_E[1:], 0.0)
    further_E[blocks.first_E[1:] - 1] = 0.0
    steep_E *= member_E - further_E
    size = blocks.num_places + 1
    slope_S = np.bincount(blocks.start_E, weights=steep_E, minlength=size)
    slope_S -= np.bincount(blocks.end_E, weights=steep_E, minlength=size)
    # a weight counts for all places behind it
    slope = 1.0 - np.cumsum(slope_S)[blocks.positions]
    return float(value), np.asarray(slope, np.float64)


def _best_tree(blocks: Blocks, worth_N: Floats, rounding: float) -> tuple[float, Floats]:
    """Return the most that a tree's worths can sum to, and how far each path is a member [N]."""
    total_N = worth_N
    total_N[ROOT] = 0.0
    chosen_N = np.ones(len(worth_N))
    for family in reversed(blocks.families):
        kept, chosen_N[family.paths] = _positive_part(total_N[family.paths], rounding)
        total_N[family.before] += kept
    for family in blocks.families:
        chosen_N[family.paths] *= chosen_N[family.before]
    return float(total_N[ROOT]), chosen_N


def _positive_part(values: Floats, rounding: float) -> tuple[Floats, Floats]:
    """Return max(values, 0) and its slope; rounded, it is never below that."""
    positive: Floats
    slope: Floats
    if rounding == 0:
        positive, slope = np.maximum(values, 0.0), (values > 0).astype(np.float64)
        return positive, slope
    slope = np.clip(values / rounding + 0.5, 0.0, 1.0)
    positive = 0.5 * rounding * slope * slope + np.maximum(values - 0.5 * rounding, 0.0)
    return positive, slope
