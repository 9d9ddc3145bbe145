"""Time whole forward passes of random models: all rows of a tree, from tokens to logits.

    python benchmarks/forward.py [--models NAME ...] [--quick] [--output FILE]
    python benchmarks/forward.py --table FILE

A pass replays the path that the step before accepted, runs the model on the tree's tokens and forms
fp32 logits of every row, as in a decoding step; drafting and acceptance are not part of it. A pass
of one token replays one row: plain decoding. The passes of several steps, as buffered rows gather
and are written to the states, are one CUDA graph. `weight_floor_ms` is what reading the weights
once takes at the bandwidth of a large copy, bytes read and written, measured in the same run; of
experts it counts those of one row.

Random routers choose about uniformly. A model with experts is also timed with routers of zeros, by
which all rows choose the same ones; `experts_read` counts the different ones of a pass and layer.

Rows of models that are not timed stay in FILE, with the date of their own run, where they are of
the same code and machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_shapes import (
    ACCEPTED_ROWS,
    PHASES,
    balanced_tree,
    model_shape,
    pending_phases,
    shape_names,
)
from gate import require_green
from report import RESULTS, Row, header, is_of_this_run, print_table, read, save, table
from timing import copy_bandwidth, time_calls

from stree_autotune.probe.timing import Effort
from stree_core.drafting.checkpoint import random_model
from stree_core.families import MoeShape
from stree_core.models.backend import load_backend
from stree_core.models.cache import Cache, CacheSize
from stree_core.models.model import Model
from stree_core.models.row_block import make_block
from stree_core.models.weights import MoeWeights

BATCHES = (1, 8, 32)
TOKENS = (1, 4, 8, 16, 32, 64, 128)
CONTEXTS = (1024, 16384)
ONE_SET = "one set"
ROUTINGS = ("random", ONE_SET)
EFFORT = Effort(min_rounds=9, max_rounds=20, seconds=0.25)
SHOWN = (
    "model", "batch", "context", "routing", "tokens", "ms", "weight_floor_ms", "over_floor",
    "over_one_token_ms", "experts_read",
)  # fmt: skip


def main() -> None:
    options = parse()
    if options.table is not None:
        print_table(options.table, SHOWN, functools.partial(is_chosen, options))
        return
    if not torch.cuda.is_available():
        raise SystemExit("passes are timed on a CUDA device, there is none; run this on a GPU")
    gate = require_green(skip=options.skip_gate)
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.inference_mode():
        bytes_per_s = copy_bandwidth(device)
        head = header(gate=gate, bytes_per_s=bytes_per_s)
        rows = rows_to_keep(options.output, head, options.models)
        backend = load_backend("triton", device)
        for name in options.models:
            shape = model_shape(name)
            model = random_model(shape, backend, torch.bfloat16, device)
            floor_ms = 1e3 * shape.weight_bytes(2) / bytes_per_s
            contexts = options.contexts if shape.has_attention else [0]
            for routing in ROUTINGS if has_experts(model) else (None,):
                if routing == ONE_SET:
                    choose_alike(model)
                for batch, context in ((b, c) for b in options.batches for c in contexts):
                    labels = {"model": name, "batch": batch}
                    labels |= {} if routing is None else {"routing": routing}
                    measured = measure(model, batch, context, options.tokens, floor_ms)
                    rows += [labels | row for row in measured]
                    torch.cuda.empty_cache()
                    # After every block of rows: a run that is cut short keeps what it has.
                    save(options.output, head, rows)
            del model
            torch.cuda.empty_cache()
    print(f"copy bandwidth {bytes_per_s / 1e12:.2f} TB/s, gate: {gate}")
    print(table(rows, SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time whole forward passes")
    parser.add_argument("--models", nargs="+", choices=shape_names(), default=shape_names())
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=list(CONTEXTS), help="models with attention only"
    )
    parser.add_argument("--quick", action="store_true", help="B 1 and 8, T 1, 4, 32, context 1k")
    parser.add_argument("--skip-gate", action="store_true", help="for development; is recorded")
    parser.add_argument("--output", "--out", type=Path, default=RESULTS / "forward-h200.json")
    parser.add_argument("--table", type=Path, help="print this result file as Markdown and stop")
    options = parser.parse_args()
    if options.quick:
        options.batches, options.tokens, options.contexts = [1, 8], [1, 4, 32], [1024]
    return options


def is_chosen(options: argparse.Namespace, row: Row) -> bool:
    """Say whether the flags ask for a row: a table may show fewer than a file has."""
    chosen_pass = row["batch"] in options.batches and row["tokens"] in options.tokens
    chosen_model = row["model"] in options.models
    return chosen_model and chosen_pass and row["context"] in (0, *options.contexts)


def rows_to_keep(path: Path, head: Row, models: Sequence[str]) -> list[Row]:
    """Return a results file's rows of other models, each with its run's date.

    None when they are of other code or of another machine.
    """
    if not is_of_this_run(path, head):
        return []
    document = read(path)
    return [
        {"date": document["date"], **row} for row in document["rows"] if row["model"] not in models
    ]


def has_experts(model: Model) -> bool:
    """Say whether a model's time depends on what its routers choose."""
    return any(isinstance(part.mixer, MoeShape) for part in model.shape.parts)


