"""Predicted against live: decode the same prompts with no, chain and tree speculation."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from stree_autotune.library import Library
from stree_autotune.live import (
    PairRequest,
    open_pair,
    open_prompts,
    print_json,
    prompt_progress,
)
from stree_autotune.probe import ProbeConfig, probe
from stree_autotune.provenance import command_line, utc_now, versions
from stree_autotune.record import RecordConfig, record_trace
from stree_autotune.runtime_table import RuntimeTable, load_runtime_table
from stree_autotune.show import result_console
from stree_autotune.step_cost import StepCost
from stree_autotune.trace_file import Trace
from stree_autotune.trace_walk import walk
from stree_core.decode import Run, StopRule, generate
from stree_core.engine import Engine, EngineConfig
from stree_core.errors import StreeError
from stree_core.files import write_atomically
from stree_core.pair import Pair, device_name, require_profile_fits, short_gpu_name
from stree_core.profile import Measured, MeasuredBlock, Profile, load_profile, save_profile
from stree_core.tree import DEFAULT_TREE, Tree

logger = logging.getLogger(__name__)

RAGGED = Tree.from_paths(
    [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0, 0]]
)
"""Nine nodes with unequal numbers of children and leaves on every level."""

_CHAINS = range(1, 9)
_WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ValidateRequest:
    """What to decode, how much of it, and where the rows go."""

    profile_path: Path
    dataset: str
    prompts_file: Path | None
    batch_size: int
    limit: int | None
    max_new_tokens: int
    output: Path | None
    write: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One way of decoding: what was predicted of it and what it did. Errors are relative."""

    mode: str
    nodes: int
    batch_size: int
    predicted_tokens_per_step: float
    live_tokens_per_step: float
    predicted_step_ms: float
    live_step_ms: float
    predicted_tokens_per_s: float
    live_tokens_per_s: float
    texts_differing_from_off: int

    @property
    def error(self) -> float:
        """Relative error of the predicted tokens per second."""
        return self.predicted_tokens_per_s / self.live_tokens_per_s - 1


@dataclass(frozen=True, slots=True)
class _Setting:
    """What all rows share."""

    pair: Pair
    prompts: list[list[int]]
    trace: Trace
    cost: StepCost
    stop: StopRule
    batch_size: int
    context: int


def run_validate(request: ValidateRequest, models: PairRequest, *, as_json: bool) -> None:
    """Print, and write where asked, predicted and live rows for a profile's pair."""
    profile = load_profile(request.profile_path)
    models = PairRequest(profile.target.name, profile.draft.name, models.data, models.runtime)
    pair = open_pair(models)
    require_profile_fits(profile, pair)
    texts = open_prompts(request.dataset, request.prompts_file, models.data)[: request.limit]
    table = _table(pair, profile, models, request.batch_size)
    setting = _record(pair, pair.encode(texts), table, request)
    rows = _measure(setting, _modes(profile, setting))
    _print(rows, pair, table)
    document = {
        "command": command_line(),
        "gpu": device_name(pair.device),
        "versions": versions(),
        "date": utc_now(),
        "dataset": request.dataset,
        "num_prompts": len(texts),
        "max_new_tokens": request.max_new_tokens,
        "runtime_table_date": table.measured.date,
        "rows": [asdict(row) for row in rows],
    }
    if request.output is not None:
        write_atomically(request.output, (json.dumps(document, indent=1) + "\n").encode())
    if request.write:
        save_profile(_with_measured(profile, rows, pair), request.profile_path)
    if as_json:
        print_json(document)


def _table(pair: Pair, profile: Profile, models: PairRequest, batch_size: int) -> RuntimeTable:
    """Return this very device's table of the pair, probing now when there is none to trust."""
    name = device_name(pair.device)
    gpu = short_gpu_name(name, pair.device)
    # A processor's name says little about its cores, their number and what else they are doing.
    table = _known_table(pair, profile, models, gpu) if pair.device.type == "cuda" else None
    if table is not None and batch_size in table.batch_sizes:
        logger.info("predicting with times measured on this GPU, %s", table.measured.date)
        return table
    logger.info("probing %s at batch size %d to predict with", name, batch_size)
    nodes = max(16, *(row.tree.build().num_nodes for row in profile.policy))
    config = ProbeConfig(gpu, profile.context, (batch_size,), nodes)
    *_, table = probe(pair, config, logger.info)
    return table


def _known_table(
    pair: Pair, profile: Profile, models: PairRequest, gpu: str
) -> RuntimeTable | None:
    """Return the pair's table for exactly this GPU, dtype and context, None when there is none."""
    library = Library.open(models.data, missing_ok=True)
    try:
        found = library.find_runtime(gpu, pair.target_ref.name, pair.draft_ref.name)
    except StreeError as err:
        logger.info("%s", err)
        return None
    table = load_runtime_table(found.path)
    dtype = str(pair.target.dtype).removeprefix("torch.")
    wanted = (device_name(pair.device), dtype, profile.context)
    return table if (table.gpu_name, table.dtype, table.context) == wanted else None


