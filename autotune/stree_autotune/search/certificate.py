"""The certificate of a trace: the fewest starts that any static tree can have on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import Field

from stree_autotune.search.dual_bound import (
    FIRST_STAGES,
    STAGES,
    Blocks,
    Floats,
    Stage,
    bound,
    fit_weights,
)
from stree_autotune.search.path_counts import index_paths
from stree_autotune.search.tree_solver import solve
from stree_autotune.store import command, digits, provenance
from stree_autotune.trace import FlatTrace, Trace, load_trace, walk_nested
from stree_core.errors import ConfigError
from stree_core.files import dump_yaml, read_yaml, sha256_of, write_atomically
from stree_core.profile import Provenance, Sha256, Strict
from stree_core.tree import MAX_NODES, Tree

Count = Annotated[int, Field(ge=0, le=1 << 40)]
Starts = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
Price = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1, max_length=MAX_NODES)]


class Line(NamedTuple):
    """Every tree with n nodes has at least starts - price * n starts."""

    starts: Starts
    price: Price


class DepthBound(Strict):
    """Lines for all trees of at most `max_depth` levels; without it, for all trees."""

    max_depth: Annotated[int, Field(ge=1, le=MAX_NODES)] | None = None
    lines: Annotated[tuple[Line, ...], Field(min_length=1, max_length=64)]

    def least_starts(self, num_nodes: int) -> float:
        """Return the fewest starts that a tree with this many nodes can have."""
        return max(line.starts - line.price * num_nodes for line in self.lines)


Block = list[tuple[tuple[int, int], float]]
"""Numbers of nodes and levels, each with the fewest starts of such trees."""

BLOCK_SIZES = 8
"""Sizes that are skipped together where not even their bound is fast enough."""


class LeastTime(Protocol):
    """What a step takes at least with any tree of some nodes and levels; 0 nodes means off."""

    def least_ms(
        self, batch_size: int, num_nodes: int, depth: int, tokens_per_step: float
    ) -> float:
        """Return the milliseconds of the quickest step, which more tokens per step may lengthen.

        Neither more nodes of a tree with siblings nor more tokens per step shorten it, and tokens
        per step over this time must not fall as the tokens grow.
        """


class Certificate(Strict):
    """Bounds for one trace; `chains` and `stars` hold the starts of those with 1, 2, ... nodes.

    `max_depth` is the deepest level that a trace with a depth axis tells about: the bounds are on
    trees of so many levels.
    """

    schema_version: Literal[1] = 1
    kind: Literal["stree-certificate"] = "stree-certificate"
    trace_sha256: Sha256
    num_positions: Count
    max_depth: Annotated[int, Field(ge=1, le=MAX_NODES)] | None = None
    chains: Counts
    stars: Counts
    bounds: Annotated[tuple[DepthBound, ...], Field(min_length=1, max_length=MAX_NODES)]
    provenance: Provenance

    @cached_property
    def _blocks(self) -> dict[int, list[Block]]:
        return {}

    def least_starts(self, num_nodes: int, depth: int) -> float:
        """Return the fewest starts of any tree with exactly these nodes and levels.

        All positions for shapes that no tree on the trace has.
        """
        if depth == num_nodes and num_nodes <= len(self.chains):
            return self.chains[num_nodes - 1]
        if self.max_depth is not None and depth > self.max_depth:
            return self.num_positions
        if depth == 1:
            return self.stars[num_nodes - 1] if num_nodes <= len(self.stars) else self.num_positions
        # a step covers its levels and the bonus token
        least = self.num_positions / (depth + 1)
        for depth_bound in self.bounds:
            if depth_bound.max_depth is None or depth_bound.max_depth >= depth:
                least = max(least, depth_bound.least_starts(num_nodes))
        return least

    @cached_property
    def most_tokens_per_step(self) -> tuple[float, ...]:
        """The most tokens per step of any static tree with at most 1, 2, ... nodes."""
        least = (
            min(self.least_starts(num_nodes, depth) for depth in range(1, num_nodes + 1))
            for num_nodes in range(1, MAX_NODES + 1)
        )
        return tuple(
            self.num_positions / starts if starts else 1.0 for starts in accumulate(least, min)
        )

    def most_tokens_per_s(self, cost: LeastTime, batch_size: int, max_nodes: int) -> float:
        """Return a rate that no tree of up to `max_nodes` nodes, nor off, is predicted to exceed.

        For every number of nodes and levels, the most tokens per step of such trees over the least
        time of such trees: the two need not be the same tree's, so the rate may be out of reach.
        """
        off_ms = cost.least_ms(batch_size, 0, 0, 1.0)
        if self.num_positions == 0:
            # a trace of prompts that ended at once: no tree emits anything more
            return 1000 * batch_size / off_ms
        least_ms = self.num_positions * off_ms
        for sizes in self._blocks_up_to(max_nodes):
            if self._bound_ms(sizes, cost, batch_size) >= least_ms:
                continue
            for size, starts in sizes:
                rate = self.num_positions / starts
                least_ms = min(least_ms, starts * cost.least_ms(batch_size, *size, rate))
        return 1000 * batch_size * self.num_positions / least_ms

    def _bound_ms(self, sizes: Block, cost: LeastTime, batch_size: int) -> float:
        """Return a time that no size of a block falls below: fewest starts, quickest step."""
        fewest, most = (choose(starts for _, starts in sizes) for choose in (min, max))
        return fewest * cost.least_ms(batch_size, *sizes[0][0], self.num_positions / most)

    def _blocks_up_to(self, max_nodes: int) -> list[Block]:
        """Return every number of nodes and levels with the least starts, computed once.

        The sizes of a block have as many levels, in ascending order; a chain is one by itself.
        """
        if max_nodes not in self._blocks:
            blocks: list[Block] = []
            for depth in range(1, max_nodes + 1):
                for first, last in _ranges(depth, max_nodes):
                    sizes = (((n, depth), self.least_starts(n, depth)) for n in range(first, last))
                    # trees without any start are those of an empty trace
                    blocks.append([size for size in sizes if size[1]])
            self._blocks[max_nodes] = [block for block in blocks if block]
        return self._blocks[max_nodes]


def _ranges(depth: int, max_nodes: int) -> Iterator[tuple[int, int]]:
    """Yield the chain's range of nodes, then those of the trees with siblings, ends excluded."""
    yield depth, depth + 1
    for first in range(depth + 1, max_nodes + 1, BLOCK_SIZES):
        yield first, min(first + BLOCK_SIZES, max_nodes + 1)


