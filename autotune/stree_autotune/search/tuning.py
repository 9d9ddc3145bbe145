"""From a question (pair, GPU, dataset, batch sizes) to a profile: load, check, decide, record."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stree_autotune.cost import MemoryModel
from stree_autotune.search.certificate import Certificate, certificate_path, read_certificate
from stree_autotune.search.request import TuneRequest, within_measured
from stree_autotune.search.study import NUM_TRIALS, SearchSetting, StudyPlace, Trial, open_storage
from stree_autotune.search.times import Times, load_times, source_of
from stree_autotune.search.typed_rates import tune_typed
from stree_autotune.search.verdict import Decision, decide_policy
from stree_autotune.store import (
    Library,
    provenance,
    require_same_model,
    require_same_shape,
)
from stree_autotune.trace import MAX_FILE_BYTES, Trace, parse_trace
from stree_core.errors import ConfigError
from stree_core.files import read_limited
from stree_core.models import MTP, ModelSource, head_source
from stree_core.profile import (
    GpuRef,
    MeasuredBlock,
    ModelRef,
    Profile,
    Sampling,
    Source,
    Sources,
)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """A trace and its certificate, None when it has none, and how the profile names the two."""

    trace: Trace
    source: Source
    certificate: Certificate | None
    certificate_source: Source | None


def load_acceptance(
    library: Library,
    pair: tuple[str, str],
    dataset: str,
    borrowed: str,
    *,
    sampling: Sampling,
    max_nodes: int,
    command: str,
) -> Acceptance:
    """Return the trace of a pair (target, draft) or the borrowed one, with its certificate.

    The certificate speaks of trees of up to `max_nodes`; `command` records the trace. Raises
    ConfigError for a trace of another dataset or sampling setting, MissingMeasurement when there is
    none.
    """
    path = (
        library.find_trace_file(borrowed)
        if borrowed
        else library.find_trace(*pair, dataset, sampling.label, command)
    )
    trace, digest = _read_trace(path, "" if borrowed else command)
    if dataset and trace.meta.dataset != dataset:
        raise ConfigError(
            f"trace {path.name} must be of the asked dataset, got {trace.meta.dataset} for "
            f"{dataset}; pass --dataset {trace.meta.dataset}"
        )
    if trace.meta.sampling != sampling:
        raise ConfigError(
            f"trace {path.name} must have the asked sampling, got {trace.meta.sampling.label}; "
            f"record another with `{command}`"
        )
    notes = []
    if borrowed:
        notes.append(f"borrowed from {trace.meta.target.name} + {trace.meta.draft.name}")
    if not trace.reliable:
        notes.append(f"only {trace.meta.num_prompts} prompts; a reliable trace has at least 64")
    source = source_of(library.label(path), digest, "; ".join(notes), estimated=bool(borrowed))
    if not certificate_path(path).is_file():
        return Acceptance(trace, source, None, None)
    certificate, digest = read_certificate(path, digest)
    note = (
        f"within: of the best possible static tree of up to {max_nodes} nodes on this trace, in "
        "predicted tokens/s"
    )
    label = library.label(certificate_path(path))
    certificate_source = source_of(label, digest, note, estimated=bool(borrowed))
    return Acceptance(trace, source, certificate, certificate_source)


def _read_trace(path: Path, command: str) -> tuple[Trace, str]:
    """Open a trace once; return it with its file's digest. A command that records it helps."""
    try:
        data = read_limited(path, MAX_FILE_BYTES)
        return parse_trace(data, str(path)), hashlib.sha256(data).hexdigest()
    except ConfigError as err:
        if not command:
            raise
        raise ConfigError(f"{err} (`{command} --force`)") from err


