"""The step cost against sums written out by hand, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import trees
from synthetic_data import TREES, make_table, step_ms

from stree_autotune.cost.overhead import DOUBT, NEAR, Coefficients, Missed, WholeStep, fit_overhead
from stree_autotune.cost.step_cost import StepCost, has_cliff
from stree_autotune.cost.terms import PLAIN, Load
from stree_autotune.cost.traffic import MAX_BUFFERED
from stree_autotune.cost.tree_shape import TreeShape, shape_of
from stree_autotune.store.runtime_table import TIMED_PATH, NoRoom, Point, RuntimeTable, Step
from stree_autotune.store.step_rule import StepRule
from stree_core.drafting.tree_plan import ModelRows, make_plan
from stree_core.errors import MissingMeasurement
from stree_core.tree import DEFAULT_TREE, OFF, Tree

COST = StepCost.from_table(make_table())
RAGGED = Tree.from_paths([[0], [1], [2], [0, 0], [0, 1], [2, 0], [0, 0, 0], [0, 0, 0, 0]])
NO_FLOORS = Coefficients(-1e9, -1e9, 0.0, 0.0)


def with_points(
    table: RuntimeTable, term: str, batch_size: int, ms: dict[int, float]
) -> RuntimeTable:
    """Replace one term's points at one batch size."""
    kept = [p for p in table.points if (p.term, p.batch_size) != (term, batch_size)]
    new = [Point(term, batch_size, size, time, 0.0) for size, time in ms.items()]  # type: ignore[arg-type]
    return table.model_copy(update={"points": (*kept, *new)})


def rows_ms(rows: int) -> float:
    """A staircase like a kernel's tiles."""
    return 0.1 * (rows > 16) + 0.2 * (rows > 32)


def all_rows_ms(tree: Tree) -> float:
    """What the rows before them cost the passes of a tree."""
    return sum(map(rows_ms, shape_of(tree).rows)) if tree.num_nodes else 0.0


def with_rows() -> RuntimeTable:
    """A table of a draft whose passes take longer with many rows before them."""
    table = make_table()
    points = [
        p._replace(ms=p.ms + rows_ms(2 + p.size)) if p.term == "draft" else p for p in table.points
    ]
    built = {name: text.build() for name, text in table.trees.items()}
    steps = [step._replace(ms=step.ms + all_rows_ms(built[step.tree])) for step in table.steps]
    table = table.model_copy(update={"points": tuple(points), "steps": tuple(steps)})
    measured = {rows: rows_ms(rows) for rows in (3, 16, 17, 32, 33, 65)}
    for batch_size in table.batch_sizes:
        table = with_points(table, "draft_rows", batch_size, measured)
    return table


WITH_ROWS = StepCost.from_table(with_rows())


@given(tree=trees(max_nodes=40, min_nodes=1))
@settings(max_examples=100, deadline=None)
def test_rows_and_widths_are_those_of_the_draft_passes(tree: Tree) -> None:
    levels = make_plan(tree, frozenset(), ModelRows(frozenset()), torch.device("cpu")).levels[1:]
    shape = shape_of(tree)
    assert shape.widths == tuple(len(level.nodes) for level in levels)
    assert shape.rows == tuple(level.first + len(level.nodes) for level in levels)


@pytest.mark.parametrize("tree", [*TREES.values(), RAGGED, Tree.chain(40)], ids=repr)
def test_rows_before_a_level_cost_what_they_do(tree: Tree) -> None:
    expected = step_ms(8, tree) + all_rows_ms(tree)
    assert WITH_ROWS.step_ms(8, tree) == pytest.approx(expected, rel=1e-9)


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
    verify = StepCost.from_table(table).times[1].curves["verify"]
    assert [verify.at(size) for size in (2, 9, 16, 17, 19, 21, 40)] == [1, 1, 1, 2, 3, 4, 4]


def test_noise_that_falls_with_size_is_pooled() -> None:
    table = with_points(make_table(), "verify", 1, {2: 1.0, 3: 3.0, 4: 2.0, 5: 2.5, 65: 9.0})
    verify = StepCost.from_table(table).times[1].curves["verify"]
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
    with pytest.raises(MissingMeasurement, match="no batch size is measured, got 1"):
        StepCost.from_table(bare).require([1], 8)
    off_alone = [step for step in make_table().steps if step.tree == "off"]
    bare = make_table().model_copy(update={"steps": tuple(off_alone)})
    with pytest.raises(MissingMeasurement, match="two or more whole steps at batch size 1"):
        StepCost.from_table(bare).require([1], 8)
    no_draft = with_points(make_table(), "draft", 4, {})
    with pytest.raises(MissingMeasurement, match="draft at batch size 4 is measured for no size"):
        StepCost.from_table(no_draft).require([3], 8)
    no_rules = make_table().model_copy(update={"rules": ()})
    with pytest.raises(MissingMeasurement, match="'branch' of a sampling rule"):
        StepCost.from_table(no_rules).require([1], 8)


