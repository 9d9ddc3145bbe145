"""The bound is below every tree's starts, near the best ones', and the file is checked."""

from __future__ import annotations

import itertools
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from synthetic import FakeCost, growth_orders, latent_trace, ordered_trees, small_traces, trace_of

from stree_autotune.cost.step_cost import StepCost
from stree_autotune.search.certificate import (
    LISTED_DEPTH,
    Certificate,
    _depths,
    certificate_path,
    certify,
    certify_file,
    load_certificate,
    save_certificate,
)
from stree_autotune.search.dual_bound import ROOT, Blocks, Stage, _evaluate, bound, fit_weights
from stree_autotune.search.request import TuneRequest
from stree_autotune.search.tuning import ask, tune
from stree_autotune.store.library import Library, shipped_root
from stree_autotune.store.runtime_table import load_runtime_table
from stree_autotune.store.show import print_profile
from stree_autotune.store.terminal import result_console
from stree_autotune.trace.file import NO_RANK, Trace, load_trace, save_trace
from stree_autotune.trace.tree_walk import FlatTrace, walk
from stree_core.errors import ConfigError
from stree_core.profile import Sampling
from stree_core.tree import Tree

KINDS = {
    "phi 0.6": {"phi": 0.6},
    "prompts": {"prompt_sd": 1.0},
    "depths": {"phi": 0.6, "depths": 6},
}
QUICK = (Stage(0.1, 30, False), Stage(0.05, 30, True))


def starts(trace: Trace, tree: Tree) -> int:
    return int(walk(trace, tree).starts_P.sum())


def random_tree(
    rng: np.random.Generator, num_nodes: int, num_children: int, max_depth: int = 256
) -> Tree:
    """Grow by random frontier nodes, likelier ones near the root's first child."""
    order: list[tuple[int, ...]] = []
    counts: dict[tuple[int, ...], int] = {(): 0}
    while len(order) < num_nodes:
        open_nodes = [
            path for path, count in counts.items() if count < num_children and len(path) < max_depth
        ]
        weights = np.array([0.6 ** sum(path) * 0.7 ** (counts[path]) for path in open_nodes])
        parent = open_nodes[rng.choice(len(open_nodes), p=weights / weights.sum())]
        path = (*parent, counts[parent])
        counts[parent] += 1
        counts[path] = 0
        order.append(path)
    return Tree.from_paths(order)


@pytest.fixture(scope="module")
def certified() -> dict[str, tuple[Trace, Certificate]]:
    """One trace of each kind with its certificate."""
    traces = {name: latent_trace(0, num_prompts=30, length=40, **kw) for name, kw in KINDS.items()}
    return {name: (trace, certify(trace, "a" * 64)) for name, trace in traces.items()}


def test_depths_with_a_bound_of_their_own() -> None:
    weak = [round(1000 / (1 + min(length, 5) * 0.5)) for length in range(1, 65)]
    assert _depths(weak) == [2, 3, 4, 5]
    perfect = [round(10_000 / (length + 1)) for length in range(1, 65)]
    depths = _depths(perfect)
    assert (depths[:12], depths[-1]) == (list(range(2, 14)), LISTED_DEPTH)
    assert all(after <= 1.13 * before for before, after in pairwise(depths[10:]))
    # the deepest level of a trace with a depth axis is the bound on all trees
    assert _depths(perfect[:8]) == [2, 3, 4, 5, 6, 7]


def test_bounds_on_deep_trees_of_a_near_perfect_draft() -> None:
    rng = np.random.default_rng(0)
    prompts = [np.where(rng.random(45) < 0.97, 0, rng.choice([1, NO_RANK], 45)) for _ in range(3)]
    trace = trace_of([prompt.tolist() for prompt in prompts], 4)
    certificate = certify(trace, "a" * 64)
    assert [limit.max_depth for limit in certificate.bounds][-2:] == [LISTED_DEPTH, None]
    for length in (4, 8, 12, 20, 40):
        tree = Tree.from_paths([*Tree.chain(length).paths, [1]])
        count = starts(trace, tree)
        least = certificate.least_starts(tree.num_nodes, tree.depth)
        assert 0 < least <= count
    assert certificate.least_starts(9, 8) > 0.85 * certificate.chains[8]


