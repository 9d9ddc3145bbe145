"""The verdict keeps paired gains, prefers the simpler option otherwise, and says why."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from synthetic import FakeCost, brute_walk, latent_trace, trace_of

from stree_autotune.search.bootstrap import Option, studentized, worst_again
from stree_autotune.search.cross_fit import NUM_FOLDS, CrossFit
from stree_autotune.search.study import Trial
from stree_autotune.search.verdict import Decision, Preference, decide_policy
from stree_autotune.trace.file import NO_RANK, Trace
from stree_autotune.trace.tree_walk import walk
from stree_core.errors import ConfigError, MissingMeasurement
from stree_core.tree import DEFAULT_TREE, OFF, Tree


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Prompts of very different difficulty."""
    return latent_trace(0, num_prompts=160, length=80, phi=0.3, prompt_sd=1.0)


@dataclass(frozen=True)
class PlainCost:
    """A price per kind of step; every node beyond `cheap_nodes` costs a full `dear_ms` more."""

    off_ms: float = 1.0
    chain_ms: float = 1.0
    tree_ms: float = 1.0
    cheap_nodes: int = 3
    dear_ms: float = 50.0
    spread: float = 0.0
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def step_ms(self, batch_size: int, tree: Tree, tokens_per_step: float | None = None) -> float:
        kind = 0 if tree == OFF else 1 if tree.is_chain else 2
        too_many = max(0, tree.num_nodes - self.cheap_nodes)
        base_ms = (self.off_ms, self.chain_ms, self.tree_ms)[kind]
        return base_ms * self.factors[kind] + self.dear_ms * too_many

    def draw(self, rng: np.random.Generator) -> PlainCost:
        off, chain, tree = 1 + self.spread * rng.standard_normal(3)
        return replace(self, factors=(float(off), float(chain), float(tree)))


def decide(
    trace: Trace, cost: PlainCost | FakeCost, max_nodes: int = 8, prefer: Preference = "simple"
) -> Decision:
    return decide_policy(trace, cost, (1,), max_nodes=max_nodes, seed=0, prefer=prefer)[0]


def with_gain(trace: Trace, gain: float, spread: float = 0.0) -> PlainCost:
    """Return a cost under which the best tree of 3 nodes is `gain` faster than the best chain."""
    free = decide(trace, PlainCost(off_ms=9.0))
    assert free.verdict == "tree"
    chain = max(walk(trace, Tree.chain(n)).tokens_per_step for n in (1, 2, 3))
    return PlainCost(off_ms=9.0, tree_ms=free.tokens_per_step / chain / (1 + gain), spread=spread)


def unpaired_interval(trace: Trace, tree: Tree, step_ms: float) -> tuple[float, float]:
    rng = np.random.default_rng(1)
    result = walk(trace, tree)
    sampled = rng.integers(0, trace.num_prompts, (1000, trace.num_prompts))
    tokens = result.positions_P[sampled].sum(axis=1)
    low, high = np.quantile(tokens / result.starts_P[sampled].sum(axis=1) / step_ms, (0.025, 0.975))
    return float(low), float(high)


def test_a_paired_gain_of_nine_percent_is_kept(trace: Trace) -> None:
    cost = with_gain(trace, 0.09)
    decision = decide(trace, cost)
    assert decision.verdict == "tree"
    assert decision.tree.num_nodes == 3
    gain, low, high = (float(x) for x in re.findall(r"-?\d+\.\d", decision.reason)[:3])
    assert 7 < gain < 10
    assert 1 < low < gain < high < 17
    # the two rates on their own overlap: an unpaired comparison would call it a tie
    chain = max((Tree.chain(n) for n in (1, 2, 3)), key=lambda c: walk(trace, c).tokens_per_step)
    chain_high = unpaired_interval(trace, chain, cost.chain_ms)[1]
    tree_low = unpaired_interval(trace, decision.tree, cost.tree_ms)[0]
    assert tree_low < chain_high


