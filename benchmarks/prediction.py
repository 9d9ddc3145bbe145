"""Predict how fast trees decode, then decode with them.

    python benchmarks/prediction.py [--pairs demo mamba2-2.7b mamba-in-llama-8b]
                                    [--batches 1 8 32] [--data DIR] [--output FILE]
    python benchmarks/prediction.py --again FILE [--data DIR]
    python benchmarks/prediction.py --table FILE [--figure FILE]

Predictions come from what tuning reads: the pair's runtime table of this machine's device and a
trace, through StepCost and walk. The live side decodes the prompts of that trace and times its
steps with all slots at work (stree_autotune.live.speed), in several rounds of all modes in turns.
The demo pair decodes its own prompts; the trace is the one that ships, recorded at another time and
batch size. Pairs of shapes accept what a trace says (traced_pair.py), so that their tokens per step
check the counting alone. Trees are grown from the shares of the trace's ranks and are none of those
that the probe times. Rows that FILE has of other pairs are kept where they are of the same code and
machine. `--again` predicts a file's rows with the model as it is now and runs nothing; `--table`
prints it and draws it.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prediction_table import SHOWN, show, shown, summary
from report import RESULTS, Row, command_line, header, is_of_this_run, read, save, table
from traced_pair import DEMO, DRAFTS, PAIRS, open_named, traced_rules

from stree_autotune.cost.step_cost import StepCost
from stree_autotune.cost.table_cost import load_table
from stree_autotune.live.measure import prompt_for
from stree_autotune.live.speed import LiveSpeed, live_speed, typical_context
from stree_autotune.store.library import Library
from stree_autotune.store.open_models import open_prompts
from stree_autotune.store.origin import utc_now
from stree_autotune.store.runtime_table import RuntimeTable
from stree_autotune.trace.file import Trace, load_trace
from stree_autotune.trace.tree_walk import walk
from stree_core.drafting.pair import Pair, device_name, short_gpu_name
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig, needed_positions
from stree_core.engine.request import Request
from stree_core.engine.stop import StopRule
from stree_core.errors import MissingMeasurement
from stree_core.tree import Tree

CHAINS = (1, 2, 5)
SIZES = (4, 8, 16, 32, 64)
DEEPEST = 8
DEMO_PROMPTS = 64
FEWEST_PROMPTS = 4
WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Case:
    """A pair, the trace that says what it accepts, and whether it does so by itself.

    `positions` are those of a slot in the runtime table that `cost` is of.
    """

    name: str
    pair: Pair
    trace: Trace
    accepts_by_itself: bool
    cost: StepCost
    positions: int


def main() -> None:
    options = parse()
    if options.table is not None:
        show(options.table, options.figure)
        return
    if options.again is not None:
        document = predicted_again(read(options.again), options.data)
        save(options.again, document, document.pop("rows"))
        return
    head = header(device=options.device)
    rows: list[Row] = []
    for name in options.pairs:
        start = time.perf_counter()
        case, source = open_case(name, options.device, options.data)
        head.setdefault("sources", {})[name] = source
        for batch in options.batches:
            rows += measure(case, batch, options)
            # After every block of rows: a run that is cut short keeps what it has.
            save_beside(options.output, head, rows)
            give_back()
        del case
        give_back()
        print(f"{name}: {time.perf_counter() - start:.0f} s")
    print(table(shown(rows), SHOWN), end="")
    print(summary(rows))


def save_beside(path: Path, head: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write rows beside those that a result file has of other pairs, each pair with its source."""
    known = read(path) if is_of_this_run(path, head) else {"sources": {}, "rows": []}
    mine = {row["pair"] for row in rows}
    both = [row for row in known["rows"] if row["pair"] not in mine] + list(rows)
    both.sort(key=lambda row: PAIRS.index(row["pair"]))
    save(path, head | {"sources": known["sources"] | head["sources"]}, both)


