"""The step cost of a table on the GPU that is asked for: as measured, or estimated."""

from __future__ import annotations

from pathlib import Path

from stree_autotune.cost.estimate import Estimate, estimate_table
from stree_autotune.cost.step_cost import StepCost
from stree_autotune.store import (
    Library,
    PairWords,
    RuntimeTable,
    StepRule,
    load_runtime_table,
)
from stree_core.errors import MissingMeasurement
from stree_core.profile import Sampling


def runtime_cost(
    library: Library,
    path: Path,
    gpu: str,
    sampling: Sampling,
    context: int,
    words: PairWords | None = None,
) -> tuple[RuntimeTable, StepCost, Estimate | None]:
    """Return the table at `path`, its cost on `gpu` under a setting, and how it was estimated.

    Raises MissingMeasurement when a spec is missing, the band of an estimate would be too wide, or
    attention layers make times depend on more context than was measured; `words` are the user's for
    the pair.
    """
    table = load_runtime_table(path)
    _require_context(table, path, context, words)
    rule = StepRule.of(sampling)
    if table.gpu == gpu:
        return table, StepCost.from_table(table, rule, context, words), None
    measured, wanted = library.gpu_spec(table.gpu), library.gpu_spec(gpu)
    if measured is None or wanted is None:
        missing = table.gpu if measured is None else gpu
        raise MissingMeasurement(
            f"times of {gpu} are estimated from those of {table.gpu}, and no spec of {missing} is "
            f"there; name the folder that has gpus/{missing}.yaml with --data"
        )
    others = [load_runtime_table(p) for p in library.runtime_paths(table.gpu) if p != path]
    estimate = estimate_table(table, measured, wanted, others, words)
    return table, StepCost.from_estimate(estimate, rule, context, words), estimate


def _require_context(
    table: RuntimeTable, path: Path, context: int, words: PairWords | None
) -> None:
    """Raise MissingMeasurement when attention makes times depend on more than was measured."""
    attention = table.target.kv_bytes_per_token + table.draft.kv_bytes_per_token > 0
    slopes = any(point.term == "context" for point in table.points)
    if attention and context != table.context and not (slopes and context <= table.context):
        longer = table.model_copy(update={"context": context})
        raise MissingMeasurement(
            "with attention layers times hold up to the context they were measured at, and "
            f"{path.name} was at {table.context}, got {context}; record it with "
            f"`{longer.probe_command(words)} --force`"
        )
