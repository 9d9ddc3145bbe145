"""How far predictions of a table can be trusted: what is left out in turn, predicted from the rest.

- size: a pass of one size from the sizes beside it; edges of the staircase are where it errs.
- batch size: a pass or whole step at one batch size from the batch sizes beside it.
- whole step: a speculative step from its terms and the other steps of its batch size.
- roofline, batch size and shape: a pass from a roofline fitted without its batch size or model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stree_autotune.cost.roofline import Sample, fit, log_errors, samples_of
from stree_autotune.cost.step_cost import StepCost
from stree_autotune.store.gpu_spec import GpuSpec
from stree_autotune.store.runtime_table import Point, RuntimeTable

PASSES = ("verify", "draft", "draft_root")


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Relative errors of one term when something is left out: their number and how large."""

    left_out: str
    term: str
    count: int
    median: float
    ninth_decile: float
    worst: float

    @classmethod
    def of(cls, left_out: str, term: str, errors: Sequence[float]) -> Accuracy:
        """Summarise errors by their absolute values."""
        sizes = np.abs(errors)
        median, ninth = np.quantile(sizes, (0.5, 0.9))
        return cls(left_out, term, len(sizes), float(median), float(ninth), float(sizes.max()))


def accuracy(table: RuntimeTable) -> list[Accuracy]:
    """Return what leaving out says of the measured table itself, term by term."""
    cost = StepCost.from_table(table)
    rows = []
    for term in PASSES:
        points = [point for point in table.points if point.term == term]
        if errors := list(_without_size(points)):
            rows.append(Accuracy.of("size", term, errors))
        if errors := list(_without_batch_size(points)):
            rows.append(Accuracy.of("batch size", term, errors))
    inner = table.batch_sizes[1:-1]
    if inner:
        rows += _steps_without_batch_size(table, cost, inner)
    errors = [error for times in cost.times.values() for error in times.left_out]
    if errors:
        rows.append(Accuracy.of("whole step", "speculating", errors))
    return rows


def roofline_accuracy(tables: Sequence[RuntimeTable], spec: GpuSpec) -> list[Accuracy]:
    """Return how a roofline fitted to tables of one GPU errs on what was left out."""
    samples = list(dict.fromkeys(s for table in tables for s in samples_of(table)))
    rows = []
    groups: tuple[tuple[str, Callable[[Sample], Hashable]], ...] = (
        ("batch size", lambda sample: sample.batch_size),
        ("shape", lambda sample: sample.model),
    )
    for what, key in groups:
        for group in sorted({key(sample) for sample in samples}, key=str):
            rest = [sample for sample in samples if key(sample) != group]
            mine = [sample for sample in samples if key(sample) == group]
            if rest:
                errors = np.expm1(log_errors(mine, fit(rest, spec), spec))
                rows.append(Accuracy.of(f"roofline, {what}", str(group), errors.tolist()))
    return rows


def _without_size(points: Sequence[Point]) -> Iterator[float]:
    """Predict every inner size from its neighbours, straight."""
    for batch_size in {point.batch_size for point in points}:
        mine = sorted((p.size, p.ms) for p in points if p.batch_size == batch_size)
        for before, (size, ms), after in zip(mine, mine[1:], mine[2:], strict=False):
            predicted = np.interp(size, (before[0], after[0]), (before[1], after[1]))
            yield float(predicted) / ms - 1


def _without_batch_size(points: Sequence[Point]) -> Iterator[float]:
    """Predict every inner batch size from its neighbours, straight."""
    for size in {point.size for point in points}:
        mine = sorted((p.batch_size, p.ms) for p in points if p.size == size)
        for before, (batch, ms), after in zip(mine, mine[1:], mine[2:], strict=False):
            predicted = np.interp(batch, (before[0], after[0]), (before[1], after[1]))
            yield float(predicted) / ms - 1


def _steps_without_batch_size(
    table: RuntimeTable, cost: StepCost, inner: Sequence[int]
) -> list[Accuracy]:
    errors: dict[str, list[float]] = {"off": [], "speculating": []}
    for left_out in inner:
        times = {size: found for size, found in cost.times.items() if size != left_out}
        rest = replace(cost, times=times, batch_sizes=tuple(sorted(times)))
        for step in table.steps:
            if step.batch_size == left_out and step.rule == "greedy":
                tree = table.trees[step.tree].build()
                predicted = rest.step_ms(left_out, tree, step.tokens_per_step)
                kind = "off" if step.is_off else "speculating"
                errors[kind].append(predicted / step.ms - 1)
    return [Accuracy.of("batch size", kind, found) for kind, found in errors.items() if found]
