"""Predict how a target with an MTP head decodes, with the head and with a sibling; then decode.

    python benchmarks/mtp.py [--pairs demo demo-gdn qwen3.5-27b nemotron-3-nano-mtp]
                             [--drafts mtp demo-draft] [--batches 1 8 32] [--rules greedy mss]
                             [--data DIR] [--prompts N] [--tokens N] [--seconds S] [--output FILE]

A trained target (demo-gdn as well, with its head) decodes prompts of the demo set. Their acceptance
is recorded first, by depth for the head (stree_autotune.trace), and its walk predicts tokens per
step. A shape has random weights and accepts what the demo target's head does: its tokens per step
check the counting alone. Times are predicted by the draft's runtime table of this GPU where --data
has one; else a quick probe of the batch sizes at hand writes one there. The live side is that of
benchmarks/prediction.py: waves of prompts, all slots at work, modes in turns, in two halves where
memory does not hold the engines of all.

A block of rows (pair, draft, batch size, mode) replaces that of the same names in FILE; other rows
of the same code and machine stay. With --seconds, what is not begun by then is left out.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from report import RESULTS, Row, header, is_of_this_run, read, save, table
from traced_pair import traced_rules

from stree_autotune.cost.step_cost import StepCost
from stree_autotune.cost.table_cost import load_table
from stree_autotune.live.measure import prompt_for
from stree_autotune.live.rows import error_summary
from stree_autotune.live.speed import LiveSpeed, live_speed, typical_context
from stree_autotune.live.validation import RAGGED
from stree_autotune.probe.plan import ProbeConfig
from stree_autotune.probe.run import probe
from stree_autotune.store.library import Library
from stree_autotune.store.open_models import PairRequest, open_pair, open_prompts
from stree_autotune.store.runtime_table import save_runtime_table
from stree_autotune.store.step_rule import StepRule
from stree_autotune.trace.file import Trace
from stree_autotune.trace.record import RecordConfig, record_trace
from stree_autotune.trace.tree_walk import walk
from stree_core.drafting.pair import Pair, Runtime, device_name, short_gpu_name
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig, MakeRules
from stree_core.engine.request import Request
from stree_core.engine.rules import SamplingSupport
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.stop import StopRule
from stree_core.errors import NotEnoughMemory
from stree_core.models.source import MTP
from stree_core.profile import Sampling
from stree_core.tree import DEFAULT_TREE, OFF, Tree

DEMO = "demo"
TRAINED = {DEMO: "demo-target", "demo-gdn": "demo-gdn"}
"""Pairs with trained weights, and their targets; others are shapes."""
WIDE = Tree.from_paths([[i] for i in range(8)] + [[i, j] for i in range(4) for j in (0, 1)])
TREES = {
    OFF.label: OFF,
    **{f"chain {k}": Tree.chain(k) for k in (1, 2, 3, 5)},
    "published tree": DEFAULT_TREE,
    "ragged tree": RAGGED,
    "wide tree": WIDE,
}
CONTEXT, WARM_UP_TOKENS, FEWEST_PROMPTS = 1024, 16, 4
SHOWN = (
    "pair", "draft", "batch", "mode", "tree", "predicted_tokens_per_s", "live_tokens_per_s",
    "predicted_tokens_per_step", "live_tokens_per_step",
)  # fmt: skip
NAMES = ("pair", "draft", "batch", "mode")


@dataclass(frozen=True)
class Case:
    """A target with one of its drafts, what is decoded, and what predicts it."""

    name: str
    draft: str
    pair: Pair
    trace: Trace
    cost: StepCost
    requests: list[Request]
    support: SamplingSupport


def main() -> None:
    options = parse()
    start, rows = time.perf_counter(), []
    head = header(device=options.device)
    for name, draft in pairs_of(options):
        for case in cases(name, draft, options):
            for batch in options.batches:
                if time.perf_counter() - start > options.seconds:
                    print(f"left out: {name}, {draft}, {case.trace.meta.sampling.label}, {batch}")
                    continue
                rows += measure(case, batch, options.rounds)
                save_beside(options.output, head, rows)
            del case
            give_back()
    print(table(rows, SHOWN), end="")
    for quantity in ("tokens_per_s", "tokens_per_step"):
        errors = [row[f"predicted_{quantity}"] / row[f"live_{quantity}"] - 1 for row in rows]
        if errors:
            print(f"{quantity}: {error_summary(errors)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A target with its head and with a sibling")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--pairs", nargs="+", default=[DEMO], help="demo, demo-gdn, or shapes with a head"
    )
    parser.add_argument("--drafts", nargs="+", default=["mtp", "demo-draft"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rules", nargs="+", default=["greedy"], help="greedy, naive, mss")
    parser.add_argument("--prompts", type=int, default=64, help="recorded and decoded")
    parser.add_argument("--tokens", type=int, default=128, help="of every text, at most")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("stree-data"), help="tables, read first")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--output", type=Path, default=RESULTS / "mtp-h200.json")
    return parser.parse_args()


def pairs_of(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the pairs with their drafts: a sibling is the demo target's alone."""
    return [
        (name, draft)
        for name in options.pairs
        for draft in options.drafts
        if name == DEMO or draft == MTP
    ]


