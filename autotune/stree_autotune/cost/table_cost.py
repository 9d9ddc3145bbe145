"""The step cost of a table on the GPU that is asked for: as measured, or estimated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stree_autotune.cost.estimate import Estimate, estimate_table
from stree_autotune.cost.layout import Layouts, find_layouts
from stree_autotune.cost.step_cost import StepCost
from stree_autotune.store import (
    GpuSpec,
    Library,
    PairWords,
    RuntimeSource,
    RuntimeTable,
    StepRule,
    load_runtime_table,
)
from stree_core.errors import MissingMeasurement
from stree_core.files import read_yaml
from stree_core.models import ModelSource
from stree_core.profile import Sampling

MOST_APART = 1.1
"""How much longer one target's off may take in one table than in another."""


@dataclass(frozen=True, slots=True)
class RuntimeInputs:
    """A runtime table, and what carries its times to the GPU `gpu`; each file is read once.

    Off in `table` is the fastest of all tables of its target (`with_fastest_off`); `has_others_off`
    says that one of another draft is. `wanted` and `measured` are the specs of that GPU and of the
    table's, None where there is none or none is needed; `others` are the further tables of the
    table's GPU, which estimates are fitted to. `sha256` is the digest of the table's file.
    """

    path: Path
    sha256: str
    gpu: str
    table: RuntimeTable
    wanted: GpuSpec | None = None
    measured: GpuSpec | None = None
    others: tuple[RuntimeTable, ...] = ()
    layouts: Layouts = field(default_factory=Layouts)
    has_others_off: bool = False


def read_runtime(
    library: Library, found: RuntimeSource, gpu: str, read: Sequence[ModelSource] = ()
) -> RuntimeInputs:
    """Read the table that was found for a GPU and, for an estimate, the specs not read yet.

    `read` are models whose configs were read already.

    Raises ConfigError when one is malformed.
    """
    own, digest = read_yaml(found.path, RuntimeTable)
    if own.gpu == gpu:
        table = with_fastest_off(own, siblings_of(library, found.path, own))
        changed = table.steps != own.steps
        return RuntimeInputs(found.path, digest, gpu, table, found.wanted, has_others_off=changed)
    known = {spec.name: spec for spec in (found.measured, found.wanted) if spec is not None}
    measured, wanted = (known.get(name) or library.gpu_spec(name) for name in (own.gpu, gpu))
    paths = library.runtime_paths(own.gpu) if measured and wanted else []
    loaded = {path: load_runtime_table(path) for path in paths if path != found.path}
    near = (each for path, each in loaded.items() if path.parent == found.path.parent)
    table, others = with_fastest_off(own, near), tuple(loaded.values())
    layouts, changed = find_layouts(library, (table, *others), read), table.steps != own.steps
    return RuntimeInputs(found.path, digest, gpu, table, wanted, measured, others, layouts, changed)


def load_table(library: Library, path: Path) -> RuntimeTable:
    """Read a table; its off is the fastest of all tables of its target in its folder."""
    table = load_runtime_table(path)
    return with_fastest_off(table, siblings_of(library, path, table))


def siblings_of(library: Library, path: Path, table: RuntimeTable) -> Iterator[RuntimeTable]:
    """Yield the other tables of a target in a table's folder, which one machine has measured."""
    for each in library.runtime_paths(table.gpu, table.target.name):
        if each != path and each.parent == path.parent:
            yield load_runtime_table(each)


def with_fastest_off(table: RuntimeTable, others: Iterable[RuntimeTable]) -> RuntimeTable:
    """Return a table whose steps without speculation are the fastest of all of its target's tables.

    They know no draft, so a verdict's baseline must not depend on which draft is asked for. What
    else runs on a machine makes them slower, never faster, and a gain too large.
    """
    fastest = {(step.batch_size, step.rule): step for step in table.steps if step.is_off}
    for other in others:
        if setting_of(other) != setting_of(table):
            continue
        for step in other.steps:
            known = fastest.get((step.batch_size, step.rule))
            if step.is_off and known is not None and step.ms < known.ms:
                fastest[step.batch_size, step.rule] = step
    steps = (fastest[s.batch_size, s.rule] if s.is_off else s for s in table.steps)
    return table.model_copy(update={"steps": tuple(steps)})


def off_disagreements(tables: Iterable[RuntimeTable]) -> list[str]:
    """Return a sentence for each target and batch size whose off differs between its tables."""
    found: dict[tuple[object, ...], list[tuple[float, str, str]]] = {}
    for table in tables:
        for step in table.steps:
            if step.is_off and step.rule == StepRule.GREEDY:
                row = step.ms, table.draft.name, table.target.name
                found.setdefault((*setting_of(table), step.batch_size), []).append(row)
    sentences = []
    for (*_, batch_size), rows in found.items():
        (low, first, target), (high, second, _) = min(rows), max(rows)
        if high > MOST_APART * low:
            sentences.append(
                f"off of {target} at batch size {batch_size} takes {high:g} ms in its table with "
                f"{second} and {low:g} with {first}, so something ran beside a probe; probe again "
                "with --force and nothing beside it"
            )
    return sentences


def setting_of(table: RuntimeTable) -> tuple[object, ...]:
    """Return what a step without speculation depends on."""
    return table.gpu, table.target.ref, table.dtype, table.backend, table.context, table.weights


def runtime_cost(
    inputs: RuntimeInputs, sampling: Sampling, context: int, words: PairWords | None = None
) -> tuple[StepCost, Estimate | None]:
    """Return the step cost of a table on the GPU asked for, and how it was estimated if it was.

    Raises MissingMeasurement when a spec is missing, the band of an estimate would be too wide, or
    attention layers make times depend on more context than was measured; `words` are the user's for
    the pair.
    """
    table, gpu = inputs.table, inputs.gpu
    _require_context(table, inputs.path, context, words)
    rule = StepRule.of(sampling)
    if table.gpu == gpu:
        return StepCost.from_table(table, rule, context, words), None
    if inputs.measured is None or inputs.wanted is None:
        missing = table.gpu if inputs.measured is None else gpu
        raise MissingMeasurement(
            f"times of {gpu} are estimated from those of {table.gpu}, and no spec of {missing} is "
            f"there; name the folder that has gpus/{missing}.yaml with --data"
        )
    estimate = estimate_table(
        table, inputs.measured, inputs.wanted, inputs.others, words, inputs.layouts
    )
    return StepCost.from_estimate(estimate, rule, context, words), estimate


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
