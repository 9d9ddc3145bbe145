"""Step cost: the time of one decoding step with any tree, from a runtime table.

    off:         whole steps, by batch size and rule
    speculating: draft_root(B) + sum over levels below the root with children of
                     draft(B, width) + draft_rows(B, rows up to the level's last)
                 + verify(B, tokens) + target_store(B, flushing) + draft_store(B, flushing)
                 + (tokens per step - 2) * (target_path(B) + depth * draft_path(B))
                 + what the rule adds (branching, distributions, draws, tries) by rows of logits
                 + overhead(B, rule, depth, tokens, siblings)

The width of a level is its number of nodes with children: only those are drafted from. `flushing`
is the mean number of slots that store their states in a step.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from stree_autotune.cost.estimate import TWO_SIDED, Estimate
from stree_autotune.cost.terms import PLAIN, Factors, Load, TermTimes, spreads, term_times
from stree_autotune.cost.tree_shape import FEWEST_ROWS, TreeShape, shape_of
from stree_autotune.cost.work import ROW_EDGES
from stree_autotune.store import PairWords, RuntimeTable, StepRule
from stree_core.errors import MissingMeasurement
from stree_core.tree import OFF, Tree

TILTED = 64


def has_cliff(below: int, above: int, shape: TreeShape | None) -> bool:
    """True when kernels change between two batch sizes, by the rows of a step's target pass."""
    tokens = 1 if shape is None else shape.num_tokens
    return any(below * tokens <= rows < above * tokens for rows in ROW_EDGES)


@dataclass(frozen=True, slots=True)
class Noise:
    """One draw: a factor per group of terms, and fit errors that all steps miss by.

    `tilt` moves verify by the logarithm of its tokens, a pass of TILTED ones by all of it;
    `between` is where, in standard deviations, a step lies whose kernels change between the
    measured batch sizes around it.
    """

    factors: Factors
    steps_off: float
    tilt: float = 0.0
    between: float = 0.0

    def at(self, num_tokens: int) -> Factors:
        """Return the factors of a step with so many tokens."""
        if not self.tilt:
            return self.factors
        tilted = math.exp(self.tilt * math.log(num_tokens) / math.log(TILTED))
        return self.factors._replace(verify=self.factors.verify * tilted)