def save_beside(path: Path, head: Row, rows: Sequence[Row]) -> None:
    """Write rows beside those of a result file that are of other names."""
    known = read(path)["rows"] if is_of_this_run(path, head) else []
    mine = {tuple(row[key] for key in NAMES) for row in rows}
    # rows of older runs say nothing of a pair
    kept = [row for row in known if tuple(row.get(key) for key in NAMES) not in mine]
    save(path, head, [*kept, *rows])


def give_back() -> None:
    """Free the memory of engines, whose captured steps refer to them."""
    gc.collect()
    torch.cuda.empty_cache()


def cases(name: str, draft: str, options: argparse.Namespace) -> Iterator[Case]:
    """Yield a pair with every rule; a shape with greedy steps that accept what a trace says."""
    runtime = Runtime(options.device)
    demo = open_pair(PairRequest(TRAINED.get(name, TRAINED[DEMO]), draft, (), runtime))
    prompts = demo.encode(open_prompts(DEMO).texts[: options.prompts])
    for rule in options.rules:
        sampling = Sampling(rule=rule, temperature=0.0 if rule == "greedy" else 1.0)
        config = RecordConfig(DEMO, sampling, max_new_tokens=options.tokens, num_slots=32)
        trace = record_trace(demo, prompts, config)
        if name in TRAINED:
            yield demo_case(name, demo, draft, trace, prompts, options)
        elif rule == "greedy":
            pair = open_pair(PairRequest(name, draft, (), runtime, shapes=True))
            yield shape_case(name, draft, pair, trace, options)


def demo_case(
    name: str, pair: Pair, draft: str, trace: Trace, prompts: list[list[int]],
    options: argparse.Namespace,
) -> Case:  # fmt: skip
    sampling = trace.meta.sampling
    stop = StopRule(options.tokens, pair.target.shape.eos_token_ids)
    requests = [
        # seeds that the trace did not have
        Request(prompt, stop, SamplingParams(sampling.temperature, seed=1000 + number))
        for number, prompt in enumerate(prompts)
    ]
    cost = step_cost(pair, trace, typical_context(prompts, trace), options)
    return Case(name, draft, pair, trace, cost, requests, SamplingSupport(sampling.rule))


def shape_case(
    name: str, draft: str, pair: Pair, trace: Trace, options: argparse.Namespace
) -> Case:
    lengths = np.diff(trace.offsets).tolist()
    # The first token is none of the trace's positions.
    requests = [
        Request(prompt_for(index), StopRule(length + 1))
        for index, length in enumerate(lengths)
        if length
    ]
    cost = step_cost(pair, trace, typical_context([prompt_for(0)], trace), options)
    return Case(name, draft, pair, trace, cost, requests, SamplingSupport())


