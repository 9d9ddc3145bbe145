"""Prompts by dataset name, from a JSONL file or the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stree_core.errors import ConfigError, nearest
from stree_core.files import read_limited

MAX_JSONL_BYTES = 256 << 20

HUB = {
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "human_eval": ("openai/openai_humaneval", None, "test"),
    "mt_bench": ("HuggingFaceH4/mt_bench_prompts", None, "train"),
}
"""Hub repository, configuration and split of the datasets known by name."""


def load_prompts(
    dataset: str, file: Path | None, *, rows: slice = slice(None), limit: int | None = None
) -> list[str]:
    """Return the prompts of `file`, or else of a dataset known by name on the hub.

    A row's prompt is its key "prompt", "question" or the first of "turns". `rows` selects rows
    before `limit` cuts. Raises ConfigError on a missing file, a row without a prompt or no rows.
    """
    records = _read_jsonl(file) if file is not None else _read_hub(dataset)
    name = str(file) if file is not None else dataset
    prompts = [
        _prompt_of(record, f"{name} row {number}")
        for number, record in list(enumerate(records, start=1))[rows]
    ][:limit]
    if not prompts:
        raise ConfigError(f"{name} must hold at least one prompt in the rows asked for; check them")
    return prompts


def parse_rows(text: str) -> slice:
    """Parse "A:B" into a slice of rows; raise ConfigError on anything else."""
    start, colon, stop = text.partition(":")
    if colon and all(part == "" or part.isdecimal() for part in (start, stop)):
        return slice(int(start) if start else None, int(stop) if stop else None)
    raise ConfigError(f"--rows must be START:STOP with whole numbers, got {text!r}; e.g. 0:100")


def _prompt_of(record: Any, where: str) -> str:
    if isinstance(record, dict):
        turns = record.get("turns") or [None]
        for value in (record.get("prompt"), record.get("question"), turns[0]):
            # Some datasets keep the turns under "prompt".
            text = value[0] if isinstance(value, list) and value else value
            if isinstance(text, str) and text.strip():
                return text
    raise ConfigError(
        f"{where} must have a prompt under 'prompt', 'question' or 'turns', it has none; add one"
    )


def _read_jsonl(path: Path) -> Iterator[Any]:
    text = read_limited(path, MAX_JSONL_BYTES)
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as err:
            raise ConfigError(
                f"{path} line {number} must be a JSON object ({err}); mend it"
            ) from err


def _read_hub(dataset: str) -> Iterator[Any]:
    if dataset not in HUB:
        raise ConfigError(
            f"dataset {dataset!r} is not known on the hub; pass its rows with --prompts FILE "
            f"({nearest(dataset, HUB)})"
        )
    try:
        import datasets
    except ImportError as err:
        raise ConfigError(
            f"reading {dataset} from the hub needs the package datasets, it is not installed; "
            "pip install 'stree[data]' or pass --prompts FILE"
        ) from err
    repository, configuration, split = HUB[dataset]
    try:
        yield from datasets.load_dataset(repository, configuration, split=split)
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"{repository} cannot be read from the hub ({err}); pass --prompts FILE"
        ) from err