def choose_alike(model: Model) -> None:
    """Make every row choose the same experts: the first of equal scores."""
    for block in model.weights.blocks:
        for weights in block.parts:
            if isinstance(weights, MoeWeights):
                weights.router_ED.zero_()


def experts_read(model: Model, run: Callable[[int], torch.Tensor]) -> float:
    """Return how many different experts a layer of a pass reads, on average."""
    counts: list[int] = []
    backend = model.backend

    def counting(inputs: torch.Tensor, choice: torch.Tensor, *rest: Any, **more: Any) -> None:
        counts.append(len(choice.unique()))
        backend.expert_mlps(inputs, choice, *rest, **more)

    model.backend = dataclasses.replace(backend, expert_mlps=counting)
    run(0)
    model.backend = backend
    return sum(counts) / len(counts)


def measure(
    model: Model,
    batch: int,
    context: int,
    token_counts: Sequence[int],
    floor_ms: float,
    effort: Effort = EFFORT,
) -> list[Row]:
    """Return one row per number of tokens; all of them share a cache and take turns."""
    size = CacheSize(batch, max(token_counts), ACCEPTED_ROWS, context)
    cache = model.make_cache(size)
    cache.committed_B.fill_(context)
    passes = {str(tokens): make_pass(model, cache, batch, tokens) for tokens in token_counts}
    for tokens, run in passes.items():
        if not torch.isfinite(run(0)).all():
            raise SystemExit(f"logits of {tokens} tokens must be finite, they are not; run tests")
    timings = time_calls(passes, PHASES, model.device, effort)
    one_ms = timings["1"].us / 1e3 if "1" in timings else None
    rows = []
    for tokens, timing in timings.items():
        ms = timing.us / 1e3
        rows.append(
            {
                "tokens": int(tokens),
                "context": context,
                "ms": round(ms, 4),
                "spread": round(timing.spread, 4),
                "weight_floor_ms": round(floor_ms, 4),
                "over_floor": round(ms / floor_ms, 3),
                "over_one_token_ms": None if one_ms is None else round(ms - one_ms, 4),
            }
        )
        if has_experts(model):
            rows[-1]["experts_read"] = round(experts_read(model, passes[tokens]), 1)
    return rows


def make_pass(model: Model, cache: Cache, batch: int, tokens: int) -> Callable[[int], torch.Tensor]:
    """Return what runs one pass of a balanced tree, a path of the previous one pending."""
    device = model.device
    block = make_block(balanced_tree(tokens), model.conv_widths, device)
    generator = torch.Generator(device).manual_seed(tokens)
    inputs = torch.randint(
        model.shape.vocab_size, (tokens, batch), generator=generator, device=device
    )
    phases = pending_phases(tokens, batch, device)

    def run(call: int) -> torch.Tensor:
        cache.pending = phases[call % PHASES]
        hidden = model.forward(inputs, block, cache, first=0, commit=True)
        logits = model.logits(hidden)
        cache.flip()
        return logits

    return run


if __name__ == "__main__":
    main()
