"""Time decoding as users run it: sessions, prompts that join and leave, every mode of a pair.

    python benchmarks/decode.py [--pairs demo mamba2-2.7b] [--batches 1 8 32] [--output FILE]
    python benchmarks/decode.py --table FILE

The demo pair decodes its own prompts with its real acceptance, greedily and at temperature 1 (MSS).
Pairs of shapes accept what a trace says (traced_pair.py). `host_share` is the part of a step's wall
time that the device does not work: 1 minus the time of the same captured steps back to back.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from report import RESULTS, Row, header, print_table, save, table
from timing import copy_bandwidth
from traced_pair import PAIRS, TRACE, open_named, traced_rules

from stree_autotune.live.measure import prompt_for
from stree_autotune.probe.stepper import occupy
from stree_autotune.probe.timing import captured
from stree_autotune.store.open_models import open_prompts
from stree_autotune.trace.file import Trace
from stree_core.drafting.pair import Pair
from stree_core.engine.decode import Run, generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.rules import SamplingSupport
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.stop import StopRule
from stree_core.tree import DEFAULT_TREE, Tree
from stree_kernels.launch.rows import MAX_BUFFERED

CONTEXT = 1024
NEW_TOKENS = 128
CHAINS = (1, 2, 4, 7)
TIMED_ROUNDS, TIMED_CALLS = 5, 40
SHOWN = (
    "pair", "batch", "temperature", "mode", "tokens_per_s", "tokens_per_step", "step_ms",
    "host_share", "over_bare_forward",
)  # fmt: skip


def main() -> None:
    options = parse()
    if options.table is not None:
        print_table(options.table, SHOWN, lambda row: True)
        return
    if not torch.cuda.is_available():
        raise SystemExit("decoding is timed on a CUDA device, there is none; run this on a GPU")
    rows: list[Row] = []
    head = header(bytes_per_s=copy_bandwidth(torch.device("cuda")))
    for name in options.pairs:
        pair, trace = open_named(name, "cuda")
        temperatures = (0.0, 1.0) if trace is None else (0.0,)
        for batch in options.batches:
            for temperature in temperatures:
                rows += measure(name, pair, trace, batch, temperature, options.prompts)
                # After every block of rows: a run that is cut short keeps what it has.
                save(options.output, head, rows)
        del pair
        torch.cuda.empty_cache()
    print(table(rows, SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time decoding")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS[:2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompts", type=int, default=3, help="prompts for each slot")
    parser.add_argument("--output", type=Path, default=RESULTS / "decode-h200.json")
    parser.add_argument("--table", type=Path, help="print this result file as Markdown and stop")
    return parser.parse_args()


def modes(trace: Trace | None) -> dict[str, Tree]:
    """Return what is compared: off, chains, the published tree and a wide one."""
    chains = {f"chain {k}": Tree.chain(k) for k in (CHAINS if trace is None else CHAINS[:3])}
    wide = Tree.from_paths([[0], [1], [2], [3], [0, 0], [0, 1], [1, 0]])
    return {"off": Tree.chain(0)} | chains | {"published tree": DEFAULT_TREE, "wide tree": wide}


def measure(
    name: str, pair: Pair, trace: Trace | None, batch: int, temperature: float, per_slot: int
) -> list[Row]:
    """Return a row for each mode, with tokens that all of a pair's modes share."""
    prompts = prompts_of(pair, trace, batch * per_slot)
    rows = []
    for mode, tree in modes(trace).items():
        run, step_ms, device_ms, bare_ms = decode(pair, tree, prompts, batch, temperature, trace)
        rows.append(
            {
                "pair": name,
                "batch": batch,
                "temperature": temperature,
                "mode": mode,
                "acceptance": "its own" if trace is None else f"of trace {TRACE}",
                "tokens_per_s": round(run.tokens_per_s, 1),
                "tokens_per_step": round(run.tokens_per_step, 4),
                "step_ms": round(step_ms, 4),
                "device_ms": round(device_ms, 4),
                "host_share": round(max(0.0, 1 - device_ms / step_ms), 4),
                "over_bare_forward": round(device_ms / bare_ms, 4) if mode == "off" else None,
            }
        )
        torch.cuda.empty_cache()
    return rows


def prompts_of(pair: Pair, trace: Trace | None, count: int) -> list[list[int]]:
    if trace is not None:
        return [prompt_for(7 * index % trace.num_prompts) for index in range(count)]
    texts = open_prompts("demo").texts
    return pair.encode([texts[index % len(texts)] for index in range(count)])


def decode(
    pair: Pair, tree: Tree, prompts: list[list[int]], batch: int, temperature: float,
    trace: Trace | None,
) -> tuple[Run, float, float, float]:  # fmt: skip
    """Return a run, wall ms and device ms of a step, and ms of a forward pass of as many rows."""
    support = SamplingSupport("mss" if temperature else "greedy")
    config = EngineConfig(batch, CONTEXT, sampling=support)
    rules = None if trace is None else traced_rules(pair, trace, batch)
    engine = Engine(pair.target, pair.draft, tree, config, rules=rules)
    each = [SamplingParams(temperature, seed=index) for index in range(len(prompts))]
    stop = StopRule(NEW_TOKENS, () if trace is not None else pair.target.shape.eos_token_ids)
    generate(engine, prompts[:batch], dataclasses.replace(stop, max_new_tokens=16))
    run = generate(engine, prompts, stop, sampling=each)

    def go_back() -> None:
        # The calls of a round fill what lies behind.
        with torch.inference_mode():
            occupy(engine.speculator, CONTEXT // 2)

    device_ms = timed(engine.launch, go_back)
    for _ in range(TIMED_ROUNDS * TIMED_CALLS):
        engine.collect()
    return run, run.step_ms, device_ms, forward_ms(engine)


def forward_ms(engine: Engine) -> float:
    """Return the device's ms of one target pass with the LM head: what a step cannot beat.

    A pass takes longer the more rows are kept beside the state, and stores the state when they are
    too many: the mean over all phases of decoding without speculation.
    """
    speculator, forward = engine.speculator, captured_forward(engine)
    pending = speculator.target_cache.pending
    times: list[float] = []
    for num_buffered in range(MAX_BUFFERED + 1):
        with torch.inference_mode():
            pending.num_buffered_B.fill_(num_buffered)
            pending.length_B.fill_(1)
        times.append(timed(forward))
    return sum(times) / len(times)


def captured_forward(engine: Engine) -> Callable[[], object]:
    """Return one target pass with the LM head, captured; it leaves the rows that are kept alone."""
    speculator = engine.speculator

    def work() -> None:
        hidden = speculator.target.forward(
            speculator.tokens_TB, speculator.plan.target_block, speculator.target_cache,
            first=0, commit=True,
        )  # fmt: skip
        speculator.target.logits(hidden)

    with torch.inference_mode():
        return captured(work, speculator.target.device)


def timed(work: Callable[[], object], before: Callable[[], None] = lambda: None) -> float:
    """Return the device's ms for one call, many back to back: the median of five rounds.

    `before` runs before each round.
    """
    times: list[float] = []
    for _ in range(TIMED_ROUNDS):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(TIMED_CALLS):
            work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / TIMED_CALLS)
    return sorted(times)[TIMED_ROUNDS // 2]


if __name__ == "__main__":
    main()
