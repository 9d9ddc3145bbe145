"""Prompts by dataset name: rows of JSON or parquet files, or the Hugging Face hub."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from stree_autotune.store.prompt_rows import Prompt, prompt_of
from stree_core.errors import ConfigError, nearest
from stree_core.extras import install_command
from stree_core.files import read_limited
from stree_core.models import Chat, is_hub_id

HUB_PREFIX = "hub:"

HUB = {
    "gsm8k": "hub:openai/gsm8k:main:test",
    "human_eval": "hub:openai/openai_humaneval:test",
    "mt_bench": "hub:HuggingFaceH4/mt_bench_prompts:train",
}
"""Where the datasets known by name lie on the hub."""

SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a dataset, by index their texts; those of all rows stand under one field."""

    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> str:
        return self.prompts[index].text

    @property
    def texts(self) -> list[str]:
        """The last user turn of every prompt."""
        return [prompt.text for prompt in self.prompts]

    @property
    def chats(self) -> list[Chat]:
        """Every conversation up to its last user turn, system prompt included."""
        return [prompt.chat for prompt in self.prompts]

    def describe(self, *, chat: bool) -> str:
        """Return one line: how many prompts from which field, and how the first begins."""
        fields = dict.fromkeys(field for prompt in self.prompts for field in prompt.fields)
        turns = self.prompts[0].chat.messages
        shown, form = self.prompts[0].text, "the last user turn"
        if chat:
            shown = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
            form = _count(len(turns), "turn")
        several = chat or len(turns) > 1
        return (
            f"{_count(len(self), 'prompt')} from field {' + '.join(fields)}; the first"
            f"{f' ({form})' if several else ''} begins: {escaped(shown[:SHOWN_CHARACTERS])}"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def escaped(text: str) -> str:
    """Return a text in one line without control characters, which a terminal would obey."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def load_prompts(
    dataset: str, source: str, *, rows: slice = slice(None), limit: int | None = None
) -> PromptSet:
    """Return the prompts of a source, or, when it is empty, of a dataset known by name.

    A source is a file (prompt_files.py) or a dataset of the Hugging Face hub, written
    hub:OWNER/NAME[:CONFIG]:SPLIT. `rows`, counted from 0, are selected before `limit` cuts. Raises
    ConfigError on a missing source, a row whose prompt cannot be taken whole, or no rows.
    """
    source = source or _known_source(dataset)
    is_hub = source.startswith(HUB_PREFIX)
    records = _read_hub(source, rows) if is_hub else read_rows(Path(source), rows)
    prompts = tuple(_of_one_field(islice(records, limit)))
    if not prompts:
        raise ConfigError(
            f"{source} must hold at least one prompt in the rows asked for, it has none; check them"
        )
    return PromptSet(prompts)


def _of_one_field(records: Records) -> Iterator[Prompt]:
    first = ""
    for where, record in records:
        prompt = prompt_of(record, where)
        first = first or prompt.fields[0]
        if prompt.fields[0] != first:
            raise ConfigError(
                f"{where} must have its prompt under {first} as the rows before, it is under "
                f"{prompt.fields[0]}; rename the field or choose rows with --rows"
            )
        yield prompt


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


def _read_hub(source: str, rows: slice) -> Records:
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
            f"{install_command('data')} or pass --prompts FILE"
        ) from err
    configuration = parts[0] if len(parts) == 2 else None
    try:
        content = datasets.load_dataset(repository, configuration, split=parts[-1])
    # The library reads many formats over the network, and fails in as many ways.
    except Exception as err:
        line = next(iter(str(err).splitlines()), type(err).__name__)
        raise ConfigError(
            f"{source} cannot be read from the hub ({line}); check the name or pass --prompts FILE"
        ) from err
    records = ((f"{source} row {number}", row) for number, row in enumerate(content))
    return islice(records, rows.start, rows.stop)


MAX_FILE_BYTES = 256 << 20
MAX_ROWS = 1_000_000
_BATCH_ROWS = 16

Records = Iterator[tuple[str, Any]]
"""Rows of a dataset, each with what errors call it."""

_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_PACKED = {b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip"}
_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\r\n]*")


def read_rows(path: Path, rows: slice = slice(None)) -> Records:
    """Yield the rows of a file that a slice selects, each with its line or row number.

    Raises ConfigError on what cannot be read, is too large, or is no JSON.
    """
    data = read_limited(path, MAX_FILE_BYTES)
    if data.startswith(_GZIP):
        data = _unpacked(data, path)
    if data.startswith(_PARQUET):
        records = _parquet_rows(data, path)
    else:
        records = _json_rows(_decoded(data, path), path)
    return islice(_bounded(records, path), rows.start, rows.stop)


def _bounded(records: Records, path: Path) -> Records:
    for number, record in enumerate(records):
        if number == MAX_ROWS:
            raise ConfigError(f"{path} may have at most {MAX_ROWS} rows, it has more; split it")
        yield record


def _unpacked(data: bytes, path: Path) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as err:
        raise ConfigError(f"{path} cannot be unpacked ({err}); make the .gz file anew") from err
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{path} may unpack to at most {MAX_FILE_BYTES} bytes, it has more; split it"
        )
    return content


def _decoded(data: bytes, path: Path) -> str:
    for magic, kind in _PACKED.items():
        if data.startswith(magic):
            raise ConfigError(f"{path} must be JSON, parquet or .gz, it is {kind}; unpack it first")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        raise ConfigError(
            f"{path} line {line} must be UTF-8, it has the byte 0x{data[err.start]:02x}; "
            "convert the file"
        ) from err


def _json_rows(text: str, path: Path) -> Records:
    """Yield every value of a text, and in place of an array at its top the array's values."""
    position, line, counted, in_array = _after_blank(text, 0), 1, 0, False
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        if text[position] == "[" and not in_array:
            in_array, position = True, _after_blank(text, position + 1)
        else:
            where = f"{path} line {line}"
            value, position = _value_at(text, position, where)
            yield where, value
            if in_array:
                position = _after_comma(text, position, path)
        if in_array and text[position : position + 1] == "]":
            in_array, position = False, position + 1
        position = _after_blank(text, position)
    if in_array:
        raise ConfigError(f"{path} must end its JSON array with ], it does not; it may be cut off")


def _after_comma(text: str, position: int, path: Path) -> int:
    position = _after_blank(text, position)
    if text[position : position + 1] == ",":
        return _after_blank(text, position + 1)
    if position < len(text) and text[position] != "]":
        line = text.count("\n", 0, position) + 1
        raise ConfigError(f"{path} line {line} must go on with , or ] in its JSON array; mend it")
    return position


def _value_at(text: str, position: int, where: str) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"{where} must be a JSON object ({err}); mend it") from err


def _after_blank(text: str, position: int) -> int:
    blank = _BLANK.match(text, position)
    assert blank is not None
    return blank.end()


def _parquet_rows(data: bytes, path: Path) -> Records:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as err:
        raise ConfigError(
            f"reading {path} needs the package pyarrow, it is not installed; "
            f"{install_command('data')} or pass the rows as JSON lines"
        ) from err
    number = 0
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(data))
        _require_unpacked_size(file.metadata, path)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                yield f"{path} row {number}", row
                number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as err:
        line = next(iter(str(err).splitlines()), type(err).__name__)
        raise ConfigError(f"{path} row {number} cannot be read ({line}); write it anew") from err


def _require_unpacked_size(metadata: Any, path: Path) -> None:
    groups = range(metadata.num_row_groups)
    size = sum(metadata.row_group(index).total_byte_size for index in groups)
    if size > MAX_FILE_BYTES:
        raise ConfigError(
            f"{path} may unpack to at most {MAX_FILE_BYTES} bytes, it says {size}; split it"
        )
