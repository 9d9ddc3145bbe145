"""The overhead: what whole steps cost beyond the sum of their separately measured terms.

    overhead = constant + depth * per level + tokens * per token (+ branching, with siblings)
    verify inside steps = verify(tokens) * (1 + what steps with nearly as many tokens still miss)

A pass that keeps the tensor cores busy runs slower among others than by itself, and by how much
depends on how its tokens fill the kernels' tiles: steps with as many tokens share it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stree_autotune.cost.tree_shape import TreeShape

Floats = NDArray[np.float64]

NEAR, DOUBT = 0.1, 0.3
"""Standard deviation of log tokens by which steps count as near, and steps that missed nothing."""

LEAST, MOST = 0.5, 2.0
"""What verify inside steps takes of verify alone, where a busy machine says something absurd."""


class Coefficients(NamedTuple):
    """What the overhead is made of, in ms: `branching` counts once, where a node has siblings."""

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

    def ms(self, shape: TreeShape) -> float:
        """Return the sum for a step with a tree of this shape."""
        total = self.constant + self.per_level * shape.depth + self.per_token * shape.num_tokens
        return total + self.branching * bool(shape.branching)


# The constant and any others, simplest first; a later set is taken only when it predicts left-out
# steps better.
_SETS = [(0, *more) for size in range(4) for more in itertools.combinations((1, 2, 3), size)]
_BETTER, _ROUNDING = 0.9, 1e-9


@dataclass(frozen=True, slots=True)
class WholeStep:
    """One measured step: its shape, the sum of its terms, verify alone, and its own time (ms)."""

    shape: TreeShape
    sum_ms: float
    verify_ms: float
    ms: float


@dataclass(frozen=True, slots=True)
class Missed:
    """What steps took beyond the overhead, relative to verify, by their tokens."""

    log_tokens_S: Floats
    share_S: Floats

    def factor(self, num_tokens: int) -> float:
        """Return what verify is multiplied by: 1 and the mean share of steps near these tokens."""
        distance_S = (self.log_tokens_S - np.log(num_tokens)) / NEAR
        weight_S = np.exp(-0.5 * np.square(distance_S))
        share = float(weight_S @ self.share_S / (weight_S.sum() + DOUBT))
        return min(MOST, max(LEAST, 1 + share))


@dataclass(frozen=True)
class Overhead:
    """Accept, commit, host, launches; `left_out` are the errors of steps predicted from others."""

    coefficients: Coefficients
    missed: Missed | None
    left_out: tuple[float, ...]

    @cached_property
    def fit_error(self) -> float:
        """Root mean square of the relative errors of left-out steps."""
        return _root_mean_square(self.left_out)


def fit_overhead(
    steps: Sequence[WholeStep], floors_ms: Coefficients, *, by_tokens: bool = False
) -> Overhead:
    """Fit the overhead to whole steps by least squares of the relative error; needs two.

    `floors_ms` bounds the coefficients from below: passes inside one graph can cost less than the
    same passes alone, so a coefficient may be negative, but never so far that a deeper tree gets
    cheaper. Non-negative least squares runs on what lies above the floors. Of the sets of
    coefficients that hold the constant the one that predicts left-out steps best wins (root mean
    square of the relative error); steps must tell its coefficients apart, as chains alone do not
    tell levels from tokens. With `by_tokens` it says what steps miss as well.
    """
    rows = _Steps.of(steps)
    best: tuple[tuple[int, ...], list[float]] | None = None
    for chosen in _SETS:
        if len(steps) > len(chosen) and rows.tell_apart(chosen):
            errors = [
                _error(step, rows.without(index), floors_ms, chosen, by_tokens)
                for index, step in enumerate(steps)
            ]
            # A further coefficient must earn its place, or noise decides.
            needed = math.inf if best is None else _BETTER * _root_mean_square(best[1]) - _ROUNDING
            if _root_mean_square(errors) < needed:
                best = chosen, errors
    assert best is not None
    coefficients, missed = _solve(rows, floors_ms, best[0])
    return Overhead(coefficients, missed if by_tokens else None, tuple(best[1]))


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """Whole steps as arrays: what coefficients are multiplied by [S, 4], and times (ms)."""

    features_SF: Floats
    ms_S: Floats
    rest_S: Floats
    verify_S: Floats
    log_tokens_S: Floats

    @classmethod
    def of(cls, steps: Sequence[WholeStep]) -> _Steps:
        ms_S = np.array([step.ms for step in steps])
        return cls(
            np.array([_features(step.shape) for step in steps]),
            ms_S,
            ms_S - np.array([step.sum_ms for step in steps]),
            np.array([step.verify_ms for step in steps]),
            np.log([step.shape.num_tokens for step in steps]),
        )

    def tell_apart(self, chosen: Sequence[int]) -> bool:
        """True when no two choices of these coefficients cost all steps alike."""
        return int(np.linalg.matrix_rank(self.features_SF[:, chosen])) == len(chosen)

    def without(self, index: int) -> _Steps:
        """Return all steps but one."""
        kept = np.arange(len(self.ms_S)) != index
        return _Steps(
            self.features_SF[kept],
            self.ms_S[kept],
            self.rest_S[kept],
            self.verify_S[kept],
            self.log_tokens_S[kept],
        )


def _error(
    left_out: WholeStep,
    others: _Steps,
    floors_ms: Coefficients,
    chosen: tuple[int, ...],
    by_tokens: bool,
) -> float:
    """Return the relative error of one step when it is predicted from the others."""
    coefficients, missed = _solve(others, floors_ms, chosen)
    predicted = left_out.sum_ms + coefficients.ms(left_out.shape)
    if by_tokens:
        predicted += (missed.factor(left_out.shape.num_tokens) - 1) * left_out.verify_ms
    return predicted / left_out.ms - 1


def _solve(
    steps: _Steps, floors_ms: Coefficients, chosen: tuple[int, ...]
) -> tuple[Coefficients, Missed]:
    """Return the coefficients, 0 where not chosen, and what the steps took beyond them."""
    # scipy.optimize takes most of a second to import, and most commands never fit
    from scipy.optimize import nnls

    features_SC: Floats = steps.features_SF[:, chosen]
    floors_C = np.array(floors_ms)[list(chosen)]
    ms_S, rest_S = steps.ms_S, steps.rest_S
    relative_SC = features_SC / ms_S[:, None]
    above_C, _ = nnls(relative_SC, (rest_S - features_SC @ floors_C) / ms_S)
    # what lies above far floors has lost its last digits, so free coefficients are solved alone
    free = above_C > 0
    found_C = floors_C.copy()
    bound_S = features_SC[:, ~free] @ floors_C[~free]
    found_C[free] = np.linalg.lstsq(relative_SC[:, free], (rest_S - bound_S) / ms_S)[0]
    values = np.zeros(len(floors_ms))
    values[list(chosen)] = found_C
    share_S = (rest_S - features_SC @ found_C) / steps.verify_S
    return Coefficients(*values.tolist()), Missed(steps.log_tokens_S, share_S)


def _root_mean_square(errors: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def _features(shape: TreeShape) -> tuple[float, ...]:
    """Return what each coefficient is multiplied by."""
    return 1.0, float(shape.depth), float(shape.num_tokens), float(bool(shape.branching))
