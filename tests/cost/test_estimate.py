"""Estimates for GPUs nobody measured: what the roofline finds, scales, promises and refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from synthetic_data import make_table, model_cost

from stree_autotune.cost.estimate import estimate_table
from stree_autotune.cost.layout import Layouts, find_layouts
from stree_autotune.cost.roofline import (
    NAMES,
    TOLERANCES,
    Efficiencies,
    Floats,
    fit,
    log_errors,
    times_and_slopes,
)
from stree_autotune.cost.step_cost import StepCost
from stree_autotune.cost.work import (
    Work,
    all_samples,
    pass_models,
    pass_work,
    plain_size,
    point_size,
)
from stree_autotune.store.gpu_spec import GpuSpec, load_gpu_spec
from stree_autotune.store.library import Library, shipped_root
from stree_autotune.store.runtime_table import RuntimeTable, load_runtime_table
from stree_core.errors import MissingMeasurement
from stree_core.tree import DEFAULT_TREE, Tree

TRUTH = Efficiencies(launch=3.0, library=5.0, read=0.85, scanned=0.5, written=0.3)
NO_SHAPES = Layouts()


def spec(name: str) -> GpuSpec:
    return load_gpu_spec(shipped_root() / "gpus" / f"{name}.yaml")


def table_of(truth: Efficiencies, weight_bytes: int = 12_000_000) -> RuntimeTable:
    """A table of the H200 whose passes take what a roofline says."""
    target, draft = (model_cost(n, weight_bytes // k) for n, k in (("target", 1), ("draft", 8)))
    table = make_table().model_copy(update={"target": target, "draft": draft})
    h200 = spec("h200")
    pair, context = pass_models(table, NO_SHAPES), table.context / 2

    def timed(work: Work) -> float:
        return float(truth.ms([work], h200)[0])

    points = []
    for p in table.points:
        if p.term in ("verify", "draft", "draft_root"):
            size = point_size(p.term, p.batch_size, p.size, context)
            p = p._replace(ms=timed(pass_work(pair[p.term != "verify"], size)))
        points.append(p)
    steps = [
        s._replace(ms=timed(pass_work(pair[0], plain_size(s.batch_size, context))))
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
    samples = all_samples([table_of(TRUTH, size) for size in (10**7, 10**9, 10**10)], NO_SHAPES)
    fitted, nominal = (
        np.abs(log_errors(samples, found, spec("h200")))
        for found in (fit(samples, spec("h200")), Efficiencies())
    )
    # what is held near its nominal value stays a little behind
    assert fitted.max() < 0.1
    assert np.sqrt(np.mean(fitted**2)) < 0.5 * np.sqrt(np.mean(nominal**2))


def test_the_roofline_by_hand() -> None:
    nothing = Work(*[0.0] * len(Work._fields))
    found, h200 = Efficiencies(), spec("h200")
    launches = nothing._replace(launches=100, library=10, narrow=3, trees=5, tiles=2)
    expected = 0.58e-3 * (350 + 40 + 3 + 2.3 * 5 + 4 * 2)
    assert found.ms([launches], h200).tolist() == pytest.approx([expected])
    moved = nothing._replace(body=4.8e9, states=4.8e8, rows=4.8e7, logits=4.8e7, trees=0)
    expected = 1 / 0.8 + 0.1 / 0.5 + 0.01 / 0.4 + 0.01 / 0.5
    assert found.ms([moved], h200).tolist() == pytest.approx([expected])
    # a product that moves as long as it computes takes longer than either and less than both
    both = nothing._replace(body=4.8e9, body_flops=989.4e9)
    assert found.ms([both], h200).tolist() == pytest.approx([1.25 * 2 ** (1 / 3)])
    assert all(getattr(TOLERANCES, name) > 0 for name in ("launch", "read", "scored"))


def test_slopes_are_derivatives() -> None:
    """By the logarithm of each efficiency, against central differences."""
    rng = np.random.default_rng(7)
    columns = rng.uniform(1, 9, (len(Work._fields), 40))
    counts = ("launches", "library", "narrow", "trees", "tiles", "one_row")
    columns[[name not in counts for name in Work._fields]] *= 1e9
    columns[[name.endswith("flops") for name in Work._fields]] *= 200
    for name, values in (("trees", [0, 1]), ("one_row", [1, 0])):
        columns[Work._fields.index(name)] = values * 20
    found, step = Efficiencies(), 1e-4

    def times_at(name: str, moved: float) -> Floats:
        value = getattr(found, name) * math.exp(moved)
        return times_and_slopes(columns, spec("h200"), replace(found, **{name: value}))[0]

    _, slopes = times_and_slopes(columns, spec("h200"), found)
    for name, slope in zip(NAMES, slopes, strict=True):
        assert slope.any(), name
        rise = (times_at(name, step) - times_at(name, -step)) / (2 * step)
        np.testing.assert_allclose(slope, rise, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gpu", ["h100", "a100-80g", "l40s"])
def test_what_memory_bounds_scales_with_bandwidth_within_the_band(gpu: str) -> None:
    bound = Efficiencies(launch=1.0, library=0.1, products=1.0)
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
    layouts = find_layouts(Library.open(), [load_runtime_table(path) for path in paths])
    for path in paths:
        table = load_runtime_table(path)
        source = Library.open().find_runtime(gpu, table.target.name, table.draft.name)
        assert source.measured is not None
        assert source.wanted is not None
        others = [load_runtime_table(other) for other in paths]
        found = estimate_table(table, source.measured, source.wanted, others, layouts=layouts)
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
    slow = spec("rtx3090").model_copy(update={"memory_bandwidth_tb_per_s": 0.02})
    with pytest.raises(MissingMeasurement, match=r"within a factor of .*probe --gpu rtx3090"):
        estimate_table(load_runtime_table(path), spec("h200"), slow)


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
