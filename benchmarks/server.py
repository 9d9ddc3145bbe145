"""How often a server's verdict is the right one, on servers whose truth is known.

    python benchmarks/server.py [--cases 100] [--first 0] [--output FILE]

Every case is a server with a drawn cost and acceptance (tests/synthetic_server.py): its plan's
results are written as `vllm bench serve` saves them, with noise and one trap in five of six cases,
imported and decided. A case is right when *every* batch size is: with the best K, or with "cannot
tell" where the truth is within 2 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from report import RESULTS, Row, header, save

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from synthetic_server import ROUNDS, RUN_NOISE, START_NOISE, TRAPS, SyntheticServer, choices_of

AIM = 0.95


def judge(seed: int) -> Row:
    """Return how many batch sizes of a case were decided, and which wrongly."""
    server = SyntheticServer(seed, TRAPS[seed % len(TRAPS)])
    with tempfile.TemporaryDirectory() as folder:
        choices = choices_of(server, Path(folder))
    wrong = [choice for choice in choices if not server.is_right(choice)]
    return {
        "seed": seed,
        "trap": server.trap,
        "batch_sizes": len(choices),
        "cannot_tell": sum(choice.cannot_tell for choice in choices),
        "wrong": [
            {"batch": c.batch_size, "chosen": c.draft_tokens, "cannot_tell": c.cannot_tell}
            for c in wrong
        ],
    }


def main() -> None:
    """Judge all cases and print both counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "server.json")
    arguments = parser.parse_args()
    run, rows = header(), []
    for seed in range(arguments.first, arguments.first + arguments.cases):
        row = judge(seed)
        rows.append(row)
        if row["wrong"]:
            print(f"case {seed} ({row['trap']}): {row['wrong']}")
    right = sum(not row["wrong"] for row in rows)
    sizes = sum(row["batch_sizes"] for row in rows)
    missed = sum(len(row["wrong"]) for row in rows)
    verdict = "met" if right >= AIM * len(rows) else "missed"
    print(f"{right} of {len(rows)} cases right at every batch size (aim 95 %: {verdict})")
    print(f"{sizes - missed} of {sizes} verdicts right")
    head = {
        **run,
        "rounds": ROUNDS,
        "run_noise": RUN_NOISE,
        "start_noise": START_NOISE,
        "right": right,
        "cases": len(rows),
    }
    save(arguments.output, head, rows)


if __name__ == "__main__":
    main()
