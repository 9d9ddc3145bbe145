"""What leaving out finds: nothing where a rule holds, and the fault where one was put."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripts import script
from synthetic_data import make_table

from stree_autotune.cost.layout import find_layouts
from stree_autotune.cost.shape_table import MeasuredGpu
from stree_autotune.store.gpu_spec import load_gpu_spec
from stree_autotune.store.library import Library, shipped_root
from stree_autotune.store.runtime_table import RuntimeTable, load_runtime_table

script_accuracy = script("accuracy")
accuracy, roofline_accuracy = script_accuracy.accuracy, script_accuracy.roofline_accuracy


def by_name(table: RuntimeTable) -> dict[tuple[str, str], Any]:
    return {(row.left_out, row.term): row for row in accuracy(table)}


def test_a_table_by_rule_is_predicted_without_error() -> None:
    rows = by_name(make_table())
    for key in (("batch size", "verify"), ("batch size", "off"), ("batch size", "speculating"),
                ("batch size", "draft"), ("whole step", "speculating")):  # fmt: skip
        assert rows[key].worst == pytest.approx(0.0, abs=1e-9), key
    assert rows["size", "verify"].worst > 0, "a staircase is not straight"


def test_a_fault_is_found_where_it_is() -> None:
    table = make_table()
    steps = [
        step._replace(ms=1.2 * step.ms) if step[:2] == (8, "chain-4") else step
        for step in table.steps
    ]
    rows = by_name(table.model_copy(update={"steps": tuple(steps)}))
    assert rows["whole step", "speculating"].worst == pytest.approx(1 - 1 / 1.2, abs=0.02)
    assert rows["batch size", "verify"].worst == pytest.approx(0.0, abs=1e-9)


def test_shapes_are_left_out_of_the_roofline() -> None:
    root = shipped_root()
    tables = [load_runtime_table(path) for path in sorted((root / "runtime").glob("h200--*.yaml"))]
    spec, library = load_gpu_spec(root / "gpus" / "h200.yaml"), Library.open()
    layouts = find_layouts(library, tables)
    rows = roofline_accuracy(tables, spec, layouts)
    shapes = {row.term: row for row in rows if row.left_out == "roofline, shape"}
    assert {"mamba2-2.7b", "mamba2-130m"} <= set(shapes)
    # From models of milliseconds to one of microseconds and back.
    assert all(0 < row.median < 0.3 for row in shapes.values())


def test_pairs_that_no_table_was_fitted_to_are_within_the_band() -> None:
    root = shipped_root()
    tables = [load_runtime_table(path) for path in sorted((root / "runtime").glob("h200--*.yaml"))]
    spec, library = load_gpu_spec(root / "gpus" / "h200.yaml"), Library.open()
    measured = MeasuredGpu(spec, tuple(tables), (), find_layouts(library, tables))
    rows, inside = script_accuracy.pair_accuracy(measured, library)
    assert inside > 0.9
    billions = [row for row in rows if not row.term.startswith(("demo", "nemotron-3-nano"))]
    assert len(billions) == 8, "off and trees of four pairs"
    assert all(row.median < 0.1 and row.worst < 0.25 for row in billions)
    # The only model with experts, which nothing else tells of.
    experts = [row for row in rows if row.term.startswith("nemotron-3-nano")]
    assert len(experts) == 2
    assert all(row.median < 0.15 and row.worst < 0.4 for row in experts)


def test_passes_of_a_shape_are_predicted_from_other_shapes_alone() -> None:
    root, name = shipped_root(), "mamba-in-llama-8b"
    tables = [load_runtime_table(path) for path in sorted((root / "runtime").glob("h200--*.yaml"))]
    spec, library = load_gpu_spec(root / "gpus" / "h200.yaml"), Library.open()
    measured = MeasuredGpu(spec, tuple(tables), (), find_layouts(library, tables))
    (own,) = [t for t in tables if t.target.name == name and t.target.weights is None]
    rows = [
        {"model": name, "batch": p.batch_size, "tokens": p.size, "context": 512, "ms": p.ms}
        for p in own.points
        if p.term == "verify" and p.size > 1
    ]
    # Of other rows it is said that all experts are the same: none of the model's table is used.
    others = [row | {"routing": "one set", "ms": 1e3} for row in rows]
    (found,), inside = script_accuracy.forward_accuracy([*rows, *others], measured, library)
    assert found.count == len(rows)
    assert 0 < found.median < 0.15
    assert inside > 0.5
    slower = [row | {"ms": 3 * row["ms"]} for row in rows]
    (found,), inside = script_accuracy.forward_accuracy(slower, measured, library)
    assert found.median > 0.5
    assert inside < 0.1


def test_published_times_are_predicted_within_a_fifth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import published  # type: ignore[import-not-found]

    paths = sorted((shipped_root() / "runtime").glob("h200--*.yaml"))
    spec = load_gpu_spec(shipped_root() / "gpus" / "h200.yaml")
    found = published.predictions([*map(load_runtime_table, paths)], spec, Library.open())
    assert len(found) == len(published.ROWS)
    assert max(abs(prediction.error) for prediction in found) < 0.2
    assert all(prediction.passes_ms < prediction.row.ms for prediction in found)