def test_what_did_not_fit_is_refused_as_that() -> None:
    table = make_table().model_copy(update={"no_room": (NoRoom("verify", 64, 129),)})
    with pytest.raises(MissingMeasurement, match="larger sizes did not fit into the GPU's memory"):
        StepCost.from_table(table).step_ms(64, Tree.chain(100))


def sampled(rule: StepRule, *off_rules: StepRule) -> StepCost:
    table = make_table()
    steps = [Step(8, "off", 5.0, 0.0, 1.0, other) for other in off_rules]
    table = table.model_copy(update={"steps": (*table.steps, *steps)})
    return StepCost.from_table(table, rule)


def test_sampling_rules_by_hand() -> None:
    greedy = step_ms(8, DEFAULT_TREE)
    # 13 tokens, 6 inner nodes with up to 3 children, levels of 1, 2, 2 and 1 drafted from
    naive = 0.02 + 0.001 * 8 * 13
    truncated = 0.05 + 0.004 * 8 * 13
    draws = sum(0.015 + 0.002 * 8 * width for width in (1, 2, 2, 1))
    one, four = 0.01 + 0.003 * 8 * 6, 0.04 + 0.006 * 8 * 6
    tries = one + (four - one) / 3 * 2
    truncated_draws = sum(0.06 + 0.005 * 8 * width for width in (1, 2, 2, 1))
    for rule, extra in (
        (StepRule.NAIVE, naive),
        (StepRule.NAIVE_TRUNCATED, truncated),
        (StepRule.MSS, naive + draws + tries),
        (StepRule.MSS_TRUNCATED, truncated + truncated_draws + tries),
    ):
        cost = sampled(rule)
        assert cost.step_ms(8, DEFAULT_TREE) == pytest.approx(greedy + extra), rule
        cut = rule.sampling.truncates
        sample = truncated - 0.004 * 8 * 12 if cut else naive - 0.001 * 8 * 12
        off = step_ms(8, Tree.chain(0)) + sample
        assert cost.step_ms(8, Tree.chain(0)) == pytest.approx(off), rule


def test_a_measured_step_without_speculation_goes_before_the_sum() -> None:
    for rule in (StepRule.NAIVE, StepRule.MSS):
        assert sampled(rule, StepRule.NAIVE).step_ms(8, Tree.chain(0)) == 5.0
    assert sampled(StepRule.MSS_TRUNCATED, StepRule.NAIVE).step_ms(8, Tree.chain(0)) < 4


def test_steps_of_a_rule_have_a_remainder_of_their_own() -> None:
    table = make_table()
    plain = StepCost.from_table(table, StepRule.MSS)
    steps = [
        Step(8, name, plain.step_ms(8, TREES[name], 1.0) + 0.5, 0.0, 1.0, StepRule.MSS)
        for name in ("chain-2", "chain-4", "published")
    ]
    cost = StepCost.from_table(
        table.model_copy(update={"steps": (*table.steps, *steps)}), StepRule.MSS
    )
    assert cost.step_ms(8, RAGGED) == pytest.approx(plain.step_ms(8, RAGGED) + 0.5)
    assert cost.step_ms(4, RAGGED) == pytest.approx(plain.step_ms(4, RAGGED))


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 7])
def test_the_share_of_steps_that_store(tokens: int) -> None:
    kept, stored = 0, 0
    for _ in range(10_000):
        kept += tokens
        if kept > MAX_BUFFERED:
            kept, stored = 0, stored + 1
    # the formula is a mean over where a path may end
    assert Load(tokens_per_step=tokens).store_share == pytest.approx(stored / 10_000, rel=0.15)
    assert Load(tokens_per_step=1).store_share == pytest.approx(1 / 17)


def test_storing_costs_by_how_often_it_happens() -> None:
    table = with_points(make_table(), "target_store", 8, {8: 1.7})
    table = with_points(table, "draft_store", 8, {8: 0.34})
    cost = StepCost.from_table(table)
    slow, fast = cost.step_ms(8, DEFAULT_TREE, 1.0), cost.step_ms(8, DEFAULT_TREE, 4.0)
    shares = [Load(tokens_per_step=rate).store_share for rate in (1.0, 4.0)]
    assert fast - slow == pytest.approx((1.7 + 0.34) * (shares[1] - shares[0]))
    assert cost.step_ms(8, DEFAULT_TREE) == cost.step_ms(8, DEFAULT_TREE, 3.0), "half the depth"


