"""Predicted against live: decode the same prompts with no, chain and tree speculation."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stree_autotune.cost import StepCost, load_table
from stree_autotune.live.rows import Heading, ValidationRow, print_rows, with_measured
from stree_autotune.live.speed import LiveSpeed, joined, live_speed, typical_context
from stree_autotune.probe import ProbeConfig, probe
from stree_autotune.store import (
    Library,
    PairRequest,
    ProgressBar,
    RuntimeTable,
    StepRule,
    Working,
    chat_warning,
    command_line,
    encode_prompts,
    open_profile_pair,
    open_prompts,
    print_json,
    utc_now,
    versions,
)
from stree_autotune.trace import RecordConfig, Trace, record_trace, walk
from stree_core.drafting import Pair, device_name, short_gpu_name
from stree_core.engine import (
    Engine,
    EngineConfig,
    Request,
    SamplingParams,
    SamplingSupport,
    StopRule,
    generate,
)
from stree_core.files import require_place, write_atomically
from stree_core.profile import Profile, load_own_profile, save_profile
from stree_core.tree import DEFAULT_TREE, OFF, Tree

logger = logging.getLogger(__name__)

RAGGED = Tree.from_paths(
    [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0, 0]]
)
"""Nine nodes with unequal numbers of children and leaves on every level."""

_CHAINS = (1, 2, 3, 4, 6, 8)
_STAGES = 3
_WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ValidateRequest:
    """What to decode, how much of it, and where the rows go."""

    profile_path: Path
    dataset: str
    prompts: str
    chat: bool
    batch_size: int
    limit: int | None
    max_new_tokens: int
    output: Path | None
    write: bool


@dataclass(frozen=True, slots=True)
class _Setting:
    """What all rows share."""

    pair: Pair
    requests: list[Request]
    trace: Trace
    support: SamplingSupport
    batch_size: int
    context: int


@dataclass(frozen=True, slots=True)
class _Stage:
    """A part of the prompts, decoded with every tree, and the times to predict it with."""

    table: RuntimeTable
    cost: StepCost
    runs: dict[Tree, LiveSpeed]


def run_validate(request: ValidateRequest, models: PairRequest, *, as_json: bool) -> None:
    """Print, and write where asked, predicted and live rows for a profile's pair."""
    for path in (request.output, request.profile_path if request.write else None):
        if path is not None:
            require_place(path)
    profile = load_own_profile(request.profile_path)
    with Working("loading the models"):
        pair = open_profile_pair(models, profile)
    warning = chat_warning(profile, chat=request.chat)
    if warning:
        logger.warning(warning)
    prompts = open_prompts(request.dataset, request.prompts, models.data, limit=request.limit)
    logger.info(prompts.describe(chat=request.chat))
    tokens = encode_prompts(pair, prompts, chat=request.chat)
    setting = _record(pair, tokens, profile, request)
    table = _known_table(setting, profile, models)
    parts = _parts(setting, table)
    with ProgressBar(len(parts) * len(_trees(profile, setting)), "runs") as progress:
        stages: list[_Stage] = []
        for part in parts:
            stages.append(_stage(setting, profile, part, table, len(stages), progress))
    rows = _rows(setting, profile, stages)
    print_rows(rows, Heading.of(pair, setting.trace.meta, stages[0].table))
    document = {
        "command": command_line(),
        "gpu": device_name(pair.device),
        "versions": versions(),
        "date": utc_now(),
        "dataset": request.dataset,
        "sampling": profile.sampling.label,
        "chat": request.chat,
        "num_prompts": len(prompts),
        "max_new_tokens": request.max_new_tokens,
        "runtime_table_date": stages[0].table.measured.date,
        "rows": [asdict(row) for row in rows],
    }
    if request.output is not None:
        write_atomically(request.output, (json.dumps(document, indent=1) + "\n").encode())
    if request.write:
        save_profile(with_measured(profile, rows, pair), request.profile_path)
    if as_json:
        print_json(document)


def _record(
    pair: Pair, prompts: list[list[int]], profile: Profile, request: ValidateRequest
) -> _Setting:
    """Record the trace of exactly these prompts, sampled as the profile says."""
    sampling = profile.sampling
    config = RecordConfig(
        request.dataset,
        sampling,
        max_new_tokens=request.max_new_tokens,
        chat=request.chat,
        depths=max(*_CHAINS, *(row.tree.build().depth for row in profile.policy)),
    )
    with ProgressBar(len(prompts), "trace") as progress:
        trace = record_trace(pair, prompts, config, progress)
    stop = StopRule(request.max_new_tokens, pair.target.shape.eos_token_ids)
    requests = [
        Request(prompt, stop, SamplingParams.of(sampling, seed))
        for seed, prompt in enumerate(prompts)
    ]
    support = SamplingSupport.of(sampling)
    return _Setting(pair, requests, trace, support, request.batch_size, profile.context)


