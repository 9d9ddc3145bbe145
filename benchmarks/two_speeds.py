"""Look for two speeds of one captured step: engines captured anew, and what may run in between.

    python benchmarks/two_speeds.py [--batch B] [--engines N] [--rounds N] [--output FILE]
    python benchmarks/two_speeds.py --table FILE

Steps of one engine are timed behind each of several events (a prompt, an eager pass, new memory,
another capture, another tree), in turns; then the same on engines captured anew. A row has the
median of all blocks of steps behind an event, the fastest and the slowest block, and the medians of
the engines: a second speed shows as blocks, events or engines that differ by percents.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from report import RESULTS, Row, header, print_table, save, table
from traced_pair import open_named

from stree_autotune.probe.plan import even_tree
from stree_autotune.probe.stepper import SteadyEngine, Stepper, prompt_reader
from stree_core.drafting import Prefill, PromptPart
from stree_core.drafting.pair import Pair
from stree_core.engine.engine import EngineConfig
from stree_core.engine.sampling import SamplingParams
from stree_core.models import CacheSize, Model
from stree_core.tree import Tree

CONTEXT = 1024
PAIR = "mamba2-2.7b"
TREES = {"chain 1": Tree.chain(1), "tree 7": even_tree(7, 2), "tree 15": even_tree(15, 4)}
SETTLING_STEPS, STEPS = 4, 68
NEW_BYTES = 1 << 28
PROMPT = (1,) * 65
SHOWN = ("pair", "batch", "tree", "event", "blocks", "ms", "fastest", "slowest", "engines")

Event = Callable[[], object]


def main() -> None:
    options = parse()
    if options.table is not None:
        print_table(options.table, SHOWN, lambda row: True)
        return
    if not torch.cuda.is_available():
        raise SystemExit("captured steps are a GPU's, there is none; run this on a GPU")
    head = header()
    pair, _ = open_named(PAIR, "cuda")
    order = random.Random(0)
    found: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for _ in range(options.engines):
        for key, blocks in of_engine(pair, options.batch, options.rounds, order).items():
            found[key].append(blocks)
    rows = [row_of(options.batch, *key, engines) for key, engines in found.items()]
    save(options.output, head, rows)
    print(table(rows, SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Look for two speeds of one captured step")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--engines", type=int, default=4, help="each captured anew")
    parser.add_argument("--rounds", type=int, default=5, help="over all events, for each engine")
    parser.add_argument("--output", type=Path, default=RESULTS / "two-speeds-h200.json")
    parser.add_argument("--table", type=Path, help="print this result file as Markdown and stop")
    return parser.parse_args()


def of_engine(
    pair: Pair, batch: int, rounds: int, order: random.Random
) -> Mapping[tuple[str, str], list[float]]:
    """Return the ms of a step, for each tree and event, of one engine captured for it."""
    config = EngineConfig(batch, CONTEXT)
    engine = SteadyEngine(pair.target, pair.draft, list(TREES.values()), config)
    stepper = Stepper(engine, SamplingParams())
    events = make_events(pair, config, stepper)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(rounds):
        turns = [(which, name) for which in range(len(TREES)) for name in events]
        for which, name in order.sample(turns, len(turns)):
            steps(stepper, which, SETTLING_STEPS)
            events[name]()
            ms = steps(stepper, which, STEPS)
            found[list(TREES)[which], name].append(ms)
    del stepper, engine, events
    gc.collect()
    torch.cuda.empty_cache()
    return found


def make_events(pair: Pair, config: EngineConfig, stepper: Stepper) -> dict[str, Event]:
    """Return what runs before a block of steps, by name."""

    def nothing() -> None:
        pass

    def new_memory() -> None:
        torch.empty(NEW_BYTES, dtype=torch.uint8, device=pair.device).fill_(1)
        torch.cuda.empty_cache()

    def other_capture() -> None:
        SteadyEngine(pair.target, None, [Tree.chain(0)], config)
        gc.collect()

    def other_trees() -> None:
        for which in range(len(TREES)):
            steps(stepper, which, SETTLING_STEPS)

    def rest() -> None:
        torch.cuda.synchronize()
        time.sleep(0.3)

    return {
        "nothing": nothing, "prompt": prompt_reader(pair.target),
        "eager pass": eager_reader(pair.target), "new memory": new_memory,
        "other capture": other_capture, "other trees": other_trees, "rest": rest,
    }  # fmt: skip


def eager_reader(model: Model) -> Event:
    """Return what consumes a prompt kernel by kernel."""
    cache = model.make_cache(CacheSize(1, 1, 1, len(PROMPT)))
    prefill, part = Prefill(model, cache, use_graph=False), PromptPart(0, PROMPT, 0, len(PROMPT))

    def consume() -> None:
        with torch.inference_mode():
            prefill.read([part])

    return consume


def steps(stepper: Stepper, which: int, count: int) -> float:
    """Run steps with a tree and return the ms of one."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        stepper.step(which)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / count


def row_of(batch: int, tree: str, event: str, engines: list[list[float]]) -> Row:
    """Return the row of a tree and an event from the blocks of each engine."""
    blocks = [ms for engine in engines for ms in engine]
    return {
        "pair": PAIR, "batch": batch, "tree": tree, "event": event, "blocks": len(blocks),
        "ms": round(statistics.median(blocks), 4), "fastest": round(min(blocks), 4),
        "slowest": round(max(blocks), 4),
        "engines": [round(statistics.median(engine), 4) for engine in engines],
    }  # fmt: skip


if __name__ == "__main__":
    main()