def test_the_first_slot_that_stores_may_cost_most() -> None:
    table = with_points(make_table(), "target_store", 8, {1: 0.6, 8: 2.0})
    cost, plain = StepCost.from_table(table), StepCost.from_table(make_table())
    times, shape = (c.times[8] for c in (cost, plain)), shape_of(DEFAULT_TREE)
    steps, without = times
    for rate in (1.0, 2.5, 6.0):
        load = Load(tokens_per_step=rate)
        flushing = 8 * load.store_share
        expected = 0.6 * flushing if flushing < 1 else 0.6 + 0.2 * (flushing - 1)
        more = steps.sum_ms(shape, load, PLAIN) - without.sum_ms(shape, load, PLAIN)
        assert more == pytest.approx(expected)
    every = Load(tokens_per_step=60.0)
    assert every.store_share == 1
    more = steps.sum_ms(shape, every, PLAIN) - without.sum_ms(shape, every, PLAIN)
    assert more == pytest.approx(2.0)


def test_accepted_tokens_cost_in_every_pass_of_the_next_step() -> None:
    table = with_points(make_table(), "target_path", 8, {1: 0.03})
    table = with_points(table, "draft_path", 8, {1: 0.01})
    cost = StepCost.from_table(table)
    for depth in (1, 5):
        slow, fast = (cost.step_ms(8, Tree.chain(depth), rate) for rate in (1.5, 4.0))
        assert fast - slow == pytest.approx(2.5 * (0.03 + depth * 0.01))
    times, shape = cost.times[8], shape_of(Tree.chain(3))
    at_timed = times.sum_ms(shape, Load(tokens_per_step=TIMED_PATH), PLAIN)
    plain = StepCost.from_table(make_table()).times[8]
    assert at_timed == pytest.approx(plain.sum_ms(shape, Load(), PLAIN)), "as it was timed"


