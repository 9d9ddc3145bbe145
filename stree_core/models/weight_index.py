"""What a model folder's weight files hold, and which of it is read: no torch, no tensor is read."""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import logging
import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeGuard

from stree_core.errors import CheckpointError, ConfigError, brief
from stree_core.families import ModelShape
from stree_core.files import open_regular, read_json
from stree_core.fp8 import EXTRAS, Fp8Weights

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


def read_headers(folder: Path) -> dict[str, StoredTensor] | None:
    """Return the headers of all tensors of a folder, None where it has no safetensors files.

    Raises CheckpointError when a file is missing or its header cannot be read.
    """
    found = find_weights(folder)
    if found is None or any(path.suffix == ".bin" for path in found.paths):
        return None
    return {key: t for path in found.paths for key, t in read_header(path).tensors.items()}


def read_header(path: Path) -> SafeHeader:
    """Read the header of a safetensors file; raise CheckpointError unless all lies in the file."""
    with open_weights(path) as file:
        return _read_header(file, path)


def _read_header(file: io.BufferedReader, path: Path) -> SafeHeader:
    try:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"a file of {size} bytes announces a header of {length}")
        return _parse_header(json.loads(file.read(length)), 8 + length, size)
    except (ValueError, RecursionError) as err:
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


@contextmanager
def open_weights(path: Path) -> Iterator[io.BufferedReader]:
    """Open a weight file; raise CheckpointError unless it is a regular file that can be read."""
    if not path.exists():
        raise CheckpointError(f"{path.parent} needs the file {path.name}, it has none; fetch it")
    try:
        with open_regular(path) as file:
            yield file
    except ConfigError as err:
        raise CheckpointError(str(err)) from err


def require_file(path: Path) -> None:
    """Raise CheckpointError where `open_weights` would, before a library opens it by name."""
    with open_weights(path):
        pass


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
    with open_weights(path) as file:
        for key, stored in _read_header(file, path).tensors.items():
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
        with open_weights(path) as file:
            first = file.read(FIRST_FILE_BYTES)
        yield f"{path.stat().st_size} {hashlib.sha256(first).hexdigest()}".encode()
    for entry in entries:
        # The first part of a name is that of the file when it was saved.
        name = entry.filename.partition("/")[2]
        yield f"{name} {entry.file_size} {entry.CRC:08x}".encode(errors="backslashreplace")


logger = logging.getLogger(__name__)

# Buffers that are computed from the config, and heads that draft for the model.
KNOWN_EXTRAS = ("*.inv_freq", "*.rotary_emb.cos_cached", "*.rotary_emb.sin_cached", "mtp.*")
MAX_COMPARED = 2000


def shape_keys(shape: ModelShape, stored: Collection[str]) -> list[str]:
    """Return the name of every tensor that a model of this shape reads, each once.

    Of several ways to store a weight that counts which the files have.
    """
    keys: dict[str, None] = {}
    for weight in shape.weights:
        adapters = (key for pair in weight.adapters for key in pair)
        keys |= dict.fromkeys((*weight.keys_in(stored), *adapters))
    return [*keys, *_scale_keys(shape.fp8, keys)]


def _scale_keys(fp8: Fp8Weights | None, keys: Collection[str]) -> list[str]:
    """Return the names of the scales of those tensors that are in FP8."""
    return [] if fp8 is None else [fp8.scales[key] for key in keys if key in fp8.scales]


def require_present(shape: ModelShape, stored: Collection[str], name: str) -> None:
    """Raise CheckpointError for the first weight of the shape that no file has."""
    for key in shape_keys(shape, stored):
        if key not in stored:
            raise CheckpointError(
                f"{name} needs weight {key}, no file has one of that name; "
                f"{nearest_key(key, stored)}"
            )


def skipped_copies(shape: ModelShape, stored: Collection[str], name: str) -> dict[str, str]:
    """Return the tensors that must be copies of others, by name; say what else is skipped.

    Raises CheckpointError for a tensor that is neither read, nor a copy, nor a known extra.
    """
    read = set(shape_keys(shape, stored))
    copies: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    unknown = []
    for key in sorted(set(stored) - read):
        original = _original(shape, key)
        extras = (*KNOWN_EXTRAS, *shape.extras, *(() if shape.fp8 is None else EXTRAS))
        extra = next((pattern for pattern in extras if fnmatchcase(key, pattern)), None)
        if original in read:
            copies[key] = original
            skipped[f"copies of {_without_numbers(original)}"] += 1
        elif extra is not None:
            skipped[extra] += 1
        else:
            unknown.append(key)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{name} holds weight {unknown[0]}{more} that decoding would ignore, so it would be "
            "another model; use the config and the checkpoint that belong together"
        )
    if skipped:
        what = ", ".join(f"{group} ({count})" for group, count in sorted(skipped.items()))
        logger.info("%s: weights that the model's own passes do not need: %s", name, what)
    return copies


def renamed(key: str, renames: Sequence[tuple[str, str]]) -> str:
    """Return the name under which a tensor is asked for."""
    for stored, name in renames:
        if key.startswith(stored):
            return name + key.removeprefix(stored)
    return key


def nearest_key(key: str, stored: Iterable[str]) -> str:
    """Return the half sentence that names the nearest weight which is there."""
    there = list(stored)
    numbers = re.findall(r"\d+", key)
    # Of a large model only the same layer is compared: this is quadratic in a name's length.
    same_layer = [other for other in there if re.findall(r"\d+", other) == numbers]
    close = difflib.get_close_matches(key, (same_layer or there)[:MAX_COMPARED], n=1, cutoff=0.0)
    if not close:
        return "the files hold no weights at all: check the folder"
    return f"the nearest is {close[0]}: use the config that belongs to the weights"


def _original(shape: ModelShape, key: str) -> str | None:
    """Return the tensor that `key` repeats by the config, None when it repeats none."""
    copies = shape.copies
    if shape.lm_head == shape.embed:
        copies = (*copies, ("lm_head.weight", shape.embed.keys[0]))
    for copy, original in copies:
        if key.startswith(copy):
            return original + key.removeprefix(copy)
    return None


def _without_numbers(key: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", key)