@dataclass(frozen=True, slots=True)
class Question:
    """A request and all inputs of its answer, each file read once and checked against the others.

    Times with the table and the GPU specs, acceptance with its certificate, and both models as the
    profile names them; the sources hold the digests. What comes later reads no file.
    """

    request: TuneRequest
    runtime: Times
    acceptance: Acceptance
    refs: tuple[ModelRef, ModelRef]
    memory: MemoryModel

    @property
    def trace(self) -> Trace:
        """The acceptance trace."""
        return self.acceptance.trace

    @property
    def name(self) -> str:
        """What tells this question's studies from those of others in one storage."""
        request, (target, draft) = self.request, self.refs
        parts = (
            f"{target.name} + {draft.name} on {request.gpu}",
            f"{self.trace.meta.dataset} {request.sampling.label}",
            f"context {request.context}, up to {request.max_nodes} nodes",
            f"table {self.runtime.source.sha256[:12]}, trace {self.acceptance.source.sha256[:12]}",
        )
        return ", ".join(parts)

    def profile(
        self, decisions: Sequence[Decision], measured: MeasuredBlock | None = None
    ) -> Profile:
        """Return the profile of these decisions."""
        request = self.request
        return Profile(
            target=self.refs[0],
            draft=self.refs[1],
            gpu=GpuRef(name=request.gpu, status=self.runtime.source.status),
            dataset=self.trace.meta.dataset,
            sampling=request.sampling,
            chat=self.trace.meta.chat,
            context=request.context,
            policy=tuple(decision.policy_row(self.gap(decision)) for decision in decisions),
            measured=measured,
            sources=Sources(
                runtime=self.runtime.source,
                trace=self.acceptance.source,
                certificate=self.acceptance.certificate_source,
            ),
            provenance=provenance(request.seed),
        )

    def gap(self, decision: Decision) -> float | None:
        """Return by which share any tree may at most be predicted to be faster, None if unknown."""
        certificate, cost = self.acceptance.certificate, self.runtime.cost
        if certificate is None:
            return None
        batch_size = decision.batch_size
        trial = Trial.at(
            batch_size,
            decision.tree,
            decision.tokens_per_step,
            cost.step_ms(batch_size, decision.tree, decision.tokens_per_step),
        )
        most = certificate.most_tokens_per_s(cost, batch_size, self.request.max_nodes)
        # Of a difference of equal speeds processors leave other last bits.
        return max(0.0, round(most / trial.tokens_per_s - 1, 9))


def tune(request: TuneRequest) -> Profile:
    """Decide every batch size of `request` and return the profile; raises what `ask` raises."""
    if request.rates:
        return tune_typed(request)
    question = ask(request)
    place = StudyPlace(
        open_storage(request.storage), f"offline, {question.name}, seed {request.seed}"
    )
    setting = SearchSetting(
        request.num_trials or NUM_TRIALS, place, question.memory, request.max_token_ms
    )
    decisions = decide_policy(
        question.trace,
        question.runtime.cost,
        question.request.batch_sizes,
        max_nodes=question.request.max_nodes,
        seed=request.seed,
        setting=setting,
        prefer=request.prefer,
    )
    cost = question.runtime.cost
    noted = [d.noted(cost.note(d.batch_size, d.tree)) for d in decisions]
    return question.profile(noted)


def ask(request: TuneRequest) -> Question:
    """Load what a request is about.

    Raises ConfigError for unknown names and files that do not belong together, MissingMeasurement
    for tables and traces that were never recorded.
    """
    library = Library.open(request.data)
    target, draft = library.model_name(request.target), library.model_name(request.draft)
    here = _sources_here(library, request)
    runtime = load_times(library, request, [source for source in here if source is not None])
    request = within_measured(request, runtime.cost)
    acceptance = load_acceptance(
        library,
        (target, draft),
        request.dataset,
        request.acceptance_from,
        sampling=request.sampling,
        max_nodes=request.max_nodes,
        command=request.trace_command(),
    )
    refs = _require_one_pair(request, here, runtime, acceptance)
    runtime.cost.require(request.batch_sizes, request.max_nodes)
    memory = runtime.memory(request)
    return Question(request, runtime, acceptance, refs, memory)


def _require_one_pair(
    request: TuneRequest, here: SourcesHere, runtime: Times, acceptance: Acceptance
) -> tuple[ModelRef, ModelRef]:
    """Return the target and the draft as the profile names them.

    Their weights are those that the trace was recorded with, since acceptance depends on them.
    Raises ConfigError unless table, trace and, where they are there, folders are of one pair; a
    borrowed trace may be of any.
    """
    trace, trace_source = acceptance.trace, acceptance.source
    table, borrowed = runtime.table, trace_source.status == "estimated"
    roles = ((table.target, trace.meta.target), (table.draft, trace.meta.draft))
    table_file = f"runtime table {PurePosixPath(runtime.source.name).name}"
    trace_file = f"trace {PurePosixPath(trace_source.name).name}"
    refs = []
    for (timed, traced), source in zip(roles, here, strict=True):
        if source is not None:
            again = f"record it again with `{table.probe_command(request.words)} --force`"
            require_same_shape(timed, source.ref, table_file, "folder", again)
            if not borrowed:
                again = f"record it again with `{request.trace_command('--force')}`"
                require_same_model(traced, source.ref, trace_file, "folder", again)
            known = None if borrowed else traced.weights_sha256
            refs.append(source.ref.model_copy(update={"weights_sha256": known}))
        elif borrowed:
            refs.append(timed.ref)
        else:
            again = "record the older of the two again"
            require_same_shape(timed, traced, table_file, trace_file, again)
            refs.append(traced)
    return refs[0], refs[1]


SourcesHere = tuple[ModelSource | None, ModelSource | None]


def _sources_here(library: Library, request: TuneRequest) -> SourcesHere:
    """Return what the models' files say now, None where they are not on this machine."""
    target = library.find_source(request.target)
    if request.draft == MTP:
        return target, None if target is None else head_source(target)
    return target, library.find_source(request.draft)
