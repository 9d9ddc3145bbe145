"""Time the scan of one layer side by side: ours, the byte floor, one token, and peers.

    python benchmarks/kernels.py [--sglang FILE] [--flashinfer FOLDER] [--quick] [--output FILE]
    python benchmarks/kernels.py --table FILE

All columns of a row are measured in turns, as CUDA graphs of calls on rotating buffers, with fp32
states and bf16 rows. Ours commits an accepted path and scans the tree in one launch, with
programmatic dependent launch from call to call as in a model. `ours_us` is the mean over the calls
of a running decoder, most of which leave the state as it is; `ours_storing_us` is a call that
stores it. `floor_us` reads and writes it once. `one_token_us` is mamba-ssm's update with a single
token and the same batch. SGLang's and the chunk scan only score the tree; see candidates.py.
`flashinfer_us` is the mean over FlashInfer's own cycle on chains, `flashinfer_storing_us` a call
that stores; libraries of it are built beforehand, see flashinfer_peer.py.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import candidates
import flashinfer_peer
import torch
from bench_shapes import LAYERS, LayerShape, accepted_path
from gate import require_green
from layer_data import LayerInputs, make_inputs
from peers import Op, Peers, load_peers
from report import RESULTS, Row, header, print_table, read, save, table
from timing import Measured, copy_bandwidth, num_calls, rotation, time_calls

from stree_kernels.ssm.tree_scan import tree_scan

BATCHES = (1, 8, 32)
TOKENS = (1, 4, 8, 16, 32, 64, 128)
PEERS = ("one_token", "sglang", "chunk_scan", "flashinfer")
# mamba-ssm autotunes its chunk scan for seconds on every new size.
CHUNK_SCAN_SHAPE, CHUNK_SCAN_TOKENS = "mamba2-2.7b", (16, 64)
# Relative errors beyond which a result is wrong, not merely rounded. mamba-ssm's chunk scan rounds
# its states to bf16.
MAX_ERRORS = {"y": 1e-2, "state": 1e-3}
# FlashInfer replays with approximate exponentials.
FLASHINFER_MAX_ERRORS = {"y": 2e-2, "state": 1e-2}
SHOWN = (
    "shape", "batch", "tokens", "ours_us", "ours_storing_us", "floor_us", "one_token_us",
    "sglang_us", "chunk_scan_us", "ours_over_one_token", "sglang_over_ours",
)  # fmt: skip
SHOWN_OF_FLASHINFER = ("flashinfer_us", "flashinfer_storing_us", "ours_over_flashinfer")

Maker = Callable[[LayerInputs], candidates.Candidate]


def main() -> None:
    options = parse()
    if options.table is not None:
        columns = shown(read(options.table)["rows"])
        print_table(options.table, columns, functools.partial(is_chosen, options))
        return
    if not torch.cuda.is_available():
        raise SystemExit("kernels are timed on a CUDA device, there is none; run this on a GPU")
    gate = require_green(skip=options.skip_gate)
    device = torch.device("cuda", torch.cuda.current_device())
    peers = load_peers(options.sglang)
    if options.flashinfer is not None:
        peers.versions["flashinfer"] = flashinfer_peer.VERSION
    with torch.inference_mode():
        bytes_per_s = copy_bandwidth(device)
        head = header(peers.versions, gate, bytes_per_s)
        rows: list[Row] = []
        for name in options.shapes:
            for batch in options.batches:
                for tokens in options.tokens:
                    is_few = name == CHUNK_SCAN_SHAPE and tokens in CHUNK_SCAN_TOKENS
                    names = [peer for peer in options.peers if is_few or peer != "chunk_scan"]
                    makers = chosen(peers, names)
                    library = find_flashinfer(options, LAYERS[name], tokens)
                    rows.append(
                        measure(LAYERS[name], batch, tokens, makers, bytes_per_s, device, library)
                    )
                    # After every row: a run that is cut short keeps what it has.
                    save(options.output, head, rows)
    print(f"copy bandwidth {bytes_per_s / 1e12:.2f} TB/s, gate: {gate}, {peers.versions}")
    print(table(rows, shown(rows)), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the scan of one layer beside peers")
    parser.add_argument("--shapes", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--sglang", type=Path, help="SGLang's mamba_ssm.py, METADATA beside it")
    parser.add_argument("--flashinfer", type=Path, help="folder of FlashInfer's built libraries")
    parser.add_argument(
        "--quick", action="store_true", help="one shape, T 1, 16, 64, no chunk scan"
    )
    parser.add_argument("--skip-gate", action="store_true", help="for development; is recorded")
    parser.add_argument("--output", "--out", type=Path, default=RESULTS / "kernels-h200.json")
    parser.add_argument("--table", type=Path, help="print this result file as Markdown and stop")
    options = parser.parse_args()
    if options.quick:
        options.shapes = options.shapes[:1]
        options.tokens = [1, 16, 64]
        options.peers = [name for name in options.peers if name != "chunk_scan"]
    return options


def shown(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the columns of a table, FlashInfer's where it was there."""
    is_there = any(row.get("flashinfer_us") is not None for row in rows)
    return SHOWN + SHOWN_OF_FLASHINFER if is_there else SHOWN