def test_context_costs_by_what_is_committed() -> None:
    table = with_points(make_table(), "context", 8, {1: 0.1, 65: 0.74})
    cost = StepCost.from_table(table, context=table.context // 2)
    plain = StepCost.from_table(table)
    # a quarter of the context less: slots are half full on average
    assert cost.step_ms(8, Tree.chain(0)) == pytest.approx(plain.step_ms(8, Tree.chain(0)) - 0.025)
    slope = 0.1 + 0.64 * 12 / 64
    expected = plain.step_ms(8, DEFAULT_TREE) - slope / 4
    assert cost.step_ms(8, DEFAULT_TREE) == pytest.approx(expected)


def test_context_costs_in_every_draft_pass_of_a_draft_with_attention() -> None:
    table = with_points(make_table(), "draft_context", 8, {1: 0.08})
    cost = StepCost.from_table(table, context=table.context // 2)
    plain = StepCost.from_table(table)
    assert cost.step_ms(8, Tree.chain(0)) == pytest.approx(plain.step_ms(8, Tree.chain(0)))
    for depth in (1, 4):
        less = plain.step_ms(8, Tree.chain(depth)) - cost.step_ms(8, Tree.chain(depth))
        assert less == pytest.approx(depth * 0.08 / 4), "a quarter of the context less"


def test_the_hosts_work_decides_nothing() -> None:
    cost = StepCost.from_table(with_points(make_table(), "host", 8, {1: 9.0}))
    assert cost.step_ms(8, DEFAULT_TREE) == pytest.approx(step_ms(8, DEFAULT_TREE))


def test_between_batch_sizes_with_a_cliff_times_are_bounded() -> None:
    cost = StepCost.from_table(make_table())
    assert [has_cliff(*gap, None) for gap in ((4, 8), (8, 16), (16, 32), (32, 64))] == [
        False, True, True, True,
    ]  # fmt: skip
    assert not has_cliff(17, 32, None)
    assert has_cliff(17, 32, shape_of(Tree.chain(2)))
    below, between, above = 16, 20, 32
    ends = [cost.step_ms(size, OFF) for size in (below, above)]
    rng = np.random.default_rng(0)
    drawn = [cost.draw(rng).step_ms(between, OFF) for _ in range(400)]
    assert np.quantile(drawn, 0.975) / np.quantile(drawn, 0.025) > (ends[1] / ends[0]) ** 0.7
    assert ends[0] <= min(drawn) < max(drawn) <= ends[1]
    assert "is bounded by both; measure with" in cost.note(between)
    assert cost.note(below) == ""


def with_off(table: RuntimeTable, ms: dict[int, float]) -> RuntimeTable:
    """Add steps of off at batch sizes where nothing else is measured."""
    more = [Step(size, "off", time, 0.0) for size, time in ms.items()]
    # A probe writes down what the host takes beside every step.
    hosts = [Point("host", size, 1, 0.1, 0.0) for size in ms]
    update = {"steps": (*table.steps, *more), "points": (*table.points, *hosts)}
    return table.model_copy(update=update)


def test_off_beside_a_cliff_makes_its_own_points() -> None:
    table = with_off(make_table(), {9: 3.3, 17: 4.0, 33: 4.5})
    assert (table.batch_sizes, table.off_sizes) == ((1, 2, 4, 8, 16, 32, 64), (9, 17, 33))
    cost = StepCost.from_table(table)
    assert cost.batch_sizes == table.batch_sizes
    assert cost.step_ms(17, OFF) == 4.0
    ends = 4.0, cost.step_ms(32, OFF)
    assert cost.step_ms(20, OFF) == pytest.approx(ends[0] + 3 / 15 * (ends[1] - ends[0]))
    drawn = {cost.draw(np.random.default_rng(seed)).step_ms(20, OFF) for seed in range(20)}
    assert drawn == {cost.step_ms(20, OFF)}, "no cliff between 17 and 32 rows"
    assert cost.note(20) == ""
    assert "chain 1 was measured at 16 and 32" in cost.note(20, Tree.chain(1))
    # a tree is between the batch sizes where trees were measured
    for tree in (Tree.chain(2), DEFAULT_TREE):
        assert cost.step_ms(17, tree) == COST.step_ms(17, tree)
    cost.require([9, 17, 20], 64)


def test_off_beside_a_cliff_grows_with_the_context() -> None:
    table = make_table()
    for size in (16, 32):
        table = with_points(table, "context", size, {1: 0.01 * size, 65: 0.02 * size})
    costs = [
        StepCost.from_table(with_off(table, {17: 4.0}), context=context)
        for context in (table.context, table.context + 2048)
    ]
    before, after = (cost.step_ms(17, OFF) for cost in costs)
    assert after - before == pytest.approx(0.01 * 17)


@given(tree=trees(max_nodes=40, min_nodes=1))
@settings(max_examples=150, deadline=None)
def test_a_further_node_never_makes_a_step_cheaper(tree: Tree) -> None:
    children = {node: len(tree.children[node]) for node in range(tree.num_tokens)}
    before = [cost.step_ms(8, tree) for cost in (COST, WITH_ROWS)]
    for node, count in children.items():
        path = tuple(tree.ranks[n] for n in tree.node_paths[node][1:])
        larger = Tree.from_paths([*tree.paths, (*path, count)])
        for cost, less in zip((COST, WITH_ROWS), before, strict=True):
            assert cost.step_ms(8, larger) >= less - 1e-12


def shape(depth: int, num_tokens: int, *branching: int) -> TreeShape:
    """Return a shape as far as the overhead sees it."""
    return TreeShape(num_tokens, depth, (), (), branching, depth, 1 + len(branching))


def whole(shape: TreeShape, sum_ms: float, ms: float) -> WholeStep:
    return WholeStep(shape, sum_ms, 1.0, ms)


def test_remainder_recovers_its_coefficients() -> None:
    shapes = [
        *(shape(1, 2), shape(2, 3), shape(4, 5), shape(8, 9), shape(4, 13, 1)),
        *(shape(2, 17, 1, 2), shape(3, 33, 1), shape(5, 20, 3)),
    ]
    wanted = Coefficients(0.3, -0.04, 0.002, 0.05)
    steps = [whole(s, 2.0, 2.0 + wanted.ms(s)) for s in shapes]
    assert steps[0].ms == pytest.approx(2.0 + 0.3 - 0.04 + 0.004)
    assert steps[5].ms == pytest.approx(2.0 + 0.3 - 0.08 + 0.034 + 0.05)
    found = fit_overhead(steps, Coefficients(-1.0, -0.5), by_tokens=True)
    assert found.coefficients == pytest.approx(wanted)
    assert found.fit_error == pytest.approx(0.0, abs=1e-9)
    assert found.missed is not None
    assert found.missed.factor(17) == pytest.approx(1.0)


def test_remainder_takes_siblings_alone_where_they_tell() -> None:
    steps = [whole(shape(d, d + 1), 1.0, 1.2) for d in (1, 2, 4, 6)]
    steps += [whole(shape(d, t, 1), 1.0, 1.5) for d, t in ((1, 9), (2, 5), (3, 17))]
    found = fit_overhead(steps, NO_FLOORS).coefficients
    assert found == pytest.approx(Coefficients(0.2, branching=0.3))


def test_steps_with_as_many_tokens_share_what_the_remainder_misses() -> None:
    missed = Missed(np.log([9, 9, 64]), np.array([0.1, 0.2, -0.4]))
    # Two of three count fully, and a part of one that missed nothing.
    assert missed.factor(9) == pytest.approx(1 + 0.3 / (2 + DOUBT))
    assert missed.factor(24) == pytest.approx(1.0, abs=1e-3), "far from all"
    absurd = Missed(np.log([9, 64]), np.array([-4.0, 9.0]))
    assert (absurd.factor(9), absurd.factor(64)) == (0.5, 2.0)
    one = math.exp(-0.5 * (math.log(10 / 9) / NEAR) ** 2)
    assert missed.factor(10) == pytest.approx(1 + 0.3 * one / (2 * one + DOUBT))


def test_verify_inside_steps_is_what_these_show_and_still_rises() -> None:
    table = make_table()
    slow = [
        step._replace(ms=step.ms + 0.5) if step.tree == "wide" and step.batch_size == 8 else step
        for step in table.steps
    ]
    times = StepCost.from_table(table.model_copy(update={"steps": tuple(slow)})).times[8]
    assert times.verify.at(17) > times.curves["verify"].at(17) + 0.05
    assert times.verify.at(64) >= times.verify.at(17), "times rise with tokens"
    assert list(times.verify.ms) == sorted(times.verify.ms)
    untouched = StepCost.from_table(table).times[8]
    assert untouched.verify.ms == pytest.approx(untouched.curves["verify"].ms)


def test_remainder_never_undoes_more_than_a_pass() -> None:
    steps = [whole(shape(d, 9), 1.0 + d, 1.0) for d in (1, 2, 3, 4)]
    found = fit_overhead(steps, Coefficients(-0.1, -0.25)).coefficients
    assert found.per_level == pytest.approx(-0.25)


def test_leave_one_out_error_against_plain_least_squares() -> None:
    rng = np.random.default_rng(3)
    depths = np.array([1, 2, 3, 4, 6, 8])
    times = 5 + 0.5 * depths + rng.normal(0, 0.05, size=6)
    steps = [
        whole(shape(int(d), int(d) + 1), 4.0, float(t)) for d, t in zip(depths, times, strict=True)
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
    found = fit_overhead(steps, NO_FLOORS)
    assert found.fit_error == pytest.approx(errors[0, 1], rel=1e-6)
    assert errors[0, 1] < errors[0,]


def test_a_left_out_step_is_told_by_those_with_as_many_tokens() -> None:
    slow = [whole(shape(d, 33), 2.0, 2.8) for d in (1, 2, 3, 4)]
    steps = [*slow, *(whole(shape(d, t), 2.0, 2.1) for d, t in ((1, 2), (2, 9), (3, 16), (4, 64)))]
    alone, near = (fit_overhead(steps, Coefficients(), by_tokens=told) for told in (False, True))
    assert near.fit_error < 0.7 * alone.fit_error


def test_the_last_digits_of_chains_say_nothing_of_trees() -> None:
    """Steps of an estimate are sums of their terms, and there are chains alone among them."""
    shapes = [shape(depth, depth + 1) for depth in (1, 2, 3, 4, 6, 8)]
    for seed in range(40):
        rng = np.random.default_rng(seed)
        sums = np.sort(rng.uniform(0.1, 0.3, len(shapes)))
        times = sums * (1 + 1e-16 * rng.standard_normal(len(shapes)))
        steps = list(map(whole, shapes, sums.tolist(), times.tolist()))
        found = fit_overhead(steps, Coefficients(-0.1, -0.02), by_tokens=True)
        assert abs(found.coefficients.ms(shape(16, 65, 1))) < 1e-9, seed


def test_two_steps_fit_a_constant_alone() -> None:
    steps = [whole(shape(1, 2), 1.0, 1.5), whole(shape(2, 3), 2.0, 2.5)]
    assert fit_overhead(steps, NO_FLOORS).coefficients == pytest.approx(Coefficients(0.5))


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