def step_cost(pair: Pair, trace: Trace, context: int, options: argparse.Namespace) -> StepCost:
    """Return the cost of steps by a known table, or by a quick probe that writes one."""
    full_name = device_name(pair.device)
    gpu = short_gpu_name(full_name, pair.device)
    names = (pair.target_ref.name, pair.draft_ref.name)
    library = Library.open((options.data,), missing_ok=True)
    path = library.measured_runtime(gpu, *names)
    if path is None:
        sampled = options.rules != ["greedy"]
        nodes = max(tree.num_nodes for tree in TREES.values())
        config = ProbeConfig(gpu, CONTEXT, tuple(options.batches), nodes, sampled=sampled)
        *_, found = probe(pair, config, print)
        path = options.data / "runtime" / f"{'--'.join((gpu, *names))}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_runtime_table(found, path)
    print(f"times of {path}")
    return StepCost.from_table(load_table(library, path), StepRule.of(trace.meta.sampling), context)


def measure(case: Case, batch: int, rounds: int) -> list[Row]:
    """Return a row for each tree at one batch size, timed in turns."""
    rules = None if case.name in TRAINED else traced_rules(case.pair, case.trace, batch)
    runs = timed(case, batch, rounds, list(TREES), rules)
    return [row(case, batch, name, runs[name]) for name in TREES]


def timed(
    case: Case, batch: int, rounds: int, names: Sequence[str], rules: MakeRules | None
) -> dict[str, list[LiveSpeed]]:
    """Return the runs of trees in turns; those of one half after the other where memory ends."""
    try:
        return in_turns(case, batch, rounds, names, rules)
    except NotEnoughMemory:
        if len(names) == 1:
            raise
    give_back()
    half = len(names) // 2
    first, second = (
        timed(case, batch, rounds, some, rules) for some in (names[:half], names[half:])
    )
    return first | second


def in_turns(
    case: Case, batch: int, rounds: int, names: Sequence[str], rules: MakeRules | None
) -> dict[str, list[LiveSpeed]]:
    """Decode with an engine of each tree in turns; raises NotEnoughMemory where they do not fit."""
    config = EngineConfig(batch, CONTEXT, sampling=case.support)
    target, draft = case.pair.target, case.pair.draft
    engines = {name: Engine(target, draft, TREES[name], config, rules=rules) for name in names}
    for engine in engines.values():
        warm_up = [request.prompt for request in case.requests[:batch]]
        generate(engine, warm_up, StopRule(WARM_UP_TOKENS))
    # A whole number of waves, so that slots are at work.
    limit = len(case.requests) if case.name in TRAINED else max(FEWEST_PROMPTS, batch)
    chosen = case.requests[: max(batch, limit // batch * batch)]
    runs: dict[str, list[LiveSpeed]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, engine in engines.items():
            runs[name].append(live_speed(engine, chosen))
    return runs


def row(case: Case, batch: int, name: str, runs: Sequence[LiveSpeed]) -> Row:
    tree, sampling = TREES[name], case.trace.meta.sampling
    prompts = np.flatnonzero(np.diff(case.trace.offsets))[: len(runs[0].generations)]
    if case.name in TRAINED:
        prompts = np.arange(len(runs[0].generations))
    tokens_per_step = walk(case.trace, tree, prompts).tokens_per_step
    step_ms = case.cost.step_ms(batch, tree, tokens_per_step)
    live_ms = statistics.median(run.step_ms for run in runs)
    live = statistics.fmean(run.tokens_per_step for run in runs)
    return {
        "pair": case.name,
        "draft": case.draft,
        "batch": batch,
        "mode": "greedy" if sampling.rule == "greedy" else f"{sampling.rule}, T = 1",
        "tree": name,
        "predicted_tokens_per_s": round(1e3 * batch * tokens_per_step / step_ms, 1),
        "live_tokens_per_s": round(1e3 * batch * live / live_ms, 1),
        "predicted_tokens_per_step": round(tokens_per_step, 4),
        "live_tokens_per_step": round(live, 4),
        "predicted_step_ms": round(step_ms, 4),
        "live_step_ms": round(live_ms, 4),
        "prompts": len(runs[0].generations),
    }


if __name__ == "__main__":
    main()
