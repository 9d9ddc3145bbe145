"""Walks over sampled traces against live steps that sample with other seeds.

    python benchmarks/sampled_walk.py [--draft mtp] [--device cpu] [--rounds 4] [--output FILE]

The prompts of the demo set are continued without end, at temperatures 0.6 and 1, by naive sampling
and by MSS. Both sides are means over all prompts and rounds, each with its standard error (of a
ratio of sums over texts); `deviations` is by how many standard errors they lie apart. More rounds,
each with seeds of its own, make the errors smaller: they should be at most 0.5 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from report import RESULTS, Row, header, save, table

from stree_autotune.live.validation import RAGGED
from stree_autotune.store.open_models import PairRequest, open_pair, open_prompts
from stree_autotune.trace.record import RecordConfig, record_trace
from stree_autotune.trace.tree_walk import walk
from stree_core.drafting.pair import Pair, Runtime
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig, needed_positions
from stree_core.engine.rules import SamplingSupport
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.stop import StopRule
from stree_core.profile import Sampling
from stree_core.tree import Tree

TREES = {"chain 3": Tree.chain(3), "ragged": RAGGED}
SHOWN = (
    "draft", "rule", "temperature", "tree", "tokens", "walked", "walked_error", "live",
    "live_error", "deviations",
)  # fmt: skip


def main() -> None:
    options = parse()
    request = PairRequest("demo-target", options.draft, (), Runtime(options.device, "float32"))
    pair = open_pair(request)
    prompts = (
        pair.encode(open_prompts("demo", "", (), limit=options.prompts).texts) * options.rounds
    )
    head, rows = header(device=options.device), []
    for temperature in options.temperatures:
        for rule in options.rules:
            sampling = Sampling(rule=rule, temperature=temperature)
            rows += compared(pair, options, sampling, prompts)
            save(options.output, head, rows)
    print(table(rows, SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sampled walks against live steps")
    parser.add_argument("--draft", default="mtp")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rules", nargs="+", default=["naive", "mss"])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.6, 1.0])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4, help="seeds of every prompt")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULTS / "sampled-walk-h200.json")
    return parser.parse_args()


def compared(
    pair: Pair, options: argparse.Namespace, sampling: Sampling, prompts: Sequence[list[int]]
) -> list[Row]:
    """Record one trace, and decode live with every tree."""
    config = RecordConfig(
        "demo", sampling, max_new_tokens=options.tokens, num_slots=options.slots, ignore_eos=True
    )
    trace = record_trace(pair, prompts, config)
    rows = []
    for name, tree in TREES.items():
        walked = walk(trace, tree)
        predicted = mean_and_error(walked.positions_P, walked.starts_P)
        tokens_P, steps_P = live(pair, options, sampling, prompts, tree)
        seen = mean_and_error(tokens_P, steps_P)
        rows.append(
            {
                "draft": options.draft,
                "rule": sampling.rule,
                "temperature": sampling.temperature,
                "tree": name,
                "tokens": int(tokens_P.sum()),
                "walked": round(predicted[0], 4),
                "walked_error": round(predicted[1] / predicted[0], 5),
                "live": round(seen[0], 4),
                "live_error": round(seen[1] / seen[0], 5),
                "deviations": round(
                    (seen[0] - predicted[0]) / float(np.hypot(seen[1], predicted[1])), 2
                ),
            }
        )
    return rows


def live(
    pair: Pair, options: argparse.Namespace, sampling: Sampling, prompts: Sequence[list[int]],
    tree: Tree,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return tokens and steps of every text, sampled with seeds that no trace has."""
    positions = needed_positions(max(map(len, prompts)), options.tokens, [tree])
    support = SamplingSupport.of(sampling)
    config = EngineConfig(options.slots, positions, sampling=support)
    engine = Engine(pair.target, pair.draft, tree, config)
    seeds = range(len(prompts), 2 * len(prompts))
    params = [SamplingParams.of(sampling, seed) for seed in seeds]
    run = generate(engine, prompts, StopRule(options.tokens), sampling=params)
    texts = run.generations
    tokens_P = np.array([len(text.tokens) - 1 for text in texts])
    return tokens_P, np.array([text.num_steps for text in texts])


def mean_and_error(positions_P: np.ndarray, starts_P: np.ndarray) -> tuple[float, float]:
    """Return a ratio of sums over texts, and its standard error."""
    ratio = positions_P.sum() / starts_P.sum()
    spread_P = positions_P - ratio * starts_P
    return float(ratio), float(np.sqrt((spread_P**2).sum()) / starts_P.sum())


if __name__ == "__main__":
    main()
