"""Prompts from files of every form, whatever field they stand under."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stree_autotune.store import prompt_rows, prompts as prompt_files
from stree_autotune.store.prompt_rows import prompt_of
from stree_autotune.store.prompts import PromptSet, load_prompts, parse_rows
from stree_core.errors import ConfigError
from stree_core.extras import install_command

QUESTION = "How many apples are in 3 boxes of 4?"
USER = {"role": "user", "content": QUESTION}
SYSTEM = {"role": "system", "content": "Be terse."}
REPLY = {"role": "assistant", "content": "Twelve."}
MORE = {"role": "user", "content": "And in 5?"}


def _file(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def texts(path: Path | str, **choice: Any) -> list[str]:
    return load_prompts("mine", str(path), **choice).texts


def turns(row: object) -> list[tuple[str, str]]:
    """Return the role and the content of every turn that is taken of a row."""
    return [(turn["role"], turn["content"]) for turn in prompt_of(row, "row 0").chat.messages]


@pytest.mark.parametrize(
    ("row", "text", "field"),
    [
        ({"prompt": "a", "answer": "x"}, "a", "prompt"),
        ({"question": "a", "answer": "x"}, "a", "question"),
        ({"problem": "a"}, "a", "problem"),
        ({"text": "a"}, "a", "text"),
        ({"prompt": None, "question": "a"}, "a", "question"),
        ({"turns": ["a", "later"]}, "a", "turns[0]"),
        ({"prompt": ["a", "later"]}, "a", "prompt[0]"),
        ({"prompt": [SYSTEM, USER]}, QUESTION, "prompt"),
        ({"messages": [SYSTEM, USER]}, QUESTION, "messages"),
        ({"messages": [{"role": "developer", "content": "x"}, USER]}, QUESTION, "messages"),
        ({"messages": [REPLY, USER]}, QUESTION, "messages"),
        ({"messages": [USER, REPLY, MORE, REPLY]}, "And in 5?", "messages"),
        ({"prompt": "a", "messages": [USER]}, QUESTION, "messages"),
        ({"custom_id": "1", "body": {"model": "m", "messages": [USER]}}, QUESTION, "body.messages"),
        ({"body": {"prompt": "a"}}, "a", "body.prompt"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "a", "conversations"),
        ({"instruction": "a", "output": "x", "text": "a and x"}, "a", "instruction"),
        ({"instruction": "a", "input": "", "output": "x"}, "a", "instruction"),
        ({"instruction": "a", "input": "b"}, "a\n\nb", "instruction + input"),
        ({"instruction": "a", "context": "b"}, "a\n\nb", "instruction + context"),
        ({"question": "a", "context": "b"}, "a\n\nb", "question + context"),
    ],
)
def test_every_known_form_is_read(row: object, text: str, field: str) -> None:
    prompt = prompt_of(row, "row 0")
    assert prompt.text == text
    assert " + ".join(prompt.fields) == field


def test_a_chat_is_taken_up_to_the_last_turn_of_a_user() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    answer = {"role": "tool", "content": "12", "tool_call_id": "1"}
    tools = [{"type": "function", "function": {"name": "multiply"}}]
    chat = [SYSTEM, USER, call, answer, REPLY, MORE, REPLY]
    prompt = prompt_of({"messages": chat, "tools": tools}, "row 0")
    assert list(prompt.chat.messages) == chat[:-1]
    assert list(prompt.chat.tools) == tools
    named = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
             {"from": "gpt", "value": "r"}, {"from": "human", "value": "again"}]  # fmt: skip
    assert turns({"conversations": named}) == [
        ("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "again"),
    ]  # fmt: skip
    assert turns({"system_prompt": "s", "question": "q"}) == [("system", "s"), ("user", "q")]
    assert turns({"system": "s", "messages": [USER]})[0] == ("system", "s")
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}]
    assert turns({"messages": [{"role": "user", "content": parts}]}) == [("user", "one\ntwo")]


IMAGE = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"role": "user", "content": IMAGE}]},
            "turn 1, part 2 must be text, got",
        ),
        ({"messages": [USER], "images": ["x.png"]}, "stands beside the field images"),
        ({"prompt": "a", "image": {"bytes": "x"}}, "stands beside the field image,"),
        ({"question": "a", "choices": ["b", "c"]}, "stands beside the field choices"),
        ({"instruction": "a", "history": [["b", "c"]]}, "stands beside the field history"),
        ({"messages": [SYSTEM, REPLY]}, "must have a turn of a user"),
        ({"messages": [{"role": "critic", "content": "a"}]}, "turn 1, must be of a known role"),
        ({"messages": [SYSTEM | {"content": ""}, USER]}, "turn 1, must have text, got ''"),
        ({"messages": "a"}, "must be a list of at most 10000 turns, got 'a'"),
        ({"messages": ["a"]}, "turn 1, must be an object with role and content"),
        ({"messages": [SYSTEM, USER], "system": "b"}, "more than one system turn"),
        ({"messages": [USER], "tools": "[]"}, "tools, which must be a list"),
        ({"prompt": 3}, "field prompt, must have text, got 3"),
        ({"instruction": "a", "input": ["b"]}, "must have text, got ['b']"),
    ],
)
def test_what_cannot_be_taken_whole_is_refused(row: object, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as err:
        prompt_of(row, "some.jsonl line 7")
    assert str(err.value).startswith("some.jsonl line 7")


def test_rows_of_a_file_have_one_field(tmp_path: Path) -> None:
    path = _file(tmp_path, '{"prompt": "a"}', '{"question": "b"}')
    with pytest.raises(ConfigError, match=r"line 2 must have its prompt under prompt as the rows"):
        texts(path)
    assert texts(path, limit=1) == ["a"]
    path = _file(
        tmp_path, '{"instruction": "a", "input": ""}', '{"instruction": "a", "input": "b"}'
    )
    fields = "2 prompts from field instruction + input; the first begins: a"
    assert load_prompts("mine", str(path)).describe(chat=False) == fields


def test_a_prompt_is_shown_without_what_a_terminal_obeys() -> None:
    prompts = PromptSet(
        (prompt_of({"messages": [SYSTEM, MORE | {"content": "\x1b[2J" * 40}]}, ""),)
    )
    line = prompts.describe(chat=False)
    expected = "1 prompt from field messages; the first (the last user turn) begins: "
    assert line == expected + r"\x1b[2J" * 20
    line = prompts.describe(chat=True)
    assert "the first (2 turns) begins: system: Be terse.\\nuser: \\x1b[2J" in line


ROWS = [{"prompt": f"p{index}", "more": {"list": [1, {"a": "]"}]}} for index in range(4)]
JSON = {
    "lines": "\n".join(map(json.dumps, ROWS)),
    "blank lines": "\n\n" + "\r\n \r\n".join(map(json.dumps, ROWS)) + "\n\n",
    "array": json.dumps(ROWS),
    "indented array": json.dumps(ROWS, indent=2),
    "indented rows": "\n".join(json.dumps(row, indent=4) for row in ROWS),
    "mark of the byte order": "\ufeff" + json.dumps(ROWS),
}


@pytest.mark.parametrize("form", JSON)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_json_is_read_in_every_form(
    form: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(pack(JSON[form].encode()))
    assert texts(path) == ["p0", "p1", "p2", "p3"]
    assert texts(path, rows=parse_rows("1:3"), limit=1) == ["p1"]


def test_rows_are_named_by_the_line_where_they_begin(tmp_path: Path) -> None:
    rows: list[object] = [*ROWS, {"answer": "x"}]
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(rows, indent=1))
    line = json.dumps(rows, indent=1)[: json.dumps(rows, indent=1).index('"answer"')].count("\n")
    with pytest.raises(ConfigError, match=rf"prompts\.json line {line} must have a prompt"):
        texts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": "b\xff"}', "line 2 must be UTF-8, it has the byte 0xff"),
        (b'{"prompt": "a"}\n{"prompt": "b \\ud83d c"}', "line 2 must be valid Unicode.*U\\+D83D"),
        (b'{"messages": [{"role": "user", "content": "\\udcff"}]}', "line 1 must be valid Unicode"),
        (b'[{"prompt": "a"}', "must end its JSON array"),
        (b'[{"prompt": "a"}\n{"prompt": "b"}]', "line 2 must go on with , or ]"),
        (b'{"prompt": "a"},\n{"prompt": "b"}', "line 1 must be a JSON object"),
        (gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9], "cannot be unpacked"),
        (b"\x1f\x8b nothing of the kind", "cannot be unpacked"),
        (b"\x28\xb5\x2f\xfd and more", "it is zstd; unpack it first"),
        (b"PAR1", "needs the package pyarrow.*pip install"),
    ],
)
def test_broken_files_are_one_sentence(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "prompts"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as err:
        texts(path)
    assert str(path) in str(err.value)
    assert "\n" not in str(err.value)


def test_reading_stops_at_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = json.dumps({"prompt": "a" * 900}).encode() + b"\n"
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(gzip.compress(row * 5, mtime=0))
    monkeypatch.setattr(prompt_files, "MAX_FILE_BYTES", 4000)
    with pytest.raises(ConfigError, match="may unpack to at most 4000 bytes"):
        texts(path)
    path.write_bytes(row * 5)
    with pytest.raises(ConfigError, match="may have at most 4000 bytes"):
        texts(path)
    path.write_bytes(row * 4)
    assert len(texts(path)) == 4
    monkeypatch.setattr(prompt_files, "MAX_ROWS", 3)
    assert len(texts(path, limit=3)) == 3
    with pytest.raises(ConfigError, match="may have at most 3 rows"):
        texts(path)
    monkeypatch.setattr(prompt_rows, "MAX_PROMPT_CHARACTERS", 899)
    with pytest.raises(ConfigError, match="line 1 may have a prompt of at most 899 characters"):
        texts(path)


def test_parquet_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "prompts.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": [SYSTEM, USER]}] * 20), path)
    assert texts(path, limit=18) == [QUESTION] * 18
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    with pytest.raises(ConfigError, match="row 0 cannot be read"):
        texts(path)
    parquet.write_table(pyarrow.table({"prompt": ["a" * 10_000] * 2}), path)
    monkeypatch.setattr(prompt_files, "MAX_FILE_BYTES", 4000)
    with pytest.raises(ConfigError, match="may unpack to at most 4000 bytes"):
        texts(path)


def test_rows_select_before_limit(tmp_path: Path) -> None:
    path = _file(tmp_path, *(f'{{"prompt": "p{i}"}}' for i in range(10)))
    assert texts(path, rows=parse_rows("4:"), limit=2) == ["p4", "p5"]
    assert texts(path, rows=parse_rows(":1")) == ["p0"]


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
    assert texts(path, rows=parse_rows("2:")) == ["c"]
    assert texts(path, limit=1) == ["a"]


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
    assert load_prompts("gsm8k", "", limit=1).texts == ["a"]
    assert texts("hub:toys/some:train", rows=parse_rows("2:3")) == ["c"]
    assert hub.calls == [("openai/gsm8k", "main", "test"), ("toys/some", None, "train")]
    with pytest.raises(ConfigError, match="hub:toys/some:train row 1 must have a prompt"):
        load_prompts("mine", "hub:toys/some:train")
    with pytest.raises(ConfigError, match=r"cannot be read from the hub \(no such split\)"):
        load_prompts("mine", "hub:toys/broken:x")
    for wrong in ("hub:toys", "hub:toys/some", "hub:toys/some:", "hub:a/b:c:d:e", "hub:../x:y"):
        with pytest.raises(ConfigError, match="hub:OWNER/NAME:SPLIT or"):
            load_prompts("mine", wrong)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=re.escape(install_command("data"))):
        load_prompts("human_eval", "")


@pytest.mark.parametrize("text", ["", "3", "a:b", "1:2:3", "-1:4"])
def test_rows_must_be_a_range(text: str) -> None:
    with pytest.raises(ConfigError, match="START:STOP"):
        parse_rows(text)


def test_a_set_of_prompts_is_read_by_index(tmp_path: Path) -> None:
    prompts = load_prompts("mine", str(_file(tmp_path, '{"text": "a"}', '{"text": "b"}')))
    assert (len(prompts), prompts[1], prompts.texts) == (2, "b", ["a", "b"])
