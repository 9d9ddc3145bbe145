"""Runtime tables: what loads, what is refused, how files are named."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from synthetic_data import make_table

from stree_autotune.store.gpu_spec import GpuSpec, load_gpu_spec
from stree_autotune.store.library import shipped_root
from stree_autotune.store.runtime_table import (
    RuntimeTable,
    load_runtime_table,
    save_runtime_table,
)
from stree_autotune.store.step_rule import StepRule
from stree_core.errors import ConfigError
from stree_core.files import dump_yaml, validate
from stree_core.profile import Sampling
from stree_core.strict_yaml import parse_yaml


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
        (content(points=[["verify", 1, 4, 1.0]]), "points.0"),
        (content(points=[["verify", 1, 4, 1.0, 0.0, 0.0]]), "points.0"),
        (content(points=[["prefill", 1, 4, 1.0, 0.0]]), "points.0"),
        (content(points=[["verify", 1, 257, 1.0, 0.0]]), "verify has size 256 at most"),
        (content(points=[["draft_store", 8, 9, 1.0, 0.0]]), "draft_store has size 8 at most"),
        (content(points=[["verify", 1, 1 << 17, 1.0, 0.0]]), "points.0"),
        (content(points=[["verify", 0, 4, 1.0, 0.0]]), "points.0"),
        (content(points=[["verify", 1, 4, -1.0, 0.0]]), "points.0"),
        (content(points=[["verify", 1, 4, float("inf"), 0.0]]), "points.0"),
        (content(points=[["verify", 1, 4, float("nan"), 0.0]]), "points.0"),
        (content(points=[["verify", 1, 4, 0.0, 0.0]]), "a time is above 0 ms"),
        (content(points=[["verify", 1, 4, 1.0, 0.0]] * 2), "every point stands once"),
        (content(points=[["draft_root", 1, 2, 1.0, 0.0]]), "draft_root has size 1"),
        (content(points=[["target_store", 8, 1, 1.0, 0.0]]), "with all 8 slots.*probe again"),
        (content(rules=[["branch", 4, 1.0, 0.0]] * 2), "every point of a rule stands once"),
        (content(rules=[["guess", 4, 1.0, 0.0]]), "rules.0"),
        (content(steps=[[1, "chain-1", 1.0, 0.0, 0.5]]), "steps.0"),
        (content(steps=[[1, "chain-1", 1.0, 0.0, 1.0, "beam"]]), "steps.0"),
        (content(steps=[[1, "nowhere", 1.0, 0.0]]), "'nowhere', which `trees` lacks"),
        (content(steps=[[1, "chain-1", 1.0, 0.0]] * 2), "every step stands once"),
        (content(trees={"a": {"paths": []}}, steps=[]), "off is the one tree without nodes"),
        (content(trees={"a": {"paths": [[1]]}}, steps=[]), "siblings have ranks without gaps"),
        (content(trees={"a": {"path": [[0]]}}, steps=[]), "unknown key trees.a.path; did you mean"),
    ],
)
def test_what_does_not_fit_is_one_sentence(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        validate(changed, RuntimeTable, "table")
    assert "\n" not in str(caught.value)


def test_what_is_a_difference_may_cost_nothing() -> None:
    points = [["target_store", 1, 1, 0.0, 0.0], ["context", 1, 4, 0.0, 0.0]]
    validate(content(points=points, rules=[["branch", 4, 0.0, 0.0]]), RuntimeTable, "table")


def test_all_slots_that_store_may_not_fit() -> None:
    points = [["target_store", 8, 1, 0.1, 0.0]]
    few = content(points=points, no_room=[["target_store", 8, 8]])
    validate(few, RuntimeTable, "table")


@pytest.mark.parametrize(
    ("weights", "pair"),
    [
        ("real", "--target demo-target --draft demo-draft"),
        ("random", "--shapes demo-target,demo-draft"),
    ],
)
def test_the_command_that_records_a_table(weights: str, pair: str) -> None:
    table = make_table().model_copy(update={"weights": weights})
    assert table.probe_command() == f"stree-tune probe --gpu h200 {pair} --context 1024"


def test_whole_steps_that_old_tables_keep_among_passes_are_read() -> None:
    rows = [["verify", 8, 65], ["even-64x16 mss_truncated", 4, 65]]
    table = validate(content(no_room=rows), RuntimeTable, "table")
    assert table.no_room == (("verify", 8, 65),)
    assert table.steps_no_room == ((4, "even-64x16", StepRule.MSS_TRUNCATED),)
    assert validate(parse_yaml(dump_yaml(table), "table"), RuntimeTable, "table") == table


def test_the_rule_of_a_setting() -> None:
    settings = [
        Sampling(),
        Sampling(rule="naive", temperature=0.7),
        Sampling(rule="naive", temperature=0.7, top_p=0.9),
        Sampling(rule="mss", temperature=1.0, top_p=0.9),
    ]
    assert [StepRule.of(setting) for setting in settings] == [
        StepRule.GREEDY,
        StepRule.NAIVE,
        StepRule.NAIVE_TRUNCATED,
        StepRule.MSS_TRUNCATED,
    ]
    assert [StepRule.of(rule.sampling) for rule in StepRule] == list(StepRule)


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.yaml"
    save_runtime_table(make_table(), path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match=r"No space left on device.*free some space"):
        save_runtime_table(make_table(batch_sizes=(1,)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_shipped_sheets_name_their_sources() -> None:
    for path in (shipped_root() / "gpus").glob("*.yaml"):
        spec = load_gpu_spec(path)
        assert spec.name == path.stem
        assert any("datasheet" in source for source in spec.sources)
        assert spec.launch_is_guess == any("guess" in source for source in spec.sources)


def test_sheet_refuses_a_stray_key() -> None:
    spec = load_gpu_spec(shipped_root() / "gpus" / "h200.yaml").model_dump(exclude_none=True)
    with pytest.raises(ConfigError, match="unknown key l2_gb; did you mean"):
        validate({**spec, "l2_gb": 1}, GpuSpec, "spec")
