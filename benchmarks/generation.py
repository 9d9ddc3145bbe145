"""Compare decoding without speculation with mamba_ssm's own generation, on the same weights.

    python benchmarks/generation.py [--layers 64] [--batches 1] [--output FILE]

A model of the mamba2-2.7b shape with random weights is made by mamba_ssm, saved in its format and
loaded by this project. Both continue the same prompt greedily, in turns: mamba_ssm with its CUDA-
graph path (`generate(cg=True)`), this project with an engine that never speculates. Prefill is the
wall time up to the first token; a token's time is the wall time of a long run less that of a short
one, divided by the tokens between, so that prefill counts for neither. mamba_ssm's CUDA extensions
are not needed for Mamba2 and are replaced by empty modules; without causal-conv1d its conv step is
made of torch calls, and it keeps its states in bf16, this project in fp32.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import load_peers
from report import RESULTS, Row, header, save, table
from timing import copy_bandwidth

from stree_core.drafting.pair import Runtime, load_single
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.stop import StopRule
from stree_core.models.source import folder_source
from stree_core.tree import Tree

HIDDEN, LAYERS, VOCAB = 2560, 64, 50277
PROMPT_TOKENS, SHORT, LONG, ROUNDS = 1024, 32, 288, 5
CONTEXT = 2048
SHOWN = (
    "engine", "batch", "prompt_tokens", "prefill_ms", "token_ms", "spread_ms", "tokens_per_s",
    "same_first_tokens",
)  # fmt: skip
Continue = Callable[[int], list[int]]
"""Continues the prompt by so many tokens, and returns those of the first sequence."""


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("generation is timed on a CUDA device, there is none; run this on a GPU")
    theirs = make_theirs(options.layers)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_single(folder_source(Path(folder)), Runtime("cuda", "bfloat16"))
    version = importlib.metadata.version("mamba_ssm")
    head = header({"mamba_ssm": version}, bytes_per_s=copy_bandwidth(torch.device("cuda")))
    rows: list[Row] = []
    for batch in options.batches:
        prompt = torch.randint(VOCAB, (1, PROMPT_TOKENS), device="cuda").expand(batch, -1)
        engine = Engine(ours, None, Tree.chain(0), EngineConfig(batch, CONTEXT))
        rows += compare(
            {"mamba_ssm": theirs_on(theirs, prompt), "stree": ours_on(engine, prompt)}, batch
        )
        save(options.output, head, rows)
    print(table(rows, SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare generation with mamba_ssm")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--output", type=Path, default=RESULTS / "generation-h200.json")
    return parser.parse_args()


def make_theirs(num_layers: int) -> Any:
    """Return mamba_ssm's model with random weights, in bf16."""
    load_peers(None)
    for extension in ("selective_scan_cuda", "causal_conv1d_cuda"):
        sys.modules.setdefault(extension, types.ModuleType(extension))
    config = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig(
        d_model=HIDDEN, n_layer=num_layers, vocab_size=VOCAB, ssm_cfg={"layer": "Mamba2"}
    )
    models = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
    torch.manual_seed(0)
    return models.MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16).eval()


def theirs_on(model: Any, prompt_BT: torch.Tensor) -> Continue:
    def run(num_tokens: int) -> list[int]:
        out_BT = model.generate(prompt_BT, PROMPT_TOKENS + num_tokens, top_k=1, cg=True)
        tokens: list[int] = out_BT[0, PROMPT_TOKENS:].tolist()
        return tokens

    # The graph's cache is made for the longest output.
    run(LONG)
    return run


def ours_on(engine: Engine, prompt_BT: torch.Tensor) -> Continue:
    prompts = prompt_BT.tolist()

    def run(num_tokens: int) -> list[int]:
        return generate(engine, prompts, StopRule(num_tokens)).generations[0].tokens

    run(LONG)
    return run


def compare(engines: dict[str, Continue], batch: int) -> list[Row]:
    """Return a row for each engine; they are timed in turns."""
    texts = {name: run(LONG) for name, run in engines.items()}
    first, second = texts.values()
    same = next((i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), LONG)
    times: dict[str, list[float]] = {name: [] for name in engines}
    prefills: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(ROUNDS):
        for name, run in engines.items():
            spent = timed(run, LONG) - timed(run, SHORT)
            times[name].append(1e3 * spent / (LONG - SHORT))
            prefills[name].append(1e3 * timed(run, 1))
    return [
        {
            "engine": name,
            "batch": batch,
            "prompt_tokens": PROMPT_TOKENS,
            "prefill_ms": round(statistics.median(prefills[name]), 2),
            "token_ms": round(statistics.median(values), 4),
            "spread_ms": round(statistics.stdev(values), 4),
            "tokens_per_s": round(1e3 * batch / statistics.median(values), 1),
            "same_first_tokens": same,
        }
        for name, values in times.items()
    ]


def timed(run: Continue, num_tokens: int) -> float:
    """Return the seconds of a run."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(num_tokens)
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