def _record(
    pair: Pair, prompts: list[list[int]], table: RuntimeTable, request: ValidateRequest
) -> _Setting:
    """Record the trace of exactly these prompts."""
    config = RecordConfig(request.dataset, max_new_tokens=request.max_new_tokens)
    with prompt_progress(len(prompts), "trace") as advance:
        trace = record_trace(pair, prompts, config, advance)
    stop = StopRule(request.max_new_tokens, pair.target.shape.eos_token_ids)
    cost = StepCost.from_table(table)
    return _Setting(pair, prompts, trace, cost, stop, request.batch_size, table.context)


def _modes(profile: Profile, setting: _Setting) -> dict[str, Tree]:
    """Return what to run: off, chains, the best chain, the tuned choice, two fixed trees."""

    def tokens_per_ms(tree: Tree) -> float:
        step_ms = setting.cost.step_ms(setting.batch_size, tree)
        return walk(setting.trace, tree).tokens_per_step / step_ms

    best = max((Tree.chain(k) for k in _CHAINS), key=tokens_per_ms)
    row = profile.row_for(setting.batch_size)
    modes = {"off": Tree.chain(0), "chain 2": Tree.chain(2), "chain 4": Tree.chain(4)}
    modes[f"best chain ({best.num_nodes})"] = best
    modes[f"tuned {row.verdict}"] = row.tree.build()
    return modes | {"published tree": DEFAULT_TREE, "ragged tree": RAGGED}


def _measure(setting: _Setting, modes: dict[str, Tree]) -> list[Row]:
    """Run every mode; modes with the same tree are run once."""
    runs: dict[Tree, Run] = {}
    with prompt_progress(len(modes), "modes") as advance:
        for done, tree in enumerate(modes.values(), start=1):
            if tree not in runs:
                runs[tree] = _decode(setting, tree)
            advance(done)
    reference = runs[Tree.chain(0)]
    return [_row(setting, name, tree, runs[tree], reference) for name, tree in modes.items()]


def _decode(setting: _Setting, tree: Tree) -> Run:
    config = EngineConfig(setting.batch_size, setting.context)
    engine = Engine(setting.pair.target, setting.pair.draft, tree, config)
    warm_up = StopRule(_WARM_UP_TOKENS)
    generate(engine, setting.prompts[: setting.batch_size], warm_up)
    return generate(engine, setting.prompts, setting.stop)


def _row(setting: _Setting, name: str, tree: Tree, run: Run, reference: Run) -> Row:
    tokens_per_step = walk(setting.trace, tree).tokens_per_step
    step_ms = setting.cost.step_ms(setting.batch_size, tree)
    # With several slots a batch runs until its last sequence ends, so slots are not always full.
    occupancy = run.num_steps / max(1, run.num_engine_steps)
    pairs = zip(run.generations, reference.generations, strict=True)
    return Row(
        mode=name,
        nodes=tree.num_nodes,
        batch_size=setting.batch_size,
        predicted_tokens_per_step=tokens_per_step,
        live_tokens_per_step=run.tokens_per_step,
        predicted_step_ms=step_ms,
        live_step_ms=run.step_ms,
        predicted_tokens_per_s=1e3 * occupancy * tokens_per_step / step_ms,
        live_tokens_per_s=run.tokens_per_s,
        texts_differing_from_off=sum(a.tokens != b.tokens for a, b in pairs),
    )


def _print(rows: Sequence[Row], pair: Pair, table: RuntimeTable) -> None:
    console = result_console()
    console.print(
        f"{pair.target_ref.name} + {pair.draft_ref.name} on {device_name(pair.device)}, "
        f"batch size {rows[0].batch_size}; table of {table.measured.date}",
    )
    grid = Table(box=None, pad_edge=False)
    for title in ("mode", "nodes", "tokens/step", "live", "step ms", "live", "tokens/s", "live"):
        grid.add_column(title, justify="left" if title == "mode" else "right")
    grid.add_column("error", justify="right")
    for row in rows:
        grid.add_row(
            row.mode, str(row.nodes),
            f"{row.predicted_tokens_per_step:.3f}", f"{row.live_tokens_per_step:.3f}",
            f"{row.predicted_step_ms:.3f}", f"{row.live_step_ms:.3f}",
            f"{row.predicted_tokens_per_s:.0f}", f"{row.live_tokens_per_s:.0f}",
            f"{row.error:+.1%}",
        )  # fmt: skip
    console.print(grid)
    differing = max(row.texts_differing_from_off for row in rows)
    if differing:
        console.print(
            f"up to {differing} texts differ from decoding without speculation: rounding at "
            "near-ties, see docs/numerics.md",
        )


def _with_measured(profile: Profile, rows: Sequence[Row], pair: Pair) -> Profile:
    measured = tuple(
        Measured(
            batch_size=row.batch_size,
            mode=row.mode,
            tokens_per_step=float(f"{row.live_tokens_per_step:.6g}"),
            step_ms=float(f"{row.live_step_ms:.6g}"),
            tokens_per_s=float(f"{row.live_tokens_per_s:.6g}"),
        )
        for row in rows
    )
    block = MeasuredBlock(
        gpu=device_name(pair.device), date=utc_now(), versions=versions(), rows=measured
    )
    return profile.model_copy(update={"measured": block})
