"""The times of one term for every size, from those that were measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from stree_autotune.runtime_table import STORES, NoRoom, Point, Term
from stree_autotune.tree_shape import FEWEST_ROWS
from stree_core.errors import MissingMeasurement


@dataclass(frozen=True, slots=True)
class Curve:
    """Times (ms) of one term for every size from `first` on; what is not covered raises."""

    term: str
    batch_size: int
    first: int
    ms: tuple[float, ...]
    remedy: str

    def at(self, size: int) -> float:
        """Return the time at `size`; raise MissingMeasurement outside the measured sizes."""
        index = size - self.first
        if not 0 <= index < len(self.ms):
            raise self._missing(size)
        return self.ms[index]

    def scaled(self, factor: Callable[[int], float]) -> Curve:
        """Return the times multiplied by a factor of their size, rising as before."""
        last = self.first + len(self.ms)
        ms = [ms * factor(size) for size, ms in zip(range(self.first, last), self.ms, strict=True)]
        return replace(self, ms=tuple(accumulate(ms, max)))

    def _missing(self, size: int) -> MissingMeasurement:
        last = self.first + len(self.ms) - 1
        covered = f"sizes {self.first} to {last}" if self.ms else "no size"
        # a level of w nodes with children needs a tree of at least 2 w nodes
        max_nodes = 2 * size if self.term == "draft" else size - 1
        more = f" --batch-size {self.batch_size}"
        more += f" --max-nodes {max_nodes}`" if self.ms and size > last else "`"
        remedy = self.remedy if not self.remedy.endswith("`") else self.remedy[:-1] + more
        return MissingMeasurement(
            f"{self.term} at batch size {self.batch_size} is measured for {covered}, got size "
            f"{size}; {remedy}"
        )


def make_curve(
    term: Term, batch_size: int, points: Iterable[Point], no_room: Iterable[NoRoom], command: str
) -> Curve:
    """Make measured times monotone in size, straight between neighbouring measured sizes only."""
    # most commands never predict, and scipy.optimize takes most of a second to import
    from scipy.optimize import isotonic_regression

    mine = sorted((point.size, point.ms) for point in points if point.term == term)
    remedy = f"record it with `{command}`"
    if any(row.name == term for row in no_room):
        remedy = "larger sizes did not fit into the GPU's memory when it was probed"
    if not mine:
        return Curve(term, batch_size, 1, (), remedy)
    if term in STORES:
        # No slot that stores adds nothing.
        mine.insert(0, (0, 0.0))
    sizes, times = zip(*mine, strict=True)
    rising = isotonic_regression(times).x
    dense = np.interp(np.arange(sizes[0], sizes[-1] + 1), sizes, rising)
    return Curve(term, batch_size, sizes[0], tuple(dense.tolist()), remedy)


def without_rows(point: Point, rows: Curve) -> Point:
    """Return what a draft pass takes without rows before it; another point as it is.

    It was timed right below the root.
    """
    if point.term != "draft" or not rows.ms:
        return point
    last = rows.first + len(rows.ms) - 1
    return point._replace(ms=point.ms - rows.at(min(FEWEST_ROWS + point.size, last)))
