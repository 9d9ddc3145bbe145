"""Time whole steps whose kernels prefer a split of L1 cache and shared memory, and with none.

    python benchmarks/shared_memory.py [--pairs NAME ...] [--batches B ...] [--output FILE]
    python benchmarks/shared_memory.py --table FILE

Every step is captured twice: as it ships (stree_kernels.launch.shared_memory), and with the
shared-memory carveout left to the driver. Both are run in turns: only the ratio of a row counts.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from report import RESULTS, Row, header, print_table, save, table
from traced_pair import PAIRS, open_named

from stree_autotune.probe.plan import even_tree
from stree_autotune.probe.stepper import SteadyEngine, Stepper, prompt_reader
from stree_autotune.probe.timing import Effort, time_interleaved
from stree_core.drafting.pair import Pair
from stree_core.engine.engine import EngineConfig
from stree_core.engine.sampling import SamplingParams
from stree_core.tree import Tree
from stree_kernels.launch import shared_memory

CONTEXT = 1024
EFFORT = Effort(min_rounds=5, max_rounds=7, seconds=0.3)
BY_DRIVER = -1
TREES = {"off": Tree.chain(0), "chain 1": Tree.chain(1), "tree 7": even_tree(7, 2)}
SHOWN = ("pair", "batch", "tree", "driver_ms", "preferred_ms", "ratio", "spread")


@contextmanager
def left_to_the_driver() -> Iterator[None]:
    """Let every kernel that is launched in here prefer nothing."""
    prefer = shared_memory._prefer
    shared_memory._prefer = lambda function, percent: prefer(function, BY_DRIVER)
    try:
        yield
    finally:
        shared_memory._prefer = prefer


MODES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "driver": left_to_the_driver,
    "preferred": nullcontext,
}


def main() -> None:
    options = parse()
    if options.table is not None:
        print_table(options.table, SHOWN, lambda row: True)
        return
    if not torch.cuda.is_available():
        raise SystemExit("the split is a GPU's, there is none; run this on a GPU")
    head, rows = header(), []
    for name in options.pairs:
        pair, _ = open_named(name, "cuda")
        settle = prompt_reader(pair.target)
        for batch in options.batches:
            for tree in TREES:
                rows.append({"pair": name, "batch": batch, "tree": tree})
                rows[-1] |= compared(pair, batch, TREES[tree], settle, MODES)
                # After every row: a run that is cut short keeps what it has.
                save(options.output, head, rows)
        del pair, settle
    print(table(rows, SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time preferred splits of L1 and shared memory")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 32])
    parser.add_argument("--output", type=Path, default=RESULTS / "shared-memory-h200.json")
    parser.add_argument("--table", type=Path, help="print this result file as Markdown and stop")
    return parser.parse_args()


def compared(
    pair: Pair, batch: int, tree: Tree, settle: Callable[[], None],
    modes: Mapping[str, Callable[[], AbstractContextManager[None]]],
) -> Row:  # fmt: skip
    """Return a step's ms in every mode, the last over the first, and the larger spread."""
    draft = pair.draft if tree.num_nodes else None
    config = EngineConfig(batch, CONTEXT)
    steppers = {}
    for mode, entered in modes.items():
        with entered():
            engine = SteadyEngine(pair.target, draft, [tree], config)
            steppers[mode] = Stepper(engine, SamplingParams())
    settle()
    works = {mode: stepper.step for mode, stepper in steppers.items()}
    timings = time_interleaved(works, pair.device, EFFORT, wall=True)
    first, *_, last = timings.values()
    row = {f"{mode}_ms": round(timing.ms, 4) for mode, timing in timings.items()}
    del works, steppers, engine
    gc.collect()
    torch.cuda.empty_cache()
    return row | {
        "ratio": round(last.ms / first.ms, 4),
        "spread": round(max(first.spread_ms / first.ms, last.spread_ms / last.ms), 4),
    }


if __name__ == "__main__":
    main()
