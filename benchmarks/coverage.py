"""How often the intervals of verdicts hold what they are about, where the truth is known.

    python benchmarks/coverage.py [--workers 14] [--seconds 400] [--repeats 2000] [--prompts 64]
                                  [--pair 2.7b]... [--output coverage.json]

A population of prompts (a shipped trace, or a synthetic one) is the truth. A repeat draws prompts
from it with replacement, decides by them, and compares the row with the population: the speedup
over off of the very tree that was chosen. The times that tuning sees are the table's; the true ones
are a draw of their uncertainty. Synthetic prompts are drawn anew, so that none comes twice.

Rows that are not off count for `coverage`: the true speedup lies in the interval. `optimistic` is
the share of them whose truth lies below it, `pessimistic` above it. `wrong` is the share of them
that are truly slower than off. `regret` is how much slower than the population's best tree the
chosen one is, on average over all rows. Needs no GPU. Repeats 0, 1, 2, ... are handed out to the
worker processes until the seconds are over or all repeats are done; each is its own seed, so the
rows depend on the number of repeats alone, not on the workers.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
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
SYNTHETIC = (
    ("synthetic", "mamba2-2.7b--mamba2-130m", 1),
    ("synthetic depths", "demo-target--mtp", 5),
)
SHOWN = (
    "pair", "batch", "repeats", "decided", "coverage", "optimistic", "pessimistic", "wrong",
    "regret",
)  # fmt: skip
POOLED = "all"


@dataclass
class Population:
    """Prompts whose truth is known, a cost, and the best speed at each batch size once asked."""

    name: str
    whole: TreeSpace
    cost: StepCost
    max_nodes: int
    sample: Callable[[np.random.Generator, int], Trace]
    best: dict[int, float] = field(default_factory=dict)

    def repeat(self, seed: int, num_prompts: int) -> list[Outcome]:
        """Decide by drawn prompts, and return how that compares with the truth."""
        rng = np.random.default_rng(seed)
        trace, truth = self.sample(rng, num_prompts), self.cost.draw(rng)
        decisions = decide_policy(
            trace, self.cost, BATCH_SIZES, max_nodes=self.max_nodes, seed=seed
        )
        return [self._outcome(decision, truth) for decision in decisions]

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
            pair=self.name,
            batch_size=size,
            is_off=decision.tree == OFF,
            true_speedup=speed / off,
            interval=decision.speedup_interval,
            regret=max(0.0, self.best[size] / chosen - 1),
        )


@dataclass(frozen=True)
class Outcome:
    """One row of one repeat beside the truth."""

    pair: str
    batch_size: int
    is_off: bool
    true_speedup: float
    interval: tuple[float, float]
    regret: float


def main() -> None:
    options, this_run = parse(), header()
    names = options.pair or list(known())
    repeats, outcomes = run(options, names)
    rows = [row for name in names for row in rows_of(name, outcomes)]
    head = {
        **this_run,
        "prompts": options.prompts,
        "max_nodes": MAX_NODES,
        "repeats": repeats,
    }
    save(options.output, head, rows)
    print(table(rows, SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Coverage of the verdicts' intervals")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seconds", type=float, default=900.0, help="after which none starts")
    parser.add_argument("--repeats", type=int, default=2000, help="of each population, at most")
    parser.add_argument("--prompts", type=int, default=64, help="drawn for each repeat")
    parser.add_argument("--pair", action="append", choices=list(known()), help="default: all")
    parser.add_argument("--output", type=Path, default=RESULTS / "coverage.json")
    return parser.parse_args()


def run(options: argparse.Namespace, names: Sequence[str]) -> tuple[int, list[Outcome]]:
    """Return the number of repeats done and all outcomes, in the order of the repeats."""
    end, found = time.monotonic() + options.seconds, {}
    # One thread each: the workers share the cores already. Libraries read this as they load.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    context = multiprocessing.get_context("spawn")
    seeds = iter(range(options.repeats))
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        running = {
            pool.submit(repeat, names, seed, options.prompts)
            for seed in islice(seeds, options.workers)
        }
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for each in done:
                seed, outcomes = each.result()
                found[seed] = outcomes
                following = next(seeds, None) if time.monotonic() < end else None
                if following is not None:
                    running.add(pool.submit(repeat, names, following, options.prompts))
    return len(found), [outcome for seed in sorted(found) for outcome in found[seed]]


def repeat(names: Sequence[str], seed: int, num_prompts: int) -> tuple[int, list[Outcome]]:
    """Run one repeat of each population in a worker; return the seed and the outcomes."""
    outcomes = [loaded(name).repeat(seed, num_prompts) for name in names]
    return seed, [outcome for each in outcomes for outcome in each]


@functools.cache
def loaded(name: str) -> Population:
    """Return a population, loaded once in each process."""
    return known()[name]()


def known() -> dict[str, Callable[[], Population]]:
    """Return how each population is loaded, by name."""
    made = [(row[0], functools.partial(shipped, *row)) for row in SHIPPED]
    made += [(row[0], functools.partial(synthetic, *row)) for row in SYNTHETIC]
    return dict(made)


def shipped(name: str, pair: str, trace_name: str) -> Population:
    """Load the population of a shipped trace, with a table of an H200."""
    trace = load_trace(shipped_root() / "traces" / f"{trace_name}.safetensors")
    return population(name, pair, trace, resampler(trace))


def synthetic(name: str, pair: str, depths: int) -> Population:
    """Make a population of prompts of very different difficulty, of so many recorded depths."""

    def fresh(rng: np.random.Generator, count: int) -> Trace:
        seed = int(rng.integers(1 << 40))
        return latent_trace(seed, num_prompts=count, phi=0.3, prompt_sd=0.7, depths=depths)

    return population(name, pair, fresh(np.random.default_rng(1 << 41), 1500), fresh)


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


def rows_of(pair: str, outcomes: Sequence[Outcome]) -> list[Row]:
    """Return a pair's row for each batch size and one for all of them."""
    own = [each for each in outcomes if each.pair == pair]
    sizes = {size: [each for each in own if each.batch_size == size] for size in BATCH_SIZES}
    rows = [row_of(pair, size, some) for size, some in sizes.items() if some]
    return [*rows, row_of(pair, POOLED, own)]


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
