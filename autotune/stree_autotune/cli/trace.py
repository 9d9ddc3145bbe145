"""The verb trace. Several processes share its work, each on a GPU of its own, when it runs as

    torchrun --nproc-per-node N -m stree_autotune trace --dataset gsm8k ...

with the flags of `stree-tune trace`. Each process takes every N-th batch; the last to finish writes
the trace, the same file as one process alone would write.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from stree_autotune.search import certify_file, describe, has_certificate
from stree_autotune.store import (
    PairRequest,
    ProgressBar,
    PromptSet,
    Working,
    check_name,
    data_folder,
    digits,
    encode_prompts,
    open_pair,
    open_sources,
    report,
    require_new,
    trace_file_name,
)
from stree_autotune.trace import (
    RELIABLE_PROMPTS,
    RecordConfig,
    Recording,
    Settings,
    Shard,
    Trace,
    TraceCheckpoint,
    current_shard,
    explained_writing,
    load_trace,
    make_meta,
    make_trace,
    record_prompts,
    save_trace,
    take_own_gpu,
)
from stree_core.drafting import Pair, device_name
from stree_core.errors import BackendUnavailable

logger = logging.getLogger(__name__)


def run_trace(
    request: PairRequest, config: RecordConfig, *, prompts: PromptSet, as_json: bool, force: bool
) -> None:
    """Record an acceptance trace, or go on with one, and write it where tuning looks first."""
    check_name(config.dataset, "dataset")
    target, draft = (source.name for source in open_sources(request))
    name = trace_file_name(target, draft, config.dataset, config.sampling.label)
    path = data_folder(request.data) / "traces" / name
    shard = current_shard()
    if shard.rank == 0:
        sys.stdout.write(f"{prompts.describe(chat=config.chat)}\n")
        sys.stdout.flush()
    trace = None if force else _uncertified(path, config, len(prompts))
    if trace is None:
        require_new(path, force=force)
        trace = _record(request, config, prompts, path, shard, force=force)
    if trace is None:
        return
    with Working("bounding what any tree can reach"):
        certificate = certify_file(path, logger.info)
    lines = [*_summary(trace, path), describe(certificate)]
    report("\n".join(lines), {"path": str(path), **trace.meta.statistics}, as_json)


def _uncertified(path: Path, config: RecordConfig, num_prompts: int) -> Trace | None:
    """Return the trace at `path` when it is this recording's and only its certificate is missing.

    So does a process leave it that is ended between the two.
    """
    if not path.is_file() or has_certificate(path):
        return None
    trace = load_trace(path)
    if not config.made(trace.meta, num_prompts):
        return None
    logger.info("%s is whole, but for its certificate", path)
    TraceCheckpoint(path, {}).remove()
    return trace


def _record(
    request: PairRequest,
    config: RecordConfig,
    prompts: PromptSet,
    path: Path,
    shard: Shard,
    *,
    force: bool,
) -> Trace | None:
    """Record this process's share; write and return the trace when all of it is there by then."""
    take_own_gpu(shard)
    with Working("loading the models"):
        pair = open_pair(request)
        tokens = encode_prompts(pair, prompts, chat=config.chat)
    parts = TraceCheckpoint(path, settings_of(pair, tokens, config))
    recordings = record_share(pair, tokens, config, parts, shard, force=force)
    if len(recordings) < len(tokens):
        logger.info("process %d of %d is done, others are not", shard.rank + 1, shard.count)
        return None
    trace = make_trace(pair, recordings, config)
    with explained_writing(path):
        save_trace(trace, path)
    parts.remove()
    return trace


def record_share(
    pair: Pair, prompts: list[list[int]], config: RecordConfig, parts: TraceCheckpoint, shard:
    Shard, *, force: bool,
) -> Mapping[int, Recording]:  # fmt: skip
    """Record this process's prompts that no part holds; return all that is recorded by then."""
    done = parts.begin(force=force)
    share = [i for i in range(len(prompts)) if shard.owns(i // config.num_slots)]
    wanted = {index for index in share if index not in done}
    num_done = len(share) - len(wanted)
    if num_done:
        logger.info("going on after %d of %d prompts", num_done, len(share))
    with (
        parts.appending(shard.rank) as append,
        ProgressBar(len(share), "prompts", num_done, quiet=shard.rank > 0) as progress,
    ):
        try:
            for index, recording in record_prompts(pair, prompts, config, wanted):
                append(index, recording)
                num_done += 1
                progress(num_done)
        except torch.AcceleratorError as err:
            raise BackendUnavailable(
                f"the device failed ({str(err).splitlines()[0]}); what was recorded is kept: run "
                "the same command again"
            ) from err
    return parts.begin(force=False)


def settings_of(pair: Pair, prompts: list[list[int]], config: RecordConfig) -> Settings:
    """Return what decides a recording, in words; a part with other settings does not fit it."""
    meta = make_meta(pair, config, len(prompts))
    return {
        "target": f"{meta.target.name} {meta.target.config_sha256[:12]}",
        "draft": f"{meta.draft.name} {meta.draft.config_sha256[:12]}",
        "tokenizer": (meta.target.tokenizer_sha256 or "")[:12],
        "weights": " ".join((ref.weights_sha256 or "")[:12] for ref in (meta.target, meta.draft)),
        "dataset": meta.dataset,
        "num_prompts": meta.num_prompts,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:12],
        "chat": meta.chat,
        "sampling": meta.sampling.label,
        "num_children": meta.num_children,
        "depths": meta.depths,
        "max_new_tokens": meta.max_new_tokens,
        "ignore_eos": meta.ignore_eos,
        "seed": meta.seed,
        "batch_size": config.num_slots,
        "dtype": meta.dtype,
        "backend": pair.target.backend.name,
        "device": device_name(pair.device),
    }


def _summary(trace: Trace, path: Path) -> list[str]:
    lines = [f"wrote {path}: {trace.num_positions:,} positions of {trace.num_prompts} prompts"]
    lines += [f"  {key.replace('_', ' ')}: {digits(n)}" for key, n in trace.meta.statistics.items()]
    if not trace.reliable:
        lines.append(f"  unreliable: a trace needs at least {RELIABLE_PROMPTS} prompts")
    return lines