def test_the_simpler_option_wins_when_the_gain_may_be_nothing(trace: Trace) -> None:
    assert decide(trace, with_gain(trace, 0.02)).verdict == "tree"
    uncertain = decide(trace, with_gain(trace, 0.02, spread=0.05))
    assert uncertain.verdict == "chain"
    assert re.search(r"; a tree of 3 nodes would gain .*, so maybe nothing$", uncertain.reason)
    equal = decide(trace, with_gain(trace, 0.0))
    assert equal.verdict == "chain"


def test_fewer_nodes_win_when_more_may_be_nothing() -> None:
    # ranks 0 and 1 are worth a node everywhere, ranks 2 and 3 in one prompt of forty
    common, rare = [0, NO_RANK, 1, NO_RANK] * 10, [2, NO_RANK, 3, NO_RANK] * 10
    trace = trace_of([rare, *[common] * 39], 4)
    cost = PlainCost(off_ms=9.0, cheap_nodes=0, dear_ms=1e-5)
    wide = Tree.from_paths([[0], [1], [2], [3]])
    small = Tree.from_paths([[0], [1]])
    rates = [walk(trace, tree).tokens_per_step / cost.step_ms(1, tree) for tree in (small, wide)]
    assert rates[0] < rates[1]
    decision = decide(trace, cost, max_nodes=4)
    assert decision.tree == small
    # and prompts without them never choose them: what they gain is not even offered
    assert "4 nodes would" not in decision.reason
    certain = trace_of([[*common, *rare]] * 40, 4)
    assert decide(certain, cost, max_nodes=4).tree == wide


def test_off_when_nothing_pays(trace: Trace) -> None:
    decision = decide(trace, PlainCost(off_ms=0.1))
    assert (decision.verdict, decision.tree) == ("off", OFF)
    assert (decision.tokens_per_step, decision.speedup) == (1.0, 1.0)
    assert decision.speedup_interval == (1.0, 1.0)
    assert re.match(r"off: .* would change speed by -\d+\.\d % \[-", decision.reason)


def test_off_when_the_gain_may_be_nothing(trace: Trace) -> None:
    chain = max(walk(trace, Tree.chain(n)).tokens_per_step for n in (1, 2, 3))
    cost = PlainCost(off_ms=1.01, chain_ms=chain, tree_ms=9.0, spread=0.05)
    decision = decide(trace, cost)
    assert decision.verdict == "off"
    assert "so maybe not at all" in decision.reason


def test_a_chain_when_width_is_useless() -> None:
    only_first = latent_trace(1, num_prompts=64, length=80, shares=(0.7,), num_children=8)
    decision = decide(only_first, FakeCost(pad=1, per_level_ms=0.4), max_nodes=12)
    assert decision.verdict == "chain"
    assert re.match(r"chain \d gains \d+\.\d % \[.*\] over off: \+", decision.reason)


def test_numbers_of_a_decision_agree(trace: Trace) -> None:
    cost = FakeCost(batch_share=0.2, spread=0.01)
    batch_sizes = (1, 4, 32)
    decisions = decide_policy(trace, cost, batch_sizes, max_nodes=24, seed=3)
    assert [decision.batch_size for decision in decisions] == list(batch_sizes)
    for decision in decisions:
        tree, batch_size = decision.tree, decision.batch_size
        # predicted tokens per step is the walk over the whole trace
        assert decision.tokens_per_step == walk(trace, tree).tokens_per_step
        assert decision.step_ms == cost.step_ms(batch_size, tree)
        rate = 1000 * batch_size * decision.tokens_per_step / decision.step_ms
        assert decision.tokens_per_s == pytest.approx(rate)
        off_rate = 1000 * batch_size / cost.step_ms(batch_size, OFF)
        # the speedup is that on prompts without a part in the choice, so a little less
        assert decision.speedup == pytest.approx(rate / off_rate, rel=0.03)
        low, high = decision.speedup_interval
        assert low < decision.speedup < high
        kind = "off" if tree == OFF else "chain" if tree.is_chain else "tree"
        assert decision.verdict == kind
        assert len(decision.reason) <= 500


