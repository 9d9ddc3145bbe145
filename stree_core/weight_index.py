"""What the weight files of a model folder hold, by their headers: no torch, no tensor is read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from stree_core.errors import CheckpointError, brief
from stree_core.files import read_json

MAX_TENSORS = 1 << 20
MAX_NAME_CHARS = 500
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself."""
MAX_PICKLE_BYTES = 64 << 20
MAX_DIMS = 8
FIRST_BYTES = 64
FIRST_FILE_BYTES = 1 << 20

_NAMES = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)


@dataclass(frozen=True, slots=True)
class WeightPaths:
    """The weight files of a folder; `index` says which holds each tensor where there are shards."""

    paths: tuple[Path, ...]
    index: Mapping[str, Path] | None


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file: `start` and `end` are positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class SafeHeader:
    """What a safetensors file says of itself."""

    tensors: Mapping[str, StoredTensor]
    format: str | None


def find_weights(folder: Path) -> WeightPaths | None:
    """Return a folder's weight files, None without any; raise CheckpointError on a bad index."""
    for index_name, name in _NAMES:
        if (folder / index_name).exists():
            index = _read_index(folder / index_name)
            return WeightPaths(tuple(dict.fromkeys(index.values())), index)
        if (folder / name).exists():
            return WeightPaths((folder / name,), None)
    return None


def weights_sha256(folder: Path) -> str | None:
    """Return a hash by which a retrained model is told apart, None for a folder without weights.

    It covers names, types, shapes and the first bytes of every tensor, not how they are sharded.
    Raises CheckpointError when a file is missing or its header cannot be read.
    """
    found = find_weights(folder)
    if found is None:
        return None
    lines = [line for path in found.paths for line in _fingerprint(path)]
    return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()


def read_header(path: Path) -> SafeHeader:
    """Read the header of a safetensors file; raise CheckpointError unless all lies in the file."""
    try:
        size = require_file(path).stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a file of {size} bytes announces a header of {length}")
            content = json.loads(file.read(length))
        return _parse_header(content, 8 + length, size)
    except (OSError, ValueError, RecursionError) as err:
        raise damaged(path, err) from err


def check_archive(path: Path) -> list[zipfile.ZipInfo]:
    """Return the entries of torch's zip format; raise ValueError for what torch never writes.

    Entries are stored as they are, so that none grows beyond the file when it is read.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"it has {len(entries)} entries, at most {MAX_TENSORS} are read")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"its entry {entry.filename!r} is compressed, torch writes none so")
        if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its entry {entry.filename!r} has {entry.file_size} bytes")
    return entries


def require_file(path: Path) -> Path:
    """Return `path`; raise CheckpointError unless it is a regular file."""
    if not path.exists():
        raise CheckpointError(f"{path.parent} needs the file {path.name}, it has none; fetch it")
    if not path.is_file():
        raise CheckpointError(f"{path} must be a regular file, it is none; check the path")
    return path


def require_names(names: Collection[str]) -> None:
    """Raise ValueError for more tensors than a model has, and for names that none has."""
    if len(names) > MAX_TENSORS:
        raise ValueError(f"it has {len(names)} tensors, at most {MAX_TENSORS} are read")
    for name in names:
        if len(name) > MAX_NAME_CHARS or not name.isprintable():
            raise ValueError(f"a tensor is named {brief(name)}")


def damaged(path: Path, err: BaseException) -> CheckpointError:
    """Return what a weight file that cannot be read is refused with."""
    text = next((line for line in str(err).splitlines() if line.strip()), "")
    reason = f"{type(err).__name__}: {text}" if isinstance(err, KeyError) else text
    return CheckpointError(
        f"{path} cannot be read ({reason[:200] or type(err).__name__}); fetch it again"
    )


def _read_index(path: Path) -> dict[str, Path]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: weight_map must map names of weights to files, got {brief(weight_map)}; "
            "use the index that belongs to the shards"
        )
    for key, name in weight_map.items():
        # An index never points outside its folder.
        if not isinstance(name, str) or name != Path(name).name or len(name) > MAX_NAME_CHARS:
            raise CheckpointError(
                f"{path}: {brief(key)} must be in a file beside the index, got {brief(name)}; "
                "use the index that belongs to the shards"
            )
    try:
        require_names(weight_map)
    except ValueError as err:
        raise CheckpointError(f"{path}: {err}; use the index that belongs to the shards") from err
    return {key: path.parent / name for key, name in weight_map.items()}


def _parse_header(content: Any, data_start: int, size: int) -> SafeHeader:
    if not isinstance(content, dict):
        raise ValueError("its header is not a JSON object")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise ValueError("its __metadata__ is not a JSON object")
    require_names(content)
    tensors = {key: _parse_tensor(key, t, data_start, size) for key, t in content.items()}
    stated = metadata.get("format")
    return SafeHeader(tensors, stated if isinstance(stated, str) else None)


def _parse_tensor(key: str, stored: Any, data_start: int, size: int) -> StoredTensor:
    entry = stored if isinstance(stored, dict) else {}
    dtype, shape, offsets = (entry.get(part) for part in ("dtype", "shape", "data_offsets"))
    if not _is_type(dtype) or not _are_sizes(shape) or not _are_sizes(offsets):
        raise ValueError(f"{key} must have dtype, shape and data_offsets, got {brief(stored)}")
    if len(shape) > MAX_DIMS or len(offsets) != 2 or not offsets[0] <= offsets[1]:
        raise ValueError(f"{key} has shape {brief(shape)} and data_offsets {brief(offsets)}")
    start, end = (data_start + offset for offset in offsets)
    # No type has less than four bits a value.
    if end > size or math.prod(shape) > 2 * (end - start):
        raise ValueError(
            f"{key} of shape {brief(shape)} reaches to byte {end}, the file has {size}"
        )
    return StoredTensor(dtype, tuple(shape), start, end)


def _is_type(dtype: object) -> TypeGuard[str]:
    """Tell whether a type has the form of F32 or F8_E4M3; which there are, the reader knows."""
    return isinstance(dtype, str) and re.fullmatch(r"[A-Z][A-Z0-9_]{1,19}", dtype) is not None


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in values)


def _fingerprint(path: Path) -> Iterator[bytes]:
    """Yield what is known of each tensor of a file without reading it whole."""
    if path.suffix == ".bin":
        yield from _bin_fingerprint(path)
        return
    header = read_header(path)
    with path.open("rb") as file:
        for key, stored in header.tensors.items():
            first = os.pread(
                file.fileno(), min(FIRST_BYTES, stored.end - stored.start), stored.start
            )
            yield f"{key} {stored.dtype} {list(stored.shape)} {first.hex()}".encode()


def _bin_fingerprint(path: Path) -> Iterator[bytes]:
    """Yield sizes and checksums of the records of torch's zip format, else the file's beginning."""
    require_file(path)
    try:
        entries = check_archive(path) if zipfile.is_zipfile(path) else []
    # A damaged archive fails in any way: zipfile trusts the numbers that it reads.
    except Exception as err:
        raise damaged(path, err) from err
    if not entries:
        with path.open("rb") as file:
            first = file.read(FIRST_FILE_BYTES)
        yield f"{path.stat().st_size} {hashlib.sha256(first).hexdigest()}".encode()
    for entry in entries:
        # The first part of a name is that of the file when it was saved.
        name = entry.filename.partition("/")[2]
        yield f"{name} {entry.file_size} {entry.CRC:08x}".encode(errors="backslashreplace")
