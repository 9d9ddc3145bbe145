"""Count the texts that chains and trees decode differently from the target alone, and why.

    python benchmarks/lossless.py [--target demo-gdn --draft mtp] [--device cuda]
                                  [--dtype float32] [--output FILE]

Every prompt of the demo set is continued (end tokens are ignored) without speculation, one prompt
at a time, and with a chain and four trees, 1 and 5 at a time. Every text has a length of its own,
from half of --tokens to all of it, so that a batch ends raggedly. For each text that differs the
margin is printed: by how much the logit of the token that the target alone chose exceeds the
other's, at the first difference, seen from a fresh prefill. Behind it nothing can be compared, so
flips are counted against the tokens up to there.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from report import Row, header, save

from stree_autotune.live.validation import RAGGED
from stree_autotune.store.open_models import PairRequest, open_pair, open_prompts
from stree_core.drafting.pair import Pair, Runtime
from stree_core.engine.decode import Run, generate
from stree_core.engine.engine import Engine, EngineConfig, needed_positions
from stree_core.engine.stop import StopRule
from stree_core.tree import DEFAULT_TREE, Tree

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from margin import logit_margin

MODES = {
    "chain 4": Tree.chain(4),
    "published tree": DEFAULT_TREE,
    "ragged tree": RAGGED,
    "wide tree": Tree.from_paths(
        [[i] for i in range(8)] + [[i, j] for i in range(4) for j in (0, 1)]
    ),
    "large tree": Tree.from_paths(
        [[i] for i in range(6)]
        + [[i, j] for i in range(4) for j in range(3)]
        + [[0, i, j] for i in range(3) for j in range(3)]
        + [[i, 0, 0] for i in (1, 2, 3)]
        + [[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]]
        + [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]
        + [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0]]
    ),
}
"""The last has 40 nodes and depth 6."""


def main() -> None:
    options = parse()
    head, rows = header(device=options.device), []
    for dtype in options.dtype:
        work = [(options, dtype, part) for part in range(options.processes)]
        if options.processes == 1:
            parts = [compare(*work[0])]
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(options.processes, context) as pool:
                parts = list(pool.map(compare, *zip(*work, strict=True)))
        for same in zip(*parts, strict=True):
            row = together(same)
            rows.append(row)
            print(
                f"{dtype:9} batch {row['batch']} {row['mode']:15} {row['differing_texts']:3} of "
                f"{row['texts']} texts differ in {row['compared_tokens']} tokens; largest margin "
                f"{max(row['margins_at_first_difference'], default=0):.2e}"
            )
    if options.output is not None:
        save(options.output, head, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Differences from the target's own text")
    parser.add_argument("--target", default="demo-target")
    parser.add_argument("--draft", default="demo-draft")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", nargs="+", default=["float64", "float32"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--processes", type=int, default=1, help="each takes a part of the prompts")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def compare(options: argparse.Namespace, dtype: str, part: int) -> list[Row]:
    """Return a row for each batch size and mode, over one part of the prompts, taken in turns."""
    torch.set_num_threads(1)
    request = PairRequest(options.target, options.draft, (), Runtime(options.device, dtype, "auto"))
    pair = open_pair(request)
    longest, chosen = options.tokens, slice(part, options.prompts, options.processes)
    prompts = pair.encode(open_prompts("demo").texts)[chosen]
    lengths = [longest - index * 37 % (longest // 2) for index in range(options.prompts)]
    stops = [StopRule(length) for length in lengths[chosen]]
    alone = decode(pair, prompts, stops, 1, Tree.chain(0))
    rows = []
    for batch, (mode, tree) in itertools.product(options.batches, MODES.items()):
        run = decode(pair, prompts, stops, batch, tree)
        texts = [
            (expected.tokens, actual.tokens)
            for expected, actual in zip(alone.generations, run.generations, strict=True)
        ]
        margins = [
            logit_margin(pair.target, prompt, expected, actual)
            for prompt, (expected, actual) in zip(prompts, texts, strict=True)
            if expected != actual
        ]
        rows.append(
            {
                "target": options.target,
                "draft": options.draft,
                "dtype": dtype,
                "batch": batch,
                "mode": mode,
                "texts": len(prompts),
                "compared_tokens": sum(len(own) - unlike(own, other) for own, other in texts),
                "differing_texts": len(margins),
                "margins_at_first_difference": margins,
            }
        )
    return rows


def together(parts: Sequence[Row]) -> Row:
    """Return one row of the same mode over all parts' texts."""
    row = dict(parts[0])
    for key in ("texts", "compared_tokens", "differing_texts", "margins_at_first_difference"):
        row[key] = sum((part[key] for part in parts[1:]), parts[0][key])
    row["flips_per_100k_tokens"] = round(1e5 * row["differing_texts"] / row["compared_tokens"], 1)
    return row


def unlike(expected: list[int], actual: list[int]) -> int:
    """Return how many tokens stand behind the first difference."""
    assert len(expected) == len(actual)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(expected, actual, strict=True))
    return max(0, len(expected) - 1 - sum(1 for _ in same))


def decode(
    pair: Pair, prompts: list[list[int]], stops: list[StopRule], batch: int, tree: Tree
) -> Run:
    longest = max(map(len, prompts))
    most = max(stop.max_new_tokens for stop in stops)
    config = EngineConfig(batch, needed_positions(longest, most, [tree]))
    engine = Engine(pair.target, pair.draft, tree, config)
    return generate(engine, prompts, stops)


if __name__ == "__main__":
    main()
