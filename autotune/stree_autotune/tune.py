"""From a question (pair, GPU, dataset, batch sizes) to a profile: load, check, decide, record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stree_autotune.library import Library, require_same_model, require_same_shape
from stree_autotune.provenance import provenance
from stree_autotune.runtime_cost import runtime_cost
from stree_autotune.runtime_table import RuntimeTable
from stree_autotune.step_cost import StepCost
from stree_autotune.trace_file import Trace, load_trace
from stree_autotune.verdict import Decision, decide_policy
from stree_core.errors import ConfigError
from stree_core.files import sha256_of
from stree_core.profile import (
    GpuRef,
    Interval,
    ModelRef,
    PolicyRow,
    Predicted,
    Profile,
    Sampling,
    Source,
    Sources,
    TreeText,
)


@dataclass(frozen=True, slots=True)
class TuneRequest:
    """What `stree-tune` was asked; `acceptance_from` and `dataset` are empty when not given."""

    gpu: str
    dataset: str
    target: str
    draft: str
    sampling: Sampling
    context: int
    batch_sizes: tuple[int, ...]
    max_nodes: int
    data: tuple[Path, ...]
    acceptance_from: str
    seed: int


@dataclass(frozen=True, slots=True)
class Runtime:
    """The step cost of the asked pair and GPU, and the table it was made from."""

    table: RuntimeTable
    cost: StepCost
    source: Source


def tune(request: TuneRequest) -> Profile:
    """Decide every batch size of `request` and return the profile.

    Raises ConfigError for unknown names and files that do not belong together, MissingMeasurement
    for tables and traces that were never recorded.
    """
    library = Library.open(request.data)
    target, draft = library.model_name(request.target), library.model_name(request.draft)
    runtime = _load_runtime(library, request, target, draft)
    trace, trace_source = _load_acceptance(library, request, target, draft)
    refs = _require_one_pair(library, request, runtime, trace, trace_source)
    runtime.cost.require(request.batch_sizes, request.max_nodes)
    decisions = decide_policy(
        trace,
        runtime.cost,
        request.batch_sizes,
        max_nodes=request.max_nodes,
        seed=request.seed,
    )
    return Profile(
        target=refs[0],
        draft=refs[1],
        gpu=GpuRef(name=request.gpu, status=runtime.source.status),
        dataset=trace.meta.dataset,
        sampling=request.sampling,
        chat=trace.meta.chat,
        context=request.context,
        policy=tuple(_policy_row(decision) for decision in decisions),
        sources=Sources(runtime=runtime.source, trace=trace_source),
        provenance=provenance(request.seed),
    )


def _load_runtime(library: Library, request: TuneRequest, target: str, draft: str) -> Runtime:
    found = library.find_runtime(request.gpu, target, draft)
    table, cost, estimate = runtime_cost(
        library, found.path, request.gpu, request.sampling, request.context
    )
    note = f"{table.gpu_name}, {table.dtype}, {table.backend}"
    if estimate is not None:
        note = estimate.rule
    note += (
        f"; whole steps are predicted with an error of {100 * cost.fit_error:.1f} % (leave one out)"
    )
    return Runtime(table, cost, _source(library, found.path, note, estimated=not found.is_exact))


def _require_one_pair(
    library: Library, request: TuneRequest, runtime: Runtime, trace: Trace, trace_source: Source
) -> tuple[ModelRef, ModelRef]:
    """Return the target and the draft as the profile names them.

    Raises ConfigError unless table, trace and, where they are there, folders are of one pair; a
    borrowed trace may be of any.
    """
    table, borrowed = runtime.table, trace_source.status == "estimated"
    roles = (
        (table.target, trace.meta.target, request.target),
        (table.draft, trace.meta.draft, request.draft),
    )
    table_file = f"runtime table {PurePosixPath(runtime.source.name).name}"
    trace_file = f"trace {PurePosixPath(trace_source.name).name}"
    refs = []
    for timed, traced, name in roles:
        here = library.find_source(name)
        if here is not None:
            again = f"record it again with `{table.probe_command} --force`"
            require_same_shape(timed, here.ref, table_file, "folder", again)
            if not borrowed:
                again = "record it again with `stree-tune trace --force`"
                require_same_model(traced, here.ref, trace_file, "folder", again)
            refs.append(here.ref)
        elif borrowed:
            refs.append(timed.ref)
        else:
            again = "record the older of the two again"
            require_same_shape(timed, traced, table_file, trace_file, again)
            refs.append(traced)
    return refs[0], refs[1]


def _load_acceptance(
    library: Library, request: TuneRequest, target: str, draft: str
) -> tuple[Trace, Source]:
    """Return the trace of the pair, or the borrowed one, and how the profile names it."""
    borrowed = bool(request.acceptance_from)
    if borrowed:
        path = library.find_borrowed_trace(request.acceptance_from)
    else:
        label = request.sampling.label
        path = library.find_trace(target, draft, request.dataset, label)
    trace = load_trace(path)
    if request.dataset and trace.meta.dataset != request.dataset:
        raise ConfigError(
            f"trace {path.name} must be of the asked dataset, got {trace.meta.dataset} for "
            f"{request.dataset}; pass --dataset {trace.meta.dataset}"
        )
    if trace.meta.sampling != request.sampling:
        raise ConfigError(
            f"trace {path.name} must have the asked sampling, got {trace.meta.sampling.label}; "
            "record another with `stree-tune trace`"
        )
    notes = []
    if borrowed:
        notes.append(f"borrowed from {trace.meta.target.name} + {trace.meta.draft.name}")
    if not trace.reliable:
        notes.append(f"only {trace.meta.num_prompts} prompts; a reliable trace has at least 64")
    return trace, _source(library, path, "; ".join(notes), estimated=borrowed)


def _source(library: Library, path: Path, note: str, *, estimated: bool) -> Source:
    return Source(
        name=library.label(path),
        sha256=sha256_of(path),
        status="estimated" if estimated else "measured",
        note=note or None,
    )


def _policy_row(decision: Decision) -> PolicyRow:
    low, high = decision.speedup_interval
    return PolicyRow(
        batch_size=decision.batch_size,
        verdict=decision.verdict,
        tree=TreeText(paths=decision.tree.paths),
        predicted=Predicted(
            tokens_per_step=_rounded(decision.tokens_per_step),
            step_ms=_rounded(decision.step_ms),
            tokens_per_s=_rounded(decision.tokens_per_s),
            speedup=_rounded(decision.speedup),
            speedup_interval=Interval(low=_rounded(low), high=_rounded(high)),
        ),
        reason=decision.reason,
    )


def _rounded(value: float) -> float:
    """Return `value` to six digits: what rounding hides, no measurement resolves."""
    return float(f"{value:.6g}")
