"""Prompts from JSONL files, whatever key they stand under."""

from __future__ import annotations

from pathlib import Path

import pytest

from stree_autotune.prompts import load_prompts, parse_rows
from stree_core.errors import ConfigError


def _file(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_every_known_key_is_read(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        '{"prompt": "a", "answer": "x"}',
        '{"question": "b"}',
        "",
        '{"turns": ["c", "later"]}',
        '{"prompt": ["d", "later"]}',
    )
    assert load_prompts("mine", str(path)) == ["a", "b", "c", "d"]


def test_rows_select_before_limit(tmp_path: Path) -> None:
    path = _file(tmp_path, *(f'{{"prompt": "p{i}"}}' for i in range(10)))
    assert load_prompts("mine", str(path), rows=parse_rows("4:"), limit=2) == ["p4", "p5"]
    assert load_prompts("mine", str(path), rows=parse_rows(":1")) == ["p0"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"answer": "x"}', "must have a prompt"),
        ('{"prompt": "  "}', "must have a prompt"),
        ('{"turns": []}', "must have a prompt"),
        ("[1]", "must have a prompt"),
        ("{", "line 1 must be a JSON object"),
        ("[" * 100_000, "line 1 must be a JSON object"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_prompts("mine", str(_file(tmp_path, line)))


def test_missing_files_and_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prompts("mine", str(tmp_path / "none.jsonl"))
    path = _file(tmp_path, '{"prompt": "a"}')
    with pytest.raises(ConfigError, match="at least one prompt"):
        load_prompts("mine", str(path), rows=parse_rows("5:9"))
    with pytest.raises(ConfigError, match="not known on the hub"):
        load_prompts("gsm9k", "")


@pytest.mark.parametrize("text", ["", "3", "a:b", "1:2:3", "-1:4"])
def test_rows_must_be_a_range(text: str) -> None:
    with pytest.raises(ConfigError, match="START:STOP"):
        parse_rows(text)
