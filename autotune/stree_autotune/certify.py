"""Make a trace's certificate: weights for a few depths and prices per node, once per trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from stree_autotune.blocks import Blocks
from stree_autotune.certificate import Certificate, DepthBound, Line, save_certificate
from stree_autotune.cover_bound import FIRST_STAGES, STAGES, Floats, bound, fit_weights
from stree_autotune.growth import solve
from stree_autotune.path_counts import index_paths
from stree_autotune.provenance import provenance
from stree_autotune.trace_file import Trace, load_trace
from stree_autotune.trace_walk import Slots, walk_nested
from stree_core.files import sha256_of
from stree_core.tree import MAX_NODES, Tree

DEPTHS = (2, 3, 4, 6, 8, 10, 12, 16, 24, 32)
"""Trees of up to so many levels have bounds of their own: their steps are quicker, and no mixture
of a few much deeper trees stands in for them."""

ALWAYS_DEPTH = 4
LEAST_GAIN = 0.02
"""Share of starts that chains of the next depth must save for a bound at that depth to pay."""

LISTED_DEPTH = 64
"""Paths deeper than this are taken to come for free in the bound on all trees."""

SIZES = (2, 4, 8, 16, 32, 64, 128, MAX_NODES)
"""Numbers of nodes at which a bound is tightest; every line holds for all."""

DESCRIBED_SIZES = (1, 2, 4, 8, 16, 32, 64)
GROWTH_DEPTH = 16
LEAST_PRICE = 0.5
"""Starts that a node must save; below, a line says nothing that its neighbour does not."""

PRUNING = 3
"""Paths with fewer blocks than a third of the price are left out while weights are sought."""

SIGNIFICANT = 9


def certify_file(path: Path, progress: Callable[[str], None] | None = None) -> Certificate:
    """Certify a trace file and write the certificate beside it."""
    certificate = certify(load_trace(path), sha256_of(path), progress)
    save_certificate(certificate, path)
    return certificate


def describe(certificate: Certificate) -> str:
    """Return one line: the most tokens per step with up to some numbers of nodes."""
    most = certificate.most_tokens_per_step
    values = ", ".join(f"{most[size - 1]:.2f} ({size})" for size in DESCRIBED_SIZES)
    return f"  most tokens per step of any static tree (with up to so many nodes): {values}"


def certify(
    trace: Trace, trace_sha256: str, progress: Callable[[str], None] | None = None
) -> Certificate:
    """Bound the tokens per step of every static tree on a trace.

    `progress` gets one line per depth.
    """
    slots = Slots.of(trace)
    chains = _nested_starts(slots, Tree.chain(LISTED_DEPTH))
    bounds = []
    for max_depth in (*_depths(chains), None):
        bounds.append(_depth_bound(slots, max_depth))
        if progress is not None:
            levels = "any number of" if max_depth is None else f"up to {max_depth}"
            progress(f"bounded trees of {levels} levels")
    stars = Tree.from_paths([rank] for rank in range(slots.num_children))
    return Certificate(
        trace_sha256=trace_sha256,
        num_positions=slots.num_positions,
        chains=chains,
        stars=_nested_starts(slots, stars),
        bounds=tuple(bounds),
        provenance=provenance(trace.meta.seed),
    )


def _depths(chains: Sequence[int]) -> list[int]:
    """Return the depths for bounds of their own: all that are small, and those that still gain."""
    depths = [depth for depth in DEPTHS if depth <= ALWAYS_DEPTH]
    for before, depth in pairwise(depth for depth in DEPTHS if depth >= ALWAYS_DEPTH):
        if chains[depth - 1] <= (1 - LEAST_GAIN) * chains[before - 1]:
            depths.append(depth)
    return depths


def _nested_starts(slots: Slots, tree: Tree) -> tuple[int, ...]:
    """Return the starts of a chain's or star's beginnings with 1, 2, ... nodes."""
    sizes = range(1, tree.num_tokens)
    values = walk_nested(slots, tree, range(tree.num_tokens), sizes)
    return tuple(round(slots.num_positions / value) for value in values.tolist())


def _depth_bound(slots: Slots, max_depth: int | None) -> DepthBound:
    """Fit weights from the lowest price up, each from the ones before."""
    deeper = max_depth is None
    depth = LISTED_DEPTH if max_depth is None else max_depth
    blocks = Blocks.of(slots, depth, deeper=deeper)
    prices, starts = _prices(slots, min(depth, GROWTH_DEPTH))
    weights = np.full(slots.num_positions, starts / max(slots.num_positions, 1))
    lines = []
    for number, price in enumerate(prices):
        frequent = Blocks.of(slots, depth, deeper=deeper, min_count=int(price / PRUNING))
        stages = (*FIRST_STAGES, *STAGES) if number == 0 else STAGES
        weights = fit_weights(frequent, weights, price, stages)
        if deeper:
            weights = np.maximum(weights, 0.0)
        price = float(f"{price:.{SIGNIFICANT}g}")
        # rounded down, so that the file claims no more than was shown
        lines.append(Line(np.floor(bound(blocks, weights, price) * 100) / 100, price))
    return DepthBound(max_depth=max_depth, lines=tuple(lines))


def _prices(slots: Slots, depth: int) -> tuple[list[float], float]:
    """Return what a node saves about each of SIZES, ascending, and the starts of the last tree."""
    index = index_paths(slots, max_nodes=MAX_NODES, max_depth=depth)
    growth = solve(index, depth=depth, width=slots.num_children, num_nodes=MAX_NODES).growth
    every = np.arange(len(growth.added))
    starts = slots.num_positions / walk_nested(slots, growth.tree, growth.added, every.tolist())
    prices = {max(_saved_per_node(starts, size), LEAST_PRICE) for size in SIZES}
    return sorted(prices), float(starts[-1])


def _saved_per_node(starts: Floats, size: int) -> float:
    """Return the mean starts that a node saves between half and twice the size."""
    last = len(starts) - 1
    low, high = min(size // 2, max(last - 1, 0)), min(2 * size, last)
    return float(starts[low] - starts[high]) / max(high - low, 1)
