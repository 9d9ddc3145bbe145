"""The paired bootstrap: options timed on the same resampled prompts, with the same drawn costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stree_autotune.search.study import CostModel
from stree_core.tree import Tree

Floats = NDArray[np.float64]


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

    def part(self, first: int, stride: int) -> PairedBootstrap:
        """Return the same resamples, of every so many prompts from the first on."""
        return PairedBootstrap(self.weights_RP[:, first::stride], self.costs)

    def times_R(
        self, starts_P: NDArray[np.int64], batch_size: int, tree: Tree, tokens_per_step: float
    ) -> Floats:
        """Return the time (ms) of each resample, whose prompts take these numbers of steps."""
        drawn = [cost.step_ms(batch_size, tree, tokens_per_step) for cost in self.costs]
        times_R: Floats = (self.weights_RP @ starts_P) * np.resize(drawn, len(self.weights_RP))
        return times_R


def interval(ratios_R: Floats) -> tuple[float, float]:
    """Return the 95 % interval of a quantity over resamples."""
    low, high = np.quantile(ratios_R, (0.025, 0.975))
    return float(low), float(high)
