"""The search finds known optima, keeps its limits, and repeats itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from synthetic import FakeCost, latent_trace, ordered_trees, trace_of

from stree_autotune.search.study import SearchResult, search_batch
from stree_autotune.search.tree_solver import MAX_DEPTH, refine
from stree_autotune.search.tree_space import Cell, TreeSpace
from stree_autotune.trace.file import NO_RANK, Trace
from stree_autotune.trace.tree_walk import FlatTrace, walk
from stree_core.errors import ConfigError, MissingMeasurement
from stree_core.tree import DEFAULT_TREE, OFF, Tree

STAIRS = {
    "stairs of 4": FakeCost(pad=4, per_token_ms=0.15, per_level_ms=0.05),
    "dear levels": FakeCost(pad=4, per_token_ms=0.02, per_level_ms=0.6),
    "dear tokens": FakeCost(pad=1, per_token_ms=0.4, per_level_ms=0.0),
    "stairs of 2": FakeCost(pad=2, per_token_ms=0.2, per_level_ms=0.2),
}


@pytest.fixture(scope="module")
def trace() -> Trace:
    return latent_trace(0, num_prompts=64, length=80, phi=0.5, prompt_sd=0.5)


def search(trace: Trace, cost: FakeCost, max_nodes: int, batch_size: int = 1) -> SearchResult:
    return search_batch(TreeSpace.of(trace, max_nodes), cost, batch_size, seed=0)


@pytest.mark.parametrize("cost", STAIRS.values(), ids=STAIRS)
def test_known_optimum_of_small_trees(trace: Trace, cost: FakeCost) -> None:
    flat = FlatTrace.of(trace)
    rates = {
        tree: walk(flat, tree).tokens_per_step / cost.step_ms(1, tree)
        for num_nodes in range(7)
        for tree in ordered_trees(num_nodes)
    }
    result = search(trace, cost, max_nodes=6)
    assert result.best.tokens_per_s == pytest.approx(1000 * max(rates.values()), rel=1e-12)
    chains = [rate for tree, rate in rates.items() if tree.is_chain and tree != OFF]
    trees = [rate for tree, rate in rates.items() if not tree.is_chain]
    assert result.chain.tokens_per_s == pytest.approx(1000 * max(chains), rel=1e-12)
    assert result.tree is not None
    assert result.tree.tokens_per_s == pytest.approx(1000 * max(trees), rel=1e-12)
    assert result.off.tokens_per_s == pytest.approx(1000 / 3.0)


def test_a_step_of_the_stairs_is_filled(trace: Trace) -> None:
    flat = FakeCost(pad=16, per_token_ms=0.02, per_level_ms=0.0)
    result = search(trace, flat, max_nodes=40)
    assert result.best.tree.num_tokens % 16 == 0


def test_no_single_leaf_improves_the_winner() -> None:
    # strongly correlated ranks and a price per node, where growing alone stops short
    trace = latent_trace(0, num_prompts=64, length=80, phi=0.8)
    cost = FakeCost(pad=1, per_token_ms=0.02)
    best = search(trace, cost, max_nodes=40).best
    again = refine(
        trace, best.tree, lambda tree, value: value / cost.step_ms(1, tree), max_nodes=40
    )
    assert again.tree == best.tree


def test_off_when_drafting_is_too_dear(trace: Trace) -> None:
    result = search(trace, FakeCost(per_level_ms=9.0), max_nodes=16)
    assert result.best is result.off
    assert result.off.tree == OFF
    assert result.off.tokens_per_step == 1.0


def test_a_chain_when_width_is_useless() -> None:
    only_first = latent_trace(1, num_prompts=64, length=80, shares=(0.7,), num_children=8)
    result = search(only_first, FakeCost(pad=1), max_nodes=16)
    assert result.best.tree.is_chain
    assert result.best is result.chain
    flat = FlatTrace.of(only_first)
    best = max(range(1, 11), key=lambda n: _chain_rate(flat, n))
    assert result.best.tree == Tree.chain(best)


def _chain_rate(flat: FlatTrace, num_nodes: int) -> float:
    tree = Tree.chain(num_nodes)
    return walk(flat, tree).tokens_per_step / FakeCost(pad=1).step_ms(1, tree)


def test_every_trial_is_exact_and_within_the_limits(trace: Trace) -> None:
    cost = FakeCost(batch_share=0.1)
    result = search(trace, cost, max_nodes=20, batch_size=4)
    evaluated = {trial.tree for trial in result.trials}
    assert len(evaluated) == len(result.trials)
    assert {OFF, DEFAULT_TREE, *(Tree.chain(n) for n in range(1, 9))} <= evaluated
    for trial in result.trials:
        assert trial.tree.num_nodes <= 20
        assert trial.tree.depth <= MAX_DEPTH
        assert trial.tree.max_children <= trace.meta.num_children
        assert trial.step_ms == cost.step_ms(4, trial.tree)
        expected = 1000 * 4 * trial.tokens_per_step / trial.step_ms
        assert trial.tokens_per_s == pytest.approx(expected)
    for trial in result.trials[:: max(1, len(result.trials) // 60)]:
        assert trial.tokens_per_step == walk(trace, trial.tree).tokens_per_step
    assert result.best.tokens_per_s == max(trial.tokens_per_s for trial in result.trials)


def test_same_seed_same_result(trace: Trace) -> None:
    cost = FakeCost(batch_share=0.1)
    first, again = (search(trace, cost, max_nodes=24, batch_size=8) for _ in range(2))
    assert first == again
    # neither does it matter which batch sizes came before
    space = TreeSpace.of(trace, 24)
    search_batch(space, cost, 1, seed=0)
    assert search_batch(space, cost, 8, seed=0) == first


def test_batch_sizes_share_solved_cells(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    from stree_autotune.search import tree_space as module

    solved: list[str] = []

    def count(name: str) -> None:
        original: Callable[..., object] = getattr(module, name)

        def counting(*args: object, **cell: object) -> object:
            solved.append(name)
            return original(*args, **cell)

        monkeypatch.setattr(module, name, counting)

    count("solve")
    count("solve_depths")
    space = TreeSpace.of(trace, 24)
    search_batch(space, FakeCost(), 1, seed=0)
    num_first = len(solved)
    search_batch(space, FakeCost(), 2, seed=0)
    assert solved.count("solve_depths") == 1
    assert "solve" in solved
    assert len(solved) == num_first


def test_smallest_spaces() -> None:
    two_ranks = latent_trace(0, num_prompts=20, length=30)
    single_node = search(two_ranks, FakeCost(), max_nodes=1)
    assert single_node.tree is None
    assert single_node.chain.tree == Tree.chain(1)
    one_child = trace_of([[0, 0, NO_RANK] * 10] * 4, 1)
    result = search(one_child, FakeCost(pad=1), max_nodes=12)
    assert result.tree is None
    assert result.best.tree == Tree.chain(2)
    assert DEFAULT_TREE not in {trial.tree for trial in result.trials}


@pytest.mark.parametrize("max_nodes", [0, -1, 256])
def test_max_nodes_out_of_range(trace: Trace, max_nodes: int) -> None:
    with pytest.raises(ConfigError, match=f"between 1 and 255, got {max_nodes}"):
        TreeSpace.of(trace, max_nodes)


def test_cells() -> None:
    assert Cell.of(DEFAULT_TREE) == Cell(4, 3, 12)
    assert Cell.of(OFF) == Cell(0, 0, 0)
    space = TreeSpace.of(latent_trace(0, num_prompts=20, length=30, num_children=5), 20)
    assert space.widths == (1, 2, 3, 4)
    assert space.solve(Cell(3, 1, 9)) == Tree.chain(3)
    assert space.solve(Cell(3, 4, 0)) == OFF
    full = space.solve(Cell(2, 2, 20))
    assert full == Tree.from_paths([[0], [1], [0, 0], [0, 1], [1, 0], [1, 1]])


@dataclass(frozen=True)
class Gap(FakeCost):
    """A cost that knows nothing beyond eight nodes."""

    def step_ms(self, batch_size: int, tree: Tree, tokens_per_step: float | None = None) -> float:
        if tree.num_nodes > 8:
            raise MissingMeasurement("trees up to 8 nodes are measured, got more; record them")
        return super().step_ms(batch_size, tree)


def test_missing_measurements_are_not_hidden(
    trace: Trace, capfd: pytest.CaptureFixture[str]
) -> None:
    assert search(trace, Gap(), max_nodes=8).best.tree.num_nodes <= 8
    with pytest.raises(MissingMeasurement, match="up to 8 nodes"):
        search(trace, Gap(), max_nodes=9)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_larger_trees_of_a_survey_are_walked_when_asked_for(trace: Trace) -> None:
    lazy, whole = TreeSpace.of(trace, 40), TreeSpace.of(trace, 40).survey
    few = lazy.surveyed(5)
    assert few == tuple(pick for pick in whole if pick[0].num_nodes <= 5)
    assert max(tree.num_nodes for tree in lazy.walked) < 40
    assert lazy.surveyed(20) == tuple(pick for pick in whole if pick[0].num_nodes <= 20)
    assert lazy.survey == whole
    for _, tree in whole:
        assert lazy.tokens_per_step(tree) == walk(trace, tree).tokens_per_step
