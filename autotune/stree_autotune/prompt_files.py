"""Rows of prompt files: JSON lines, JSON arrays, indented JSON, each also as .gz, and parquet.

A file is read up to a limit, whatever its packed size says. Rows are parsed one by one, so that one
that nobody asked for may be bad.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from stree_core.errors import ConfigError
from stree_core.extras import install_command
from stree_core.files import read_limited

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