def certificate_path(trace: Path) -> Path:
    """Return where the certificate of a trace file lies."""
    return trace.with_suffix(".certificate.yaml")


def load_certificate(trace: Path) -> Certificate | None:
    """Return the certificate beside a trace file, None when there is none.

    Raises ConfigError when it is malformed or belongs to another trace.
    """
    if not certificate_path(trace).is_file():
        return None
    return read_certificate(trace, sha256_of(trace))[0]


def read_certificate(trace: Path, trace_sha256: str) -> tuple[Certificate, str]:
    """Return the certificate beside a trace file of this digest, and the certificate's own digest.

    Raises ConfigError when it is missing, malformed or belongs to another trace.
    """
    path = certificate_path(trace)
    certificate, digest = read_yaml(path, Certificate)
    if certificate.trace_sha256 != trace_sha256:
        raise ConfigError(
            f"{path} must belong to the trace beside it, which has changed since; "
            f"make it again with `{command('certify', trace)}`"
        )
    return certificate, digest


def has_certificate(trace: Path) -> bool:
    """True when a sound certificate of this very trace lies beside it."""
    try:
        return load_certificate(trace) is not None
    except ConfigError:
        return False


def save_certificate(certificate: Certificate, trace: Path) -> Path:
    """Write a certificate atomically beside its trace file; return where."""
    path = certificate_path(trace)
    write_atomically(path, dump_yaml(certificate))
    return path


ALWAYS_DEPTH = 4
LEAST_GAIN = 0.03
"""Trees of up to some depths have bounds of their own: their steps are quicker, and no mixture of a
few much deeper trees stands in for them. These are the first depths, and each that saves chains
this share of the starts that the depth kept before it has."""

LISTED_DEPTH = 64
"""Paths deeper than this are taken to come for free in the bound on all trees. Where chains still
gain beyond SOLVER_DEPTH, that says nothing, and trees of so many levels have their own."""

PATIENCE = 2
"""How many times more steps weights may take for depths that drafts of little error reach."""

SIZES = (2, 4, 8, 16, 32, 64, 128, MAX_NODES)
"""Numbers of nodes at which a bound is tightest; every line holds for all."""

DESCRIBED_SIZES = (1, 2, 4, 8, 16, 32, 64)
SOLVER_DEPTH = 16
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
    values = ", ".join(f"{digits(most[size - 1])} ({size})" for size in DESCRIBED_SIZES)
    return f"  most tokens per step of any static tree (with up to so many nodes): {values}"


