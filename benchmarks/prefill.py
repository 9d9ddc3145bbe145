"""Time prompts, from token ids on the host to first tokens on the host, beside mamba_ssm's.

    python benchmarks/prefill.py [--models NAME ...] [--sizes BxT ...] [--output FILE]
    python benchmarks/prefill.py --table FILE

B prompts of T tokens are read side by side into empty slots, in pieces of `piece_tokens`, all at
once where that is 0; weights are random. `peak_over` is the most memory that was allocated over
weights, caches and one piece's activations as counted here: its widest rows and the stream. The
peer is mamba_ssm's model of the same shape, where it can be imported: its Triton scan of chunks,
without its CUDA extensions.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_shapes import model_shape, shape_names
from gate import require_green
from report import RESULTS, Row, header, print_table, save, table
from timing import copy_bandwidth

from stree_core.drafting.checkpoint import random_model
from stree_core.drafting.prefill import Prefill, PromptPart
from stree_core.engine.prompt_queue import pieces
from stree_core.models.backend import load_backend
from stree_core.models.cache import CacheSize
from stree_core.models.model import Model

SIZES = {
    "mamba2-2.7b": ((1, 64, 0), (1, 256, 0), (1, 1024, 0), (8, 1024, 0), (1, 16384, 0)),
    "mamba-in-llama-8b": ((1, 1024, 0), (1, 8192, 0)),
}
PIECES = (512, 1024, 2048, 4096)
"""Budgets that are compared on the longest prompt."""
PEER = "mamba2-2.7b"
WARM_UP_RUNS, RUNS = 2, 5
SHOWN = (
    "model", "batch", "prompt_tokens", "piece_tokens", "ms", "spread", "tokens_per_s", "peak_over",
    "peer_ms",
)  # fmt: skip


def main() -> None:
    options = parse()
    if options.table is not None:
        print_table(options.table, SHOWN, lambda _: True)
        return
    if not torch.cuda.is_available():
        raise SystemExit("prompts are timed on a CUDA device, there is none; run this on a GPU")
    gate = require_green(skip=options.skip_gate)
    device = torch.device("cuda", torch.cuda.current_device())
    peer, version = load_peer() if options.peer else (None, "not asked for")
    head = header({"mamba_ssm": version}, gate, copy_bandwidth(device))
    backend = load_backend("triton", device)
    rows: list[Row] = []
    with torch.inference_mode():
        for name in options.models:
            model = random_model(model_shape(name), backend, torch.bfloat16, device)
            sizes = list(SIZES.get(name, ((1, 1024, 0),)))
            sizes += [(*sizes[-1][:2], piece) for piece in PIECES]
            for batch, length, piece in sizes:
                own = peer if name == PEER and not piece else None
                rows.append({"model": name, **measure(model, batch, length, piece, own)})
                save(options.output, head, rows)
            del model
            torch.cuda.empty_cache()
    print(table(rows, SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time prompts")
    parser.add_argument("--models", nargs="+", choices=shape_names(), default=list(SIZES))
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--skip-gate", action="store_true", help="for development; is recorded")
    parser.add_argument("--output", type=Path, default=RESULTS / "prefill-h200.json")
    parser.add_argument("--table", type=Path, help="print this result file as Markdown and stop")
    return parser.parse_args()


def load_peer() -> tuple[Any, str]:
    """Return mamba_ssm's model and its version, None and why where it cannot be had."""
    from generation import LAYERS, make_theirs

    try:
        return make_theirs(LAYERS), importlib.metadata.version("mamba_ssm")
    except ImportError as err:
        return None, f"absent: {err}"


def measure(model: Model, batch: int, length: int, piece_tokens: int, peer: Any) -> Row:
    """Return one row."""
    device, held = model.device, torch.cuda.memory_allocated()
    cache = model.make_cache(CacheSize(batch, 1, 1, length))
    prefill = Prefill(model, cache, use_graph=True)
    vocab_size = model.shape.vocab_size
    if peer is not None:
        # The peer's embedding may lack the padding rows of ours.
        vocab_size = min(vocab_size, peer.backbone.embedding.num_embeddings)
    tokens = torch.randint(vocab_size, (batch, length)).tolist()
    whole = [PromptPart(slot, own, 0, length) for slot, own in enumerate(tokens)]
    cut = pieces(whole, piece_tokens or batch * length)

    def read() -> list[int]:
        hidden_SD = [prefill.read(piece)[-1:] for piece in cut[:-1]]
        hidden_SD.append(prefill.read(cut[-1]))
        picked: list[int] = model.logits(hidden_SD[-1][None]).argmax(-1)[0].tolist()
        return picked

    torch.cuda.reset_peak_memory_stats()
    times = timed(read)
    peak = torch.cuda.max_memory_allocated()
    ms = statistics.median(times)
    row: Row = {
        "batch": batch, "prompt_tokens": length, "piece_tokens": piece_tokens,
        "ms": round(ms, 3), "spread": round(statistics.pstdev(times) / ms, 4),
        "tokens_per_s": round(1e3 * batch * length / ms),
        "peak_over": round(peak / (held + cache.num_bytes + piece_bytes(model, cut[0])), 3),
        "peer_ms": None,
    }  # fmt: skip
    if peer is not None:
        ids = torch.tensor(tokens, device=device)
        first = functools.partial(peer.generate, ids, length + 1, top_k=1, cg=False)
        row["peer_ms"] = round(statistics.median(timed(lambda: first().tolist())), 3)
    return row


def piece_bytes(model: Model, piece: list[PromptPart]) -> int:
    """Return what one layer's projections and the stream of a piece take."""
    shape = model.shape
    rows = sum(part.end - part.begin for part in piece)
    weights = (w for block in model.weights.blocks for part in block.parts for w in _matrices(part))
    widest = max(sum(weight.shape) for weight in weights)
    return rows * (2 * widest + 12 * shape.hidden_size)


def _matrices(part: Any) -> list[torch.Tensor]:
    tensors = (getattr(part, name) for name in part.__slots__)
    return [t for t in tensors if isinstance(t, torch.Tensor) and t.ndim == 2]


def timed(run: Callable[[], object]) -> list[float]:
    """Return the milliseconds of some runs, after others that compile and capture."""
    times = []
    for number in range(WARM_UP_RUNS + RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if number >= WARM_UP_RUNS:
            times.append(1e3 * (time.perf_counter() - start))
    return times


if __name__ == "__main__":
    main()
