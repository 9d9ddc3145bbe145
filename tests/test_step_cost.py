"""The step cost against sums written out by hand, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from strategies import trees
from synthetic_data import TREES, make_table, model_cost, step_ms, verify_ms

from stree_autotune.estimate import Estimate, estimate_table, pass_bytes
from stree_autotune.gpu_sheet import GpuSheet, load_gpu_sheet
from stree_autotune.library import shipped_root
from stree_autotune.remainder import WholeStep, fit_remainder
from stree_autotune.runtime_table import Point, RuntimeTable
from stree_autotune.step_cost import StepCost
from stree_core.errors import MissingMeasurement
from stree_core.tree import DEFAULT_TREE, Tree

COST = StepCost.from_table(make_table())
RAGGED = Tree.from_paths([[0], [1], [2], [0, 0], [0, 1], [2, 0], [0, 0, 0], [0, 0, 0, 0]])
NO_FLOORS = (-1e9, -1e9, 0.0)


def sheet(name: str) -> GpuSheet:
    return load_gpu_sheet(shipped_root() / "gpus" / f"{name}.yaml")


def with_points(
    table: RuntimeTable, term: str, batch_size: int, ms: dict[int, float]
) -> RuntimeTable:
    """Replace one term's points at one batch size."""
    kept = [p for p in table.points if (p.term, p.batch_size) != (term, batch_size)]
    new = [Point(term, batch_size, size, time, 0.0) for size, time in ms.items()]  # type: ignore[arg-type]
    return table.model_copy(update={"points": (*kept, *new)})


@pytest.mark.parametrize("tree", [Tree.chain(0), *TREES.values(), RAGGED], ids=repr)
@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_step_is_the_sum_of_its_terms(tree: Tree, batch_size: int) -> None:
    assert COST.step_ms(batch_size, tree) == pytest.approx(step_ms(batch_size, tree), rel=1e-9)


def test_ragged_tree_by_hand() -> None:
    # levels with children: root (3 children), [0] and [2] (2 and 1), [0,0] (1), [0,0,0] (1)
    terms = 0.35 + (0.3 + 0.004) * 3 + (0.01 + 0.0005) + (0.01 + 0.001) + (3.0 + 0.03)
    assert COST.step_ms(1, RAGGED) == pytest.approx(terms + 0.05 + 4 * 0.01, rel=1e-9)


def test_staircase_is_not_smeared() -> None:
    def verified(num_leaves: int) -> float:
        return COST.step_ms(32, Tree.from_paths([[i] for i in range(num_leaves)]))

    assert verified(22) == verified(17) == verified(31)
    assert verified(32) - verified(31) == pytest.approx(0.03 * 32)


def test_between_measured_sizes_the_line_joins_neighbours_only() -> None:
    table = with_points(make_table(), "verify", 1, {2: 1.0, 16: 1.0, 17: 2.0, 21: 4.0, 65: 4.0})
    verify = StepCost.from_table(table).times[1].verify
    assert [verify.at(size) for size in (2, 9, 16, 17, 19, 21, 40)] == [1, 1, 1, 2, 3, 4, 4]


def test_noise_that_falls_with_size_is_pooled() -> None:
    table = with_points(make_table(), "verify", 1, {2: 1.0, 3: 3.0, 4: 2.0, 5: 2.5, 65: 9.0})
    verify = StepCost.from_table(table).times[1].verify
    assert [verify.at(size) for size in (2, 3, 4, 5, 65)] == pytest.approx([1, 2.5, 2.5, 2.5, 9])


def test_between_measured_batch_sizes_it_is_linear() -> None:
    tree = DEFAULT_TREE
    expected = 0.75 * COST.step_ms(4, tree) + 0.25 * COST.step_ms(8, tree)
    assert COST.step_ms(5, tree) == pytest.approx(expected)


@pytest.mark.parametrize("batch_size", [128, 65])
def test_beyond_the_measured_batch_sizes_is_refused(batch_size: int) -> None:
    with pytest.raises(MissingMeasurement, match=f"probe --gpu h200 .* --batch-size {batch_size}"):
        COST.step_ms(batch_size, DEFAULT_TREE)


