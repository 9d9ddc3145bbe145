"""The remainder: what whole steps cost beyond the sum of their separately measured terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Simplest first; a later set is taken only when it predicts left-out steps better.
FEATURE_SETS = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class WholeStep:
    """One measured step: its depth, its tokens, the sum of its terms, and its own time (ms)."""

    depth: int
    num_tokens: int
    sum_ms: float
    ms: float


@dataclass(frozen=True, slots=True)
class Remainder:
    """constant + per_level * depth + per_token * tokens, in ms; accept, commit, host, launches."""

    constant_ms: float
    per_level_ms: float
    per_token_ms: float
    fit_error: float

    def ms(self, depth: int, num_tokens: int) -> float:
        """Return the remainder of a step with a tree of this depth and number of tokens."""
        return self.constant_ms + self.per_level_ms * depth + self.per_token_ms * num_tokens


def fit_remainder(steps: Sequence[WholeStep], floors_ms: tuple[float, float, float]) -> Remainder:
    """Fit the remainder to whole steps by least squares of the relative error.

    `floors_ms` bounds the three coefficients from below: passes inside one graph can cost less than
    the same passes alone, so a coefficient may be negative, but never so far that a deeper tree
    gets cheaper. Non-negative least squares runs on what lies above the floors. Of the sets
    {constant}, {constant, depth}, {constant, depth, tokens} the one with the smallest leave-one-out
    error (root mean square, relative to the step) wins; that is `fit_error`. Needs two steps.
    """
    count, errors = _best_set(steps, floors_ms)
    constant, per_level, per_token = _solve(steps, floors_ms, count)
    return Remainder(constant, per_level, per_token, _root_mean_square(errors))


def leave_one_out(steps: Sequence[WholeStep], floors_ms: tuple[float, float, float]) -> list[float]:
    """Return the relative error of each step when it is predicted from the others."""
    return _best_set(steps, floors_ms)[1]


def _best_set(
    steps: Sequence[WholeStep], floors_ms: tuple[float, float, float]
) -> tuple[int, list[float]]:
    """Return the number of features that predicts left-out steps best, and its errors."""
    best: tuple[int, list[float]] | None = None
    for count in FEATURE_SETS:
        if len(steps) <= count:
            break
        errors = _leave_one_out(steps, floors_ms, count)
        # a further feature must earn its place, or noise decides
        if best is None or _root_mean_square(errors) < 0.9 * _root_mean_square(best[1]):
            best = (count, errors)
    assert best is not None
    return best


def _root_mean_square(errors: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def _features(steps: Sequence[WholeStep]) -> Floats:
    return np.array([(1, step.depth, step.num_tokens) for step in steps], dtype=np.float64)


def _solve(
    steps: Sequence[WholeStep], floors_ms: tuple[float, float, float], count: int
) -> tuple[float, float, float]:
    """Return the three coefficients; those beyond the first `count` are 0."""
    # scipy.optimize takes most of a second to import, and most commands never fit
    from scipy.optimize import nnls

    features = _features(steps)[:, :count]
    floors = np.array(floors_ms[:count])
    times = np.array([step.ms for step in steps])
    residual = times - np.array([step.sum_ms for step in steps]) - features @ floors
    above, _ = nnls(features / times[:, None], residual / times)
    coefficients = [*(above + floors).tolist(), 0.0, 0.0]
    return coefficients[0], coefficients[1], coefficients[2]


def _leave_one_out(
    steps: Sequence[WholeStep], floors_ms: tuple[float, float, float], count: int
) -> list[float]:
    errors = []
    for index, left_out in enumerate(steps):
        rest = [*steps[:index], *steps[index + 1 :]]
        constant, per_level, per_token = _solve(rest, floors_ms, count)
        predicted = (
            left_out.sum_ms
            + constant
            + per_level * left_out.depth
            + per_token * left_out.num_tokens
        )
        errors.append(predicted / left_out.ms - 1)
    return errors