def give_back() -> None:
    """Free the memory of engines, whose captured steps refer to them."""
    gc.collect()
    torch.cuda.empty_cache()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Predict and time decoding")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="nodes of trees")
    parser.add_argument("--prompts", type=int, default=DEMO_PROMPTS, help="of the demo pair")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="own tables and traces")
    parser.add_argument("--output", type=Path, default=RESULTS / "prediction-h200.json")
    parser.add_argument("--again", type=Path, help="predict the rows of this result file and stop")
    parser.add_argument("--table", type=Path, help="print this result file as Markdown and stop")
    parser.add_argument("--figure", type=Path, help="with --table: draw it, .svg or .png")
    return parser.parse_args()


def open_case(name: str, device: str, data: Sequence[Path]) -> tuple[Case, dict[str, Any]]:
    """Return a pair with what predicts it, and where the predictions come from."""
    pair, trace = open_named(name, device, data)
    accepts_by_itself = trace is None
    gpu = short_gpu_name(device_name(pair.device), pair.device)
    if trace is None:
        trace = demo_trace(data)
    prompts = pair.encode(open_prompts("demo").texts) if accepts_by_itself else [prompt_for(0)]
    context = typical_context(prompts, trace)
    label, runtime = find_table(name, gpu, data)
    cost = StepCost.from_table(runtime, context=context)
    source = {
        "runtime_table": label,
        "runtime_date": runtime.measured.date,
        "runtime_gpu": runtime.gpu_name,
        "runtime_context": runtime.context,
        "context": context,
        "trace": f"{trace.meta.dataset} of {trace.meta.target.name}, {trace.meta.dtype}",
        "acceptance": "its own" if accepts_by_itself else "taken from the trace",
        "num_prompts": trace.num_prompts,
        "command": command_line(),
    }
    return Case(name, pair, trace, accepts_by_itself, cost, runtime.context), source


def demo_trace(data: Sequence[Path]) -> Trace:
    """Return what the demo pair accepted of its own prompts."""
    return load_trace(Library.open(data).find_trace(*DEMO, "demo"))


def find_table(name: str, gpu: str, data: Sequence[Path]) -> tuple[str, RuntimeTable]:
    """Return a pair's runtime table, and the name to record it under."""
    library = Library.open(data)
    names = DEMO if name == "demo" else (name, DRAFTS[name])
    path = library.measured_runtime(gpu, *names)
    if path is None:
        raise MissingMeasurement(f"no runtime table of {names} is there for {gpu}; probe it")
    return library.label(path), load_table(library, path)


def predicted_again(document: dict[str, Any], data: Sequence[Path]) -> dict[str, Any]:
    """Return a result file with what its tables and the model as it is now predict."""
    gpu = short_gpu_name(document["gpu"], torch.device("cuda"))
    rows = []
    for name, source in document["sources"].items():
        _, runtime = find_table(name, gpu, data)
        cost = StepCost.from_table(runtime, context=source["context"])
        for row in (row for row in document["rows"] if row["pair"] == name):
            tree = Tree.from_paths(row["tree"])
            tokens_per_step = row["predicted_tokens_per_step"]
            rows.append(row | predicted(cost, row["batch"], tree, tokens_per_step))
    rows.sort(key=lambda row: PAIRS.index(row["pair"]))
    return document | {"rows": rows, "predicted": {"date": utc_now()}}


def predicted(cost: StepCost, batch: int, tree: Tree, tokens_per_step: float) -> Row:
    """Return what a row says of the prediction."""
    step_ms = cost.step_ms(batch, tree, tokens_per_step)
    return {
        "predicted_tokens_per_s": round(1e3 * batch * tokens_per_step / step_ms, 1),
        "predicted_tokens_per_step": round(tokens_per_step, 4),
        "predicted_step_ms": round(step_ms, 4),
    }


def modes(trace: Trace, sizes: Sequence[int]) -> dict[str, Tree]:
    """Return what is compared: off, chains, trees."""
    chains = {f"chain {k}": Tree.chain(k) for k in CHAINS}
    trees = {f"tree {size}": likely_tree(trace, size) for size in sizes}
    return {"off": Tree.chain(0)} | chains | trees


