"""Verdicts where the right answer is known without any search."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scripts import script
from synthetic import FakeCost, latent_trace, ordered_trees, trace_of

from stree_autotune.search.path_counts import index_paths, path_shares, rank_distribution
from stree_autotune.search.study import SearchSetting
from stree_autotune.search.tree_solver import MAX_DEPTH, grow
from stree_autotune.search.verdict import Decision, decide_policy
from stree_autotune.trace.file import NO_RANK, Trace
from stree_autotune.trace.tree_walk import FlatTrace
from stree_core.tree import Tree


@pytest.fixture(scope="module")
def trace() -> Trace:
    return latent_trace(0, num_prompts=64, length=80, phi=0.3, prompt_sd=0.5)


def decide(trace: Trace, cost: FakeCost, batch_sizes: tuple[int, ...] = (1,)) -> list[Decision]:
    return list(decide_policy(trace, cost, batch_sizes, max_nodes=32, seed=0))


def test_a_useless_draft_is_off() -> None:
    useless = trace_of([[NO_RANK] * 40] * 20, 8)
    free = FakeCost(off_ms=1.0, verify_ms=1.0, per_token_ms=1e-6, per_level_ms=1e-6)
    decision = decide(useless, free)[0]
    assert decision.verdict == "off"
    assert decision.tokens_per_step == 1.0


def test_a_perfect_draft_is_a_chain_as_long_as_allowed() -> None:
    perfect = trace_of([[0] * 200] * 20, 8)
    decision = decide(perfect, FakeCost(pad=1))[0]
    assert decision.tree == Tree.chain(MAX_DEPTH)


def test_free_verification_is_a_wide_tree(trace: Trace) -> None:
    free = FakeCost(per_token_ms=0.0, per_level_ms=0.6, pad=1)
    decision = decide(trace, free)[0]
    assert decision.verdict == "tree"
    assert decision.tree.max_children >= 5
    assert decision.tree.num_nodes > 3 * decision.tree.depth


def test_dear_verification_is_a_chain(trace: Trace) -> None:
    dear = FakeCost(off_ms=3.0, verify_ms=2.4, per_token_ms=0.5, per_level_ms=0.0, pad=1)
    decision = decide(trace, dear)[0]
    assert decision.verdict == "chain"
    # where a token costs nearly a step, not even that pays
    assert decide(trace, FakeCost(verify_ms=0.5, per_token_ms=2.5, pad=1))[0].verdict == "off"


def test_a_large_batch_that_computes_is_off(trace: Trace) -> None:
    # at batch 1 a step is all memory traffic, at 64 time grows with tokens
    class ComputeBound(FakeCost):
        def step_ms(
            self, batch_size: int, tree: Tree, tokens_per_step: float | None = None
        ) -> float:
            return max(3.0, 0.05 * batch_size * tree.num_tokens) + 0.1 * tree.depth

    small, large = decide(trace, ComputeBound(), (1, 64))
    assert small.verdict == "tree"
    assert large.verdict == "off"


distributions = st.lists(st.floats(0.01, 0.9), min_size=1, max_size=4).map(
    lambda parts: (np.array(parts) / max(1.0, sum(parts))).tolist()
)


def independent_value(distribution: list[float], tree: Tree) -> float:
    return sum(float(np.prod([distribution[rank] for rank in path])) for path in tree.paths)


@given(distributions, st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_the_exact_recursion_against_every_tree(
    distribution: list[float], num_nodes: int, depth: int
) -> None:
    value, tree = script("search_baselines").best_tree(distribution, num_nodes, depth)
    allowed = (
        tree
        for size in range(num_nodes + 1)
        for tree in ordered_trees(size)
        if tree.depth <= depth and tree.max_children <= len(distribution)
    )
    assert value == pytest.approx(max(independent_value(distribution, tree) for tree in allowed))
    assert value == pytest.approx(independent_value(distribution, tree))
    assert tree.num_nodes <= num_nodes
    assert tree.depth <= depth


@pytest.mark.parametrize("num_nodes", [5, 17, 40])
@pytest.mark.parametrize("depth", [2, 4, 10])
def test_growth_is_the_exact_recursion_for_independent_ranks(num_nodes: int, depth: int) -> None:
    trace = latent_trace(0, num_prompts=300)
    index = index_paths(FlatTrace.of(trace), max_nodes=num_nodes, max_depth=depth)
    distribution = rank_distribution(index.flat)
    shares = path_shares(index)
    for level in index.levels[1:]:
        shares[level] = distribution[index.ranks[level]] * shares[index.parents[level]]
    grown = grow(index, shares, depth=depth, width=10, num_nodes=num_nodes).tree
    value = script("search_baselines").best_tree(distribution, num_nodes, depth)[0]
    assert independent_value(distribution.tolist(), grown) == pytest.approx(value, rel=1e-3)


def test_a_limit_on_the_time_per_token_rules_out_what_is_too_slow(trace: Trace) -> None:
    """A tie goes to the simpler option, unless a token of it takes too long."""
    cost = FakeCost(pad=8, spread=0.3)
    space = SearchSetting()
    (free,) = decide_policy(trace, cost, (1,), max_nodes=16, seed=0, setting=space)
    assert free.verdict == "off"
    token_ms = free.step_ms / free.tokens_per_step
    (best,) = decide_policy(
        trace,
        cost,
        (1,),
        max_nodes=16,
        seed=0,
        setting=replace(space, max_token_ms=0.99 * token_ms),
    )
    assert best.step_ms / best.tokens_per_step < token_ms
    assert "--max-token-ms" in best.reason
    assert "binds" in best.reason
    (loose,) = decide_policy(
        trace, cost, (1,), max_nodes=16, seed=0, setting=replace(space, max_token_ms=2 * token_ms)
    )
    assert loose == free
    (never,) = decide_policy(
        trace, cost, (1,), max_nodes=16, seed=0, setting=replace(space, max_token_ms=0.01)
    )
    assert never.step_ms / never.tokens_per_step < best.step_ms / best.tokens_per_step
    assert "serve fewer sequences" in never.reason