def test_same_seed_same_decisions(trace: Trace) -> None:
    cost = FakeCost(batch_share=0.2, spread=0.02)
    lines: list[str] = []
    first = decide_policy(trace, cost, (2, 8), max_nodes=16, seed=5, progress=lines.append)
    assert decide_policy(trace, cost, (2, 8), max_nodes=16, seed=5) == first
    assert decide_policy(trace, cost, (8,), max_nodes=16, seed=5) == first[1:]
    assert lines == [f"batch size {d.batch_size}: {d.reason}" for d in first]


def test_options_are_timed_on_prompts_that_did_not_choose() -> None:
    # the first fold's prompts accept rank 3 only, all others rank 0
    own, other = [3] * 8, [0] * 8
    trace = trace_of([own if index % NUM_FOLDS == 0 else other for index in range(20)], 4)
    fit = CrossFit.of(trace, FakeCost(), max_nodes=6, seed=0)
    for kind in (Tree.chain(3), DEFAULT_TREE):
        option = fit.option(1, Trial.at(1, kind, 1.0, 1.0), 6)
        # a start at every position: the others know nothing of rank 3
        missed = option.ms_P[::NUM_FOLDS]
        assert len(set(missed.tolist())) == 1
        assert missed[0] >= 8 * FakeCost().step_ms(1, Tree.chain(1))
        assert option.ms_P[1] < missed[0] / 2
    # what all prompts choose may hold rank 3 all the same
    assert option.trial.tree == DEFAULT_TREE


def test_chains_are_chosen_up_to_a_length() -> None:
    trace = trace_of([[0] * 12] * 10, 2)
    fit = CrossFit.of(trace, FakeCost(), max_nodes=8, seed=0)
    for most in (1, 3, 8):
        option = fit.option(1, Trial.at(1, Tree.chain(most), 1.0, 1.0), most)
        # all prompts are alike, so the others choose what the fold would
        fastest = min(
            sum(brute_walk(trace, chain)[0]) * FakeCost().step_ms(1, chain)
            for chain in map(Tree.chain, range(1, most + 1))
        )
        assert option.whole_ms == pytest.approx(fastest)


def test_off_is_timed_as_it_is() -> None:
    trace = latent_trace(4, num_prompts=21, length=30, phi=0.5)
    cost = FakeCost(spread=0.1)
    fit = CrossFit.of(trace, cost, max_nodes=16, seed=0)
    option = fit.option(2, Trial.at(2, OFF, 1.0, 1.0), 0)
    assert option.whole_ms == pytest.approx(trace.num_positions * cost.step_ms(2, OFF))
    assert np.std(option.drawn_D) == pytest.approx(0.1, rel=0.3)


def test_ratios_are_paired() -> None:
    trace = latent_trace(4, num_prompts=21, length=30, phi=0.5, prompt_sd=1.0)
    fit = CrossFit.of(trace, FakeCost(), max_nodes=16, seed=0)
    off, chain = (fit.option(1, Trial.at(1, t, 1.0, 1.0), 2) for t in (OFF, Tree.chain(2)))
    same = chain.ratio_to(chain)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    ratio = chain.ratio_to(off)
    assert ratio.low < ratio.value < ratio.high
    assert set(fit.bootstrap.weights_RP.sum(axis=1).tolist()) == {21.0}


def test_intervals_hold_the_truth_of_few_skewed_prompts() -> None:
    # a ratio of sums of 24 prompts, a few of which are very long
    rng, count, covered = np.random.default_rng(7), 24, []
    shares = np.full(count, 1 / count)
    weights_RP = rng.multinomial(count, shares, size=400).astype(float)
    for _ in range(300):
        bottom = rng.lognormal(0, 1, count)
        top = bottom * rng.gamma(2.0, 0.5, count)
        missed_R = studentized(top, bottom, weights_RP)
        low, high = np.quantile(missed_R, (0.025, 0.975))
        error = np.log(top.sum() / bottom.sum())
        covered.append(low <= error <= high)
    assert 0.9 < np.mean(covered) < 0.99