def certify(
    trace: Trace, trace_sha256: str, progress: Callable[[str], None] | None = None
) -> Certificate:
    """Bound the tokens per step of every static tree on a trace.

    `progress` gets one line per depth.
    """
    flat = FlatTrace.of(trace)
    chains = _nested_starts(flat, Tree.chain(min(LISTED_DEPTH, flat.max_depth)))
    bounds = []
    for max_depth in (*_depths(chains), None):
        bounds.append(_depth_bound(flat, max_depth))
        if progress is not None:
            levels = "any number of" if max_depth is None else f"up to {max_depth}"
            progress(f"bounded trees of {levels} levels")
    stars = Tree.from_paths([rank] for rank in range(flat.num_children))
    return Certificate(
        trace_sha256=trace_sha256,
        num_positions=flat.num_positions,
        max_depth=trace.meta.depths if trace.meta.depths > 1 else None,
        chains=chains,
        stars=_nested_starts(flat, stars),
        bounds=tuple(bounds),
        provenance=provenance(trace.meta.seed),
    )


def _depths(chains: Sequence[int]) -> list[int]:
    """Return the depths for bounds of their own: all that are small, and those that still gain."""
    # the deepest of a trace with a depth axis is the bound on all trees
    deepest = len(chains) - (len(chains) < LISTED_DEPTH)
    depths = [depth for depth in range(2, ALWAYS_DEPTH + 1) if depth <= deepest]
    for depth in range(ALWAYS_DEPTH + 1, deepest + 1):
        if chains[depth - 1] <= (1 - LEAST_GAIN) * chains[depths[-1] - 1]:
            depths.append(depth)
    if depths and depths[-1] > SOLVER_DEPTH and deepest not in depths:
        depths.append(deepest)
    return depths


def _nested_starts(flat: FlatTrace, tree: Tree) -> tuple[int, ...]:
    """Return the starts of a chain's or star's beginnings with 1, 2, ... nodes."""
    sizes = range(1, tree.num_tokens)
    values = walk_nested(flat, tree, range(tree.num_tokens), sizes)
    return tuple(round(flat.num_positions / value) for value in values.tolist())


def _depth_bound(flat: FlatTrace, max_depth: int | None) -> DepthBound:
    """Fit weights from the lowest price up, each from the ones before."""
    deeper = max_depth is None and flat.max_depth > LISTED_DEPTH
    depth = min(LISTED_DEPTH, flat.max_depth) if max_depth is None else max_depth
    blocks = Blocks.of(flat, depth, deeper=deeper)
    prices, starts = _prices(flat, min(depth, SOLVER_DEPTH))
    weights = np.full(flat.num_positions, starts / max(flat.num_positions, 1))
    lines = []
    for number, price in enumerate(prices):
        frequent = Blocks.of(flat, depth, deeper=deeper, min_count=int(price / PRUNING))
        stages: tuple[Stage, ...] = (*FIRST_STAGES, *STAGES) if number == 0 else STAGES
        if max_depth is not None and ALWAYS_DEPTH < max_depth <= SOLVER_DEPTH:
            stages = tuple(replace(each, max_steps=PATIENCE * each.max_steps) for each in stages)
        weights = fit_weights(frequent, weights, price, stages)
        if deeper:
            weights = np.maximum(weights, 0.0)
        price = float(f"{price:.{SIGNIFICANT}g}")
        # rounded down, so that the file claims no more than was shown
        lines.append(Line(np.floor(bound(blocks, weights, price) * 100) / 100, price))
    return DepthBound(max_depth=max_depth, lines=tuple(lines))


def _prices(flat: FlatTrace, depth: int) -> tuple[list[float], float]:
    """Return what a node saves about each of SIZES, ascending, and the starts of the last tree."""
    index = index_paths(flat, max_nodes=MAX_NODES, max_depth=depth)
    grown = solve(index, depth=depth, width=flat.num_children, num_nodes=MAX_NODES).grown
    every = np.arange(len(grown.added))
    starts = flat.num_positions / walk_nested(flat, grown.tree, grown.added, every.tolist())
    prices = {max(_saved_per_node(starts, size), LEAST_PRICE) for size in SIZES}
    return sorted(prices), float(starts[-1])


def _saved_per_node(starts: Floats, size: int) -> float:
    """Return the mean starts that a node saves between half and twice the size."""
    last = len(starts) - 1
    low, high = min(size // 2, max(last - 1, 0)), min(2 * size, last)
    return float(starts[low] - starts[high]) / max(high - low, 1)
