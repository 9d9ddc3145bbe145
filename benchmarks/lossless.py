"""Count the texts that chains and trees decode differently from the target alone, and why.

    python benchmarks/lossless.py [--device cuda] [--dtype float32] [--output FILE]

Every prompt of the demo set is continued by exactly --tokens tokens (end tokens are ignored)
without speculation, with a chain and with three trees. For each text that differs the margin is
printed: by how much the logit of the token that the target alone chose exceeds the other's, at the
first difference, seen from a fresh prefill.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stree_autotune.live import PairRequest, open_pair, open_prompts
from stree_autotune.margin import logit_margin
from stree_autotune.provenance import utc_now, versions
from stree_autotune.validate import RAGGED
from stree_core.decode import Run, generate
from stree_core.engine import Engine, EngineConfig, needed_positions
from stree_core.files import write_atomically
from stree_core.pair import Pair, Runtime, device_name
from stree_core.stop import StopRule
from stree_core.tree import DEFAULT_TREE, Tree

MODES = {
    "chain 4": Tree.chain(4),
    "published tree": DEFAULT_TREE,
    "ragged tree": RAGGED,
    "wide tree": Tree.from_paths(
        [[i] for i in range(8)] + [[i, j] for i in range(4) for j in (0, 1)]
    ),
}


def main() -> None:
    options = parse()
    rows = []
    for dtype in options.dtype:
        pair = open_pair(
            PairRequest("demo-target", "demo-draft", (), Runtime(options.device, dtype, "auto"))
        )
        prompts = pair.encode(open_prompts("demo", None, ())[: options.prompts])
        rows += compare(pair, prompts, options.tokens, dtype)
        name = device_name(pair.device)
    document = {
        "command": f"python benchmarks/lossless.py --device {options.device} "
        f"--dtype {' '.join(options.dtype)} --prompts {options.prompts} --tokens {options.tokens}",
        "gpu": name,
        "versions": versions(),
        "date": utc_now(),
        "rows": rows,
    }
    if options.output is not None:
        write_atomically(options.output, (json.dumps(document, indent=1) + "\n").encode())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Differences from the target's own text")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", nargs="+", default=["float64", "float32"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def compare(
    pair: Pair, prompts: list[list[int]], num_tokens: int, dtype: str
) -> list[dict[str, object]]:
    """Return one row per mode: differing texts, tokens per step, margins at first differences."""
    alone = decode(pair, prompts, num_tokens, Tree.chain(0))
    rows: list[dict[str, object]] = []
    for mode, tree in MODES.items():
        run = decode(pair, prompts, num_tokens, tree)
        margins = [
            logit_margin(pair.target, prompt, expected.tokens, actual.tokens)
            for prompt, expected, actual in zip(
                prompts, alone.generations, run.generations, strict=True
            )
            if expected.tokens != actual.tokens
        ]
        rows.append(
            {
                "dtype": dtype,
                "mode": mode,
                "texts": len(prompts),
                "tokens_per_text": num_tokens,
                "differing_texts": len(margins),
                "margins_at_first_difference": margins,
                "tokens_per_step": round(run.tokens_per_step, 4),
            }
        )
        listed = ", ".join(f"{value:.2e}" for value in margins) or "none"
        print(
            f"{dtype:9} {mode:15} {len(margins):3} of {len(prompts)} texts differ; margins {listed}"
        )
    return rows


def decode(pair: Pair, prompts: list[list[int]], num_tokens: int, tree: Tree) -> Run:
    longest = max(map(len, prompts))
    config = EngineConfig(1, needed_positions(longest, num_tokens, [tree]))
    engine = Engine(pair.target, pair.draft, tree, config)
    return generate(engine, prompts, StopRule(num_tokens))


if __name__ == "__main__":
    main()
