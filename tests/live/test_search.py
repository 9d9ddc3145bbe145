"""The search on live steps: it finds what the model misses, goes on, and measures nothing twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from synthetic import FakeCost, latent_trace

from stree_autotune.live.corrected_cost import MEDIAN_ERROR, CorrectedCost, LiveStep, pad_bucket
from stree_autotune.live.search import FINALISTS, LiveSearch
from stree_autotune.probe.timing import Effort
from stree_autotune.search.study import SearchSetting, StudyPlace, open_storage, search_batch
from stree_autotune.search.tree_space import TreeSpace
from stree_core.tree import DEFAULT_TREE, OFF, Tree

MODEL = FakeCost(pad=16, per_token_ms=0.01, per_level_ms=0.15)


@dataclass
class World:
    """True times: the model's, off by a factor of their own for every pad bucket and depth."""

    seed: int
    misfit: float = 0.08
    noise: float = 0.002
    calls: list[list[Tree]] = field(default_factory=list)

    def step_ms(self, tree: Tree) -> float:
        rng = np.random.default_rng([self.seed, pad_bucket(tree), tree.depth])
        return MODEL.step_ms(1, tree) * math.exp(self.misfit * rng.standard_normal())

    def measure(
        self, batch_size: int, trees: Sequence[Tree], effort: Effort
    ) -> dict[Tree, LiveStep]:
        assert batch_size == 1
        self.calls.append(list(trees))
        rng = np.random.default_rng([self.seed, len(self.calls)])
        times = {tree: self.step_ms(tree) for tree in trees}
        return {
            tree: LiveStep(ms * (1 + self.noise * rng.standard_normal()), self.noise * ms)
            for tree, ms in times.items()
        }

    @property
    def first_looks(self) -> list[Tree]:
        return [tree for call in self.calls[:-1] for tree in call]


@pytest.fixture(scope="module")
def space() -> TreeSpace:
    return TreeSpace.of(latent_trace(0, num_prompts=48, length=60, phi=0.3), 40)


def live(space: TreeSpace, world: World, setting: SearchSetting) -> LiveSearch:
    return LiveSearch(space, MODEL, world.measure, setting, 0, lambda line: None, patience_s=1.0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_measuring_finds_what_the_model_misses(space: TreeSpace, seed: int) -> None:
    world = World(seed)
    result = live(space, world, SearchSetting(40)).run(1)
    rates = {tree: space.tokens_per_step(tree) / world.step_ms(tree) for _, tree in space.survey}
    true_best = max(rates.values())
    model_pick = search_batch(space, MODEL, 1, seed=0).best.tree
    picked = result.search.best.tree
    regret, blind = (
        1 - space.tokens_per_step(tree) / world.step_ms(tree) / true_best
        for tree in (picked, model_pick)
    )
    assert regret < 0.01
    assert blind > regret
    looked = world.first_looks
    assert len(looked) == len(set(looked)) == 40
    assert {OFF, DEFAULT_TREE, model_pick, *(Tree.chain(n) for n in range(1, 9))} <= set(looked)
    assert len({(pad_bucket(tree), tree.depth) for tree in looked}) > 12
    assert OFF in world.calls[-1]
    assert len(world.calls[-1]) == FINALISTS + 1


def test_only_measured_trees_are_candidates_and_their_times_are_the_measured(
    space: TreeSpace,
) -> None:
    world = World(5, noise=0.0)
    result = live(space, world, SearchSetting(14)).run(1)
    trees = {trial.tree for trial in result.search.trials}
    assert trees == set(world.first_looks)
    for trial in result.search.trials:
        assert trial.step_ms == pytest.approx(world.step_ms(trial.tree))
        assert trial.tokens_per_step == space.tokens_per_step(trial.tree)


def test_a_live_study_goes_on(space: TreeSpace, tmp_path: Path) -> None:
    worlds = [World(7), World(7), World(7)]
    for world, num_trials in zip(worlds, (12, 20, 20), strict=True):
        place = StudyPlace(open_storage(str(tmp_path / "live.journal")), "toy")
        live(space, world, SearchSetting(num_trials, place)).run(1)
    counts = [len(world.first_looks) for world in worlds]
    assert counts == [12, 8, 0]
    both = worlds[0].first_looks + worlds[1].first_looks
    assert len(set(both)) == 20


def test_residuals_reach_the_neighbours() -> None:
    wide = Tree.from_paths([[0], [1], [2]])
    other = Tree.from_paths([[0], [1]])
    deep = Tree.chain(3)
    large = Tree.from_paths([[i] for i in range(20)])
    steps = {
        OFF: LiveStep(2 * MODEL.step_ms(1, OFF), 0.0),
        wide: LiveStep(1.5 * MODEL.step_ms(1, wide), 0.1),
        deep: LiveStep(0.9 * MODEL.step_ms(1, deep), 0.1),
    }
    cost = CorrectedCost(MODEL, 1, steps)

    def factor(tree: Tree) -> float:
        return cost.step_ms(1, tree) / MODEL.step_ms(1, tree)

    assert [factor(tree) for tree in (OFF, wide, other, deep)] == pytest.approx([2, 1.5, 1.5, 0.9])
    mean = math.sqrt(1.5 * 0.9)
    assert factor(Tree.chain(2)) == pytest.approx(mean), "no such depth, so all of the pad bucket"
    assert factor(large) == pytest.approx(mean), "no such pad bucket, so all, off excepted"
    drawn = [cost.draw(np.random.default_rng(seed)) for seed in range(200)]
    assert {one.step_ms(1, OFF) for one in drawn} == {steps[OFF].ms}
    logs = np.log([one.step_ms(1, wide) / steps[wide].ms for one in drawn])
    assert np.std(logs) == pytest.approx(MEDIAN_ERROR * 0.1 / steps[wide].ms, rel=0.2)


def test_a_tree_that_does_not_fit_is_not_measured(space: TreeSpace) -> None:
    from synthetic_data import memory_for

    world = World(9)
    result = live(space, world, SearchSetting(20, memory=memory_for(Tree.chain(6), 1))).run(1)
    assert max(tree.num_nodes for tree in world.first_looks) == 6
    assert result.search.best.tree.num_nodes <= 6
