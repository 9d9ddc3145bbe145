"""Time the gated delta scan of one layer side by side: ours, the byte floor, and peers.

    python benchmarks/delta.py [--peers FOLDER] [--quick] [--output FILE]
    python benchmarks/delta.py --table FILE

All columns of a row are measured in turns, as CUDA graphs of calls on rotating buffers, with fp32
states and bf16 rows. Ours commits accepted rows and scores the tree, with programmatic dependent
launch from call to call as in a model. `ours_us` is the mean over the calls of one flush cycle with
four accepted rows a step, every fifth of which stores the state; `ours_storing_us` is such a call
alone; `ours_chain_us` scores a chain of as many tokens. `floor_us` reads the state once and moves
the rows. fla's and SGLang's replay kernel take a chain; neither advances the state beyond one
token, nor does SGLang's tree kernel; see delta_candidates.py. None is a peer that cannot be
imported, is wrong, or is SGLang's replay kernel beyond 8 tokens, which compiles for minutes.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import delta_candidates as candidates
import torch
from candidates import Candidate
from delta_data import PHASES, SHAPES, DeltaInputs, DeltaShape, depth, make_inputs
from delta_peers import DeltaPeers, load_delta_peers
from gate import require_green
from report import RESULTS, Row, header, print_table, save, table
from timing import copy_bandwidth, num_calls, rotation, time_calls

BATCHES = (1, 8, 32)
TOKENS = (1, 8, 16, 32, 64)
PEERS = ("fla", "sglang_tree", "sglang_replay")
# SGLang's replay kernel is one warp per program: from 16 tokens it compiles for minutes.
MAX_REPLAY_TOKENS = 8
OURS = ("ours", "ours_storing", "ours_chain")
# Relative errors beyond which a result is wrong, not merely rounded.
MAX_ERRORS = {"ours": {"o": 2.5e-3, "state": 1e-5}, "peer": {"o": 1e-2}}
SHOWN = (
    "shape", "batch", "tokens", "depth", "ours_us", "ours_storing_us", "floor_us", "fla_us",
    "sglang_tree_us", "sglang_replay_us", "ours_chain_us",
)  # fmt: skip

Maker = Callable[[DeltaInputs], Candidate]


def main() -> None:
    options = parse()
    if options.table is not None:
        print_table(options.table, SHOWN, lambda row: row["shape"] in options.shapes)
        return
    if not torch.cuda.is_available():
        raise SystemExit("kernels are timed on a CUDA device, there is none; run this on a GPU")
    gate = require_green(skip=options.skip_gate)
    device = torch.device("cuda", torch.cuda.current_device())
    peers = load_delta_peers(options.peers)
    with torch.inference_mode():
        bytes_per_s = copy_bandwidth(device)
        head = header(peers.versions, gate, bytes_per_s)
        rows: list[Row] = []
        for name in options.shapes:
            for batch in options.batches:
                for tokens in options.tokens:
                    rows.append(measure(SHAPES[name], batch, tokens, peers, bytes_per_s, device))
                    # After every row: a run that is cut short keeps what it has.
                    save(options.output, head, rows)
                    print(table(rows[-1:], SHOWN).splitlines()[-1], file=sys.stderr, flush=True)
    print(f"copy bandwidth {bytes_per_s / 1e12:.2f} TB/s, gate: {gate}, {peers.versions}")
    print(table(rows, SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the gated delta scan of one layer")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[:1])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--peers", type=Path, help="folder of unpacked wheels: fla, sglang")
    parser.add_argument("--quick", action="store_true", help="T 1 and 16, B 1 and 8")
    parser.add_argument("--skip-gate", action="store_true", help="for development; is recorded")
    parser.add_argument("--output", "--out", type=Path, default=RESULTS / "delta-h200.json")
    parser.add_argument("--table", type=Path, help="print this result file as Markdown and stop")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.batches = [1, 16], [1, 8]
    return options


def measure(
    shape: DeltaShape, batch: int, tokens: int, peers: DeltaPeers, bytes_per_s: float,
    device: torch.device,
) -> Row:  # fmt: skip
    """Return one row: check every candidate on buffer 0, then time those that are right."""
    num_buffers = rotation(batch * shape.state_bytes, device)
    inputs = make_inputs(shape, batch, tokens, num_buffers, device)
    made = {name: make(inputs) for name, make in makers(peers, tokens).items()}
    right = {name: item for name, item in made.items() if is_right(name, item)}
    for name in OURS:
        if name not in right:
            raise SystemExit(f"{shape.name} B={batch} T={tokens}: {name}: {made[name].errors}")
    launches = {name: item.launch for name, item in right.items()}
    timings = time_calls(launches, num_calls(num_buffers, PHASES), device)
    floor = 1e6 * shape.floor_bytes(batch, tokens) / bytes_per_s
    row: Row = {"shape": shape.name, "batch": batch, "tokens": tokens}
    row |= {"depth": depth(inputs.parents), "floor_us": round(floor, 3), "buffers": num_buffers}
    for name in (*OURS, *PEERS):
        found = timings.get(name)
        row[f"{name}_us"] = round(found.us, 3) if found else None
        row[f"{name}_spread"] = round(found.spread, 4) if found else None
    for name, item in made.items():
        for what, error in item.errors.items():
            row[f"{name}_{what}_error"] = float(f"{error:.2g}")
    # What this row allocated is of other sizes than the next one's.
    del inputs, made, right, launches
    torch.cuda.empty_cache()
    return row


def makers(peers: DeltaPeers, tokens: int) -> dict[str, Maker]:
    """Return what makes each candidate that is there, ours first."""
    found: dict[str, Maker] = {name: getattr(candidates, name) for name in OURS}
    for name in PEERS:
        is_slow = name == "sglang_replay" and tokens > MAX_REPLAY_TOKENS
        if name in peers.ops and not is_slow:
            found[name] = functools.partial(getattr(candidates, name), op=peers.ops[name])
    return found


def is_right(name: str, item: Candidate) -> bool:
    """Say whether a candidate's results are; print those that are not."""
    limits = MAX_ERRORS["ours" if name in OURS else "peer"]
    # Written so that a NaN, which compares false, is wrong.
    wrong = {what: error for what, error in item.errors.items() if not error <= limits[what]}
    if wrong:
        print(f"{name} is not timed, its relative errors are {wrong}", file=sys.stderr, flush=True)
    return not wrong


if __name__ == "__main__":
    main()
