"""Time a gated delta layer's scan of prompts beside fla's chunked one.

    python benchmarks/delta_prompts.py [--peers FOLDER] [--output FILE]
    python benchmarks/delta_prompts.py --table FILE

Prompts of one length lie side by side; states are fp32, rows bf16, and both ops return the state
after them. Calls repeat on one buffer, larger than L2 from some 4096 tokens on. fla's op allocates
its outputs, as it does in a server; ours allocates the chunks' inverses.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from delta_data import SHAPES, DeltaInputs, make_inputs
from delta_peers import load_delta_peers
from gate import require_green
from layer_data import relative_error
from report import RESULTS, Row, header, print_table, save, table
from timing import time_calls
from torch import Tensor

from stree_kernels.delta import delta_chunk_scan, delta_chunk_scan_ref
from stree_kernels.delta.delta_chunk_scan_ref import PackedTokens
from stree_kernels.launch.packing import Packing

SIZES = ((1, 512), (1, 4096), (8, 512), (32, 512))
"""Prompts and tokens of each."""
MAX_ERRORS = {"ours": 2.5e-3, "fla": 2e-2}
"""Relative errors of o beyond which a result is wrong, not merely rounded."""
SHOWN = ("shape", "batch", "tokens", "ours_us", "fla_us", "ours_o_error", "fla_o_error")


def main() -> None:
    options = parse()
    if options.table is not None:
        print_table(options.table, SHOWN, lambda _: True)
        return
    if not torch.cuda.is_available():
        raise SystemExit("kernels are timed on a CUDA device, there is none; run this on a GPU")
    gate = require_green(skip=options.skip_gate)
    device = torch.device("cuda", torch.cuda.current_device())
    peers = load_delta_peers(options.peers)
    rows: list[Row] = []
    with torch.inference_mode():
        for batch, length in SIZES:
            inputs = make_inputs(SHAPES["qwen3-next"], batch, length, 1, device)
            rows.append(measure(inputs, peers.ops.get("fla_chunk")))
            save(options.output, header(peers.versions, gate), rows)
    print(table(rows, SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the gated delta scan of prompts")
    parser.add_argument("--peers", type=Path, help="folder of unpacked wheels: fla, sglang")
    parser.add_argument("--skip-gate", action="store_true", help="for development; is recorded")
    parser.add_argument("--output", type=Path, default=RESULTS / "delta-prompts-h200.json")
    parser.add_argument("--table", type=Path, help="print this result file as Markdown and stop")
    return parser.parse_args()


def measure(inputs: DeltaInputs, fla: Callable[..., Any] | None) -> Row:
    """Return one row: check both ops against float64, then time them in turns."""
    shape, batch, length, device = inputs.shape, inputs.batch, inputs.tokens, inputs.device
    buffer = inputs.buffers[0]
    q, v, beta = buffer.tokens
    parts = (q, buffer.rows.k_BRGN, v, buffer.rows.g_BRH, beta)
    tokens = PackedTokens(*(tensor.flatten(0, 1).contiguous() for tensor in parts))
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    state, out = buffer.state_BHPN, torch.full_like(tokens.v_MHP, torch.nan)
    numbers = torch.arange(batch, dtype=torch.int32, device=device)
    packing = Packing(offsets, numbers, torch.ones_like(numbers))
    # of one tensor fla keeps the chunks' indices, which the host has to read
    wide_offsets = offsets.long()
    launches: dict[str, Callable[[int], Tensor]] = {}

    def ours(_: int) -> Tensor:
        delta_chunk_scan.delta_chunk_scan(state, tokens, packing, out_MHP=out, gate=None)
        return out

    def fla_chunk(_: int) -> Tensor:
        assert fla is not None
        q, k, v, g, beta = (tensor[None] for tensor in tokens)
        o: Tensor
        o, _ = fla(
            q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True,
            state_v_first=True, cu_seqlens=wide_offsets, scale=shape.state_dim**-0.5,
        )  # fmt: skip
        return o[0]

    truth, start = _truth(state, tokens, packing), state.clone()
    row: Row = {"shape": shape.name, "batch": batch, "tokens": length}
    for name, launch in (("fla", fla_chunk if fla else None), ("ours", ours)):
        row |= {f"{name}_us": None, f"{name}_o_error": None}
        if launch is None:
            continue
        error = relative_error(launch(0), truth)
        row[f"{name}_o_error"] = float(f"{error:.2g}")
        if error <= MAX_ERRORS[name]:
            launches[name] = launch
    state.copy_(start)
    for name, found in time_calls(launches, 4, device).items():
        row |= {f"{name}_us": round(found.us, 2), f"{name}_spread": round(found.spread, 4)}
    return row


def _truth(state: Tensor, tokens: PackedTokens, packing: Packing) -> Tensor:
    """Return o in float64."""
    wide = PackedTokens(*(tensor.double() for tensor in tokens))
    out = torch.empty_like(wide.v_MHP)
    delta_chunk_scan_ref.delta_chunk_scan(
        state.double(), wide, packing, out_MHP=out, gate=None
    )  # fmt: skip
    return out


if __name__ == "__main__":
    main()
