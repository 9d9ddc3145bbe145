"""How often the intervals of verdicts hold what they are about, where the truth is known.

    python benchmarks/coverage.py [--minutes 15] [--prompts 64] [--output coverage.json]

A population of prompts (a shipped trace, or a synthetic one) is the truth. A repeat draws prompts
from it with replacement, decides by them, and compares the row with the population: the speedup
over off of the very tree that was chosen. The times that tuning sees are the table's; the true ones
are a draw of their uncertainty. Synthetic prompts are drawn anew, so that none comes twice.

Rows that are not off count for `coverage`: the true speedup lies in the interval. `optimistic` is
the share of them whose truth lies below it, `pessimistic` above it. `wrong` is the share of them
that are truly slower than off. `regret` is how much slower than the population's best tree the
chosen one is, on average over all rows. Needs no GPU; the number of repeats is what fits into the
minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from report import RESULTS, Row, header, save, table

from stree_autotune.cost.step_cost import StepCost
from stree_autotune.search.study import CostModel, search_batch
from stree_autotune.search.tree_space import TreeSpace
from stree_autotune.search.verdict import Decision, decide_policy
from stree_autotune.store.library import shipped_root
from stree_autotune.store.runtime_table import load_runtime_table
from stree_autotune.trace.file import Trace, load_trace
from stree_core.tree import OFF

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from synthetic import latent_trace

BATCH_SIZES = (1, 8, 32)
MAX_NODES = 24
SHIPPED = (
    ("2.7b", "mamba2-2.7b--mamba2-130m", "demo-target--demo-draft--gsm8k--greedy"),
    ("8b", "mamba-in-llama-8b--mamba2-distilled-small", "demo-target--demo-draft--gsm8k--greedy"),
    ("demo", "demo-target--demo-draft", "demo-target--demo-draft--mt_bench--greedy"),
    ("demo mtp", "demo-target--mtp", "demo-target--mtp--gsm8k--greedy"),
)
SHOWN = (
    "pair", "batch", "repeats", "decided", "coverage", "optimistic", "pessimistic", "wrong",
    "regret",
)  # fmt: skip
POOLED = "all"


@dataclass
class Population:
    """Prompts whose truth is known, a cost, and what was found at each batch size."""

    name: str
    whole: TreeSpace
    cost: StepCost
    max_nodes: int
    sample: Callable[[np.random.Generator, int], Trace]
    best: dict[int, float] = field(default_factory=dict)
    found: dict[int, list[Outcome]] = field(default_factory=dict)

    def repeat(self, seed: int, num_prompts: int) -> None:
        """Decide by drawn prompts, and note how that compares with the truth."""
        rng = np.random.default_rng(seed)
        trace, truth = self.sample(rng, num_prompts), self.cost.draw(rng)
        decisions = decide_policy(
            trace, self.cost, BATCH_SIZES, max_nodes=self.max_nodes, seed=seed
        )
        for decision in decisions:
            outcome = self._outcome(decision, truth)
            self.found.setdefault(decision.batch_size, []).append(outcome)

    def _outcome(self, decision: Decision, truth: CostModel) -> Outcome:
        size = decision.batch_size
        rate = self.whole.tokens_per_step(decision.tree)
        speed = rate / truth.step_ms(size, decision.tree, rate)
        off = 1 / truth.step_ms(size, OFF, 1.0)
        if size not in self.best:
            best = search_batch(self.whole, self.cost, size, seed=0).best
            self.best[size] = best.tokens_per_step / best.step_ms
        chosen = rate / self.cost.step_ms(size, decision.tree, rate)
        return Outcome(
            is_off=decision.tree == OFF,
            true_speedup=speed / off,
            interval=decision.speedup_interval,
            regret=max(0.0, self.best[size] / chosen - 1),
        )


@dataclass(frozen=True)
class Outcome:
    """One row of one repeat beside the truth."""

    is_off: bool
    true_speedup: float
    interval: tuple[float, float]
    regret: float


def main() -> None:
    options, run = parse(), header()
    populations = list(shipped()) + list(synthetic())
    end, repeats = time.process_time() + 60 * options.minutes, 0
    while time.process_time() < end:
        for population in populations:
            population.repeat(repeats, options.prompts)
        repeats += 1
    rows = [row for population in populations for row in rows_of(population)]
    head = {
        **run,
        "prompts": options.prompts,
        "max_nodes": MAX_NODES,
    }
    save(options.output, head, rows)
    print(table(rows, SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Coverage of the verdicts' intervals")
    parser.add_argument("--minutes", type=float, default=15.0, help="of processor time")
    parser.add_argument("--prompts", type=int, default=64, help="drawn for each repeat")
    parser.add_argument("--output", type=Path, default=RESULTS / "coverage.json")
    return parser.parse_args()


def shipped() -> Iterator[Population]:
    """Yield the shipped traces with tables of an H200."""
    for name, pair, trace_name in SHIPPED:
        trace = load_trace(shipped_root() / "traces" / f"{trace_name}.safetensors")
        yield population(name, pair, trace, resampler(trace))


def synthetic() -> Iterator[Population]:
    """Yield populations of prompts of very different difficulty, without and with a depth axis."""
    for name, pair, depths in (
        ("synthetic", "mamba2-2.7b--mamba2-130m", 1),
        ("synthetic depths", "demo-target--mtp", 5),
    ):

        def fresh(rng: np.random.Generator, count: int, depths: int = depths) -> Trace:
            seed = int(rng.integers(1 << 40))
            return latent_trace(seed, num_prompts=count, phi=0.3, prompt_sd=0.7, depths=depths)

        yield population(name, pair, fresh(np.random.default_rng(1 << 41), 1500), fresh)


def population(
    name: str, pair: str, trace: Trace, sample: Callable[[np.random.Generator, int], Trace]
) -> Population:
    cost = StepCost.from_table(
        load_runtime_table(shipped_root() / "runtime" / f"h200--{pair}.yaml")
    )
    most = cost.most_nodes(BATCH_SIZES, MAX_NODES)
    return Population(name, TreeSpace.of(trace, most), cost, most, sample)


def resampler(trace: Trace) -> Callable[[np.random.Generator, int], Trace]:
    """Return a function that draws prompts of a trace with replacement."""

    def sample(rng: np.random.Generator, count: int) -> Trace:
        drawn = rng.integers(0, trace.num_prompts, count)
        parts = [trace.ranks[trace.offsets[i] : trace.offsets[i + 1]] for i in drawn]
        offsets = np.cumsum([0, *map(len, parts)]).astype(np.int64)
        meta = trace.meta.model_copy(update={"num_prompts": count})
        return Trace(np.concatenate(parts), offsets, meta)

    return sample


def rows_of(population: Population) -> list[Row]:
    """Return a row for each batch size and one for all of them."""
    found = population.found
    rows = [row_of(population.name, size, found[size]) for size in sorted(found)]
    return [*rows, row_of(population.name, POOLED, list(chain(*found.values())))]


def row_of(pair: str, batch: int | str, outcomes: Sequence[Outcome]) -> Row:
    told = [outcome for outcome in outcomes if not outcome.is_off]
    shares: dict[str, float | None] = dict.fromkeys(SHOWN[4:8])
    if told:
        low = [each.true_speedup < each.interval[0] for each in told]
        high = [each.true_speedup > each.interval[1] for each in told]
        slower = [each.true_speedup < 1 for each in told]
        optimistic, pessimistic, wrong = map(statistics.fmean, (low, high, slower))
        values = (1 - optimistic - pessimistic, optimistic, pessimistic, wrong)
        shares = {name: round(value, 4) for name, value in zip(SHOWN[4:8], values, strict=True)}
    regret = statistics.fmean(outcome.regret for outcome in outcomes)
    return {
        "pair": pair,
        "batch": batch,
        "repeats": len(outcomes),
        "decided": len(told),
        **shares,
        "regret": round(regret, 4),
    }


if __name__ == "__main__":
    main()
