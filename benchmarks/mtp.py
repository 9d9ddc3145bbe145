"""Decode the demo target live with its own MTP head and with the demo draft.

    python benchmarks/mtp.py [--batches 1 8 32] [--rules greedy mss] [--tokens 128] [--output FILE]

Greedy, and sampled at temperature 1; without speculation, chains of 1 to 5 and three trees. Prompts
of the demo set are decoded in waves (stree_autotune.live.speed): tokens/s are those of full slots,
prefill left out. With --seconds, what is not done by then is left out. Kernels of a fresh machine
are compiled by a run with few --tokens; several may do so at once, each with a part of the cases.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

from report import RESULTS, Row, header, save, table

from stree_autotune.live.speed import live_speed
from stree_autotune.live.validation import RAGGED
from stree_autotune.store.open_models import PairRequest, open_pair, open_prompts
from stree_core.drafting.pair import Pair, Runtime
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.rules import SamplingSupport
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.session import Request
from stree_core.engine.stop import StopRule
from stree_core.tree import DEFAULT_TREE, OFF, Tree

WIDE = Tree.from_paths([[i] for i in range(8)] + [[i, j] for i in range(4) for j in (0, 1)])
TREES = {f"chain {k}": Tree.chain(k) for k in range(1, 6)} | {
    "published tree": DEFAULT_TREE, "ragged tree": RAGGED, "wide tree": WIDE,
}  # fmt: skip
CONTEXT, FEWEST_PROMPTS = 768, 8
SHOWN = ("draft", "batch", "mode", "tree", "tokens_per_step", "step_ms", "tokens_per_s")


@dataclass(frozen=True)
class Case:
    """One way of decoding; `draft` is off without speculation."""

    draft: str
    batch: int
    rule: str
    name: str
    tree: Tree


def main() -> None:
    options = parse()
    start = time.perf_counter()
    pairs = {
        draft: open_pair(PairRequest("demo-target", draft, (), Runtime(options.device, "auto")))
        for draft in options.drafts
    }
    texts = open_prompts("demo", "", ())
    any_pair = pairs[options.drafts[0]]
    prompts = any_pair.encode(texts)
    head, rows = header({}, "tests of the head", None), []
    for case in cases(options):
        if time.perf_counter() - start > options.seconds:
            print(f"left out from {case} on")
            break
        pair = any_pair if case.draft == "off" else pairs[case.draft]
        rows.append(measured(pair, case, prompts, options.tokens))
        save(options.output, head, rows)
    print(table(rows, SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The demo target with its head and its draft")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--drafts", nargs="+", default=["mtp", "demo-draft"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rules", nargs="+", default=["greedy", "mss"])
    parser.add_argument("--tokens", type=int, default=128, help="of every text, at most")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--output", type=Path, default=RESULTS / "mtp-h200.json")
    return parser.parse_args()


def cases(options: argparse.Namespace) -> list[Case]:
    """Return every way of decoding, the most asked for first."""
    found = []
    for rule, batch in itertools.product(options.rules, options.batches):
        found.append(Case("off", batch, rule, "off", OFF))
        for (name, tree), draft in itertools.product(TREES.items(), options.drafts):
            found.append(Case(draft, batch, rule, name, tree))
    return found


def measured(pair: Pair, case: Case, prompts: list[list[int]], num_tokens: int) -> Row:
    """Decode at least two waves and return what came of it."""
    temperature = 0.0 if case.rule == "greedy" else 1.0
    support = SamplingSupport(case.rule)  # type: ignore[arg-type]
    engine = Engine(
        pair.target, pair.draft, case.tree, EngineConfig(case.batch, CONTEXT, sampling=support)
    )
    chosen = prompts[: max(FEWEST_PROMPTS, 2 * case.batch)]
    generate(engine, chosen[: case.batch], StopRule(16))
    eos = pair.target.shape.eos_token_ids
    requests = [
        Request(prompt, StopRule(num_tokens, eos), SamplingParams(temperature, seed=index))
        for index, prompt in enumerate(chosen)
    ]
    speed = live_speed(engine, requests)
    return {
        "draft": case.draft,
        "batch": case.batch,
        "mode": "greedy" if case.rule == "greedy" else f"{case.rule}, T = 1",
        "tree": case.name,
        "nodes": case.tree.num_nodes,
        "prompts": len(chosen),
        "tokens_per_step": round(speed.tokens_per_step, 4),
        "step_ms": round(speed.step_ms, 4),
        "tokens_per_s": round(speed.tokens_per_s, 1),
    }


if __name__ == "__main__":
    main()
