"""What a rule costs beyond the greedy one, by rows of logits (nodes times slots)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stree_autotune.runtime_table import SEVERAL, RuleKey, RulePoint, Work
from stree_autotune.tree_shape import TreeShape
from stree_core.errors import MissingMeasurement

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class RuleTimes:
    """Times (ms) of every work at the measured numbers of rows."""

    curves: Mapping[str, tuple[Floats, Floats]]
    command: str

    @classmethod
    def of(cls, points: Iterable[RulePoint], command: str) -> RuleTimes:
        """Make times monotone in rows."""
        # most commands never predict, and scipy.optimize takes most of a second to import
        from scipy.optimize import isotonic_regression

        found: dict[str, list[tuple[int, float]]] = {}
        for point in points:
            found.setdefault(point.work, []).append((point.rows, point.ms))
        curves = {}
        for work, pairs in found.items():
            rows, times = zip(*sorted(pairs), strict=True)
            curves[work] = (np.array(rows, dtype=np.float64), isotonic_regression(times).x)
        return cls(curves, command)

    def at(self, work: Work, rows: float) -> float:
        """Return the time of a work; beyond the last measured rows it grows in proportion.

        Raises MissingMeasurement when the work was not measured.
        """
        if work not in self.curves:
            raise MissingMeasurement(
                f"what the work {work!r} of a sampling rule costs is not in the table; measure it "
                f"with `{self.command}`"
            )
        sizes, times = self.curves[work]
        if rows > sizes[-1]:
            return float(times[-1] * rows / sizes[-1])
        return float(np.interp(rows, sizes, times))

    def step_ms(self, rule: RuleKey, batch_size: int, shape: TreeShape) -> float:
        """Return what the rule adds to a speculative step; branching is greedy's as well."""
        total = sum(self.at("branch", width * batch_size) for width in shape.branching)
        name, _, truncated = rule.partition("_")
        if name == "greedy":
            return total
        total += self.off_ms(rule, batch_size, shape.num_tokens)
        if name == "mss":
            draw: Work = "draw_truncated" if truncated else "draw"
            total += sum(self.at(draw, width * batch_size) for width in (1, *shape.widths))
            rows = shape.num_inner * batch_size
            one, several = self.at("try", rows), self.at("tries", rows)
            total += one + max(0.0, several - one) / (SEVERAL - 1) * (shape.most_children - 1)
        return total

    def off_ms(self, rule: RuleKey, batch_size: int, num_tokens: int = 1) -> float:
        """Return what choosing the target's tokens by the rule adds."""
        if rule == "greedy":
            return 0.0
        work: Work = "sample_truncated" if rule.endswith("truncated") else "sample"
        return self.at(work, num_tokens * batch_size)
