"""The terms of a step at one batch size: times by size, and their sum for a tree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stree_autotune.cost.overhead import Coefficients, Overhead, WholeStep, fit_overhead
from stree_autotune.cost.traffic import MAX_BUFFERED
from stree_autotune.cost.tree_shape import FEWEST_ROWS, TreeShape, shape_of
from stree_autotune.store import (
    SEVERAL,
    STORES,
    TIMED_PATH,
    NoRoom,
    Point,
    RulePoint,
    RuntimeTable,
    Step,
    StepRule,
    Term,
    Work,
)
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

    def sum_at(self, sizes: Sequence[int]) -> float:
        """Return the sum of the times at several sizes; raises as `at` does."""
        low, high, ms = min(sizes) - self.first, max(sizes) - self.first, self.ms
        if low < 0 or high >= len(ms):
            return sum(map(self.at, sizes))
        return sum([ms[size - self.first] for size in sizes])

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
    if any(row.term == term for row in no_room):
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


Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class RuleTimes:
    """Times (ms) of every work at the measured numbers of rows; `known` keeps what was asked."""

    curves: Mapping[str, tuple[Floats, Floats]]
    command: str
    known: dict[tuple[Work, float], float] = field(default_factory=dict, repr=False)

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
        ms = self.known.get((work, rows))
        if ms is None:
            ms = self.known[work, rows] = self._at(work, rows)
        return ms

    def _at(self, work: Work, rows: float) -> float:
        if work not in self.curves:
            raise MissingMeasurement(
                f"what the work {work!r} of a sampling rule costs is not in the table; measure it "
                f"with `{self.command}`"
            )
        sizes, times = self.curves[work]
        if rows > sizes[-1]:
            return float(times[-1] * rows / sizes[-1])
        return float(np.interp(rows, sizes, times))

    def step_ms(self, rule: StepRule, batch_size: int, shape: TreeShape) -> float:
        """Return what the rule adds to a speculative step; branching is greedy's as well."""
        total = sum(self.at("branch", width * batch_size) for width in shape.branching)
        if rule == StepRule.GREEDY:
            return total
        total += self.off_ms(rule, batch_size, shape.num_tokens)
        if rule.sampling.rule == "mss":
            draw: Work = "draw_truncated" if rule.sampling.truncates else "draw"
            total += sum(self.at(draw, width * batch_size) for width in (1, *shape.widths))
            rows = shape.num_inner * batch_size
            one, several = self.at("try", rows), self.at("tries", rows)
            total += one + max(0.0, several - one) / (SEVERAL - 1) * (shape.most_children - 1)
        return total

    def off_ms(self, rule: StepRule, batch_size: int, num_tokens: int = 1) -> float:
        """Return what choosing the target's tokens by the rule adds."""
        if rule == StepRule.GREEDY:
            return 0.0
        work: Work = "sample_truncated" if rule.sampling.truncates else "sample"
        return self.at(work, num_tokens * batch_size)


PER_TOKENS = 1024
"""Committed tokens that a point of `context` or `draft_context` stands for."""


class Factors(NamedTuple):
    """One number per group of terms: its relative spread, or what a draw multiplies it by."""

    off: float
    verify: float
    draft: float
    rules: float


PLAIN = Factors(1.0, 1.0, 1.0, 1.0)


class Load(NamedTuple):
    """What a step's time depends on beside its tree.

    `more_context` is how many tokens more than half the table's context a slot has committed, on
    average; `tokens_per_step` says how often states are stored.
    """

    rule: StepRule = StepRule.GREEDY
    more_context: float = 0.0
    tokens_per_step: float = 1.0

    @property
    def store_share(self) -> float:
        """The share of steps in which a slot stores its state.

        Rows gather until they are more than MAX_BUFFERED; the step that would exceed it, by about
        half a step's tokens, stores all.
        """
        rate = self.tokens_per_step
        return min(1.0, rate / (MAX_BUFFERED + (1 + rate) / 2))


class Sums(NamedTuple):
    """The terms of a speculative step (ms), summed by the groups that a draw moves."""

    verify: float
    drafts: float
    rules: float


