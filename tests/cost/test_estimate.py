"""Estimates for GPUs nobody measured: what the roofline finds, scales, promises and refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from synthetic_data import make_table, model_cost

from stree_autotune.cost.estimate import estimate_table
from stree_autotune.cost.roofline import Efficiencies, Work, fit, log_errors, point_work, samples_of
from stree_autotune.cost.step_cost import StepCost
from stree_autotune.store.gpu_spec import GpuSpec, load_gpu_spec
from stree_autotune.store.library import Library, shipped_root
from stree_autotune.store.runtime_table import RuntimeTable, load_runtime_table
from stree_core.errors import MissingMeasurement
from stree_core.tree import DEFAULT_TREE, Tree

TRUTH = Efficiencies((3.0, 2.0, 0.85, 0.6, 0.3, 0.5))


def spec(name: str) -> GpuSpec:
    return load_gpu_spec(shipped_root() / "gpus" / f"{name}.yaml")


def table_of(truth: Efficiencies, weight_bytes: int = 12_000_000) -> RuntimeTable:
    """A table of the H200 whose passes take what a roofline says."""
    target, draft = (model_cost(n, weight_bytes // k) for n, k in (("target", 1), ("draft", 8)))
    table = make_table().model_copy(update={"target": target, "draft": draft})
    h200 = spec("h200")
    points = [
        p._replace(ms=float(truth.ms([point_work(p.term, p.batch_size, p.size, table)], h200)[0]))
        for p in table.points
    ]
    steps = [
        s._replace(ms=float(truth.ms([point_work("verify", s.batch_size, 1, table)], h200)[0]))
        for s in table.steps
        if s.tree == "off"
    ]
    whole = [s for s in table.steps if s.tree != "off"]
    return table.model_copy(update={"points": tuple(points), "steps": (*steps, *whole)})


def noisy(table: RuntimeTable) -> RuntimeTable:
    """The same with errors of a tenth."""
    rng = np.random.default_rng(4)
    points = [p._replace(ms=p.ms * math.exp(0.1 * rng.standard_normal())) for p in table.points]
    return table.model_copy(update={"points": tuple(points)})


def test_the_fit_finds_the_roofline_it_was_made_with() -> None:
    samples = [s for size in (10**7, 10**9, 10**10) for s in samples_of(table_of(TRUTH, size))]
    errors = log_errors(samples, fit(samples, spec("h200")), spec("h200"))
    assert np.abs(errors).max() < 0.02


def test_the_roofline_by_hand() -> None:
    work = Work(launches=100, many=1, weights=4.8e9, states=4.8e8, rows=4.8e7, flops=989.4e9)
    launches = 100 * (3 + 2) * 0.58e-3
    expected = launches + 1 / 0.85 + 0.1 / 0.6 + 0.01 / 0.3 + 1 / 0.5
    assert TRUTH.ms([work], spec("h200")).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("gpu", ["h100", "a100-80g", "l40s"])
def test_what_memory_bounds_scales_with_bandwidth_within_the_band(gpu: str) -> None:
    bound = Efficiencies((1.0, 0.0, 0.85, 0.85, 0.85, 1.0))
    tables = [noisy(table_of(bound, size)) for size in (10**11, 4 * 10**11)]
    found = estimate_table(tables[0], spec("h200"), spec(gpu), tables[1:])
    ratio = 4.8 / spec(gpu).memory_bandwidth_tb_per_s
    for before, after in zip(tables[0].points, found.table.points, strict=True):
        if before[:3] in (("verify", 1, 2), ("verify", 4, 1)):
            assert 0 < abs(math.log(after.ms / before.ms / ratio)) < found.band
    assert found.table.gpu == gpu


@pytest.mark.parametrize("gpu", ["h100", "a100-80g", "l40s"])
def test_every_table_of_the_h200_has_an_estimate(gpu: str) -> None:
    paths = sorted((shipped_root() / "runtime").glob("h200--*.yaml"))
    assert paths
    for path in paths:
        table = load_runtime_table(path)
        source = Library.open().find_runtime(gpu, table.target.name, table.draft.name)
        assert source.measured is not None
        assert source.wanted is not None
        others = [load_runtime_table(other) for other in paths]
        found = estimate_table(table, source.measured, source.wanted, others)
        assert found.rule.startswith("measured on h200")
        cost, measured = StepCost.from_estimate(found), StepCost.from_table(table)
        for tree in (Tree.chain(0), Tree.chain(4), DEFAULT_TREE):
            ratio = cost.step_ms(1, tree) / measured.step_ms(1, tree)
            assert 1 <= ratio <= 4.8 / source.wanted.memory_bandwidth_tb_per_s


def test_draws_spread_as_the_estimate_may_err() -> None:
    tables = [table_of(TRUTH, size) for size in (10**7, 10**10)]
    found = estimate_table(tables[0], spec("h200"), spec("a100-80g"), tables[1:])
    cost = StepCost.from_estimate(found)
    rng = np.random.default_rng(1)
    drawn = [cost.draw(rng).step_ms(16, Tree.chain(0)) for _ in range(2000)]
    expected = math.hypot(found.own, found.common)
    assert np.std(np.log(drawn)) == pytest.approx(expected, rel=0.1, abs=1e-4)


def test_a_band_beyond_the_limit_is_refused() -> None:
    path = shipped_root() / "runtime" / "h200--mamba2-2.7b--mamba2-130m.yaml"
    with pytest.raises(MissingMeasurement, match=r"within a factor of .*probe --gpu rtx3090"):
        estimate_table(load_runtime_table(path), spec("h200"), spec("rtx3090"))


def test_too_few_passes_are_refused() -> None:
    table = make_table().model_copy(update={"points": make_table().points[:5]})
    with pytest.raises(MissingMeasurement, match="estimates need 12 measured passes"):
        estimate_table(table, spec("h200"), spec("h100"))


def test_the_sheets_hold_the_published_bandwidths() -> None:
    rates = {"h200": 4.8, "h100": 3.35, "a100-80g": 2.039, "l40s": 0.864, "rtx4090": 1.008,
             "rtx3090": 0.936, "b200": 8.0}  # fmt: skip
    assert {name: spec(name).memory_bandwidth_tb_per_s for name in rates} == rates
    others = sorted(set(rates) - {"h100"}, key=lambda name: spec("h100").likeness(spec(name)))
    assert others[0] == "h200"