def _known_table(setting: _Setting, profile: Profile, models: PairRequest) -> RuntimeTable | None:
    """Return the pair's table for exactly this GPU, dtype and context, None when there is none."""
    pair = setting.pair
    # A processor's name says little about its cores, their number and what else they are doing.
    if pair.device.type != "cuda":
        return None
    name = device_name(pair.device)
    library = Library.open(models.data, missing_ok=True)
    gpu = short_gpu_name(name, pair.device)
    path = library.measured_runtime(gpu, pair.target_ref.name, pair.draft_ref.name)
    if path is None:
        return None
    table = load_table(library, path)
    dtype = str(pair.target.dtype).removeprefix("torch.")
    if (table.gpu_name, table.dtype, table.context) != (name, dtype, profile.context):
        return None
    if setting.batch_size not in table.batch_sizes:
        return None
    logger.info("predicting with times measured on this GPU, %s", table.measured.date)
    return table


def _parts(setting: _Setting, table: RuntimeTable | None) -> list[list[Request]]:
    """Split the requests into stages: one with a known table, else a few that each probe anew.

    A machine that drifts between probing and decoding would look like an error of the prediction.
    """
    count = 1 if table is not None else min(_STAGES, len(setting.requests))
    return [setting.requests[first::count] for first in range(count)]


def _stage(
    setting: _Setting,
    profile: Profile,
    requests: list[Request],
    table: RuntimeTable | None,
    number: int,
    progress: ProgressBar,
) -> _Stage:
    """Probe when there is no table, then decode `requests` in every mode, as stage `number`."""
    if table is None:
        name = device_name(setting.pair.device)
        logger.info("probing %s at batch size %d to predict with", name, setting.batch_size)
        gpu = short_gpu_name(name, setting.pair.device)
        nodes = max(16, *(row.tree.build().num_nodes for row in profile.policy))
        sampled = setting.trace.meta.sampling.rule != "greedy"
        config = ProbeConfig(gpu, profile.context, (setting.batch_size,), nodes, sampled=sampled)
        *_, table = probe(setting.pair, config)
    trees, runs = _trees(profile, setting), {}
    for tree in trees:
        runs[tree] = _decode(setting, requests, tree)
        progress(number * len(trees) + len(runs))
    rule = StepRule.of(setting.trace.meta.sampling)
    prompts = [request.prompt for request in setting.requests]
    cost = StepCost.from_table(table, rule, typical_context(prompts, setting.trace))
    return _Stage(table, cost, runs)


def _fixed_modes(profile: Profile, setting: _Setting) -> dict[str, Tree]:
    """Return what is run whatever was measured: off, two chains, the tuned choice, two trees."""
    row = profile.row_for(setting.batch_size)
    modes = {OFF.kind: OFF, "chain 2": Tree.chain(2), "chain 4": Tree.chain(4)}
    modes[f"tuned {row.verdict}"] = row.tree.build()
    return modes | {"published tree": DEFAULT_TREE, "ragged tree": RAGGED}


def _trees(profile: Profile, setting: _Setting) -> list[Tree]:
    """Return every tree that a stage decodes with, once each."""
    trees = [*_fixed_modes(profile, setting).values(), *map(Tree.chain, _CHAINS)]
    return list(dict.fromkeys(trees))


def _decode(setting: _Setting, requests: list[Request], tree: Tree) -> LiveSpeed:
    config = EngineConfig(setting.batch_size, setting.context, sampling=setting.support)
    engine = Engine(setting.pair.target, setting.pair.draft, tree, config)
    first = [request.prompt for request in requests[: setting.batch_size]]
    generate(engine, first, StopRule(_WARM_UP_TOKENS))
    return live_speed(engine, requests)


def _rows(setting: _Setting, profile: Profile, stages: Sequence[_Stage]) -> list[ValidationRow]:
    """Return predicted against live, the best chain being the one that was fastest live."""
    runs = {tree: joined([stage.runs[tree] for stage in stages]) for tree in stages[0].runs}
    best = max(map(Tree.chain, _CHAINS), key=lambda chain: runs[chain].tokens_per_s)
    modes = _fixed_modes(profile, setting) | {f"best chain ({best.num_nodes})": best}
    reference = runs[OFF]
    return [
        _row(setting, name, tree, stages, runs[tree], reference) for name, tree in modes.items()
    ]


def _row(
    setting: _Setting,
    name: str,
    tree: Tree,
    stages: Sequence[_Stage],
    run: LiveSpeed,
    reference: LiveSpeed,
) -> ValidationRow:
    tokens_per_step = walk(setting.trace, tree).tokens_per_step
    step_ms = statistics.fmean(
        s.cost.step_ms(setting.batch_size, tree, tokens_per_step) for s in stages
    )
    pairs = zip(run.generations, reference.generations, strict=True)
    differing = sum(a.tokens != b.tokens for a, b in pairs)
    return ValidationRow(
        mode=name,
        nodes=tree.num_nodes,
        batch_size=setting.batch_size,
        predicted_tokens_per_step=tokens_per_step,
        live_tokens_per_step=run.tokens_per_step,
        predicted_step_ms=step_ms,
        live_step_ms=run.step_ms,
        predicted_tokens_per_s=1e3 * setting.batch_size * tokens_per_step / step_ms,
        live_tokens_per_s=run.tokens_per_s,
        timed_steps=run.num_calls,
        # Sampling asks other random questions with every tree.
        texts_differing_from_off=differing if setting.support.rule == "greedy" else None,
    )