@dataclass(frozen=True, slots=True)
class TermTimes:
    """All terms at one batch size; `overheads` and `off_steps` are by rule.

    The curve of `draft` is that of points without what their rows cost, `draft_rows`; `verify` is
    what verify takes inside whole steps. A search asks for one step with many draws of the factors,
    so `sums` keeps what they multiply.
    """

    batch_size: int
    curves: Mapping[Term, Curve]
    verify: Curve
    rules: RuleTimes
    off_steps: Mapping[StepRule, float]
    overheads: Mapping[StepRule, Overhead]
    command: str
    sums: dict[tuple[TreeShape, Load], Sums] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def off_ms(self, load: Load, factors: Factors) -> float:
        """Return the time of a step with verdict off; raise MissingMeasurement without any."""
        ms = self.off_steps.get(load.rule)
        if ms is None and StepRule.GREEDY in self.off_steps:
            ms = self.off_steps[StepRule.GREEDY] + self.rules.off_ms(load.rule, self.batch_size)
        if ms is None:
            raise self._missing("a whole step without speculation")
        return ms * factors.off + self._context_ms(1, load)

    def sum_ms(self, shape: TreeShape, load: Load, factors: Factors) -> float:
        """Return the sum of the terms of a speculative step, without the overhead."""
        sums = self.sums.get((shape, load))
        if sums is None:
            sums = self.sums[shape, load] = self._sums(shape, load)
        verify, drafts, rules = sums
        return verify * factors.verify + drafts * factors.draft + rules * factors.rules

    def _sums(self, shape: TreeShape, load: Load) -> Sums:
        more_accepted = load.tokens_per_step - TIMED_PATH
        drafts = self.curves["draft_root"].at(1) + self._stored_ms("draft_store", load)
        more = more_accepted * self._optional("draft_path")
        more += self._optional("draft_context") * load.more_context / PER_TOKENS
        drafts += more * (1 + len(shape.widths))
        if shape.widths:
            drafts += self.curves["draft"].sum_at(shape.widths)
            if self.curves["draft_rows"].ms:
                drafts += self.curves["draft_rows"].sum_at(shape.rows)
        verify = self.verify.at(shape.num_tokens) + self._stored_ms("target_store", load)
        verify += more_accepted * self._optional("target_path")
        verify += self._context_ms(shape.num_tokens, load)
        return Sums(verify, drafts, self.rules.step_ms(load.rule, self.batch_size, shape))

    def speculative_ms(
        self, shape: TreeShape, load: Load, factors: Factors, steps_off: float
    ) -> float:
        """Return the time of a speculative step that misses the fit by `steps_off` fit errors."""
        overhead = self.fitted(load.rule)
        total = self.sum_ms(shape, load, factors) + overhead.coefficients.ms(shape)
        return total * math.exp(steps_off * overhead.fit_error)

    @property
    def left_out(self) -> tuple[float, ...]:
        """Relative errors of greedy steps, each predicted from the others."""
        greedy = self.overheads.get(StepRule.GREEDY)
        return greedy.left_out if greedy is not None else ()

    def fitted(self, rule: StepRule) -> Overhead:
        """Return a rule's overhead, greedy's for one without steps of its own.

        Raises MissingMeasurement when there were no steps to fit it to.
        """
        found = self.overheads.get(rule) or self.overheads.get(StepRule.GREEDY)
        if found is None:
            raise self._missing("two or more whole steps")
        return found

    def require(self, max_nodes: int, rule: StepRule) -> None:
        """Raise MissingMeasurement unless verdict off and trees up to `max_nodes` have a time."""
        self.off_ms(Load(rule), PLAIN)
        self.curves["draft_root"].at(1)
        for size in (2, max_nodes + 1):
            self.curves["verify"].at(size)
        if max_nodes > 1:
            # half the nodes on one level, one child below each, is the widest draft pass
            for size in (1, max_nodes // 2):
                self.curves["draft"].at(size)
        self.rules.step_ms(rule, self.batch_size, TreeShape(2, 1, (), (), (1,), 1, 1))
        self.fitted(rule)

    def _optional(self, term: Term) -> float:
        ms = self.curves[term].ms
        return ms[0] if ms else 0.0

    def _stored_ms(self, term: Term, load: Load) -> float:
        """Return what flushing costs with the mean number of slots that do in a step."""
        curve = self.curves[term]
        if not curve.ms:
            return 0.0
        whole, share = divmod(self.batch_size * load.store_share, 1)
        few, more = curve.at(int(whole)), curve.at(min(int(whole) + 1, self.batch_size))
        return few + share * (more - few)

    def _context_ms(self, num_tokens: int, load: Load) -> float:
        curve = self.curves["context"]
        if not load.more_context or not curve.ms:
            return 0.0
        return curve.at(num_tokens) * load.more_context / PER_TOKENS

    def _missing(self, what: str) -> MissingMeasurement:
        return MissingMeasurement(
            f"{what} at batch size {self.batch_size} must be in the table, it is not; record it "
            f"with `{self.command} --batch-size {self.batch_size}`"
        )


def term_times(table: RuntimeTable, rule: StepRule, command: str) -> dict[int, TermTimes]:
    """Return the terms of every batch size with a step, ascending, overheads fitted for one rule.

    Where off alone was measured only its time is there. `command` records more, as errors say.
    """
    rules = RuleTimes.of(table.rules, command)
    sizes = sorted({*table.batch_sizes, *table.off_sizes})
    times = {size: _at_batch_size(table, size, rules, rule, command) for size in sizes}
    for size in table.off_sizes:
        times[size] = _with_context(times[size], times, table.batch_sizes)
    return times


def _with_context(off: TermTimes, times: Mapping[int, TermTimes], full: Sequence[int]) -> TermTimes:
    """Return where off alone was measured, with what context costs straight between neighbours."""
    known = [size for size in full if times[size].curves["context"].ms]
    if not known:
        return off
    ms = np.interp(off.batch_size, known, [times[size].curves["context"].at(1) for size in known])
    curve = replace(off.curves["context"], ms=(float(ms),))
    return replace(off, curves={**off.curves, "context": curve})


def spreads(table: RuntimeTable) -> Factors:
    """Return the relative spread of each group: the median over its points, at most one half."""
    relative: dict[str, list[float]] = {group: [] for group in Factors._fields}
    for step in table.steps:
        if step.is_off:
            relative["off"].append(step.spread_ms / step.ms)
    for point in table.points:
        group = {"verify": "verify", "draft": "draft", "draft_root": "draft"}.get(point.term)
        if group is not None:
            relative[group].append(point.spread_ms / point.ms)
    relative["rules"] = [point.spread_ms / point.ms for point in table.rules if point.ms > 0]
    return Factors(*(min(0.5, float(np.median(values or [0.0]))) for values in relative.values()))


def _whole_steps(times: TermTimes, steps: Sequence[Step], table: RuntimeTable) -> list[WholeStep]:
    """Return speculative steps beside the sums of their terms, where these were measured."""
    found = []
    for step in steps:
        if step.is_off:
            continue
        shape = shape_of(table.trees[step.tree].build())
        load = Load(step.rule, 0.0, step.tokens_per_step)
        try:
            sum_ms = times.sum_ms(shape, load, PLAIN)
        except MissingMeasurement:
            # A pass did not fit into memory, or the probe was stopped.
            continue
        found.append(WholeStep(shape, sum_ms, times.verify.at(shape.num_tokens), step.ms))
    return found


def _at_batch_size(
    table: RuntimeTable, batch_size: int, rules: RuleTimes, asked: StepRule, command: str
) -> TermTimes:
    points = [point for point in table.points if point.batch_size == batch_size]
    no_room = [row for row in table.no_room if row.batch_size == batch_size]
    terms: tuple[Term, ...] = Term.__args__  # type: ignore[attr-defined]
    rows = make_curve("draft_rows", batch_size, points, no_room, command)
    points = [without_rows(point, rows) for point in points]
    curves = {term: make_curve(term, batch_size, points, no_room, command) for term in terms}
    steps = [step for step in table.steps if step.batch_size == batch_size]
    off: dict[StepRule, float] = {step.rule: step.ms for step in steps if step.is_off}
    for sampled, same in (
        (StepRule.MSS, StepRule.NAIVE), (StepRule.NAIVE, StepRule.MSS),
        (StepRule.NAIVE_TRUNCATED, StepRule.MSS_TRUNCATED),
    ):  # fmt: skip
        # Without a tree the two choose alike.
        if sampled not in off and same in off:
            off[sampled] = off[same]
    times = TermTimes(batch_size, curves, curves["verify"], rules, off, {}, command)
    overheads: dict[StepRule, Overhead] = {}
    # Greedy's overhead is part of every rule's, and the last two share theirs.
    fitted = dict.fromkeys((StepRule.GREEDY, asked))
    if asked == StepRule.NAIVE_TRUNCATED:
        fitted[StepRule.MSS_TRUNCATED] = None
    for rule in fitted:
        whole = _whole_steps(times, [step for step in steps if step.rule == rule], table)
        if len(whole) > 1:
            overheads[rule] = _fitted(whole, times, overheads.get(StepRule.GREEDY))
        if rule == StepRule.GREEDY and rule in overheads:
            # Few trees are timed with the others, which are compared with verify as these show it.
            missed = overheads[rule].missed
            assert missed is not None
            times = replace(times, verify=times.verify.scaled(missed.factor))
    if StepRule.MSS_TRUNCATED in overheads:
        overheads.setdefault(StepRule.NAIVE_TRUNCATED, overheads[StepRule.MSS_TRUNCATED])
    return replace(times, overheads=overheads)


def _fitted(steps: Sequence[WholeStep], times: TermTimes, greedy: Overhead | None) -> Overhead:
    """Fit a overhead; one of a sampling rule is greedy's and what its steps differ by."""
    floors = _floors_of(times)
    if greedy is None:
        return fit_overhead(steps, floors, by_tokens=True)
    shared = greedy.coefficients
    known = [replace(row, sum_ms=row.sum_ms + shared.ms(row.shape)) for row in steps]
    more = fit_overhead(known, floors.minus(shared))
    return replace(more, coefficients=shared.plus(more.coefficients))


def _floors_of(times: TermTimes) -> Coefficients:
    """Return how far each coefficient of the overhead may go below zero.

    A level costs at least nothing with its draft pass, the constant at most undoes the draft's root
    pass, and further tokens and siblings never pay.
    """
    draft = times.curves["draft"].ms
    return Coefficients(-times.curves["draft_root"].at(1), -draft[0] if draft else 0.0)
