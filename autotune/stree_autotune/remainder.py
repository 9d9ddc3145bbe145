"""The remainder: what whole steps cost beyond the sum of their separately measured terms."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stree_autotune.tree_shape import TreeShape

Floats = NDArray[np.float64]


class Coefficients(NamedTuple):
    """What the remainder is made of, in ms: `branching` counts once, where a node has siblings."""

    constant: float = 0.0
    per_level: float = 0.0
    per_token: float = 0.0
    branching: float = 0.0

    def minus(self, other: Coefficients) -> Coefficients:
        """Return the differences."""
        return Coefficients(*(a - b for a, b in zip(self, other, strict=True)))

    def plus(self, other: Coefficients) -> Coefficients:
        """Return the sums."""
        return Coefficients(*(a + b for a, b in zip(self, other, strict=True)))


# The constant and any others, simplest first; a later set is taken only when it predicts left-out
# steps better.
_SETS = [(0, *more) for size in range(4) for more in itertools.combinations((1, 2, 3), size)]


@dataclass(frozen=True, slots=True)
class WholeStep:
    """One measured step: its shape, the sum of its terms, and its own time (ms)."""

    shape: TreeShape
    sum_ms: float
    ms: float


@dataclass(frozen=True, slots=True)
class Remainder:
    """Accept, commit, host, launches: a sum over what `Coefficients` name."""

    coefficients: Coefficients
    fit_error: float

    def ms(self, shape: TreeShape) -> float:
        """Return the remainder of a step with a tree of this shape."""
        terms: Iterator[float] = map(operator.mul, self.coefficients, _features(shape))
        return sum(terms)


def fit_remainder(steps: Sequence[WholeStep], floors_ms: Coefficients) -> Remainder:
    """Fit the remainder to whole steps by least squares of the relative error.

    `floors_ms` bounds the coefficients from below: passes inside one graph can cost less than the
    same passes alone, so a coefficient may be negative, but never so far that a deeper tree gets
    cheaper. Non-negative least squares runs on what lies above the floors. Of the sets of
    coefficients that hold the constant the one with the smallest leave-one-out error (root mean
    square, relative to the step) wins; that is `fit_error`. Needs two steps.
    """
    chosen, errors = _best_set(steps, floors_ms)
    return Remainder(_solve(steps, floors_ms, chosen), _root_mean_square(errors))


def leave_one_out(steps: Sequence[WholeStep], floors_ms: Coefficients) -> list[float]:
    """Return the relative error of each step when it is predicted from the others."""
    return _best_set(steps, floors_ms)[1]


def _best_set(
    steps: Sequence[WholeStep], floors_ms: Coefficients
) -> tuple[tuple[int, ...], list[float]]:
    """Return which coefficients predict left-out steps best, and their errors."""
    best: tuple[tuple[int, ...], list[float]] | None = None
    for chosen in _SETS:
        if len(steps) <= len(chosen):
            continue
        errors = _leave_one_out(steps, floors_ms, chosen)
        # a further coefficient must earn its place, or noise decides
        if best is None or _root_mean_square(errors) < 0.9 * _root_mean_square(best[1]):
            best = (chosen, errors)
    assert best is not None
    return best


def _root_mean_square(errors: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def _features(shape: TreeShape) -> tuple[float, ...]:
    """Return what each coefficient is multiplied by."""
    return 1.0, float(shape.depth), float(shape.num_tokens), float(bool(shape.branching))


def _solve(
    steps: Sequence[WholeStep], floors_ms: Coefficients, chosen: tuple[int, ...]
) -> Coefficients:
    """Return the coefficients; those that are not chosen are 0."""
    # scipy.optimize takes most of a second to import, and most commands never fit
    from scipy.optimize import nnls

    features: Floats = np.array([_features(step.shape) for step in steps])[:, chosen]
    floors = np.array(floors_ms)[list(chosen)]
    times = np.array([step.ms for step in steps])
    residual = times - np.array([step.sum_ms for step in steps]) - features @ floors
    above, _ = nnls(features / times[:, None], residual / times)
    values = np.zeros(len(floors_ms))
    values[list(chosen)] = above + floors
    return Coefficients(*values.tolist())


def _leave_one_out(
    steps: Sequence[WholeStep], floors_ms: Coefficients, chosen: tuple[int, ...]
) -> list[float]:
    errors = []
    for index, left_out in enumerate(steps):
        rest = [*steps[:index], *steps[index + 1 :]]
        found = Remainder(_solve(rest, floors_ms, chosen), 0.0)
        errors.append((left_out.sum_ms + found.ms(left_out.shape)) / left_out.ms - 1)
    return errors
