"""Time whole steps whose kernels prefer a split of L1 cache and shared memory, and with none.

    python benchmarks/shared_memory.py [--pairs NAME ...] [--batches B ...] [--output FILE]
    python benchmarks/shared_memory.py --table FILE

Every step is captured twice: as it ships (stree_kernels.launch.shared_memory), and with the
shared-memory carveout left to the driver. At batch size 1 it is captured with other carveouts of
the scan alone, too, and so are the scans of one layer after each other. All of a row are run in
turns: only its ratios count.
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from bench_shapes import LAYERS
from candidates import ours
from layer_data import make_inputs
from report import RESULTS, Row, header, print_table, save, table
from timing import num_calls, rotation, time_calls
from traced_pair import PAIRS, open_named

from stree_autotune.probe.plan import even_tree
from stree_autotune.probe.stepper import SteadyEngine, Stepper, prompt_reader
from stree_autotune.probe.timing import Effort, time_interleaved
from stree_core.drafting.pair import Pair
from stree_core.engine.engine import EngineConfig
from stree_core.engine.sampling import SamplingParams
from stree_core.tree import Tree
from stree_kernels.launch import shared_memory
from stree_kernels.ssm import tree_scan

CONTEXT = 1024
EFFORT = Effort(min_rounds=5, max_rounds=7, seconds=0.3)
BY_DRIVER = -1
TREES = {"off": Tree.chain(0), "chain 1": Tree.chain(1), "tree 7": even_tree(7, 2)}
SCAN_LAYER = "mamba2-2.7b"
SHOWN = ("pair", "batch", "tree", "driver_ms", "preferred_ms", "ratio", "scan_ratios", "spread")

Prefer = Callable[..., None]
Modes = Mapping[str, Callable[[], AbstractContextManager[None]]]


@contextmanager
def left_to_the_driver() -> Iterator[None]:
    """Let every kernel that is launched in here prefer nothing."""
    prefer = shared_memory._prefer
    shared_memory._prefer = lambda function, percent: prefer(function, BY_DRIVER)
    try:
        yield
    finally:
        shared_memory._prefer = prefer


@contextmanager
def scan_prefers(prefer: Prefer) -> Iterator[None]:
    """Let scans that are launched in here state their carveout by this function."""
    module: Any = tree_scan
    shipped = module.prefer_shared
    module.prefer_shared = prefer
    try:
        yield
    finally:
        module.prefer_shared = shipped


def _nothing(kernel: Any, device: torch.device, num_programs: int, *, streamed: bool) -> None:
    shared_memory._prefer(kernel.function, BY_DRIVER)


def _two_waves(kernel: Any, device: torch.device, num_programs: int, *, streamed: bool) -> None:
    shared_memory.prefer_shared(kernel, device, 2 * num_programs, streamed=streamed)


def _all(kernel: Any, device: torch.device, num_programs: int, *, streamed: bool) -> None:
    shared_memory._prefer(kernel.function, 100)


MODES: Modes = {"driver": left_to_the_driver, "preferred": nullcontext}
SCAN_MODES: Modes = {
    name: functools.partial(scan_prefers, prefer)
    for name, prefer in (("nothing", _nothing), ("two waves", _two_waves), ("all", _all))
}
"""What the scan alone may ask for instead of the room of one launch."""


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
                modes = {**MODES, **(SCAN_MODES if batch == 1 else {})}
                rows[-1] |= compared(pair, batch, TREES[tree], settle, modes)
                # After every row: a run that is cut short keeps what it has.
                save(options.output, head, rows)
        del pair, settle
    with torch.inference_mode():
        rows += [scans(tree) for tree in TREES]
    save(options.output, head, rows)
    print(table(rows, SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time preferred splits of L1 and shared memory")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 32])
    parser.add_argument("--output", type=Path, default=RESULTS / "shared-memory-h200.json")
    parser.add_argument("--table", type=Path, help="print this result file as Markdown and stop")
    return parser.parse_args()


def compared(pair: Pair, batch: int, tree: Tree, settle: Callable[[], None], modes: Modes) -> Row:
    """Return a step's ms in every mode, their ratios, and the largest spread."""
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
    del works, steppers, engine
    gc.collect()
    torch.cuda.empty_cache()
    spread = max(timing.spread_ms / timing.ms for timing in timings.values())
    return ratios({mode: timing.ms for mode, timing in timings.items()}, spread)


def scans(tree: str) -> Row:
    """Return the same of one layer's scan at batch size 1, of a tree's rows, after each other."""
    device = torch.device("cuda", torch.cuda.current_device())
    layer = LAYERS[SCAN_LAYER]
    inputs = make_inputs(
        layer, 1, 1 + TREES[tree].num_nodes, rotation(layer.state_bytes, device), device
    )
    candidate = ours(inputs, tree_scan.tree_scan)
    calls = num_calls(len(inputs.buffers), candidate.cycle)

    def launch(mode: Callable[[], AbstractContextManager[None]], call: int) -> None:
        with mode():
            candidate.launch(call)

    modes = {**MODES, **SCAN_MODES}
    works = {name: functools.partial(launch, mode) for name, mode in modes.items()}
    timings = time_calls(works, calls, device)
    spread = max(timing.spread for timing in timings.values())
    key = {"pair": f"scans of {SCAN_LAYER}", "batch": 1, "tree": tree}
    return key | ratios({name: 1e-3 * timing.us for name, timing in timings.items()}, spread)


def ratios(ms: Mapping[str, float], spread: float) -> Row:
    """Return what ships over what the driver chooses, and other scans over what ships."""
    shipped = ms["preferred"]
    return {
        **{f"{name}_ms": round(ms[name], 5) for name in MODES},
        "ratio": round(shipped / ms["driver"], 4),
        "scan_ratios": {name: round(ms[name] / shipped, 4) for name in SCAN_MODES if name in ms},
        "spread": round(spread, 4),
    }


if __name__ == "__main__":
    main()
