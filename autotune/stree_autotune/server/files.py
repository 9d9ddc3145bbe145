"""Files that servers and load generators wrote, read within limits and told apart by content."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stree_core.errors import ConfigError, brief
from stree_core.files import read_limited

MAX_BYTES = 64 << 20
MAX_RECORDS = 100_000
MAX_FILES = 10_000
ITERATION = "iteration elapsed time:"
"""What every line of vLLM's log of iterations holds."""
LARGEST = 1e15
_MAX_DEPTH = 12


class Document(NamedTuple):
    """One JSON object, or a whole text (Prometheus, a log), and the file that it is from."""

    file: str
    content: Mapping[str, Any]
    text: str = ""


def read_documents(path: Path) -> list[Document]:
    """Return what a file holds: a JSON object, a list or lines of them, or a text as a whole.

    Raises ConfigError for what is none of these, and beyond MAX_RECORDS.
    """
    text = _text(path)
    name = path.name
    if not text.lstrip().startswith(("{", "[")):
        if "# TYPE " in text or "\nvllm:" in f"\n{text}" or ITERATION in text:
            return [Document(name, {}, text)]
        raise ConfigError(
            f"{path} is neither JSON nor Prometheus text; name files that a server's load "
            "generator or /metrics wrote"
        )
    try:
        return [Document(name, found) for found in _objects(text, path)]
    except RecursionError as err:
        raise ConfigError(f"{path} nests too deeply to be a result; fetch it again") from err


def _text(path: Path) -> str:
    try:
        return read_limited(path, MAX_BYTES).decode()
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path} must be text in UTF-8, it is not; name another file") from err


def _objects(text: str, path: Path) -> list[dict[str, Any]]:
    """Return the objects of a document or of lines; anything else beside them is an error."""
    try:
        content = json.loads(text)
        found = content if isinstance(content, list) else [content]
    except ValueError as whole:
        lines = text.splitlines()
        if len(lines) > MAX_RECORDS:
            raise _too_many(path, len(lines)) from whole
        try:
            found = [json.loads(line) for line in lines if line.strip()]
        except ValueError as err:
            raise ConfigError(
                f"{path} is cut short or damaged ({whole}); run it again or fetch it again"
            ) from err
    if len(found) > MAX_RECORDS:
        raise _too_many(path, len(found))
    if not all(isinstance(each, dict) for each in found):
        raise ConfigError(f"{path} must hold JSON objects, it holds other values; name a result")
    return found


def _too_many(path: Path, count: int) -> ConfigError:
    return ConfigError(
        f"a file may hold at most {MAX_RECORDS} records, {path} has {count}; cut it to the runs "
        "that matter"
    )


def number(document: Document, key: str, *, least: float = 0.0) -> float:
    """Return a finite number of at least `least`; else ConfigError that names file and key."""
    value = document.content.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{document.file} needs a number in {key}, got {brief(value)}; run again")
    # also false for NaN
    if not least <= value <= LARGEST:
        raise ConfigError(
            f"{document.file} needs a finite {key} of at least {least:g}, got {brief(value)}; run "
            "it again"
        )
    return float(value)


def text_of(document: Document, key: str, default: str = "") -> str:
    """Return a short text or number as text, the default where the key is missing or empty."""
    value = document.content.get(key)
    return default if value in (None, "") else str(value)[:200]


def nested(content: Any, key: str, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Yield every mapping inside `content` that has a key."""
    if depth > _MAX_DEPTH:
        return
    if isinstance(content, Mapping):
        if key in content:
            yield content
            return
        for value in content.values():
            yield from nested(value, key, depth + 1)
    elif isinstance(content, list):
        for value in content[:MAX_RECORDS]:
            yield from nested(value, key, depth + 1)
