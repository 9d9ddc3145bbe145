"""What a pass is made of: products, experts and scans of a shape, and the kernels they meet."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_data import model_cost

from stree_autotune.cost import work
from stree_autotune.cost.layout import ExpertLayer, Layouts, Product, layout_of, rough_layout
from stree_autotune.cost.work import PassModel, PassSize, in_library, pass_work
from stree_autotune.store.library import Library
from stree_kernels.linear.stream_plan import make_plan

LIBRARY = Library.open()
KERNELS = Path(__file__).parents[2] / "kernels" / "stree_kernels"


@pytest.mark.parametrize("name", ["mamba2-2.7b", "nemotron-h-8b", "nemotron-3-nano-mtp"])
def test_a_layout_holds_the_weights_that_a_token_reads(name: str) -> None:
    shape = LIBRARY.find_described(name).shape
    layout = layout_of(shape)
    values = sum(p.rows * p.columns * p.number for p in (*layout.products, layout.head))
    values += sum(e.number * e.num_chosen * e.values for e in layout.experts)
    # norms, biases and convolutions are no products
    assert values == pytest.approx(shape.weight_bytes(2) / 2, rel=0.01)


def test_kinds_and_counts_are_those_of_the_shape() -> None:
    layout = layout_of(LIBRARY.find_described("nemotron-3-nano-mtp").shape)
    assert (layout.num_scans, layout.num_attention) == (23, 6)
    assert sum(layer.number for layer in layout.experts) == 23
    assert layout.kinds == {"Mamba2 layers", "attention", "experts", "MLP"}
    assert layout.score_flops == 6 * 4 * 32 * 128


def test_rows_share_experts() -> None:
    layer = ExpertLayer(num_experts=128, num_chosen=6, values=1, number=1)
    assert layer.distinct(1) == pytest.approx(6)
    assert layer.distinct(2) == pytest.approx(12 - 36 / 128)
    assert layer.distinct(1000) == pytest.approx(128)
    # every row uses all of them
    assert ExpertLayer(8, 8, 1, 1).distinct(1) == pytest.approx(8)


def test_the_limits_are_those_of_the_kernels() -> None:
    text = (KERNELS / "linear" / "linear.py").read_text()
    assert f"num_rows <= {work.FEW_ROWS}:" in text
    shared = (KERNELS / "launch" / "shared_memory.py").read_text()
    assert f"NARROW, NARROW_ROWS = {work.NARROW}, {work.MORE_ROWS}\n" in shared
    assert f"STREAMED_ROWS = range(2, {work.STREAMED_ROWS + 1})" in shared
    grouped = (KERNELS / "linear" / "grouped_experts.py").read_text()
    assert f"FEWEST_ROWS = {work.UNGROUPED_ROWS + 1}\n" in grouped
    tiles = re.findall(r"ScanConfig\(\d+, 128, (\d+)", (KERNELS / "ssm/tree_scan.py").read_text())
    assert tuple(sorted(set(map(int, tiles)))) == work.SCAN_TILES


def test_rows_at_which_kernels_change(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = importlib.import_module("stree_kernels.linear.linear")
    found = set()
    for can_stream in (True, False):
        monkeypatch.setattr(linear, "_can_stream", lambda _, can=can_stream: can)
        for columns in (1024, 4096):
            weight = torch.empty(4096, columns, dtype=torch.bfloat16, device="meta")
            kernels = [_kernel(linear, rows, weight) for rows in range(1, 201)]
            found |= {rows for rows in range(1, 200) if kernels[rows - 1] != kernels[rows]}
    assert tuple(sorted(found)) == work.ROW_EDGES[:-1]
    assert work.ROW_EDGES[-1] == work.PRODUCT_TILE


def _kernel(linear: Any, num_rows: int, weight: torch.Tensor) -> tuple[object, ...]:
    """Return what decides how rows are multiplied, of several tokens a slot and of one."""
    decided = []
    for one_token in (False, True):
        config = linear.pick_config(num_rows, weight, one_token=one_token)
        tile = None
        if config is linear.STREAM_CONFIG:
            plan = make_plan(config, num_rows, *weight.shape, 132, gated=False, shares=False)
            tile = plan.block_m
        decided.append((config, tile))
    return tuple(decided)


def test_where_cublas_multiplies() -> None:
    assert [in_library(Product(4096, 4096, 1), rows) for rows in (1, 16, 17)] == [
        False,
        False,
        True,
    ]


def test_experts_of_many_rows_are_read_once() -> None:
    layout = layout_of(LIBRARY.find_described("nemotron-3-nano-30b-a3b").shape)
    model = PassModel(model_cost("target", 10**9), layout, 2)
    few, more, many = (
        pass_work(model, PassSize(1, rows, rows, rows, 0)) for rows in (8, work.UNGROUPED_ROWS, 64)
    )
    assert more.expert_reads == pytest.approx(work.UNGROUPED_ROWS / 8 * few.expert_reads)
    assert few.grouped_bytes == more.grouped_flops == 0
    assert many.expert_reads == many.expert_bytes == 0
    assert more.expert_bytes < many.grouped_bytes < 1.3 * more.expert_bytes
    # two operations a value, of which each takes two bytes
    assert many.grouped_flops == pytest.approx(64 / 8 * few.expert_reads)


def test_a_step_without_a_tree_stores_its_states_at_times() -> None:
    layout = layout_of(LIBRARY.find_described("mamba2-2.7b").shape)
    model = PassModel(model_cost("target", 10**9), layout, 2)
    plain = pass_work(model, PassSize(4, 1, 1, 1, 0, plain=True))
    tree = pass_work(model, PassSize(4, 5, 5, 5, 0))
    assert plain.states == pytest.approx(tree.states * 18 / 17)
    assert (plain.trees, plain.scan_flops, plain.one_row) == (0, 0, 0)
    assert pass_work(model, PassSize(1, 1, 1, 1, 0)).one_row == 1
    wider = pass_work(model, PassSize(4, 17, 17, 17, 0))
    assert (tree.tiles, wider.tiles) == (0, layout.num_scans)
    assert wider.scan_flops == 2 * tree.scan_flops


def test_an_unknown_shape_is_guessed() -> None:
    cost = model_cost("target", 10**9)
    layout = Layouts().at(cost, 2)
    assert layout == rough_layout(cost, 2)
    values = sum(p.rows * p.columns * p.number for p in (*layout.products, layout.head))
    assert values == pytest.approx(cost.weight_bytes / 2, rel=0.1)
