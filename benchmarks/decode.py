"""Time decoding as users run it: sessions, prompts that join and leave, every mode of a pair.

    python benchmarks/decode.py [--pairs demo mamba2-2.7b] [--batches 1 8 32] [--output FILE]
    python benchmarks/decode.py --table FILE

The demo pair decodes its own prompts with its real acceptance, greedily and at temperature 1 (MSS).
The shapes mamba2-2.7b and mamba2-130m have random weights: there, and in this file alone, the
target's choices are taken from a recorded trace (`TraceRule`), so that steps accept as many tokens
as in the trace while every pass is computed. `host_share` is the part of a step's wall time that
the device does not work: 1 minus the time of the same captured steps back to back.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from report import RESULTS, Row, header, print_table, save, table
from timing import copy_bandwidth
from torch import Tensor

from stree_autotune.library import Library
from stree_autotune.prompts import load_prompts
from stree_autotune.stepper import occupy
from stree_autotune.trace_file import Trace, load_trace
from stree_core import step as step_module
from stree_core.backend import Backend
from stree_core.decode import Run, generate
from stree_core.engine import Engine, EngineConfig
from stree_core.model_source import folder_source, sheet_source
from stree_core.pair import Pair, Runtime, load_pair
from stree_core.rules import GreedyRule, SamplingSupport
from stree_core.sampling import SamplingParams
from stree_core.stop import StopRule
from stree_core.tree import DEFAULT_TREE, Tree
from stree_core.tree_plan import TreePlan
from stree_kernels.rows import MAX_KEPT

TRACE = "demo-target--demo-draft--gsm8k--greedy"
SHAPES = ("mamba2-2.7b", "mamba2-130m")
CONTEXT = 1024
NEW_TOKENS = 128
CHAINS = (1, 2, 4, 7)
TIMED_ROUNDS, TIMED_CALLS = 5, 40
MakeRules = Callable[..., list["TraceRule"]]
SHOWN = (
    "pair", "batch", "temperature", "mode", "tokens_per_s", "tokens_per_step", "step_ms",
    "host_share", "over_bare_forward",
)  # fmt: skip


class TraceRule(GreedyRule):
    """Picks after each node the child that a trace names, or a token that is no child.

    Shape letters: T tree tokens, B slots, K children, N positions.
    """

    def __init__(
        self, plan: TreePlan, backend: Backend, ranks_BN: Tensor, position_B: Tensor
    ) -> None:
        super().__init__(plan, backend)
        tree = plan.tree
        most = max((len(children) for children in tree.children), default=0)
        rows = [[*children, *[-1] * (most + 1 - len(children))] for children in tree.children]
        self._child_TK = torch.tensor(rows, device=ranks_BN.device)
        self._depth_T = plan.tables.depths_T
        self._ranks_BN = ranks_BN
        self._position_B = position_B

    def choose(self, logits_TBV: Tensor, tokens_TB: Tensor) -> Tensor:
        """Return the tokens of the children that the trace accepts."""
        likeliest_TB = super().choose(logits_TBV, tokens_TB)
        place_TB = self._position_B + self._depth_T[:, None]
        place_TB = place_TB % self._ranks_BN.shape[1]
        rank_TB = self._ranks_BN.t().gather(0, place_TB)
        last = self._child_TK.shape[1] - 1
        node_TB = self._child_TK.gather(1, rank_TB.clamp(max=last))
        taken_TB = tokens_TB.gather(0, node_TB.clamp(min=0))
        other_TB = (likeliest_TB + 12345) % logits_TBV.shape[-1]
        return torch.where(node_TB >= 0, taken_TB, other_TB)

    def advance(self, emitted_LB: Tensor, count_B: Tensor) -> None:
        """Move on in the trace."""
        self._position_B.add_(count_B)


def trace_rules(trace: Trace, num_slots: int, device: torch.device) -> MakeRules:
    """Return what stands in for stree_core.rules.make_rules: slots begin at different prompts."""
    ranks = torch.from_numpy(trace.ranks.astype("int64")).to(device)
    starts = [int(trace.offsets[slot * 7 % trace.num_prompts]) for slot in range(num_slots)]
    ranks_BN = torch.stack([ranks.roll(-start) for start in starts])
    position_B = torch.zeros(num_slots, dtype=torch.int64, device=device)

    def make(
        support: object,
        plans: Sequence[TreePlan],
        num_slots: int,
        vocab_size: int,
        backend: Backend,
    ) -> list[TraceRule]:
        return [TraceRule(plan, backend, ranks_BN, position_B) for plan in plans]

    return make


def main() -> None:
    options = parse()
    if options.table is not None:
        print_table(options.table, SHOWN, lambda row: True)
        return
    if not torch.cuda.is_available():
        raise SystemExit("decoding is timed on a CUDA device, there is none; run this on a GPU")
    rows: list[Row] = []
    head = header({}, "skipped", copy_bandwidth(torch.device("cuda")))
    for name in options.pairs:
        pair = open_demo() if name == "demo" else open_shapes()
        trace = None if name == "demo" else load_trace(Library.open().find_borrowed_trace(TRACE))
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
    choices = ["demo", SHAPES[0]]
    parser.add_argument("--pairs", nargs="+", choices=choices, default=choices)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompts", type=int, default=3, help="prompts for each slot")
    parser.add_argument("--output", type=Path, default=RESULTS / "decode-h200.json")
    parser.add_argument("--table", type=Path, help="print this result file as Markdown and stop")
    return parser.parse_args()


def open_demo() -> Pair:
    library = Library.open()
    sources = [folder_source(library.find_model(name)) for name in ("demo-target", "demo-draft")]
    return load_pair(*sources, Runtime("cuda"))


def open_shapes() -> Pair:
    library = Library.open()
    return load_pair(*(sheet_source(library.find_shape(name)) for name in SHAPES), Runtime("cuda"))


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
        return [[1 + index % 1000, 2, 3, 4] for index in range(count)]
    file = Library.open().find_model("demo-target") / "prompts.jsonl"
    texts = load_prompts("demo", file)
    return pair.encode([texts[index % len(texts)] for index in range(count)])


def decode(
    pair: Pair, tree: Tree, prompts: list[list[int]], batch: int, temperature: float,
    trace: Trace | None,
) -> tuple[Run, float, float, float]:  # fmt: skip
    """Return a run, wall ms and device ms of a step, and ms of a forward pass of as many rows."""
    make_rules = step_module.make_rules
    if trace is not None:
        step_module.make_rules = trace_rules(trace, batch, pair.device)  # type: ignore[assignment]
    try:
        support = SamplingSupport("mss" if temperature else "greedy")
        engine = Engine(
            pair.target, pair.draft, tree, EngineConfig(batch, CONTEXT, sampling=support)
        )
    finally:
        step_module.make_rules = make_rules
    each = [SamplingParams(temperature, seed=index) for index in range(len(prompts))]
    stop = StopRule(NEW_TOKENS, () if trace is not None else pair.target.shape.eos_token_ids)
    generate(engine, prompts[:batch], dataclasses.replace(stop, max_new_tokens=16))
    run = generate(engine, prompts, stop, sampling=each)
    with torch.inference_mode():
        occupy(engine.speculator, CONTEXT // 2)
    device_ms = timed(engine.launch)
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
    times = []
    for num_kept in range(MAX_KEPT + 1):
        with torch.inference_mode():
            pending.num_kept_B.fill_(num_kept)
            pending.length_B.fill_(1)
        times.append(timed(forward))
    return sum(times) / len(times)


def captured_forward(engine: Engine) -> Callable[[], None]:
    """Return one target pass with the LM head, captured; it leaves the rows that are kept alone."""
    speculator = engine.speculator

    def work() -> None:
        hidden = speculator.target.forward(
            speculator.tokens_TB, speculator.plan.target_block, speculator.target_cache,
            first=0, commit=True,
        )  # fmt: skip
        speculator.target.logits(hidden)

    with torch.inference_mode():
        for _ in range(2):
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
    return graph.replay


def timed(work: Callable[[], None]) -> float:
    """Return the device's ms for one call, many back to back: the median of five."""
    times = []
    for _ in range(TIMED_ROUNDS):
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