def test_rare_dreadful_prompts_are_allowed_for() -> None:
    # 3 of 320 prompts are the longest there are, and drafts are useless on them
    rng, count, drawn = np.random.default_rng(11), 64, 300
    off = rng.uniform(30, 200, 320)
    tree = off / rng.normal(1.2, 0.15, 320)
    off[:3], tree[:3] = 255, 255 * 1.6
    truth = off.sum() / tree.sum()
    weights_RP = rng.multinomial(count, np.full(count, 1 / count), size=500).astype(float)
    below, plain = 0, 0
    for _ in range(drawn):
        chosen = rng.integers(0, len(off), count)
        slow, fast = (
            Option(Trial.at(1, OFF, 1.0, 1.0), ms[chosen], np.zeros(1), weights_RP)
            for ms in (off, tree)
        )
        ratio = fast.ratio_to(slow)
        missed_R = studentized(slow.ms_P, fast.ms_P, weights_RP)
        plain += ratio.value * np.exp(-np.quantile(missed_R, 0.975)) > truth
        below += ratio.low > truth
        assert ratio.low <= ratio.value <= ratio.high
        assert not ratio.is_gain or ratio.low >= 1.0
    assert below < 0.75 * plain


def test_one_more_prompt_like_the_worst() -> None:
    top, bottom = np.array([4.0, 2.0, 6.0]), np.array([2.0, 2.0, 2.0])
    assert worst_again(top, bottom) == pytest.approx((14 / 8) / (12 / 6))
    assert worst_again(bottom, bottom) == 1.0


def test_the_faster_option_can_be_preferred(trace: Trace) -> None:
    uncertain = with_gain(trace, 0.02, spread=0.05)
    decision = decide(trace, uncertain, prefer="fast")
    assert decision.verdict == "tree"
    assert "maybe it gains nothing" in decision.reason
    chain = max(walk(trace, Tree.chain(n)).tokens_per_step for n in (1, 2, 3))
    cost = PlainCost(off_ms=1.01, chain_ms=chain, tree_ms=9.0, spread=0.05)
    assert decide(trace, cost).reason.endswith("--prefer fast takes it")
    assert decide(trace, cost, prefer="fast").verdict == "chain"


def test_prompts_without_output_change_nothing() -> None:
    full = latent_trace(6, num_prompts=16, length=20)
    prompts = [
        full.ranks[a:b].tolist() for a, b in zip(full.offsets, full.offsets[1:], strict=False)
    ]
    padded = trace_of([[], *[p for prompt in prompts for p in (prompt, [])]], 10)
    assert decide(padded, FakeCost()) == decide(full, FakeCost())


@pytest.mark.parametrize("prompts", [[[0, 0, 1]], [[], [0, 1], []], [[], []]])
def test_too_few_prompts(prompts: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="needs two prompts with output"):
        decide(trace_of(prompts, 2), FakeCost())


@pytest.mark.parametrize("max_nodes", [1, 255])
@pytest.mark.parametrize("num_children", [2, 64])
@pytest.mark.parametrize("ranks", [[0], [NO_RANK], [1, 0]])
def test_tiny_traces_decide_something(ranks: list[int], num_children: int, max_nodes: int) -> None:
    trace = trace_of([ranks, ranks], num_children)
    decision = decide(trace, FakeCost(), max_nodes=max_nodes)
    assert decision.tokens_per_step == walk(trace, decision.tree).tokens_per_step


@dataclass(frozen=True)
class Unmeasured(FakeCost):
    """A cost that lacks everything."""

    def step_ms(self, batch_size: int, tree: Tree, tokens_per_step: float | None = None) -> float:
        raise MissingMeasurement(f"batch size {batch_size} has no table; record one")


def test_missing_measurements_are_not_hidden(trace: Trace) -> None:
    with pytest.raises(MissingMeasurement, match="batch size 1 has no table"):
        decide(trace, Unmeasured())
