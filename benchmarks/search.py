"""Our search against other ways to choose a tree: tokens/s on prompts that were not looked at.

Every method chooses on one half of the prompts and is timed on the other, and the other way round;
all share the walk and the step cost. Methods with a family of trees take the one that is fastest on
the prompts they may see, so only their ways of building trees differ. `gap` is the distance of the
tree chosen on all prompts from the certified bound.

    python benchmarks/search.py [--traces gsm8k,ar6] [--positions 6000]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from report import RESULTS, Row, header, save
from search_baselines import METHODS

from stree_autotune.cost.step_cost import StepCost
from stree_autotune.search.certificate import Certificate, certify, load_certificate
from stree_autotune.search.study import search_batch
from stree_autotune.search.tree_space import TreeSpace
from stree_autotune.store.library import Library, shipped_root
from stree_autotune.store.runtime_table import load_runtime_table
from stree_autotune.trace.file import Trace, load_trace
from stree_autotune.trace.tree_walk import FlatTrace, walk
from stree_core.tree import Tree

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from synthetic import latent_trace

SHIPPED = ("demo", "gsm8k", "human_eval", "mt_bench")
SYNTHETIC: dict[str, dict[str, Any]] = {
    "iid": {},
    "ar3": {"phi": 0.3},
    "ar6": {"phi": 0.6},
    "ar9": {"phi": 0.9},
    "mixture": {"prompt_sd": 1.0},
}
TABLES = ("h200--demo-target--demo-draft", "h200--mamba2-2.7b--mamba2-130m")
BATCH_SIZES = (1, 8, 32)
MAX_NODES = 64
LENGTH = 126
TOLERANCE = 0.002
OURS = "ours"


class Half:
    """Some prompts of a trace, the trees each method may choose from, and what they make."""

    def __init__(self, trace: Trace, prompts: np.ndarray) -> None:
        self.flat = FlatTrace.of(trace, prompts)
        self.space = TreeSpace.of(trace, MAX_NODES, prompts)
        self.starts_of: dict[Tree, int] = {}
        self.families = {
            name: list(dict.fromkeys(make(self.flat, MAX_NODES))) for name, make in METHODS.items()
        }

    def starts(self, tree: Tree) -> int:
        """Return the steps that all prompts take with a tree."""
        if tree not in self.starts_of:
            self.starts_of[tree] = int(walk(self.flat, tree).starts_P.sum())
        return self.starts_of[tree]

    def ms(self, tree: Tree, cost: StepCost, batch_size: int) -> float:
        """Return the predicted time of all prompts, one after another."""
        starts = self.starts(tree)
        return starts * cost.step_ms(batch_size, tree, self.flat.num_positions / starts)

    def choose(self, method: str, cost: StepCost, batch_size: int) -> Tree:
        """Return the tree that a method takes for these prompts."""
        if method == OURS:
            # off is nobody's method, and is no tree
            found = search_batch(self.space, cost, batch_size, seed=0)
            kinds = [trial for trial in (found.chain, found.tree) if trial is not None]
            return max(kinds, key=lambda trial: trial.tokens_per_s).tree
        return min(self.families[method], key=lambda tree: self.ms(tree, cost, batch_size))


def rows_of(
    name: str, trace: Trace, certificate: Certificate, costs: dict[str, StepCost]
) -> Iterator[Row]:
    """Yield one row per table, batch size and method."""
    every = np.flatnonzero(np.diff(trace.offsets))
    halves = [Half(trace, every[0::2]), Half(trace, every[1::2])]
    whole = Half(trace, every)
    for table, cost in costs.items():
        for batch_size in BATCH_SIZES:
            most = certificate.most_tokens_per_s(cost, batch_size, MAX_NODES)
            for method in (OURS, *METHODS):
                total_ms = 0.0
                for chosen_on, timed_on in (halves, halves[::-1]):
                    tree = chosen_on.choose(method, cost, batch_size)
                    total_ms += timed_on.ms(tree, cost, batch_size)
                tree = whole.choose(method, cost, batch_size)
                fitted_ms = whole.ms(tree, cost, batch_size)
                tokens = 1000 * batch_size * trace.num_positions
                off = 1000 * batch_size / cost.least_ms(batch_size, 0, 0, 1.0)
                yield {
                    "trace": name,
                    "table": table,
                    "batch": batch_size,
                    "method": method,
                    "nodes": tree.num_nodes,
                    "depth": tree.depth,
                    "tokens_per_s": round(tokens / total_ms, 2),
                    # deciding for off is every method's right, and none's merit
                    "gap": round(max(0.0, most / max(tokens / fitted_ms, off) - 1), 5),
                    "speedup_over_off": round(tokens / total_ms / off, 4),
                }


def traces(names: list[str], num_positions: int) -> Iterator[tuple[str, Trace, Certificate]]:
    """Yield the shipped traces with their certificates, and synthetic ones with fresh ones."""
    library = Library.open(())
    for name in names:
        if name in SHIPPED:
            path = library.find_trace("demo-target", "demo-draft", name)
            certificate = load_certificate(path)
            trace = load_trace(path)
        else:
            trace = latent_trace(
                7, num_prompts=num_positions // 113, length=LENGTH, **SYNTHETIC[name]
            )
            certificate = certify(trace, "0" * 64)
        assert certificate is not None
        yield name, trace, certificate


def summary(rows: list[Row]) -> dict[str, Any]:
    """Return how ours compares: worst loss against each method, and the certified gaps."""
    ours = {key(row): row for row in rows if row["method"] == OURS}
    ratio: Callable[[Row], float] = lambda row: ours[key(row)]["tokens_per_s"] / row["tokens_per_s"]  # noqa: E731
    gaps = [row["gap"] for row in ours.values()]
    return {
        "median_gap": round(statistics.median(gaps), 4),
        "largest_gap": max(gaps),
        "ours_over": {
            method: {
                "worst": round(min(ratio(row) for row in rows if row["method"] == method), 4),
                "median": round(
                    statistics.median(ratio(row) for row in rows if row["method"] == method), 4
                ),
            }
            for method in METHODS
        },
        "rows_below": sum(ratio(row) < 1 - TOLERANCE for row in rows if row["method"] != OURS),
    }


def key(row: Row) -> tuple[str, str, int]:
    """Return what rows of different methods share."""
    return row["trace"], row["table"], row["batch"]


def main() -> None:
    """Run, write the results file, print a small table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", default=",".join((*SYNTHETIC, *SHIPPED)))
    parser.add_argument("--positions", type=int, default=6000, help="of each synthetic trace")
    parser.add_argument("--output", type=Path, default=RESULTS / "search.json")
    options, run = parser.parse_args(), header()
    costs = {
        name: StepCost.from_table(load_runtime_table(shipped_root() / "runtime" / f"{name}.yaml"))
        for name in TABLES
    }
    rows: list[Row] = []
    for name, trace, certificate in traces(options.traces.split(","), options.positions):
        started = time.process_time()
        rows += rows_of(name, trace, certificate, costs)
        seconds = time.process_time() - started
        print(f"{name}: {trace.num_positions} positions, {seconds:.0f} s", file=sys.stderr)
    document = {
        **run,
        "summary": summary(rows),
    }
    save(options.output, document, rows)
    print(table(document), end="")


def table(document: dict[str, Any]) -> str:
    """Return the summary as Markdown."""
    found = document["summary"]
    lines = [f"`{document['command']}`, {document['date'][:10]}", ""]
    lines += ["| method | ours over it, worst | median |", "| --- | ---: | ---: |"]
    lines += [
        f"| {method} | {100 * (both['worst'] - 1):+.1f} % | {100 * (both['median'] - 1):+.1f} % |"
        for method, both in found["ours_over"].items()
    ]
    lines += ["", f"Rows where ours is more than 0.2 % below: {found['rows_below']}."]
    lines += [
        f"Certified gap of ours: median {100 * found['median_gap']:.1f} %, "
        f"largest {100 * found['largest_gap']:.1f} %."
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
