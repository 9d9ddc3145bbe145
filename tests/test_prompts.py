"""Prompts from JSONL files, whatever key they stand under."""

from __future__ import annotations

import sys
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
        '{"instruction": "e", "output": "x"}',
        '{"problem": "f"}',
        '{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "g"}]}',
    )
    assert load_prompts("mine", str(path)) == ["a", "b", "c", "d", "e", "f", "g"]


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


def test_rows_that_are_not_asked_for_may_be_bad(tmp_path: Path) -> None:
    path = str(_file(tmp_path, '{"prompt": "a"}', "", '{"answer": "x"}', '{"prompt": "c"}'))
    with pytest.raises(ConfigError, match=r"prompts\.jsonl line 3 must have a prompt"):
        load_prompts("mine", path)
    assert load_prompts("mine", path, rows=parse_rows("2:")) == ["c"]
    assert load_prompts("mine", path, limit=1) == ["a"]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"empty\.jsonl must hold at least one prompt"):
        load_prompts("mine", str(path))


class Hub:
    """Stands for the package datasets."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str | None, str]] = []

    def load_dataset(self, name: str, configuration: str | None, split: str) -> list[object]:
        self.calls.append((name, configuration, split))
        if name == "toys/broken":
            raise RuntimeError("no such split\nand more")
        return [{"question": "a"}, {"answer": "b"}, {"question": "c"}]


def test_datasets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert load_prompts("gsm8k", "", limit=1) == ["a"]
    assert load_prompts("mine", "hub:toys/some:train", rows=parse_rows("2:3")) == ["c"]
    assert hub.calls == [("openai/gsm8k", "main", "test"), ("toys/some", None, "train")]
    with pytest.raises(ConfigError, match="hub:toys/some:train row 1 must have a prompt"):
        load_prompts("mine", "hub:toys/some:train")
    with pytest.raises(ConfigError, match=r"cannot be read from the hub \(no such split\)"):
        load_prompts("mine", "hub:toys/broken:x")
    for wrong in ("hub:toys", "hub:toys/some", "hub:toys/some:", "hub:a/b:c:d:e", "hub:../x:y"):
        with pytest.raises(ConfigError, match="hub:OWNER/NAME:SPLIT or"):
            load_prompts("mine", wrong)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'stree\[data\]'"):
        load_prompts("human_eval", "")


@pytest.mark.parametrize("text", ["", "3", "a:b", "1:2:3", "-1:4"])
def test_rows_must_be_a_range(text: str) -> None:
    with pytest.raises(ConfigError, match="START:STOP"):
        parse_rows(text)