def likely_tree(trace: Trace, num_nodes: int) -> Tree:
    """Return the likeliest paths if ranks were independent, at most DEEPEST deep."""
    counts = np.bincount(trace.ranks, minlength=256)[: trace.meta.num_children]
    shares = np.minimum.accumulate(counts / max(1, trace.num_positions))
    paths: list[tuple[int, ...]] = []
    heap: list[tuple[float, tuple[int, ...]]] = [(-float(shares[0]), (0,))]
    while len(paths) < num_nodes:
        weight, path = heapq.heappop(heap)
        paths.append(path)
        if path[-1] + 1 < len(shares) and shares[path[-1]] > 0:
            ratio = float(shares[path[-1] + 1] / shares[path[-1]])
            heapq.heappush(heap, (weight * ratio, (*path[:-1], path[-1] + 1)))
        if len(path) < DEEPEST:
            heapq.heappush(heap, (weight * float(shares[0]), (*path, 0)))
    return Tree.from_paths(paths)


def measure(case: Case, batch: int, options: argparse.Namespace) -> list[Row]:
    """Return a row for each mode of one batch size, timed in turns."""
    chosen = chosen_prompts(case, batch, options.prompts)
    requests = requests_of(case, chosen)
    trees = modes(case.trace, options.sizes)
    needed = [
        needed_positions(len(request.prompt), request.stop.max_new_tokens, list(trees.values()))
        for request in requests
    ]
    # Kernels cut their work by the positions that a slot has, filled or not.
    room = max(case.positions, *needed)
    config, rules = EngineConfig(batch, room), None
    if not case.accepts_by_itself:
        # One script for all engines: they decode in turns.
        rules = traced_rules(case.pair, case.trace, batch)
    engines = {
        mode: Engine(case.pair.target, case.pair.draft, tree, config, rules=rules)
        for mode, tree in trees.items()
    }
    for engine in engines.values():
        generate(engine, [r.prompt for r in requests[:batch]], StopRule(WARM_UP_TOKENS))
    rounds = [
        {mode: live_speed(engine, requests) for mode, engine in engines.items()}
        for _ in range(options.rounds)
    ]
    return [
        make_row(case, batch, mode, tree, chosen, [speeds[mode] for speeds in rounds])
        for mode, tree in trees.items()
    ]


def chosen_prompts(case: Case, batch: int, num_demo_prompts: int) -> list[int]:
    """Return which prompts of the trace are decoded, prompts without a step left out."""
    wanted = num_demo_prompts if case.accepts_by_itself else max(FEWEST_PROMPTS, batch)
    lengths = np.diff(case.trace.offsets)
    return [int(index) for index in np.flatnonzero(lengths > 0)[:wanted]]


def requests_of(case: Case, chosen: Sequence[int]) -> list[Request]:
    """Return the requests whose texts the trace recorded."""
    if case.accepts_by_itself:
        texts = open_prompts("demo").texts
        stop = StopRule(case.trace.meta.max_new_tokens, case.pair.target.shape.eos_token_ids)
        prompts = case.pair.encode([texts[index] for index in chosen])
        return [Request(prompt, stop) for prompt in prompts]
    lengths = np.diff(case.trace.offsets).tolist()
    # The first token is none of the trace's positions.
    return [Request(prompt_for(index), StopRule(lengths[index] + 1)) for index in chosen]


def make_row(
    case: Case, batch: int, mode: str, tree: Tree, chosen: Sequence[int],
    speeds: Sequence[LiveSpeed],
) -> Row:  # fmt: skip
    tokens_per_step = walk(case.trace, tree, np.array(chosen)).tokens_per_step
    rates = [speed.tokens_per_s for speed in speeds]
    rate = statistics.median(rates)
    return {
        "pair": case.name,
        "batch": batch,
        "mode": mode,
        "tree": [list(path) for path in tree.paths],
        **predicted(case.cost, batch, tree, tokens_per_step),
        "live_tokens_per_s": round(rate, 1),
        "live_tokens_per_step": round(speeds[0].tokens_per_step, 4),
        "live_step_ms": round(statistics.median(speed.step_ms for speed in speeds), 4),
        "num_prompts": len(chosen),
        "timed_steps": sum(speed.num_calls for speed in speeds),
        "live_spread": round(statistics.pstdev(rates) / rate, 4),
    }


if __name__ == "__main__":
    main()
