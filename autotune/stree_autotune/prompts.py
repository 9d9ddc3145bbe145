"""Prompts by dataset name, from a JSONL file or the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stree_core.errors import ConfigError, nearest
from stree_core.files import read_limited
from stree_core.hub import is_hub_id

MAX_JSONL_BYTES = 256 << 20
HUB_PREFIX = "hub:"

HUB = {
    "gsm8k": "hub:openai/gsm8k:main:test",
    "human_eval": "hub:openai/openai_humaneval:test",
    "mt_bench": "hub:HuggingFaceH4/mt_bench_prompts:train",
}
"""Where the datasets known by name lie on the hub."""

PROMPT_KEYS = ("prompt", "question", "instruction", "problem", "turns", "messages")
"""Under which keys a row may keep its prompt; of several turns or messages the first counts."""

Records = Iterator[tuple[str, Any]]
"""Rows of a dataset, each with what errors call it."""


def load_prompts(
    dataset: str, source: str, *, rows: slice = slice(None), limit: int | None = None
) -> list[str]:
    """Return the prompts of a source, or, when it is empty, of a dataset known by name.

    A source is a file of JSON lines or a dataset of the Hugging Face hub, written
    hub:OWNER/NAME[:CONFIG]:SPLIT. `rows`, counted from 0, are selected before `limit` cuts. Raises
    ConfigError on a missing source, a row without a prompt or no rows.
    """
    source = source or _known_source(dataset)
    is_hub = source.startswith(HUB_PREFIX)
    records = _read_hub(source) if is_hub else _read_jsonl(Path(source))
    prompts = [_prompt_of(record, where) for where, record in list(records)[rows][:limit]]
    if not prompts:
        raise ConfigError(
            f"{source} must hold at least one prompt in the rows asked for, it has none; check them"
        )
    return prompts


def parse_rows(text: str) -> slice:
    """Parse "A:B" into a slice of rows; raise ConfigError on anything else."""
    start, colon, stop = text.partition(":")
    if colon and all(part == "" or part.isdecimal() for part in (start, stop)):
        return slice(int(start) if start else None, int(stop) if stop else None)
    raise ConfigError(f"--rows must be START:STOP with whole numbers, got {text!r}; e.g. 0:100")


def _known_source(dataset: str) -> str:
    if dataset not in HUB:
        raise ConfigError(
            f"dataset {dataset!r} is not known on the hub; pass its rows with --prompts FILE "
            f"({nearest(dataset, HUB)})"
        )
    return HUB[dataset]


def _prompt_of(record: Any, where: str) -> str:
    if isinstance(record, dict):
        for key in PROMPT_KEYS:
            text = _text_of(record.get(key))
            if text is not None:
                return text
    raise ConfigError(
        f"{where} must have a prompt under {', '.join(PROMPT_KEYS[:-1])} or {PROMPT_KEYS[-1]}, it "
        "has none; add one or leave the row out with --rows"
    )


def _text_of(value: Any) -> str | None:
    """Return the text of a prompt, of the first turn or of the first message of a user."""
    if isinstance(value, list):
        turns = [turn for turn in value if not (isinstance(turn, dict) and _is_system(turn))]
        value = turns[0] if turns else None
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value.strip() else None


def _is_system(message: dict[str, Any]) -> bool:
    return message.get("role") == "system"


def _read_jsonl(path: Path) -> Records:
    text = read_limited(path, MAX_JSONL_BYTES)
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as err:
            raise ConfigError(f"{where} must be a JSON object ({err}); mend it") from err


def _read_hub(source: str) -> Records:
    repository, *parts = source.removeprefix(HUB_PREFIX).split(":")
    if not is_hub_id(repository) or not 1 <= len(parts) <= 2 or not all(parts):
        raise ConfigError(
            f"a hub dataset is written hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIG:SPLIT, got "
            f"{source}; for example {HUB['gsm8k']}"
        )
    try:
        import datasets
    except ImportError as err:
        raise ConfigError(
            f"reading {source} needs the package datasets, it is not installed; "
            "pip install 'stree[data]' or pass --prompts FILE"
        ) from err
    configuration = parts[0] if len(parts) == 2 else None
    try:
        rows = datasets.load_dataset(repository, configuration, split=parts[-1])
    # The library reads many formats over the network, and fails in as many ways.
    except Exception as err:
        line = next(iter(str(err).splitlines()), type(err).__name__)
        raise ConfigError(
            f"{source} cannot be read from the hub ({line}); check the name or pass --prompts FILE"
        ) from err
    for number, row in enumerate(rows):
        yield f"{source} row {number}", row
