"""The step cost that a request is answered with: of a table, or of both models' shapes alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from stree_autotune.cost import (
    Estimate,
    MemoryModel,
    ShapeQuestion,
    StepCost,
    estimate_shapes,
    nearest_measured,
    read_runtime,
    runtime_cost,
)
from stree_autotune.search.request import TuneRequest, probe_command_of
from stree_autotune.store import GpuSpec, Library, RuntimeTable, StepRule
from stree_core.errors import ConfigError, MissingMeasurement
from stree_core.models import MTP, ModelSource, head_source
from stree_core.profile import Source

FROM_SHAPES = "*"
"""Stands for the pair in the name of a table that was made from shapes, which no file holds."""

FEWEST_NODES = 2
"""Times of shapes are estimated for no fewer: a step cost takes two whole steps."""


@dataclass(frozen=True, slots=True)
class Times:
    """The step cost of the asked pair and GPU, and the table and the GPU's spec behind it."""

    table: RuntimeTable
    wanted: GpuSpec | None
    cost: StepCost
    source: Source

    def memory(self, request: TuneRequest) -> MemoryModel:
        """Return what decoding needs of the GPU's memory; without a spec everything fits."""
        limit = math.inf if self.wanted is None else self.wanted.memory_gb * 1e9
        rule = StepRule.of(request.sampling)
        table = self.table
        return MemoryModel(table.target, table.draft, request.context, request.gpu, rule, limit)


def source_of(name: str, sha256: str, note: str, *, estimated: bool) -> Source:
    """Return how a profile names a file of this label and digest."""
    return Source(
        name=name,
        sha256=sha256,
        status="estimated" if estimated else "measured",
        note=note or None,
    )


def load_times(library: Library, request: TuneRequest, read: Sequence[ModelSource] = ()) -> Times:
    """Return the step cost of a request: measured, carried over, or of the shapes alone.

    `read` are models whose configs were read already.

    Raises ConfigError for unknown names, MissingMeasurement when nothing says how long a step
    takes.
    """
    target, draft = library.model_name(request.target), library.model_name(request.draft)
    command = probe_command_of(library, request)
    try:
        found = library.find_runtime(request.gpu, target, draft, command)
    except MissingMeasurement as missing:
        return times_of_shapes(library, request, missing)
    inputs = read_runtime(library, found, request.gpu, read)
    table = inputs.table
    label = library.label(inputs.path)
    if not table.batch_sizes:
        cut_short = MissingMeasurement(
            f"a table needs whole steps of trees, {label} has none since its probe was cut short; "
            f"go on with it by `{command}`"
        )
        return times_of_shapes(library, request, cut_short)
    cost, estimate = runtime_cost(inputs, request.sampling, request.context, request.words)
    note = f"{table.gpu_name}, {table.number_types}, {table.backend}"
    if estimate is not None:
        note = estimate.rule
    note += (
        f"; whole steps are predicted with an error of {100 * cost.fit_error:.1f} % (leave one out)"
    )
    if inputs.has_others_off:
        note += "; off is as fast as in the target's table with another draft"
    source = source_of(label, inputs.sha256, note, estimated=not found.is_exact)
    return Times(table, inputs.wanted, cost, source)


def times_of_shapes(library: Library, request: TuneRequest, missing: MissingMeasurement) -> Times:
    """Estimate from what the models' configs say; raise `missing` where that is not known."""
    spec = library.gpu_spec(request.gpu)
    if spec is None:
        raise missing
    try:
        target = library.find_described(request.target)
        draft = None if request.draft == MTP else library.find_described(request.draft)
    except ConfigError:
        # neither config nor shape: only a measurement can tell
        raise missing from None
    measured = nearest_measured(library, spec)
    if measured is None:
        raise missing
    draft = head_source(target) if draft is None else draft
    _require_vocabulary(target, draft)
    question = ShapeQuestion(
        target,
        draft,
        spec,
        request.batch_sizes,
        max(FEWEST_NODES, request.max_nodes),
        request.context,
    )
    estimate = estimate_shapes(question, measured, request.words)
    rule = StepRule.of(request.sampling)
    cost = StepCost.from_estimate(estimate, rule, request.context, request.words)
    name = f"runtime/{measured.spec.name}--{FROM_SHAPES}.yaml"
    source = source_of(name, _digest(measured.sha256, estimate), estimate.rule, estimated=True)
    return Times(estimate.table, spec, cost, source)


def _require_vocabulary(target: ModelSource, draft: ModelSource) -> None:
    """Raise ConfigError for a draft that lacks tokens of the target, which decoding refuses too."""
    wanted, known = target.shape.vocab_size, draft.shape.vocab_size
    if known < wanted:
        raise ConfigError(
            f"a draft needs the target's whole vocabulary, {target.name} has {wanted} tokens and "
            f"{draft.name} {known}; choose another draft"
        )


def _digest(tables: tuple[str, ...], estimate: Estimate) -> str:
    """Return a hash of all tables and of both shapes."""
    table = estimate.table
    parts = [*tables, table.target.shape_sha256 or "", table.draft.shape_sha256 or ""]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
