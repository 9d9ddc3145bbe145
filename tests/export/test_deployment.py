"""What a setting is worth to a server, from the profile's own trace and step cost alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from synthetic import brute_walk, latent_trace, small_traces
from synthetic_data import make_table, write_library
from synthetic_profile import PAIR, RAGGED, ROWS, write_profile

from stree_autotune.cost.step_cost import StepCost
from stree_autotune.export.deployment import Deployment, chains, ranges, stars
from stree_autotune.search.profile_sources import profile_cost, profile_trace
from stree_autotune.store.library import Library, shipped_root
from stree_autotune.trace.file import Trace
from stree_autotune.trace.tree_walk import conditional_rates, emitted_per_step, marginal_rates, walk
from stree_core.errors import MissingMeasurement
from stree_core.profile import GpuRef, load_profile
from stree_core.tree import Tree


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_profile(folder)
    return folder


@pytest.fixture
def deployment(root: Path) -> Deployment:
    profile = load_profile(next((root / "tuned").iterdir()))
    return Deployment(profile, Library((root,)), "target", "draft")


@settings(max_examples=60, deadline=None)
@given(trace=small_traces())
def test_steps_emit_what_a_plain_walk_counts(trace: Trace) -> None:
    for tree in (Tree.chain(0), Tree.chain(3), RAGGED):
        _, starts = brute_walk(trace, tree)
        emitted = emitted_per_step(trace, tree)
        assert len(emitted) == len(starts)
        assert emitted.sum() == trace.num_positions
        assert set(emitted.tolist()) <= set(range(1, tree.depth + 2))


def test_rates_follow_their_identities() -> None:
    trace = latent_trace(3, phi=0.6, num_prompts=40)
    marginals = marginal_rates(trace, 6)
    assert marginals == sorted(marginals, reverse=True)
    assert 1 + sum(marginals) == pytest.approx(walk(trace, Tree.chain(6)).tokens_per_step)
    assert np.cumprod(conditional_rates(marginals)) == pytest.approx(marginals)
    assert conditional_rates([0.5, 0.0, 0.0]) == [0.5, 0.0, 0.0]


def test_the_best_chain_is_that_of_a_plain_walk(deployment: Deployment) -> None:
    """Whatever numbers the profile holds: those of this one mean nothing."""
    table = make_table("h200", *PAIR)
    cost = StepCost.from_table(table)

    def rate(length: int) -> float:
        _, starts = brute_walk(deployment.trace, Tree.chain(length))
        tokens = deployment.trace.num_positions / len(starts)
        return tokens / cost.step_ms(1, Tree.chain(length))

    chosen = deployment.chains()
    assert chosen[1].num_nodes == max(range(9), key=rate)
    assert chosen[1] != ROWS[1]
    assert (chosen[4], chosen[16]) == (ROWS[4], ROWS[16])


def test_changes_say_what_they_cost(deployment: Deployment) -> None:
    same = {row.batch_size: row.tree.build() for row in deployment.rows}
    assert deployment.changes(same, "why") == ()
    reason, caveat, line = deployment.changes({**same, 1: Tree.chain(1)}, "why")
    assert reason == "why"
    assert "stree's own decoder" in caveat
    before, after = (deployment.tokens_per_s(1, tree) for tree in (RAGGED, Tree.chain(1)))
    assert line == (
        f"batch size 1: chain 1 in place of a tree of 3 nodes, {after:.0f} instead of "
        f"{before:.0f} tokens/s ({100 * (after / before - 1):+.0f} %)"
    )


def test_one_setting_is_the_best_mean(deployment: Deployment) -> None:
    candidates = [*chains(8), *stars(8)]
    chosen = deployment.one_setting(lambda tree: tree.is_chain, candidates)
    rates = {
        tree: math.prod(deployment.tokens_per_s(size, tree) for size in ROWS) for tree in candidates
    }
    assert rates[chosen] == pytest.approx(max(rates.values()))
    one = replace(deployment, batch_size=3)
    assert one.one_setting(lambda tree: tree.is_chain, candidates) == ROWS[4]


def test_a_row_s_own_chain_may_be_the_setting_of_all(deployment: Deployment) -> None:
    """Here the only one that is any good, though no candidate."""
    own = ROWS[4]
    rates = [deployment.mean_log_rate(dict.fromkeys(ROWS, tree)) for tree in (own, Tree.chain(0))]
    assert rates[0] > rates[1]
    assert deployment.one_setting(lambda tree: tree.is_chain, [Tree.chain(0)]) == own


def test_what_nobody_timed_or_recorded_is_left_out(deployment: Deployment) -> None:
    rows = deployment.rows[:1]
    timed, untimed, unrecorded = Tree.chain(1), Tree.chain(200), stars(20)[-1]
    assert unrecorded.max_children > deployment.trace.meta.num_children
    assert deployment.best([untimed, unrecorded, timed], rows) == timed
    with pytest.raises(MissingMeasurement):
        deployment.best([untimed], rows)


def test_ranges_join_neighbours() -> None:
    chain, off = Tree.chain(2), Tree.chain(0)
    chosen = {1: chain, 2: chain, 8: off, 16: chain}
    assert ranges(chosen) == [(1, 2, chain), (3, 8, off), (9, 16, chain)]


def test_sources_are_read_only_to_judge(deployment: Deployment) -> None:
    """A profile that a format can say needs neither table nor trace."""
    bare = replace(deployment, library=Library(()))
    with pytest.raises(MissingMeasurement, match=r"this needs traces/.*has none; name the folder"):
        bare.chains()
    policy = deployment.profile.policy[1:]
    profile = deployment.profile.model_copy(update={"policy": policy})
    assert replace(bare, profile=profile).chains() == {4: ROWS[4], 16: ROWS[16]}


def test_a_source_of_another_content_is_not_taken(root: Path, tmp_path: Path) -> None:
    profile = load_profile(next((root / "tuned").iterdir()))
    write_library(tmp_path, make_table("h200", *PAIR, spread=0.3))
    with pytest.raises(MissingMeasurement, match="has another one"):
        profile_cost(profile, Library((tmp_path,)))
    # a later root may have the right one
    assert profile_cost(profile, Library((tmp_path, root))).step_ms(1, RAGGED) > 0


def test_carried_over_times_are_carried_over_again(root: Path) -> None:
    profile = load_profile(next((root / "tuned").iterdir()))
    profile = profile.model_copy(update={"gpu": GpuRef(name="h100", status="estimated")})
    with pytest.raises(MissingMeasurement, match="no spec of h200 is there"):
        profile_cost(profile, Library((root,)))
    carried = profile_cost(profile, Library((root, shipped_root())))
    measured = StepCost.from_table(make_table("h200", *PAIR))
    assert carried.step_ms(1, RAGGED) > measured.step_ms(1, RAGGED)


@pytest.mark.parametrize(
    "path", sorted((shipped_root() / "tuned").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_profiles_are_judged_as_they_were_tuned(path: Path) -> None:
    """Their sources ship with them, and the rates come out as tuning wrote them."""
    profile, library = load_profile(path), Library((shipped_root(),))
    deployment = Deployment(profile, library, "target", "draft")
    assert profile_trace(profile, library).num_prompts > 0
    for row in profile.policy:
        rate = deployment.tokens_per_s(row.batch_size, row.tree.build())
        assert rate == pytest.approx(row.predicted.tokens_per_s, rel=1e-4)
