"""Times of a pair that nobody measured, from both shapes alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from stree_autotune.cost.layout import find_layouts
from stree_autotune.cost.shape_table import (
    HARDLY_MEASURED,
    MeasuredGpu,
    ShapeQuestion,
    estimate_shapes,
    nearest_measured,
)
from stree_autotune.cost.step_cost import StepCost
from stree_autotune.store.gpu_spec import GpuSpec
from stree_autotune.store.library import Library
from stree_autotune.store.step_rule import StepRule
from stree_core.errors import MissingMeasurement
from stree_core.models.source import head_source
from stree_core.tree import DEFAULT_TREE, OFF, Tree

LIBRARY = Library.open()


def spec(name: str) -> GpuSpec:
    found = LIBRARY.gpu_spec(name)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def measured() -> MeasuredGpu:
    found = nearest_measured(LIBRARY, spec("h100"))
    assert found is not None
    assert found.spec.name == "h200"
    return found


def question(target: str, draft: str, gpu: GpuSpec) -> ShapeQuestion:
    model = LIBRARY.find_described(target)
    other = head_source(model) if draft == "mtp" else LIBRARY.find_described(draft)
    return ShapeQuestion(model, other, gpu, (1, 8, 32), 24, 1024)


def test_a_shape_that_no_table_has_is_near_its_measured_passes(measured: MeasuredGpu) -> None:
    asked = question("nemotron-h-8b", "mamba2-130m", spec("h200"))
    found = estimate_shapes(asked, measured)
    # benchmarks/results/shapes-h200.json; a pass without the step around it
    verify = {point[1:3]: point.ms for point in found.table.points if point.term == "verify"}
    assert verify[1, 16] == pytest.approx(4.58, rel=0.1)
    assert verify[8, 16] == pytest.approx(5.97, rel=0.1)
    off = {step.batch_size: step.ms for step in found.table.steps if step.tree == "off"}
    assert off[1] == pytest.approx(3.95, rel=0.1)
    assert off[8] == pytest.approx(5.53, rel=0.2)
    assert "from the models' shapes alone" in found.rule
    assert "in no table" not in found.rule


def test_every_rule_and_tree_has_a_time(measured: MeasuredGpu) -> None:
    found = estimate_shapes(question("nemotron-h-8b", "mamba2-130m", spec("h100")), measured)
    for rule in (StepRule.GREEDY, StepRule.MSS, StepRule.NAIVE_TRUNCATED):
        cost = StepCost.from_estimate(found, rule, 1024)
        cost.require((1, 8, 32), 24)
        times = [cost.step_ms(8, tree) for tree in (OFF, Tree.chain(2), Tree.chain(4))]
        assert times == sorted(times)
        assert cost.step_ms(20, DEFAULT_TREE) > cost.step_ms(8, DEFAULT_TREE)
    assert found.table.gpu == "h100"


def test_experts_in_no_table_widen_the_band_and_are_named(measured: MeasuredGpu) -> None:
    tables = [table for table in measured.tables if table.target.name != "nemotron-3-nano-mtp"]
    assert len(tables) < len(measured.tables)
    measured = replace(measured, tables=tuple(tables), layouts=find_layouts(LIBRARY, tables))
    plain = estimate_shapes(question("nemotron-h-8b", "mamba2-130m", spec("h200")), measured)
    experts = estimate_shapes(question("nemotron-3-nano-mtp", "mtp", spec("h200")), measured)
    assert experts.common == pytest.approx(math.hypot(plain.common, HARDLY_MEASURED))
    assert "experts are in no table" in experts.rule


def test_another_architecture_is_known_less_well(measured: MeasuredGpu) -> None:
    bands = [
        estimate_shapes(question("mamba2-1.3b", "mamba2-130m", spec(gpu)), measured).band
        for gpu in ("h200", "h100", "a100-80g", "l40s")
    ]
    assert bands == sorted(bands)
    slow = spec("rtx3090").model_copy(update={"memory_bandwidth_tb_per_s": 0.02})
    with pytest.raises(MissingMeasurement, match="known from its shape only within a factor"):
        estimate_shapes(question("mamba2-1.3b", "mamba2-130m", slow), measured)
