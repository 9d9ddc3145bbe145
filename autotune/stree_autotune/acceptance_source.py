"""The acceptance trace that a tuning is about, its certificate, and how a profile names files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stree_autotune.certificate import Certificate, certificate_path, load_certificate
from stree_autotune.library import Library
from stree_autotune.trace_file import Trace, load_trace
from stree_core.errors import ConfigError
from stree_core.files import sha256_of
from stree_core.profile import Sampling, Source


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
    trace = load_trace(path) if borrowed else _load_own(path, command)
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
    certificate, certificate_source = load_certificate(path), None
    if certificate is not None:
        note = (
            f"within: of the best possible static tree of up to {max_nodes} nodes on this "
            "trace, in predicted tokens/s"
        )
        certificate_source = source_of(
            library, certificate_path(path), note, estimated=bool(borrowed)
        )
    source = source_of(library, path, "; ".join(notes), estimated=bool(borrowed))
    return Acceptance(trace, source, certificate, certificate_source)


def _load_own(path: Path, command: str) -> Trace:
    try:
        return load_trace(path)
    except ConfigError as err:
        raise ConfigError(f"{err} (`{command} --force`)") from err


def source_of(library: Library, path: Path, note: str, *, estimated: bool) -> Source:
    """Return how a profile names a file."""
    return Source(
        name=library.label(path),
        sha256=sha256_of(path),
        status="estimated" if estimated else "measured",
        note=note or None,
    )
