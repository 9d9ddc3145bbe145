"""The paired bootstrap: options timed on the same resampled prompts, with the same drawn costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stree_autotune.search.study import CostModel, Trial
from stree_core.tree import Tree

Floats = NDArray[np.float64]
LOW, HIGH = 0.025, 0.975

LEAST_VARIANCE = 0.1
"""The least variance of a resample, as a share of that of all prompts: where one prompt makes most
of it, a resample without that prompt would say next to nothing of its own error."""


@dataclass(frozen=True, slots=True, eq=False)
class PairedBootstrap:
    """Resamples of prompts and draws of the step cost, the same for all that is compared.

    `weights_RP` says how often each resample holds each prompt; the draws are used by turns.
    """

    weights_RP: Floats
    costs: tuple[CostModel, ...]

    @classmethod
    def of(
        cls, num_prompts: int, cost: CostModel, *, num_resamples: int, num_draws: int, seed: int
    ) -> PairedBootstrap:
        """Draw resamples of so many prompts, then costs."""
        rng = np.random.default_rng(seed)
        shares = np.full(num_prompts, 1 / num_prompts)
        drawn = rng.multinomial(num_prompts, shares, size=num_resamples).astype(np.float64)
        return cls(drawn, tuple(cost.draw(rng) for _ in range(num_draws)))

    def times_R(
        self, starts_P: NDArray[np.int64], batch_size: int, tree: Tree, tokens_per_step: float
    ) -> Floats:
        """Return the time (ms) of each resample, whose prompts take these numbers of steps."""
        drawn = [cost.step_ms(batch_size, tree, tokens_per_step) for cost in self.costs]
        times_R: Floats = (self.weights_RP @ starts_P) * np.resize(drawn, len(self.weights_RP))
        return times_R


def interval(ratios_R: Floats) -> tuple[float, float]:
    """Return the 95 % interval of a quantity over resamples."""
    low, high = np.quantile(ratios_R, (LOW, HIGH))
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster one option is than another: estimate and 95 % interval.

    `is_gain` tells whether the resamples leave it above 1; then `low` is 1 at least.
    """

    value: float
    low: float
    high: float
    is_gain: bool

    def __str__(self) -> str:
        ratios = (self.value, self.low, self.high)
        # Adding 0 turns -0.0 into 0.0.
        value, low, high = (round(100 * (ratio - 1), 1) + 0.0 for ratio in ratios)
        return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """What may run: its tree, and the time that every prompt takes with it [P], in expectation.

    The times are of trees that were chosen without the prompt. `drawn_D` is the logarithm of all
    prompts' time under each draw of the cost over the expected one, `weights_RP` the resamples.
    """

    trial: Trial
    ms_P: Floats
    drawn_D: Floats
    weights_RP: Floats

    @property
    def whole_ms(self) -> float:
        """The expected time of all prompts."""
        return float(self.ms_P.sum())

    def ratio_to(self, other: Option) -> Ratio:
        """Return how many times faster this option is than the other, on the same resamples.

        The low end counts the worst prompt once more. A few prompts in a hundred, long ones that
        the draft cannot follow, may make most of the error, and a sample that has none of them
        looks both fast and certain: resampling alone leaves the truth below the interval three
        times as often as it should (benchmarks/coverage.py).
        """
        value = other.whole_ms / self.whole_ms
        missed_R = studentized(other.ms_P, self.ms_P, self.weights_RP)
        missed_R = missed_R + np.resize(other.drawn_D - self.drawn_D, len(missed_R))
        low, high = interval(missed_R)
        tested = value * math.exp(-high)
        careful = tested * worst_again(other.ms_P, self.ms_P)
        return Ratio(
            value,
            low=max(careful, 1.0) if tested > 1 else careful,
            high=value * math.exp(-low),
            is_gain=tested > 1,
        )


def worst_again(top_P: Floats, bottom_P: Floats) -> float:
    """Return the factor, 1 at most, by which sum(top) / sum(bottom) moves with one more prompt.

    That prompt is like the one that lowers it most.
    """
    top, bottom = float(top_P.sum()), float(bottom_P.sum())
    moved_P = (top + top_P) / (bottom + bottom_P)
    return min(1.0, float(moved_P.min()) * bottom / top)


def studentized(top_P: Floats, bottom_P: Floats, weights_RP: Floats) -> Floats:
    """Return by how much the logarithm of sum(top) / sum(bottom) may be too large, per resample.

    Each resample's deviation is divided by its own standard error and multiplied by that of all
    prompts, which corrects the interval for skew and for few prompts (bootstrap-t; Efron and
    Tibshirani, An Introduction to the Bootstrap, 12.5). 0 throughout for a ratio without spread.
    """
    count = len(top_P)
    sums = top_P.sum(), bottom_P.sum()
    error_P = top_P / sums[0] - bottom_P / sums[1]
    variance = float(error_P @ error_P) * count / max(1, count - 1)
    num_resamples = len(weights_RP)
    if variance < 1e-24:
        return np.zeros(num_resamples)
    top_R, bottom_R = weights_RP @ top_P, weights_RP @ bottom_P
    moved_R = np.log(top_R / bottom_R) - math.log(sums[0] / sums[1])
    squares_R = (
        weights_RP @ (top_P * top_P) / top_R**2
        - 2 * (weights_RP @ (top_P * bottom_P)) / (top_R * bottom_R)
        + weights_RP @ (bottom_P * bottom_P) / bottom_R**2
    )
    variance_R = np.maximum(squares_R * count / (count - 1), LEAST_VARIANCE * variance)
    missed_R: Floats = moved_R * np.sqrt(variance / variance_R)
    return missed_R