def test_beyond_the_measured_sizes_is_refused_with_the_command() -> None:
    with pytest.raises(MissingMeasurement, match=r"sizes 1 to 65, got size 101.*--max-nodes 100"):
        COST.step_ms(1, Tree.chain(100))


def test_require_names_the_first_gap() -> None:
    COST.require([1, 3, 64], 64)
    with pytest.raises(MissingMeasurement, match="got size 66"):
        COST.require([1], 65)
    bare = make_table().model_copy(update={"steps": ()})
    with pytest.raises(MissingMeasurement, match="whole steps at batch size 1"):
        StepCost.from_table(bare).require([1], 8)
    no_branch = with_points(make_table(), "branch", 4, {})
    with pytest.raises(MissingMeasurement, match="branch at batch size 4 is measured for no size"):
        StepCost.from_table(no_branch).require([3], 8)


@given(tree=trees(max_nodes=40, min_nodes=1))
@settings(max_examples=150, deadline=None)
def test_a_further_node_never_makes_a_step_cheaper(tree: Tree) -> None:
    children = {node: len(tree.children[node]) for node in range(tree.num_tokens)}
    before = COST.step_ms(8, tree)
    for node, count in children.items():
        path = tuple(tree.ranks[n] for n in tree.node_paths[node][1:])
        larger = Tree.from_paths([*tree.paths, (*path, count)])
        assert COST.step_ms(8, larger) >= before - 1e-12


def test_remainder_recovers_its_coefficients() -> None:
    shapes = [(1, 2), (2, 3), (4, 5), (8, 9), (4, 13), (2, 17), (3, 33)]
    steps = [WholeStep(d, t, 2.0, 2.0 + 0.3 - 0.04 * d + 0.002 * t) for d, t in shapes]
    found = fit_remainder(steps, (-1.0, -0.5, 0.0))
    assert found.constant_ms == pytest.approx(0.3)
    assert found.per_level_ms == pytest.approx(-0.04)
    assert found.per_token_ms == pytest.approx(0.002)
    assert found.fit_error == pytest.approx(0.0, abs=1e-9)


def test_remainder_never_undoes_more_than_a_pass() -> None:
    steps = [WholeStep(d, 9, 1.0 + d, 1.0) for d in (1, 2, 3, 4)]
    assert fit_remainder(steps, (-0.1, -0.25, 0.0)).per_level_ms >= -0.25


def test_leave_one_out_error_against_plain_least_squares() -> None:
    rng = np.random.default_rng(3)
    depths = np.array([1, 2, 3, 4, 6, 8])
    times = 5 + 0.5 * depths + rng.normal(0, 0.05, size=6)
    steps = [
        WholeStep(int(d), int(d) + 1, 4.0, float(t)) for d, t in zip(depths, times, strict=True)
    ]
    errors = {}
    for powers in ((0,), (0, 1)):
        design = np.stack([depths**p for p in powers], axis=1) / times[:, None]
        wanted = (times - 4.0) / times
        missed = []
        for i in range(6):
            rest = np.arange(6) != i
            solution, *_ = np.linalg.lstsq(design[rest], wanted[rest], rcond=None)
            missed.append(design[i] @ solution - wanted[i])
        errors[powers] = math.sqrt(np.mean(np.square(missed)))
    found = fit_remainder(steps, NO_FLOORS)
    assert found.fit_error == pytest.approx(errors[0, 1], rel=1e-6)
    assert errors[0, 1] < errors[0,]


def test_two_steps_fit_a_constant_alone() -> None:
    found = fit_remainder([WholeStep(1, 2, 1.0, 1.5), WholeStep(2, 3, 2.0, 2.5)], NO_FLOORS)
    assert (found.constant_ms, found.per_level_ms) == (pytest.approx(0.5), 0.0)