def is_chosen(options: argparse.Namespace, row: Row) -> bool:
    """Say whether the flags ask for a row: a table may show fewer than a file has."""
    chosen_shape, chosen_batch = row["shape"] in options.shapes, row["batch"] in options.batches
    return chosen_shape and chosen_batch and row["tokens"] in options.tokens


def chosen(peers: Peers, names: list[str]) -> dict[str, Maker]:
    """Return what makes each candidate that is there, ours first."""
    ops: dict[str, tuple[Callable[..., candidates.Candidate], Op | None]] = {
        "one_token": (candidates.one_token, peers.one_token),
        "sglang": (candidates.sglang, peers.tree_update),
        "chunk_scan": (candidates.chunk_scan, peers.chunk_scan),
    }
    makers: dict[str, Maker] = {
        "ours": functools.partial(candidates.ours, op=tree_scan),
        "ours_storing": functools.partial(candidates.ours_storing, op=tree_scan),
    }
    for name in ops.keys() & set(names):
        make, op = ops[name]
        if op is not None:
            makers[name] = functools.partial(make, op=op)
    return makers


def find_flashinfer(options: argparse.Namespace, shape: LayerShape, tokens: int) -> Path | None:
    """Return the library for a layer and a number of tokens, None where none was built."""
    if options.flashinfer is None or "flashinfer" not in options.peers:
        return None
    groups = max(shape.num_b_groups, shape.num_c_groups)
    folder = options.flashinfer.resolve()
    path = flashinfer_peer.library_path(folder, shape.num_heads, groups, tokens)
    return path if path.exists() else None


def measure(
    shape: LayerShape, batch: int, tokens: int, makers: dict[str, Maker], bytes_per_s: float,
    device: torch.device, flashinfer: Path | None = None,
) -> Row:  # fmt: skip
    """Return one row: check every candidate on buffer 0, then time those that are right."""
    num_buffers = rotation(batch * shape.state_bytes, device)
    inputs = make_inputs(shape, batch, tokens, num_buffers, device)
    made = {name: make(inputs) for name, make in makers.items()}
    if flashinfer is not None:
        made |= flashinfer_peer.make_candidates(inputs, flashinfer)
    right = {name: item for name, item in made.items() if is_right(name, item)}
    for name in ("ours", "ours_storing"):
        if name not in right:
            raise SystemExit(f"{shape.name} B={batch} T={tokens}: {name}: {made[name].errors}")
    timings = time_calls(
        {name: item.launch for name, item in right.items()},
        {name: num_calls(num_buffers, item.cycle) for name, item in right.items()},
        device,
    )
    floor = shape.floor_bytes(batch, tokens, len(accepted_path(tokens)))
    row = make_row((shape.name, batch, tokens), 1e6 * floor / bytes_per_s, timings)
    row["buffers"] = num_buffers
    for name, item in made.items():
        if item.state_sets:
            row[f"{name}_state_sets"] = item.state_sets
        for what, error in item.errors.items():
            row[f"{name}_{what}_error"] = float(f"{error:.2g}")
    # What this row allocated is of other sizes than the next one's.
    del inputs, made, right
    torch.cuda.empty_cache()
    return row


def is_right(name: str, item: candidates.Candidate) -> bool:
    """Say whether a candidate's results are; print those that are not."""
    # Written so that a NaN, which compares false, is wrong.
    limits = FLASHINFER_MAX_ERRORS if name.startswith("flashinfer") else MAX_ERRORS
    wrong = {what: e for what, e in item.errors.items() if not e <= limits[what]}
    if wrong:
        print(f"{name} is not timed, its relative errors are {wrong}", file=sys.stderr, flush=True)
    return not wrong


def make_row(key: tuple[str, int, int], floor_us: float, timings: dict[str, Measured]) -> Row:
    """Return a row of the table: None where a candidate is absent or wrong."""

    def us(name: str) -> float | None:
        return round(timings[name].us, 3) if name in timings else None

    def ratio(above: str, below: str) -> float | None:
        if above not in timings or below not in timings:
            return None
        return round(timings[above].us / timings[below].us, 3)

    row: Row = dict(zip(("shape", "batch", "tokens"), key, strict=True))
    row |= {"ours_us": us("ours"), "floor_us": round(floor_us, 3)}
    row |= {f"{name}_us": us(name) for name in ("ours_storing", *PEERS, "flashinfer_storing")}
    for name in ("ours", "ours_storing", *PEERS, "flashinfer_storing"):
        row[f"{name}_spread"] = round(timings[name].spread, 4) if name in timings else None
    row["ours_over_one_token"] = ratio("ours", "one_token")
    row["sglang_over_ours"] = ratio("sglang", "ours")
    row["ours_over_flashinfer"] = ratio("ours", "flashinfer")
    return row


if __name__ == "__main__":
    main()