@given(small_traces(), growth_orders(), st.data())
@settings(max_examples=60, deadline=None)
def test_any_weights_bound_any_tree(
    trace: Trace, order: list[tuple[int, ...]], data: st.DataObject
) -> None:
    tree, flat = Tree.from_paths(order), FlatTrace.of(trace)
    depth = data.draw(st.integers(1, 4))
    price = data.draw(st.sampled_from([0.0, 0.3, 1.0, 4.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    weights = rng.random(flat.num_positions) * data.draw(st.sampled_from([0.3, 1.0, 2.0]))
    least = bound(Blocks.of(flat, depth, deeper=True), weights, price) - price * tree.num_nodes
    assert least <= starts(trace, tree) + 1e-9
    if tree.depth <= depth:
        # weights may be negative where no block stands for deeper ones
        weights -= 0.3
        least = bound(Blocks.of(flat, depth), weights, price) - price * tree.num_nodes
        assert least <= starts(trace, tree) + 1e-9


@given(small_traces(), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_bound_covers_the_worst_tree(trace: Trace, seed: int) -> None:
    # the most that a tree's excesses can be, by trying every tree
    flat = FlatTrace.of(trace)
    rng = np.random.default_rng(seed)
    weights, price = rng.random(flat.num_positions), float(rng.random())
    before = np.zeros(len(flat.positions_S) + 1)
    before[np.flatnonzero(flat.positions_S >= 0) + 1] = weights
    before = np.cumsum(before)
    two_levels = [tree for n in range(7) for tree in ordered_trees(n) if tree.depth <= 2]
    narrow = [tree for tree in two_levels if tree.max_children <= 4]
    worst = -np.inf
    for tree in narrow:
        paths, total = set(tree.paths), 0.0
        for place in np.flatnonzero(flat.positions_S >= 0).tolist():
            length = 0
            while tuple(int(flat.ranks_at(d)[place]) for d in range(length + 1)) in paths:
                length += 1
            total += max(0.0, float(before[place + length + 1] - before[place]) - 1)
        worst = max(worst, total - price * tree.num_nodes)
    least = bound(Blocks.of(flat, 2), weights, price)
    assert least <= weights.sum() - worst + 1e-9
    # trees with more nodes than were tried might still be worse, none is at a price like this
    dear = bound(Blocks.of(flat, 2), weights, 1000.0)
    alone = sum(max(0.0, weight - 1) for weight in weights.tolist())
    assert dear == pytest.approx(weights.sum() - alone)


@pytest.mark.parametrize("deeper", [False, True])
def test_slopes_are_those_of_the_value(deeper: bool) -> None:
    flat = FlatTrace.of(latent_trace(3, num_prompts=8, length=30))
    blocks = Blocks.of(flat, 3, deeper=deeper)
    rng = np.random.default_rng(0)
    weights, way = rng.random(flat.num_positions), rng.standard_normal(flat.num_positions)
    value, slope = _evaluate(blocks, weights, 2.0, 0.1)
    ahead, behind = (_evaluate(blocks, weights + s * 1e-6 * way, 2.0, 0.1)[0] for s in (1, -1))
    assert (ahead - behind) / 2e-6 == pytest.approx(slope @ way, rel=1e-4)
    # rounded kinks err to the safe side
    assert value <= bound(blocks, weights, 2.0)


def test_blocks_by_hand() -> None:
    trace = trace_of([[0, 2, NO_RANK], [0]], 3)
    blocks = Blocks.of(FlatTrace.of(trace), 2)
    # flat: 0 1 2 | 3 4 are marks | 5 | 6 7 are marks
    pairs = list(zip(blocks.start_E.tolist(), blocks.end_E.tolist(), strict=True))
    assert pairs == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (5, 6), (5, 7)]
    assert blocks.first_E.tolist() == [0, 3, 5, 6]
    # paths: root, [0], [2] (which needs [1] as well), [0, 2] (which needs two more)
    assert blocks.path_E.tolist() == [ROOT, 1, 3, ROOT, 2, ROOT, ROOT, 1]
    assert blocks.new_nodes_N.tolist() == [0, 1, 2, 3]
    assert [(f.paths, f.before.tolist()) for f in blocks.families] == [
        (slice(1, 2), [0]),
        (slice(2, 3), [1]),
        (slice(3, 4), [1]),
    ]
    deeper = Blocks.of(FlatTrace.of(trace), 1, deeper=True)
    assert (0, 3) in zip(deeper.start_E.tolist(), deeper.end_E.tolist(), strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_never_below_any_small_tree_and_near_the_best(
    certified: dict[str, tuple[Trace, Certificate]], kind: str
) -> None:
    trace, certificate = certified[kind]
    best = 0.0
    for num_nodes in range(1, 7):
        for tree in ordered_trees(num_nodes):
            count = starts(trace, tree)
            assert certificate.least_starts(num_nodes, tree.depth) <= count
            for limit in certificate.bounds:
                if limit.max_depth is None or tree.depth <= limit.max_depth:
                    assert limit.least_starts(num_nodes) <= count
            best = max(best, trace.num_positions / count)
        most = certificate.most_tokens_per_step[num_nodes - 1]
        assert best <= most <= 1.12 * best
    assert list(certificate.most_tokens_per_step) == sorted(certificate.most_tokens_per_step)


@pytest.mark.parametrize("kind", KINDS)
def test_never_below_random_large_trees(
    certified: dict[str, tuple[Trace, Certificate]], kind: str
) -> None:
    trace, certificate = certified[kind]
    rng = np.random.default_rng(1)
    for num_nodes in (8, 16, 40, 64, 120, 255):
        for _ in range(5):
            tree = random_tree(rng, num_nodes, trace.meta.num_children, trace.meta.max_depth)
            assert certificate.least_starts(num_nodes, tree.depth) <= starts(trace, tree)
    for length in (LISTED_DEPTH, LISTED_DEPTH + 9):
        if length > trace.meta.max_depth:
            assert certificate.least_starts(length, length) == trace.num_positions
            continue
        chain = Tree.chain(length)
        assert certificate.least_starts(length, length) <= starts(trace, chain)


def test_fitting_raises_the_bound() -> None:
    flat = FlatTrace.of(latent_trace(1, num_prompts=20, length=40, phi=0.5))
    blocks = Blocks.of(flat, 3)
    flat = np.full(flat.num_positions, 0.4)
    values = [bound(blocks, flat, 10.0)]
    for stages in ((QUICK[0],), QUICK):
        values.append(bound(blocks, fit_weights(blocks, flat, 10.0, stages), 10.0))
    assert values[0] + 20 < values[1] < values[2]


@pytest.mark.parametrize(
    "name", ["h200--demo-target--demo-draft", "h200--mamba2-2.7b--mamba2-130m"]
)
def test_least_time_is_no_tree_s_but_some_tree_s(name: str) -> None:
    cost = StepCost.from_table(load_runtime_table(shipped_root() / "runtime" / f"{name}.yaml"))
    rng = np.random.default_rng(2)
    trees = [tree for n in range(7) for tree in ordered_trees(n)]
    trees += [random_tree(rng, int(rng.integers(7, 64)), 10) for _ in range(60)]
    for batch_size, tree in itertools.product((1, 3, 16, 64), trees):
        least = cost.least_ms(batch_size, tree.num_nodes, tree.depth, 1.7)
        assert least <= cost.step_ms(batch_size, tree, 1.7) + 1e-12
        if tree.num_nodes <= 2:
            assert least == pytest.approx(cost.step_ms(batch_size, tree, 1.7))
        rates = [r / cost.least_ms(batch_size, tree.num_nodes, tree.depth, r) for r in (1, 3, 9)]
        assert rates == sorted(rates)


class TokenCost(FakeCost):
    """A cost by tokens and levels alone, whose least time is every tree's time."""

    def least_ms(
        self, batch_size: int, num_nodes: int, depth: int, tokens_per_step: float
    ) -> float:
        """Return the time of any tree of this size."""
        paths = [[0] * (level + 1) for level in range(depth)]
        paths += [[rank] for rank in range(1, num_nodes - depth + 1)]
        return self.step_ms(batch_size, Tree.from_paths(paths))


def test_no_tree_is_faster_than_the_certified_rate(
    certified: dict[str, tuple[Trace, Certificate]],
) -> None:
    trace, certificate = certified["phi 0.6"]
    cost = TokenCost(pad=4, per_token_ms=0.05)
    trees = [tree for n in range(7) for tree in ordered_trees(n)]
    best = max(2000 * walk(trace, t).tokens_per_step / cost.step_ms(2, t) for t in trees)
    most = certificate.most_tokens_per_s(cost, 2, 6)
    assert best <= most <= 1.1 * best
    # where nothing pays, off is the bound and the gap is nothing
    dear = TokenCost(off_ms=0.1)
    assert certificate.most_tokens_per_s(dear, 2, 6) == pytest.approx(20_000)


def test_files_round_trip_and_belong_to_their_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_trace(latent_trace(0, num_prompts=4, length=8), path)
    assert load_certificate(path) is None
    lines: list[str] = []
    certificate = certify_file(path, lines.append)
    assert lines[-1] == "bounded trees of any number of levels"
    assert load_certificate(path) == certificate
    again = certify_file(path)
    assert again.model_copy(update={"provenance": certificate.provenance}) == certificate
    save_trace(latent_trace(1, num_prompts=4, length=8), path)
    with pytest.raises(ConfigError, match=re.escape(f"stree-tune certify {path}")):
        load_certificate(path)
    certificate_path(path).write_text("kind: stree-certificate\nlines: []\n")
    with pytest.raises(ConfigError, match="unknown key lines"):
        load_certificate(path)


def test_a_trace_of_nothing_has_a_certificate(tmp_path: Path) -> None:
    for trace in (trace_of([[], []], 2), trace_of([[NO_RANK] * 3], 2), trace_of([[0] * 20], 1)):
        certificate = certify(trace, "b" * 64)
        save_certificate(certificate, tmp_path / "t.safetensors")
        for length in (1, 5, 30):
            count = starts(trace, Tree.chain(length))
            assert certificate.least_starts(length, length) <= count


@pytest.mark.parametrize("dataset", ["demo", "gsm8k", "human_eval", "mt_bench"])
def test_shipped_certificates_hold(dataset: str) -> None:
    path = Library.open(()).find_trace("demo-target", "demo-draft", dataset)
    trace, certificate = load_trace(path), load_certificate(path)
    assert certificate is not None
    assert certificate.num_positions == trace.num_positions
    rng = np.random.default_rng(3)
    trees = [random_tree(rng, int(rng.integers(1, 64)), 16) for _ in range(40)]
    for tree in [*trees, *(Tree.chain(n) for n in (1, 4, 20))]:
        assert certificate.least_starts(tree.num_nodes, tree.depth) <= starts(trace, tree)


def test_a_tuned_row_says_how_far_the_best_tree_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    request = TuneRequest(
        gpu="h200",
        dataset="mt_bench",
        target="demo-target",
        draft="demo-draft",
        sampling=Sampling(),
        context=1024,
        batch_sizes=(1, 32),
        max_nodes=16,
        data=(),
        acceptance_from="",
        seed=0,
    )
    profile, again = tune(request), tune(request)
    assert profile.model_copy(update={"provenance": again.provenance}) == again
    question = ask(request)
    certificate = question.acceptance.certificate
    assert certificate is not None
    for row in profile.policy:
        most = certificate.most_tokens_per_s(question.runtime.cost, row.batch_size, 16)
        assert row.predicted.gap == pytest.approx(
            max(0.0, most / row.predicted.tokens_per_s - 1), abs=1e-5
        )
    assert profile.sources.certificate is not None
    print_profile(profile, result_console(), verbose=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "best possible static tree of up to 16 nodes on this trace" in printed
    assert f"{100 * (profile.policy[1].predicted.gap or 0):.1f} %" in printed


def test_a_trace_without_positions_bounds_what_off_reaches() -> None:
    """All its prompts ended at once: no tree emits anything more."""
    found = certify(trace_of([[0, 1, 0]] * 2, 2), "a" * 64)
    empty = found.model_copy(update={"num_positions": 0})
    cost = SimpleNamespace(least_ms=lambda *_: 2.0)
    assert empty.most_tokens_per_s(cost, 4, 8) == 2000
