"""How much speed a choice of tree leaves behind, by live steps.

    python benchmarks/regret.py [--pairs demo mamba2-2.7b] [--batches 1 8] [--output FILE]
    python benchmarks/regret.py --pairs demo --batches 1 --trials 8 --max-nodes 12 --output cpu.json

Per pair and batch size at least 40 trees are timed live, as `stree-tune --measure` does. Four picks
are looked at: the offline search's and the measured one's, each as the fastest (point) and as the
verdict, which takes the simplest option that may be as fast. The picks, off, and the five fastest
are then timed a second time, every tree on an engine of its own; regret is what a pick lacks to the
fastest of these, by the second times alone. Acceptance is that of a trace, in live steps as well
(stree_autotune.live.measure), so tokens per step are exact and only times are measured. The demo
pair has its own trace; the shapes mamba2-2.7b and mamba2-130m have random weights and borrow one.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from report import RESULTS, Row, header, save, table

from stree_autotune.live.measure import measure_steps
from stree_autotune.live.search import NUM_LIVE_TRIALS
from stree_autotune.live.tuning import decide_live, live_search, open_question_pair
from stree_autotune.probe.timing import Effort
from stree_autotune.search.request import TuneRequest
from stree_autotune.search.study import Trial, search_batch
from stree_autotune.search.tuning import Question, ask
from stree_autotune.search.verdict import decide_policy
from stree_core.drafting.pair import Pair, short_gpu_name
from stree_core.models.backend import resolve_device
from stree_core.profile import Sampling
from stree_core.tree import OFF, Tree

PAIRS = {
    "demo": ("demo-target", "demo-draft", "demo", ""),
    "mamba2-2.7b": (
        "mamba2-2.7b", "mamba2-130m", "", "demo-target--demo-draft--gsm8k--greedy"
    ),
}  # fmt: skip
CONTEXT = 1024
FASTEST = 5
SECOND_LOOK = Effort(min_rounds=15, max_rounds=80, seconds=0.4)
AIMS = {"offline": 0.03, "measured": 0.01}
SHOWN = (
    "pair", "batch", "config", "tokens_per_step", "step_ms", "live_tokens_per_s", "regret",
    "chosen_by",
)  # fmt: skip


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse()
    device = resolve_device("auto")
    head = header() | {"context": CONTEXT}
    rows: list[Row] = []
    for name in options.pairs:
        question = ask(request_of(name, short_gpu_name(head["gpu"], device), options))
        pair = open_question_pair(question)
        for batch in options.batches:
            rows += measure(name, question, pair, batch)
            save(options.output, head, rows)
        del pair
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(table([row for row in rows if row["measurement"] == "second"], SHOWN), end="")
    for row in rows:
        for chooser in filter(None, row["chosen_by"].split(", ")):
            print_regret(row, chooser)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Regret of the chosen trees")
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--trials", type=int, default=NUM_LIVE_TRIALS)
    parser.add_argument("--max-nodes", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS / "regret-h200.json")
    return parser.parse_args()


def request_of(name: str, gpu: str, options: argparse.Namespace) -> TuneRequest:
    target, draft, dataset, acceptance_from = PAIRS[name]
    return TuneRequest(
        gpu=gpu,
        dataset=dataset,
        target=target,
        draft=draft,
        sampling=Sampling(),
        context=CONTEXT,
        batch_sizes=tuple(options.batches),
        max_nodes=options.max_nodes,
        data=(),
        acceptance_from=acceptance_from,
        seed=0,
        num_trials=options.trials,
    )


def measure(name: str, question: Question, pair: Pair, batch: int) -> list[Row]:
    """Return the first rows of all trees, and the second ones of the fastest and the picks."""
    live = live_search(question, pair, in_memory=True)
    found = live.run(batch)
    request, cost = question.request, question.runtime.cost
    (offline,) = decide_policy(
        question.trace, cost, (batch,), max_nodes=request.max_nodes, seed=request.seed
    )
    picks = {
        "offline point": search_batch(live.space, cost, batch, seed=request.seed).best.tree,
        "offline verdict": offline.tree,
        "measured point": found.search.best.tree,
        "measured verdict": decide_live(question, found).tree,
    }
    ranked = sorted(found.search.trials, key=lambda trial: -trial.tokens_per_s)
    chosen = [OFF, *picks.values(), *(trial.tree for trial in ranked[:FASTEST])]
    again = measure_steps(
        pair, question.trace, CONTEXT, batch, chosen, SECOND_LOOK, apart=True
    )  # fmt: skip
    second = [
        Trial.at(batch, tree, live.space.tokens_per_step(tree), step.ms)
        for tree, step in again.items()
    ]
    spreads = {tree: step.spread_ms for tree, step in found.cost.steps.items()}
    rows = as_rows(ranked, spreads, "first", {})
    rows += as_rows(second, {tree: step.spread_ms for tree, step in again.items()}, "second", picks)
    return [{"pair": name, "batch": batch} | row for row in rows]


def as_rows(
    trials: Sequence[Trial], spreads: dict[Tree, float], measurement: str, picks: dict[str, Tree]
) -> list[Row]:
    best = max(trial.tokens_per_s for trial in trials)
    return [
        {
            "config": config_of(trial.tree),
            "measurement": measurement,
            "tokens_per_step": round(trial.tokens_per_step, 4),
            "step_ms": round(trial.step_ms, 5),
            "spread": round(spreads[trial.tree] / trial.step_ms, 4),
            "live_tokens_per_s": round(trial.tokens_per_s, 1),
            "regret": round(1 - trial.tokens_per_s / best, 4),
            "chosen_by": ", ".join(name for name, tree in picks.items() if tree == trial.tree),
            "parents": list(trial.tree.parents[1:]),
        }
        for trial in sorted(trials, key=lambda trial: -trial.tokens_per_s)
    ]


def config_of(tree: Tree) -> str:
    """Return a short name; two trees may share it, their parents tell them apart."""
    if tree.num_nodes == 0:
        return "off"
    kind = "chain" if tree.is_chain else f"depth {tree.depth} tree of"
    return f"{kind} {tree.num_nodes}"


def print_regret(row: Row, chooser: str) -> None:
    aim = AIMS[chooser.split()[0]]
    verdict = "met" if row["regret"] <= aim else "missed"
    print(
        f"{row['pair']}, batch {row['batch']}, {chooser}: {row['config']}, regret "
        f"{row['regret']:.2%} (aim {aim:.0%}, {verdict})"
    )


if __name__ == "__main__":
    main()
