"""Synthetic traces and step costs with known properties, and small random trees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm

from stree_autotune.trace.file import NO_RANK, Trace, TraceMeta
from stree_core.profile import ModelRef, Provenance, Sampling
from stree_core.tree import Tree

SHARES = (0.52, 0.14, 0.07, 0.045, 0.03, 0.02, 0.015, 0.012, 0.01, 0.008)
"""A plausible distribution of ranks 0, 1, ...; what is missing to 1 is the share of misses."""


def meta(num_prompts: int, num_children: int, depths: int = 1) -> TraceMeta:
    """Return metadata for invented models."""
    return TraceMeta(
        schema_version=1 if depths == 1 else 2,
        depths=depths,
        target=ModelRef(name="target", config_sha256="a" * 64),
        draft=ModelRef(name="draft", config_sha256="b" * 64),
        dataset="synthetic",
        sampling=Sampling(),
        num_children=num_children,
        max_new_tokens=128,
        seed=0,
        dtype="float32",
        num_prompts=num_prompts,
        statistics={"rank0_share": 0.52},
        provenance=Provenance(
            version="0", git_sha="none", versions={}, seed=0, command="test", date="2026-01-01"
        ),
    )


def trace_of(prompts: list[list[int]], num_children: int) -> Trace:
    """Build a trace from the ranks of each prompt."""
    ranks = np.array([rank for prompt in prompts for rank in prompt], np.uint8)
    offsets = np.cumsum([0, *map(len, prompts)]).astype(np.int64)
    return Trace(ranks, offsets, meta(len(prompts), num_children))


def latent_trace(
    seed: int,
    *,
    num_prompts: int = 319,
    length: int = 126,
    phi: float = 0.0,
    prompt_sd: float = 0.0,
    num_children: int = 10,
    shares: tuple[float, ...] = SHARES,
    depths: int = 1,
) -> Trace:
    """Draw ranks with the marginal distribution `shares` from a Gaussian per position.

    phi is the Gaussian's AR(1) coefficient, prompt_sd the spread of its level between prompts; with
    both 0 the ranks are independent. Prompts have `length` positions, every fifth one half of it.
    With `depths` every start has ranks of its own, which share the position's Gaussian by half and
    grow with depth.
    """
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((num_prompts, length))
    latent = noise.copy()
    for t in range(1, length):
        latent[:, t] = phi * latent[:, t - 1] + np.sqrt(1 - phi * phi) * noise[:, t]
    latent += prompt_sd * rng.standard_normal((num_prompts, 1))
    latent /= np.sqrt(1 + prompt_sd**2)
    if depths > 1:
        ahead = np.pad(latent, ((0, 0), (0, depths)))
        ahead = np.stack([ahead[:, d : d + length] for d in range(depths)], axis=-1)
        own = rng.standard_normal(ahead.shape)
        latent = np.sqrt(0.5) * (ahead + own) + 0.1 * np.arange(depths)
    ranks = np.searchsorted(np.cumsum(shares), norm.cdf(latent))
    ranks[ranks >= min(num_children, len(shares))] = NO_RANK
    lengths = np.where(np.arange(num_prompts) % 5 == 4, length // 2, length)
    if depths > 1:
        ranks[np.add.outer(np.arange(length), np.arange(depths)) >= lengths[:, None, None]] = (
            NO_RANK
        )
    keep = np.arange(length) < lengths[:, None]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Trace(ranks[keep].astype(np.uint8), offsets, meta(num_prompts, num_children, depths))


def with_depths(trace: Trace, depths: int) -> Trace:
    """Return the trace with a depth axis that says the same of trees of so many levels."""
    ranks = np.full((trace.num_positions, depths), NO_RANK, np.uint8)
    for first, end in zip(trace.offsets[:-1], trace.offsets[1:], strict=True):
        for depth in range(depths):
            own = trace.ranks[first + depth : end]
            ranks[first : first + len(own), depth] = own
    return Trace(ranks, trace.offsets, meta(trace.num_prompts, trace.meta.num_children, depths))


def met_ranks(trace: Trace, start: int, num: int) -> tuple[int, ...]:
    """Return the first ranks that a step from a position meets, one after the other."""
    if trace.meta.depths == 1:
        return tuple(int(rank) for rank in trace.ranks[start : start + num])
    return tuple(int(rank) for rank in trace.ranks[start, :num])


def brute_walk(trace: Trace, tree: Tree) -> tuple[list[int], list[int]]:
    """Walk with a plain loop; return the starts of each prompt and the start positions."""
    paths = set(tree.paths)
    starts_P, starts = [], []
    for first, end in zip(trace.offsets[:-1], trace.offsets[1:], strict=True):
        s, count = int(first), 0
        while s < end:
            starts.append(s)
            count += 1
            accepted = 0
            while s + accepted < end and met_ranks(trace, s, accepted + 1) in paths:
                accepted += 1
            s += accepted + 1
        starts_P.append(count)
    return starts_P, starts


def ordered_trees(num_nodes: int) -> list[Tree]:
    """Return every tree with `num_nodes` nodes (as many as the Catalan number)."""
    sets: set[frozenset[tuple[int, ...]]] = {frozenset()}
    for _ in range(num_nodes):
        sets = {paths | {path} for paths in sets for path in _frontier(paths)}
    return [Tree.from_paths(paths) for paths in sorted(sets, key=sorted)]


def _frontier(paths: frozenset[tuple[int, ...]]) -> list[tuple[int, ...]]:
    frontier = []
    for parent in ((), *paths):
        rank = 0
        while (*parent, rank) in paths:
            rank += 1
        frontier.append((*parent, rank))
    return frontier


@st.composite
def growth_orders(
    draw: st.DrawFn, max_nodes: int = 12, max_children: int = 4
) -> list[tuple[int, ...]]:
    """Draw paths in an order of which every prefix is a tree."""
    order: list[tuple[int, ...]] = []
    for _ in range(draw(st.integers(0, max_nodes))):
        options = sorted(path for path in _frontier(frozenset(order)) if path[-1] < max_children)
        order.append(draw(st.sampled_from(options)))
    return order


@st.composite
def small_traces(draw: st.DrawFn, num_children: int = 4) -> Trace:
    """Draw a trace of a few short prompts, some of them empty."""
    rank = st.sampled_from([0, 0, 0, 1, *range(num_children), NO_RANK])
    prompts = draw(st.lists(st.lists(rank, max_size=30), min_size=1, max_size=6))
    return trace_of(prompts, num_children)


@dataclass(frozen=True)
class FakeCost:
    """Milliseconds of a step: verification padded up to `pad` tokens, plus a charge per level.

    `off_ms` is the step with verdict off. `spread` is the relative runtime uncertainty that `draw`
    applies, independently for each padded size and for off.
    """

    off_ms: float = 3.0
    verify_ms: float = 3.0
    per_token_ms: float = 0.01
    per_level_ms: float = 0.15
    pad: int = 16
    batch_share: float = 0.0
    spread: float = 0.0
    factors: NDArray[np.float64] | None = None

    def step_ms(self, batch_size: int, tree: Tree, tokens_per_step: float | None = None) -> float:
        """Return the step's milliseconds."""
        if tree.num_nodes == 0:
            return self.off_ms * self._factor(0)
        padded = -(-tree.num_tokens // self.pad) * self.pad
        tokens_ms = self.per_token_ms * padded * (1 + self.batch_share * batch_size)
        step_ms = self.verify_ms + tokens_ms + self.per_level_ms * tree.depth
        return step_ms * self._factor(padded // self.pad)

    def draw(self, rng: np.random.Generator) -> FakeCost:
        """Return the cost with its uncertainty drawn once."""
        return replace(self, factors=1 + self.spread * rng.standard_normal(300))

    def _factor(self, stair: int) -> float:
        return 1.0 if self.factors is None else float(self.factors[stair])