STILL = Noise(PLAIN, 0.0)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Times of one pair on one GPU; see the module for the formula. Times are milliseconds.

    An estimate has `common`, a relative spread that all terms share, and `tilt`, one by which
    passes of few and of many tokens err apart.
    """

    times: Mapping[int, TermTimes]
    batch_sizes: tuple[int, ...]
    spreads: Factors
    command: str
    load: Load = field(default_factory=Load)
    common: float = 0.0
    tilt: float = 0.0
    noise: Noise = STILL

    @classmethod
    def from_table(
        cls,
        table: RuntimeTable,
        rule: StepRule = StepRule.GREEDY,
        context: int | None = None,
        words: PairWords | None = None,
    ) -> StepCost:
        """Build the step cost of a measured table, of slots half full up to `context` tokens.

        `words` are the user's for the pair, which errors repeat.
        """
        load = Load(rule, 0.0 if context is None else (context - table.context) / 2)
        command = table.probe_command(words)
        times = term_times(table, rule, command)
        return cls(times, table.batch_sizes, spreads(table), command, load)

    @classmethod
    def from_estimate(
        cls,
        estimate: Estimate,
        rule: StepRule = StepRule.GREEDY,
        context: int | None = None,
        words: PairWords | None = None,
    ) -> StepCost:
        """Build the step cost of an estimated table, whose draws spread as the estimate may err."""
        cost = cls.from_table(estimate.table, rule, context, words)
        moved = Factors(*(math.hypot(spread, estimate.own) for spread in cost.spreads))
        return replace(cost, spreads=moved, common=estimate.common, tilt=estimate.own)

    @property
    def fit_error(self) -> float:
        """The largest leave-one-out error of predicted whole steps, relative, over batch sizes."""
        rule = self.load.rule
        errors = [t.fitted(rule).fit_error for t in self.times.values() if t.overheads]
        return max(errors, default=math.nan)

    def step_ms(self, batch_size: int, tree: Tree, tokens_per_step: float | None = None) -> float:
        """Return the time of one step with `tree`; a tree without nodes means verdict off.

        With more tokens per step states are stored more often; not given, half of the tree's depth
        is taken to be accepted. Straight between neighbouring measured batch sizes; off has further
        ones, on both sides of a change of its kernels. Raises
        MissingMeasurement outside the measured batch sizes and tree sizes, naming the command that
        records more.
        """
        rate = 1 + tree.depth / 2 if tokens_per_step is None else tokens_per_step
        return self._shape_ms(batch_size, shape_of(tree) if tree.num_nodes else None, rate)

    def least_ms(
        self, batch_size: int, num_nodes: int, depth: int, tokens_per_step: float
    ) -> float:
        """Return the time of the quickest step of any tree with these nodes and levels; 0 is off.

        One node on every level is drafted from, and where the nodes are no chain one of them has
        several children, and no level has rows before it: more of any never takes less. Raises as
        `step_ms` does.
        """
        bushy, below = num_nodes > depth, max(0, depth - 1)
        shape = TreeShape(
            num_tokens=num_nodes + 1,
            depth=depth,
            widths=(1,) * below,
            rows=(FEWEST_ROWS + 1,) * below,
            branching=(1,) if bushy else (),
            num_inner=depth,
            most_children=2 if bushy else 1,
        )
        return self._shape_ms(batch_size, shape if num_nodes else None, tokens_per_step)

    def _shape_ms(self, batch_size: int, shape: TreeShape | None, tokens_per_step: float) -> float:
        load = Load(self.load.rule, self.load.more_context, tokens_per_step)
        sizes = self.batch_sizes if shape is not None else self._off_sizes
        if batch_size in sizes:
            return self._ms(self.times[batch_size], shape, load)
        below, above = _neighbours(batch_size, sizes, self.command)
        share = (batch_size - below) / (above - below)
        ends = [self._ms(self.times[size], shape, load) for size in (below, above)]
        straight = (1 - share) * ends[0] + share * ends[1]
        if not self.noise.between or not has_cliff(below, above, shape):
            return straight
        # more slots never take less, so the true time lies between the two
        spread = abs(math.log(ends[1] / ends[0])) / (2 * TWO_SIDED)
        moved = straight * math.exp(spread * self.noise.between)
        return min(max(moved, min(ends)), max(ends))

    def note(self, batch_size: int, tree: Tree = OFF) -> str:
        """Say that the time of off or of a tree is bounded rather than measured, else nothing."""
        for each in dict.fromkeys((OFF, tree)):
            sizes = self.batch_sizes if each.num_nodes else self._off_sizes
            if batch_size in sizes:
                continue
            below, above = _neighbours(batch_size, sizes, self.command)
            if not has_cliff(below, above, shape_of(each) if each.num_nodes else None):
                continue
            return (
                f"{each.label} was measured at {below} and {above}, its kernels change in between, "
                "so its time here is bounded by both; measure with "
                f"`{self.command} --batch-size {batch_size}`"
            )
        return ""

    def draw(self, rng: np.random.Generator) -> StepCost:
        """Return the cost as another measurement might have found it.

        Each group of terms moves by its relative spread, all together by the spread they share, and
        all speculative steps by the fit error.
        """
        deviates = rng.standard_normal(len(PLAIN) + 2).tolist()
        shared = self.common * deviates[-2]
        moved = [math.exp(shared + s * z) for s, z in zip(self.spreads, deviates, strict=False)]
        # a measured table has no tilt, and its draws stay those without one
        tilt = self.tilt * float(rng.standard_normal()) if self.tilt else 0.0
        between = float(rng.standard_normal()) if self._has_gaps else 0.0
        return replace(self, noise=Noise(Factors(*moved), deviates[-1], tilt, between))

    def require(self, batch_sizes: Iterable[int], max_nodes: int) -> None:
        """Raise MissingMeasurement unless every tree of up to `max_nodes` has a time."""
        for batch_size in batch_sizes:
            sizes = self.batch_sizes
            measured: tuple[int, ...] = (batch_size,)
            if batch_size not in sizes:
                measured = _neighbours(batch_size, sizes, self.command)
            for size in measured:
                self.times[size].require(max_nodes, self.load.rule)

    def most_nodes(self, batch_sizes: Sequence[int], limit: int) -> int:
        """Return the most nodes, up to a limit, with which every tree has a time; 0 without any."""
        for size in range(limit, 0, -1):
            try:
                self.require(batch_sizes, size)
            except MissingMeasurement:
                continue
            return size
        return 0

    @property
    def _has_gaps(self) -> bool:
        sizes = self.batch_sizes
        return bool(sizes) and sizes[-1] - sizes[0] >= len(sizes)

    @property
    def _off_sizes(self) -> tuple[int, ...]:
        """Batch sizes where off was measured, ascending, trees or not."""
        return tuple(self.times)

    def _ms(self, times: TermTimes, shape: TreeShape | None, load: Load) -> float:
        if shape is None:
            return times.off_ms(load, self.noise.factors)
        factors = self.noise.at(shape.num_tokens)
        return times.speculative_ms(shape, load, factors, self.noise.steps_off)


def _neighbours(batch_size: int, sizes: Sequence[int], command: str) -> tuple[int, int]:
    """Return the measured sizes around one; raise MissingMeasurement beyond them."""
    index = bisect.bisect(sizes, batch_size)
    if not 0 < index < len(sizes):
        covered = "no batch size is"
        if sizes:
            covered = f"batch sizes {sizes[0]} to {sizes[-1]} are"
        raise MissingMeasurement(
            f"{covered} measured, got {batch_size}; record it with "
            f"`{command} --batch-size {batch_size}`"
        )
    return sizes[index - 1], sizes[index]
