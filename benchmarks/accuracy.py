"""How far predictions of a table can be trusted: what is left out in turn, predicted from the rest.

- size: a pass of one size from the sizes beside it; edges of the staircase are where it errs.
- batch size: a pass or whole step at one batch size from the batch sizes beside it.
- whole step: a speculative step from its terms and the other steps of its batch size.
- roofline, batch size and shape: a pass from a roofline fitted without its batch size or model.
- both shapes: a whole step of a pair from a roofline fitted without both of its models.
- passes of a shape: those of forward.py, by size, from a roofline fitted without the shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from report import Row

from stree_autotune.cost.estimate import TWO_SIDED, fit_shapes
from stree_autotune.cost.layout import Layouts, layout_of
from stree_autotune.cost.roofline import fit, log_errors
from stree_autotune.cost.shape_table import DTYPE, MeasuredGpu, ShapeQuestion, table_of_shapes
from stree_autotune.cost.step_cost import StepCost
from stree_autotune.cost.traffic import model_cost
from stree_autotune.cost.work import (
    MOST_SLOTS,
    PassModel,
    PassSize,
    Sample,
    all_samples,
    element_bytes,
    pass_work,
    plain_size,
    point_size,
)
from stree_autotune.store.gpu_spec import GpuSpec
from stree_autotune.store.library import Library
from stree_autotune.store.runtime_table import Point, RuntimeTable
from stree_autotune.store.step_rule import StepRule
from stree_core.errors import MissingMeasurement
from stree_core.models.source import MTP, head_source

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


def roofline_accuracy(
    tables: Sequence[RuntimeTable], spec: GpuSpec, layouts: Layouts
) -> list[Accuracy]:
    """Return how a roofline fitted to tables of one GPU errs on what was left out."""
    samples = all_samples(tables, layouts)
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


def pair_accuracy(measured: MeasuredGpu, library: Library) -> tuple[list[Accuracy], float]:
    """Return how whole greedy steps are predicted from shapes that no table was fitted to.

    Both models of a pair are left out of the roofline. Also the share of steps inside the band.
    """
    rows, inside = [], []
    for table in measured.tables:
        names = (table.target.name, table.draft.name)
        own = (names[0], f"{names[0]} {MTP}" if names[1] == MTP else names[1])
        rest = [s for s in all_samples(measured.tables, measured.layouts) if s.model not in own]
        if len({sample.model for sample in rest}) < 2:
            continue
        roofline = fit_shapes(rest, measured.spec, table)
        target = library.find_described(names[0])
        draft = head_source(target) if names[1] == MTP else library.find_described(names[1])
        most = max(tree.build().num_nodes for tree in table.trees.values())
        asked = ShapeQuestion(target, draft, measured.spec, table.batch_sizes, most, table.context)
        cost = StepCost.from_table(table_of_shapes(asked, roofline, measured))
        band = TWO_SIDED * math.hypot(roofline.between, roofline.within)
        errors: dict[str, list[float]] = {"off": [], "speculating": []}
        for step in table.steps:
            asked_for = step.batch_size in table.batch_sizes and step.batch_size <= MOST_SLOTS
            if step.rule == StepRule.GREEDY and asked_for:
                tree = table.trees[step.tree].build()
                error = cost.step_ms(step.batch_size, tree, step.tokens_per_step) / step.ms
                errors["off" if step.is_off else "speculating"].append(error - 1)
                inside.append(abs(math.log(error)) <= band)
        for kind, found in errors.items():
            rows.append(Accuracy.of(f"both shapes, {kind}", " + ".join(names), found))
    return rows, sum(inside) / max(1, len(inside))


def forward_accuracy(
    rows: Sequence[Row], measured: MeasuredGpu, library: Library
) -> tuple[list[Accuracy], float]:
    """Return how passes that forward.py timed are predicted from other shapes' tables.

    Also the share of them inside the band. Rows whose experts are all the same are left out.
    """
    width = element_bytes(DTYPE)
    samples, found, inside = all_samples(measured.tables, measured.layouts), [], []
    for name in sorted({row["model"] for row in rows}):
        source = library.find_described(name)
        model = PassModel(
            model_cost(source.shape, source.ref, width), layout_of(source.shape), width
        )
        mine = [
            Sample(name, row["batch"], "verify", pass_work(model, _size_of(row)), row["ms"])
            for row in rows
            if row["model"] == name and row.get("routing") != "one set"
        ]
        rest = [sample for sample in samples if sample.model != name]
        roofline = fit_shapes(rest, measured.spec, measured.tables[0])
        errors = log_errors(mine, roofline.found, measured.spec)
        band = TWO_SIDED * math.hypot(roofline.between, roofline.within)
        inside += (np.abs(errors) <= band).tolist()
        found.append(Accuracy.of("passes of a shape", name, np.expm1(errors).tolist()))
    return found, sum(inside) / max(1, len(inside))


def _size_of(row: Row) -> PassSize:
    """Return the rows of a pass; one token is a step without a tree, which stores now and then."""
    batch_size, num_tokens, context = row["batch"], row["tokens"], row["context"]
    if num_tokens == 1:
        return plain_size(batch_size, context)
    return point_size("verify", batch_size, num_tokens, context)


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
        sizes = tuple(size for size in cost.batch_sizes if size != left_out)
        rest = replace(cost, times=times, batch_sizes=sizes)
        for step in table.steps:
            if step.batch_size == left_out and step.rule == "greedy":
                tree = table.trees[step.tree].build()
                try:
                    predicted = rest.step_ms(left_out, tree, step.tokens_per_step)
                except MissingMeasurement:
                    # a larger batch size had no memory for so large a tree
                    continue
                kind = "off" if step.is_off else "speculating"
                errors[kind].append(predicted / step.ms - 1)
    return [Accuracy.of("batch size", kind, found) for kind, found in errors.items() if found]
