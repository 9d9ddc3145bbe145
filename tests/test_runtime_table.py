"""Runtime tables: what loads, what is refused, how files are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from synthetic_data import make_table

from stree_autotune.gpu_sheet import GpuSheet, load_gpu_sheet
from stree_autotune.library import shipped_root
from stree_autotune.runtime_table import (
    RuntimeTable,
    load_runtime_table,
    save_runtime_table,
)
from stree_core.errors import ConfigError
from stree_core.files import validate


def content(**changes: Any) -> dict[str, Any]:
    return {**make_table(batch_sizes=(1,)).model_dump(mode="json", exclude_none=True), **changes}


def test_round_trip_and_name(tmp_path: Path) -> None:
    table = make_table()
    path = tmp_path / table.file_name
    save_runtime_table(table, path)
    assert load_runtime_table(path) == table
    assert path.name == "h200--demo-target--demo-draft.yaml"
    assert table.batch_sizes == (1, 2, 4, 8, 16, 32, 64)
    assert "\n- [verify, 1, 16, 3.03, 0.0]\n" in path.read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (content(gpuname="x"), "unknown key gpuname; did you mean gpu_name"),
        (content(backend="cuda"), "backend"),
        (content(points=[]), "points"),
        (content(points=[["verify", 1, 4, 1.0]]), "points.0"),
        (content(points=[["verify", 1, 4, 1.0, 0.0, 0.0]]), "points.0"),
        (content(points=[["prefill", 1, 4, 1.0, 0.0]]), "points.0"),
        (content(points=[["verify", 1, 257, 1.0, 0.0]]), "points.0"),
        (content(points=[["verify", 0, 4, 1.0, 0.0]]), "points.0"),
        (content(points=[["verify", 1, 4, -1.0, 0.0]]), "points.0"),
        (content(points=[["verify", 1, 4, float("inf"), 0.0]]), "points.0"),
        (content(points=[["verify", 1, 4, float("nan"), 0.0]]), "points.0"),
        (content(points=[["verify", 1, 4, 0.0, 0.0]]), "a time is above 0 ms"),
        (content(points=[["verify", 1, 4, 1.0, 0.0]] * 2), "every point stands once"),
        (content(points=[["one_token", 1, 2, 1.0, 0.0]]), "one_token has size 1"),
        (content(steps=[[1, "nowhere", 1.0, 0.0]]), "'nowhere', which `trees` lacks"),
        (content(steps=[[1, "chain-1", 1.0, 0.0]] * 2), "every step stands once"),
        (content(trees={"a": {"paths": []}}, steps=[]), "'a' has none"),
        (content(trees={"a": {"paths": [[1]]}}, steps=[]), "siblings have ranks without gaps"),
        (content(trees={"a": {"path": [[0]]}}, steps=[]), "unknown key trees.a.path; did you mean"),
    ],
)
def test_what_does_not_fit_is_one_sentence(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        validate(changed, RuntimeTable, "table")
    assert "\n" not in str(caught.value)


def test_branch_may_cost_nothing() -> None:
    validate(content(points=[["branch", 1, 4, 0.0, 0.0]]), RuntimeTable, "table")


def test_shipped_sheets_name_their_sources() -> None:
    for path in (shipped_root() / "gpus").glob("*.yaml"):
        sheet = load_gpu_sheet(path)
        assert sheet.name == path.stem
        assert any("datasheet" in source for source in sheet.sources)


def test_sheet_refuses_a_stray_key() -> None:
    sheet = load_gpu_sheet(shipped_root() / "gpus" / "h200.yaml").model_dump(exclude_none=True)
    with pytest.raises(ConfigError, match="unknown key l2_gb; did you mean"):
        validate({**sheet, "l2_gb": 1}, GpuSheet, "sheet")
