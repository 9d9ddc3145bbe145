"""`stree-tune import`: files of a server in, a server table and its acceptance out.

Every run becomes a cell's value; runs that say something else than they were meant to are left out
and named as findings. Warnings are findings too: they are kept in the files and printed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stree_autotune.server import sglang, vllm
from stree_autotune.server.counters import Accepted, has_records, read_metrics, read_records
from stree_autotune.server.files import ITERATION, MAX_FILES, Document, read_documents
from stree_autotune.server.findings import findings_of, usable_runs
from stree_autotune.server.iterations import iteration_findings, iteration_ms
from stree_autotune.server.runs import BenchRun
from stree_autotune.server.tables import (
    Served,
    ServerAcceptance,
    ServerTable,
    log_spread,
    median,
)
from stree_core.errors import ConfigError
from stree_core.files import validate

DERIVED = {
    "vllm": (
        "step time is mean TPOT x tokens per step (counters of the run), compared with the mean "
        "time between streamed chunks; pauses for prefill are part of it"
    ),
    "sglang": (
        "step time is the median of step_time_dict where it agrees with mean TPOT x accept_length, "
        "else the latter"
    ),
}
COUNTED = (
    "marginal: share of steps that keep at least so many draft tokens, bonus token not counted"
)
CONTEXT_RATIO = 1.25


@dataclass(frozen=True, slots=True)
class Names:
    """What files do not say; an empty word is taken from them."""

    gpu: str = ""
    target: str = ""
    draft: str = ""
    method: str = ""
    dataset: str = ""


@dataclass(frozen=True, slots=True)
class Imported:
    """The files to write, either None where nothing tells it, and all findings."""

    table: ServerTable | None
    acceptance: ServerAcceptance | None
    findings: tuple[str, ...]


@dataclass(slots=True)
class _Read:
    """What a set of files holds."""

    runs: list[BenchRun] = field(default_factory=list)
    metrics: list[Document] = field(default_factory=list)
    records: list[Document] = field(default_factory=list)
    logs: list[Document] = field(default_factory=list)
    infos: list[Document] = field(default_factory=list)


def import_files(paths: Sequence[Path], names: Names) -> Imported:
    """Return what a set of files of one server and pair says.

    Raises ConfigError for files that are not recognised or do not belong together.
    """
    if len(paths) > MAX_FILES:
        raise ConfigError(
            f"at most {MAX_FILES} files are imported at once, got {len(paths)}; name fewer"
        )
    read = _Read()
    for path in paths:
        for document in read_documents(path):
            _sort_in(document, read)
    counted = [*read_metrics(read.metrics), *read_records(read.records)]
    if not read.runs and not counted:
        raise ConfigError(
            f"no file has a run or an acceptance (read {len(paths)}); name results of `vllm bench "
            "serve`, bench_serving, AIPerf, /metrics or responses"
        )
    served, runs = _served(read, names), read.runs
    _require_one_context(runs)
    usable, left_out = usable_runs(_numbered(runs))
    logged = iteration_findings(usable, iteration_ms(read.logs))
    found = (*left_out, *findings_of(usable, counted), *logged)
    table = _table(served, usable, found)
    acceptance = _acceptance(served, usable, counted, found, names)
    return Imported(table, acceptance, found)


def _sort_in(document: Document, read: _Read) -> None:
    content = document.content
    if ITERATION in document.text:
        read.logs.append(document)
    elif document.text:
        read.metrics.append(document)
    elif sglang.is_bench(content):
        read.runs.append(sglang.read_bench(document))
    elif vllm.is_bench(content):
        read.runs.append(vllm.read_bench(document))
    elif sglang.is_server_info(content):
        read.infos.append(document)
    elif has_records(content):
        read.records.append(document)
    elif not content.get("version"):
        raise ConfigError(
            f"{document.file} is no format that is known here; name results of `vllm bench serve`, "
            "bench_serving, AIPerf, /metrics, /server_info or responses"
        )


def _served(read: _Read, names: Names) -> Served:
    """Return whose files these are; raise ConfigError when they are of several."""
    runs = read.runs
    target = names.target or _only(runs, "target", "--target", "of one target model")
    draft = names.draft or _only(runs, "draft", "--draft", "of one draft")
    method = names.method or _only(runs, "method", "--draft", "of one way to draft")
    server = _only(runs, "server", "", "of one server") or "vllm"
    version = _only(runs, "version", "", "of one version of the server") or "unknown"
    gpu = names.gpu or _only(runs, "gpu", "--gpu", "of one GPU")
    for value, flag, what in ((gpu, "--gpu", "the GPU"), (target, "--target", "the target")):
        if not value:
            raise ConfigError(f"no file says {what}; pass {flag} with its name")
    content = {
        "server": server,
        "version": version,
        "gpu": gpu,
        "target": target,
        "draft": draft or method or "draft",
        "method": method or "draft_model",
        "flags": _only(runs, "flags", "", "of one set of the server's flags"),
        "weights": _only(runs, "weights", "", "of one model's weights"),
        "date": max((run.date for run in runs), default="") or "unknown",
    }
    return validate(content, Served, "what the files say of the server")


def _only(runs: Sequence[BenchRun], name: str, flag: str, what: str) -> str:
    """Return the one value that runs have; those that do not say count for nothing."""
    values = {str(getattr(run, name)) for run in runs} - {"", "unknown"}
    if len(values) > 1:
        shown = ", ".join(sorted(values)[:4])[:120]
        remedy = f"import them apart, or pass {flag}" if flag else "import them apart"
        raise ConfigError(f"files imported together must be {what}, got {shown}; {remedy}")
    return values.pop() if values else ""


def _require_one_context(runs: Sequence[BenchRun]) -> None:
    lengths = [run.context for run in runs]
    if lengths and max(lengths) > CONTEXT_RATIO * min(lengths):
        raise ConfigError(
            f"runs imported together must have about one length, got {min(lengths)} to "
            f"{max(lengths)} tokens; import each length apart, into another --data folder"
        )


def _numbered(runs: Sequence[BenchRun]) -> list[BenchRun]:
    """Return the runs with rounds: those that have none, or a taken one, get the next free one."""
    taken: dict[tuple[int, int], set[int]] = defaultdict(set)
    numbered = []
    for run in sorted(runs, key=lambda each: (each.round == 0, each.round, each.file)):
        rounds = taken[run.key]
        number = run.round if run.round and run.round not in rounds else len(rounds) + 1
        while number in rounds:
            number += 1
        rounds.add(number)
        numbered.append(replace(run, round=number))
    return numbered


def _table(served: Served, runs: Sequence[BenchRun], found: tuple[str, ...]) -> ServerTable | None:
    if not runs:
        return None
    by_key: dict[tuple[int, int], list[BenchRun]] = defaultdict(list)
    for run in runs:
        by_key[run.key].append(run)
    cells = [
        {
            "batch_size": size,
            "draft_tokens": tokens,
            "rounds": [run.round for run in members],
            "step_ms": [_rounded(run.step_ms) for run in members],
            "tokens_per_s": [_rounded(run.tokens_per_s) for run in members],
            "spread": _rounded(log_spread([run.step_ms for run in members])),
        }
        for (size, tokens), members in sorted(by_key.items())
    ]
    content = {
        "served": served,
        "context": round(median([float(run.context) for run in runs])),
        "derived": DERIVED[served.server],
        "findings": _short(found),
        "cells": cells,
    }
    return validate(content, ServerTable, "the server table of these files")


def _acceptance(
    served: Served,
    runs: Sequence[BenchRun],
    counted: Sequence[Accepted],
    found: tuple[str, ...],
    names: Names,
) -> ServerAcceptance | None:
    """Return the acceptance: of runs where they have one, of other counts for other Ks."""
    accepted = [
        {
            "draft_tokens": run.draft_tokens,
            "batch_size": run.batch_size,
            "round": run.round,
            "steps": run.steps,
            "accepted": min(run.accepted, run.steps * run.draft_tokens),
            "by_position": run.by_position,
        }
        for run in runs
        if run.steps
    ]
    known = {run.draft_tokens for run in runs if run.steps}
    accepted += [
        {
            "draft_tokens": each.draft_tokens,
            "batch_size": 1,
            "round": place + 1,
            "steps": each.steps,
            "accepted": each.accepted,
            "by_position": each.by_position,
        }
        for place, each in enumerate(counted)
        if not each.note and each.draft_tokens not in known
    ]
    if not accepted:
        return None
    if not names.dataset:
        raise ConfigError("acceptance belongs to a dataset, none was named; pass --dataset NAME")
    content = {
        "served": served,
        "dataset": names.dataset,
        "derived": COUNTED,
        "findings": _short(found),
        "runs": accepted,
    }
    return validate(content, ServerAcceptance, "the acceptance of these files")


def _short(found: Sequence[str]) -> tuple[str, ...]:
    return tuple(text[:480] for text in found[:200])


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