def test_draws_follow_the_spread_and_the_seed() -> None:
    cost = StepCost.from_table(make_table(spread=0.02))
    rng = np.random.default_rng(0)
    off = [cost.draw(rng).step_ms(1, Tree.chain(0)) for _ in range(2000)]
    assert np.std(np.log(off)) == pytest.approx(0.02, rel=0.1)
    assert np.median(off) == pytest.approx(cost.step_ms(1, Tree.chain(0)), rel=0.002)
    again = np.random.default_rng(0)
    assert cost.draw(again).step_ms(1, Tree.chain(0)) == off[0]


def test_a_draw_moves_equal_terms_together() -> None:
    cost = StepCost.from_table(make_table(spread=0.1)).draw(np.random.default_rng(5))
    plain = StepCost.from_table(make_table())
    ratio = cost.step_ms(1, Tree.chain(0)) / plain.step_ms(1, Tree.chain(0))
    assert cost.step_ms(64, Tree.chain(0)) == pytest.approx(
        ratio * plain.step_ms(64, Tree.chain(0))
    )


def estimate(kv_bytes_per_token: int = 0) -> Estimate:
    table = make_table(kv_bytes_per_token=kv_bytes_per_token)
    return estimate_table(table, sheet("h200"), sheet("h100"))


def test_estimate_scales_the_traffic_share_alone() -> None:
    carried = estimate(kv_bytes_per_token=512).table
    point = next(p for p in carried.points if p[:3] == ("verify", 8, 16))
    moved = 12_000_000 + 8 * (2 * 400_000 + 1024 * 512 + 2 * 4 * 16 * 4096)
    traffic_ms = moved / 4.8e12 * 1e3
    assert point.ms == pytest.approx(verify_ms(8, 16) + traffic_ms * (4.8 / 3.35 - 1))
    assert carried.gpu == "h100"
    branch = next(p for p in carried.points if p[:3] == ("branch", 8, 1))
    assert branch.ms == pytest.approx(0.014)


def test_estimate_never_scales_more_than_the_time_itself() -> None:
    table = make_table().model_copy(update={"target": model_cost("demo-target", 10**12)})
    carried = estimate_table(table, sheet("h200"), sheet("h100"))
    off = StepCost.from_estimate(carried).step_ms(1, Tree.chain(0))
    assert off == pytest.approx(3.02 * 4.8 / 3.35)


def test_estimated_steps_carry_the_traffic_of_every_pass() -> None:
    carried = StepCost.from_estimate(estimate())
    target, draft = make_table().target, make_table().draft
    # the published tree drafts from 1, 2, 2 and 1 nodes and verifies 13 tokens
    moved = pass_bytes(target, 4, 13, 1024) + sum(
        pass_bytes(draft, 4, w, 1024) for w in (1, 2, 2, 1)
    )
    expected = step_ms(4, DEFAULT_TREE) + moved / 4.8e9 * (4.8 / 3.35 - 1)
    assert carried.step_ms(4, DEFAULT_TREE) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tree", [Tree.chain(0), Tree.chain(3), DEFAULT_TREE], ids=repr)
def test_draws_of_an_estimate_stay_in_its_band(tree: Tree) -> None:
    carried = StepCost.from_estimate(estimate())
    rng = np.random.default_rng(1)
    drawn = np.array([carried.draw(rng).step_ms(16, tree) for _ in range(400)])
    low, high = step_ms(16, tree), step_ms(16, tree) * 4.8 / 3.35
    assert low * (1 - 1e-6) <= drawn.min() < low * 1.02
    assert high * 0.98 < drawn.max() <= high * (1 + 1e-6)


def test_another_architecture_is_not_estimated() -> None:
    other = sheet("h100").model_copy(update={"name": "a100", "architecture": "ampere"})
    with pytest.raises(MissingMeasurement, match="stree-tune probe --gpu a100"):
        estimate_table(make_table(), sheet("h200"), other)


def test_the_sheets_hold_the_published_bandwidths() -> None:
    assert sheet("h200").memory_bandwidth_tb_per_s == 4.8
    assert sheet("h100").memory_bandwidth_tb_per_s == 3.35
    assert sheet("h100").is_sibling_of(sheet("h200"))
