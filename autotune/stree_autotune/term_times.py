"""The terms of a step at one batch size, looked up by size, and their sum for a tree's shape."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from stree_autotune.remainder import Remainder, WholeStep, fit_remainder
from stree_autotune.runtime_table import Point, RuntimeTable
from stree_core.errors import MissingMeasurement
from stree_core.tree import Tree


class TreeShape(NamedTuple):
    """What the time of a step depends on.

    `widths`: inner nodes of every level below the root that has any; each is one draft pass.
    `branching`: inner nodes of every level, root included, on which some node has several children.
    """

    num_tokens: int
    depth: int
    widths: tuple[int, ...]
    branching: tuple[int, ...]


class Factors(NamedTuple):
    """One number per term: its relative spread, or what a draw multiplies it by."""

    one_token: float
    verify: float
    draft_root: float
    draft: float
    branch: float


PLAIN = Factors(1.0, 1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Curve:
    """Times (ms) of one term for every size from `first` on; what is not covered raises."""

    term: str
    batch_size: int
    first: int
    ms: tuple[float, ...]
    command: str

    def at(self, size: int) -> float:
        """Return the time at `size`; raise MissingMeasurement outside the measured sizes."""
        index = size - self.first
        if not 0 <= index < len(self.ms):
            raise self._missing(size)
        return self.ms[index]

    def _missing(self, size: int) -> MissingMeasurement:
        last = self.first + len(self.ms) - 1
        covered = f"sizes {self.first} to {last}" if self.ms else "no size"
        # a level of w nodes with children needs a tree of at least 2 w nodes
        max_nodes = size - 1 if self.term == "verify" else 2 * size
        more = f" --max-nodes {max_nodes}" if self.ms and size > last else ""
        return MissingMeasurement(
            f"{self.term} at batch size {self.batch_size} is measured for {covered}, got size "
            f"{size}; record it with `{self.command}{more}`"
        )


@dataclass(frozen=True, slots=True)
class TermTimes:
    """All terms at one batch size."""

    one_token: Curve
    verify: Curve
    draft_root: Curve
    draft: Curve
    branch: Curve
    remainder: Remainder | None

    def off_ms(self, factors: Factors) -> float:
        """Return the time of a step with verdict off."""
        return self.one_token.at(1) * factors.one_token

    def sum_ms(self, shape: TreeShape, factors: Factors) -> float:
        """Return the sum of the terms of a speculative step, without the remainder."""
        total = self.draft_root.at(1) * factors.draft_root
        total += self.verify.at(shape.num_tokens) * factors.verify
        draft, branch = self.draft.at, self.branch.at
        if shape.widths:
            total += sum([draft(width) for width in shape.widths]) * factors.draft
        if shape.branching:
            total += sum([branch(width) for width in shape.branching]) * factors.branch
        return total

    def speculative_ms(self, shape: TreeShape, factors: Factors, steps_off: float) -> float:
        """Return the time of a speculative step that misses the fit by `steps_off` fit errors."""
        remainder = self.fitted()
        total = self.sum_ms(shape, factors) + remainder.ms(shape.depth, shape.num_tokens)
        return total * math.exp(steps_off * remainder.fit_error)

    def fitted(self) -> Remainder:
        """Return the remainder; raise MissingMeasurement when there were no steps to fit it to."""
        if self.remainder is None:
            raise MissingMeasurement(
                f"two or more whole steps at batch size {self.verify.batch_size} are needed, the "
                f"table has fewer; record them with `{self.verify.command}`"
            )
        return self.remainder

    def require(self, max_nodes: int) -> None:
        """Raise MissingMeasurement unless verdict off and trees up to `max_nodes` have a time."""
        sizes = [(self.one_token, 1), (self.draft_root, 1)]
        sizes += [(self.verify, size) for size in (2, max_nodes + 1)]
        if max_nodes > 1:
            # half the nodes on one level, one child below each, is the widest draft pass
            sizes += [(c, size) for c in (self.draft, self.branch) for size in (1, max_nodes // 2)]
        for curve, size in sizes:
            curve.at(size)
        self.fitted()


@lru_cache(maxsize=1 << 14)
def shape_of(tree: Tree) -> TreeShape:
    """Return the shape of a tree that has nodes."""
    inner: list[int] = []
    branching: list[bool] = []
    children = [0] * tree.num_tokens
    for parent in tree.parents[1:]:
        children[parent] += 1
    for count, depth in zip(children, tree.depths, strict=True):
        if count == 0:
            continue
        if depth == len(inner):
            inner.append(0)
            branching.append(False)
        inner[depth] += 1
        branching[depth] |= count > 1
    wide = tuple(width for width, several in zip(inner, branching, strict=True) if several)
    return TreeShape(tree.num_tokens, tree.depth, tuple(inner[1:]), wide)


def term_times(table: RuntimeTable) -> dict[int, TermTimes]:
    """Return the terms of every measured batch size, remainder fitted, ascending."""
    return {batch_size: _at_batch_size(table, batch_size) for batch_size in table.batch_sizes}


def spreads(table: RuntimeTable) -> Factors:
    """Return the relative spread of each term: the median over its points, at most one half."""
    relative: dict[str, list[float]] = {term: [0.0] for term in Factors._fields}
    for point in table.points:
        if point.ms > 0:
            relative[point.term].append(point.spread_ms / point.ms)
    return Factors(
        *(min(0.5, float(np.median(values[1:] or values))) for values in relative.values())
    )


def _at_batch_size(table: RuntimeTable, batch_size: int) -> TermTimes:
    points = [point for point in table.points if point.batch_size == batch_size]
    command = table.probe_command
    curves = {term: _curve(term, batch_size, points, command) for term in Factors._fields}
    bare = TermTimes(**curves, remainder=None)
    steps = [step for step in table.steps if step.batch_size == batch_size]
    if len(steps) < 2:
        return bare
    shapes = [shape_of(table.trees[step.tree].build()) for step in steps]
    whole = [
        WholeStep(shape.depth, shape.num_tokens, bare.sum_ms(shape, PLAIN), step.ms)
        for shape, step in zip(shapes, steps, strict=True)
    ]
    return TermTimes(**curves, remainder=fit_remainder(whole, _floors(bare)))


def _floors(times: TermTimes) -> tuple[float, float, float]:
    """Return how far each coefficient of the remainder may go below zero.

    A level costs at least nothing with its draft pass, the constant at most undoes the draft's root
    pass, and further tokens never pay.
    """
    per_level = -times.draft.ms[0] if times.draft.ms else 0.0
    return -times.draft_root.at(1), per_level, 0.0


def _curve(term: str, batch_size: int, points: Iterable[Point], command: str) -> Curve:
    """Make measured times monotone in size, straight between neighbouring measured sizes only."""
    # most commands never predict, and scipy.optimize takes most of a second to import
    from scipy.optimize import isotonic_regression

    mine = sorted((point.size, point.ms) for point in points if point.term == term)
    if not mine:
        return Curve(term, batch_size, 1, (), command)
    sizes, times = zip(*mine, strict=True)
    rising = isotonic_regression(times).x
    dense = np.interp(np.arange(sizes[0], sizes[-1] + 1), sizes, rising)
    return Curve(term, batch_size, sizes[0], tuple(dense.tolist()), command)
