"""Time whole forward passes with weights in bf16 and in FP8, side by side.

    python benchmarks/fp8.py [--models NAME ...] [--batches B ...] [--output FILE]
    python benchmarks/fp8.py --table FILE

Weights are random, in FP8 by blocks of 128 x 128; a pass is as in `forward.py`. `weight_floor_ms`
is what reading the weights as they are stored takes at the bandwidth of a large copy. `over_bf16`
is a pass's time over that of the same pass in bf16. `errors` compares projections by the kernels
with float64 of the same codes and scales: the relative root mean square over all outputs.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from bench_shapes import model_shape, shape_names
from forward import measure
from gate import require_green
from report import RESULTS, Row, header, print_table, save, table
from timing import copy_bandwidth

from stree_autotune.probe.timing import Effort
from stree_core.drafting.checkpoint import random_model
from stree_core.families.registry import in_fp8
from stree_core.fp8 import Fp8Scheme
from stree_core.models.backend import load_backend
from stree_kernels.fp8 import projection, projection_ref
from stree_kernels.fp8.scaled_weight import random_scaled
from stree_kernels.linear.deferred_norm import DeferredNorm

MODELS = ("mamba-in-llama-8b", "qwen3.5-27b")
BATCHES = (1, 8)
TOKENS = (1, 2, 8, 16)
CONTEXT = 1024
EFFORT = Effort(min_rounds=5, max_rounds=12, seconds=0.15)
SHOWN = ("model", "weights", "batch", "tokens", "ms", "weight_floor_ms", "over_floor", "over_bf16")
SIZES = ((10272, 4096), (4096, 14336))
ROWS = (1, 2, 8, 16, 64, 128)
SCHEME = Fp8Scheme("fp8-block", "a benchmark")


def main() -> None:
    options = parse()
    if options.table is not None:
        print_table(options.table, SHOWN, lambda row: True)
        return
    if not torch.cuda.is_available():
        raise SystemExit("passes are timed on a CUDA device, there is none; run this on a GPU")
    gate = require_green(skip=options.skip_gate)
    device = torch.device("cuda", torch.cuda.current_device())
    rows: list[Row] = []
    with torch.inference_mode():
        bytes_per_s = copy_bandwidth(device)
        head = header(gate=gate, bytes_per_s=bytes_per_s) | {"errors": errors(device)}
        for name in options.models:
            for weights in ("bf16", SCHEME.kind):
                for measured in passes(name, weights, options.batches, device, bytes_per_s):
                    rows += measured
                    # After every block of rows: a run that is cut short keeps what it has.
                    save(options.output, head, beside_bf16(rows))
    print(f"copy bandwidth {bytes_per_s / 1e12:.2f} TB/s, gate: {gate}")
    for error in head["errors"]:
        print(error)
    print(table(beside_bf16(rows), SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time forward passes in bf16 and FP8")
    parser.add_argument("--models", nargs="+", choices=shape_names(), default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--skip-gate", action="store_true", help="for development; is recorded")
    parser.add_argument("--output", "--out", type=Path, default=RESULTS / "fp8-h200.json")
    parser.add_argument("--table", type=Path, help="print this result file as Markdown and stop")
    return parser.parse_args()


def passes(
    name: str, weights: str, batches: Sequence[int], device: torch.device, bytes_per_s: float
) -> Iterator[list[Row]]:
    """Yield the rows of one model with weights of one type, by batch size."""
    shape = model_shape(name)
    if weights != "bf16":
        shape = in_fp8(shape, SCHEME)
    model = random_model(shape, load_backend("triton", device), torch.bfloat16, device)
    floor_ms = 1e3 * shape.weight_bytes(2) / bytes_per_s
    for batch in batches:
        timed = measure(model, batch, CONTEXT, TOKENS, floor_ms, EFFORT)
        yield [{"model": name, "weights": weights, "batch": batch, **row} for row in timed]
        torch.cuda.empty_cache()


def beside_bf16(rows: list[Row]) -> list[Row]:
    """Return the rows with their time over that in bf16."""
    bf16 = {
        (row["model"], row["batch"], row["tokens"]): row["ms"]
        for row in rows
        if row["weights"] == "bf16"
    }
    return [
        row | {"over_bf16": round(row["ms"] / bf16[row["model"], row["batch"], row["tokens"]], 3)}
        for row in rows
    ]


def errors(device: torch.device) -> list[Row]:
    """Return the errors of projections by rows and size of the weight, the norm's weights apart."""
    random = torch.Generator(device).manual_seed(0)
    found = []
    for num_columns, num_inner in SIZES:
        weight = random_scaled((num_columns, num_inner), torch.bfloat16, random, column_block=128)
        factor = torch.rand(num_inner, generator=random, device=device) + 0.5
        weight = weight.times_columns(factor)
        exact = dataclasses.replace(
            weight, scales=weight.scales.double(), dtype=torch.float64,
            column_factor_K=factor.double(),
        )  # fmt: skip
        for num_rows in ROWS:
            values = torch.randn(num_rows, num_inner, generator=random, device=device).bfloat16()
            out = torch.full((num_rows, num_columns), torch.nan, device=device)
            projection.linear(DeferredNorm(values, None, 1, 0.0), weight, out)
            truth = out.double()
            projection_ref.linear(DeferredNorm(values.double(), None, 1, 0.0), exact, truth)
            error = ((out.double() - truth).norm() / truth.norm()).item()
            found.append({"weight": [num_columns, num_inner], "rows": num_rows, "error": error})
    return found


if __name__ == "__main__":
    main()
