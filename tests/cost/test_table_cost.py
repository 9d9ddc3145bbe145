"""The table that a request is answered with: off is a target's, whatever draft is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_data import make_table

from stree_autotune.cost.table_cost import off_disagreements, read_runtime
from stree_autotune.store.library import Library, RuntimeSource
from stree_autotune.store.runtime_table import (
    RuntimeTable,
    runtime_file_name,
    save_runtime_table,
)


def with_draft(table: RuntimeTable, name: str, factor: float) -> RuntimeTable:
    """The same target with another draft, and other times of off."""
    steps = [s._replace(ms=factor * s.ms) if s.is_off else s for s in table.steps]
    draft = table.draft.model_copy(update={"name": name})
    return table.model_copy(update={"draft": draft, "steps": tuple(steps)})


def saved(table: RuntimeTable, root: Path) -> Path:
    name = runtime_file_name(table.gpu, table.target.name, table.draft.name)
    save_runtime_table(table, root / "runtime" / name)
    return root / "runtime" / name


def off_of(table: RuntimeTable) -> list[float]:
    return [step.ms for step in table.steps if step.is_off]


def test_off_is_the_fastest_of_a_targets_tables(tmp_path: Path) -> None:
    table = make_table()
    slow, fast = with_draft(table, "slow", 1.5), with_draft(table, "fast", 0.9)
    paths = {each.draft.name: saved(each, tmp_path) for each in (table, slow, fast)}
    library = Library.open((tmp_path,))
    found = {
        name: read_runtime(library, RuntimeSource(path), table.gpu) for name, path in paths.items()
    }
    for name, inputs in found.items():
        assert off_of(inputs.table) == pytest.approx([0.9 * ms for ms in off_of(table)])
        assert inputs.has_others_off == (name != "fast")
        speculating = [step for step in inputs.table.steps if not step.is_off]
        assert speculating == [step for step in table.steps if not step.is_off]


def test_tables_of_a_target_that_disagree_on_off_are_named() -> None:
    table = make_table()
    other = with_draft(table, "other", 1.2)
    first = next(step for step in table.steps if step.is_off)
    close, elsewhere = with_draft(table, "close", 1.05), other.model_copy(update={"gpu": "h100"})
    assert off_disagreements([table, close, elsewhere]) == []
    sentences = off_disagreements([table, other])
    assert len(sentences) == len(off_of(table))
    assert f"off of {table.target.name} at batch size {first.batch_size} takes" in sentences[0]
    assert f"with other and {first.ms:g} with {table.draft.name}, so" in sentences[0]


def test_off_of_another_setting_or_folder_says_nothing(tmp_path: Path) -> None:
    table = make_table()
    fast = with_draft(table, "fast", 0.5)
    mine = saved(table, tmp_path / "mine")
    saved(fast, tmp_path / "theirs")
    saved(fast.model_copy(update={"dtype": "float32"}), tmp_path / "mine")
    library = Library.open((tmp_path / "mine", tmp_path / "theirs"))
    inputs = read_runtime(library, RuntimeSource(mine), table.gpu)
    assert inputs.table == table
    assert not inputs.has_others_off
