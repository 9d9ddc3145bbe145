"""Step cost: the time of one decoding step with any tree, from a runtime table.

    off:         one_token(B)
    speculating: draft_root(B) + sum over levels below the root with children of draft(B, width)
                 + sum over levels where some node has several children of branch(B, width)
                 + verify(B, tokens) + remainder(B, depth, tokens)

The width of a level is its number of nodes with children: only those are drafted from.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from stree_autotune.estimate import Estimate
from stree_autotune.runtime_table import RuntimeTable
from stree_autotune.term_times import (
    PLAIN,
    Factors,
    TermTimes,
    TreeShape,
    shape_of,
    spreads,
    term_times,
)
from stree_core.errors import MissingMeasurement
from stree_core.tree import Tree


@dataclass(frozen=True, slots=True)
class Band:
    """Between which multiples of the measured times an estimate's true times lie."""

    measured: Mapping[int, TermTimes]
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Noise:
    """One draw: a factor per term, fit errors that all steps miss by, and a place in the band."""

    factors: Factors
    steps_off: float
    place: float


STILL = Noise(PLAIN, 0.0, 0.5)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Times of one pair on one GPU; see the module for the formula. Times are milliseconds."""

    times: Mapping[int, TermTimes]
    batch_sizes: tuple[int, ...]
    spreads: Factors
    command: str
    band: Band | None = None
    noise: Noise = STILL

    @classmethod
    def from_table(cls, table: RuntimeTable) -> StepCost:
        """Build the step cost of a measured table."""
        return cls(term_times(table), table.batch_sizes, spreads(table), table.probe_command)

    @classmethod
    def from_estimate(cls, estimate: Estimate) -> StepCost:
        """Build the step cost of an estimated table, whose draws fall into the estimate's band."""
        ratio = estimate.bandwidth_ratio
        band = Band(term_times(estimate.measured), min(1.0, ratio), max(1.0, ratio))
        return replace(cls.from_table(estimate.table), band=band)

    @property
    def fit_error(self) -> float:
        """The largest leave-one-out error of predicted whole steps, relative, over batch sizes."""
        remainders = [times.remainder for times in self.times.values()]
        return max((r.fit_error for r in remainders if r is not None), default=math.nan)

    def step_ms(self, batch_size: int, tree: Tree) -> float:
        """Return the time of one step with `tree`; a tree without nodes means verdict off.

        Straight between neighbouring measured batch sizes. Raises MissingMeasurement outside the
        measured batch sizes and tree sizes, naming the command that records more.
        """
        shape = shape_of(tree) if tree.num_nodes else None
        if batch_size in self.times:
            return self._ms_at(batch_size, shape)
        below, above = self._neighbours(batch_size)
        share = (batch_size - below) / (above - below)
        return (1 - share) * self._ms_at(below, shape) + share * self._ms_at(above, shape)

    def draw(self, rng: np.random.Generator) -> StepCost:
        """Return the cost as another measurement might have found it.

        Each term moves by its relative spread, all speculative steps by the fit error, an estimate
        to a common place in its band: from the low end over the point estimate to the high end.
        """
        deviates = rng.standard_normal(len(PLAIN) + 1).tolist()
        moved = [math.exp(s * z) for s, z in zip(self.spreads, deviates, strict=False)]
        place = 0.5 if self.band is None else rng.random()
        return replace(self, noise=Noise(Factors(*moved), deviates[-1], place))

    def require(self, batch_sizes: Iterable[int], max_nodes: int) -> None:
        """Raise MissingMeasurement unless every tree of up to `max_nodes` has a time."""
        for batch_size in batch_sizes:
            measured = (batch_size,) if batch_size in self.times else self._neighbours(batch_size)
            for size in measured:
                self.times[size].require(max_nodes)

    def _neighbours(self, batch_size: int) -> tuple[int, int]:
        index = bisect.bisect(self.batch_sizes, batch_size)
        if not 0 < index < len(self.batch_sizes):
            raise MissingMeasurement(
                f"batch sizes {self.batch_sizes[0]} to {self.batch_sizes[-1]} are measured, got "
                f"{batch_size}; record it with `{self.command} --batch-size {batch_size}`"
            )
        return self.batch_sizes[index - 1], self.batch_sizes[index]

    def _ms_at(self, batch_size: int, shape: TreeShape | None) -> float:
        """Return the time at a measured batch size, for this draw."""
        ms = self._ms(self.times[batch_size], shape)
        place = self.noise.place
        if self.band is None or place == 0.5:
            return ms
        measured = self._ms(self.band.measured[batch_size], shape)
        if place < 0.5:
            return 2 * place * ms + (1 - 2 * place) * self.band.low * measured
        return (2 - 2 * place) * ms + (2 * place - 1) * self.band.high * measured

    def _ms(self, times: TermTimes, shape: TreeShape | None) -> float:
        if shape is None:
            return times.off_ms(self.noise.factors)
        return times.speculative_ms(shape, self.noise.factors, self.noise.steps_off)
