"""Files that are whole or absent, read within limits, and checked by their schemas."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stree_core.errors import (
    CheckpointError,
    ConfigError,
    UnwritableFile,
    brief,
    nearest,
    reason_of,
    unwritable,
)
from stree_core.strict_yaml import format_yaml, parse_yaml

MAX_JSON_BYTES = 64 << 20
MAX_YAML_BYTES = 4 << 20
LOCK_WAIT_S = 60.0
_CHUNK_BYTES = 1 << 20
_LEFTOVER_S = 3600.0

ModelT = TypeVar("ModelT", bound=BaseModel)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part.

    Raises UnwritableFile, the old file intact, when it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        _replace(path, data)
    except OSError as err:
        raise unwritable(path, err) from err


def require_place(path: Path) -> None:
    """Raise UnwritableFile when `path` could not be written: asked before work, not after it.

    A few bytes are written beside it and removed again, which tells a full or read-only disk.
    """
    if path.is_dir():
        raise UnwritableFile(f"{path} names a file to write, it is a folder; name a file in it")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=_temporary_prefix(path))
        try:
            _write_all(handle, bytes(4096))
        finally:
            os.close(handle)
            os.unlink(temporary)
    except OSError as err:
        raise unwritable(path, err) from err


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`, which one process at a time can; `what` it guards is for errors.

    Raises ConfigError when another holds it for a minute, UnwritableFile without a place for it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as err:
        raise unwritable(path, err) from err
    try:
        deadline = time.monotonic() + LOCK_WAIT_S
        while not _try_lock(handle):
            if time.monotonic() > deadline:
                raise ConfigError(f"{what} is in use by another process; try again once it is done")
            time.sleep(0.02)
        yield
    finally:
        os.close(handle)


@contextmanager
def open_regular(path: Path) -> Iterator[io.BufferedReader]:
    """Open a regular file; raise ConfigError for a folder, pipe, device or what cannot be read.

    Without O_NONBLOCK a pipe that nobody writes to would be waited for.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as err:
        reason = reason_of(err) if isinstance(err, OSError) else str(err)
        raise ConfigError(f"{path} cannot be read ({reason}); check the path") from err
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ConfigError(
                f"{path} cannot be read (it is a folder, pipe or device); name a regular file"
            )
        with os.fdopen(handle, "rb", closefd=False) as file:
            yield file
    except OSError as err:
        raise ConfigError(f"{path} cannot be read ({reason_of(err)}); check the path") from err
    finally:
        os.close(handle)


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Return a file's bytes; raise ConfigError when it is missing or larger than `max_bytes`.

    Reading stops at the limit, whatever size the file claims to have.
    """
    with open_regular(path) as file:
        chunks, left = [], max_bytes + 1
        if os.fstat(file.fileno()).st_size <= max_bytes:
            while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
                chunks.append(chunk)
                left -= len(chunk)
        else:
            left = 0
    if left == 0:
        raise ConfigError(f"{path} may have at most {max_bytes} bytes, it has more; check it")
    return b"".join(chunks)


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes; raise ConfigError when it cannot be read."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_temporary_prefix(path))
    try:
        try:
            _write_all(handle, data)
            # mkstemp creates private files; a result is as readable as any other of its user.
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(handle, 0o666 & ~umask)
            os.fsync(handle)
        finally:
            os.close(handle)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view[:_CHUNK_BYTES]) :]


def _temporary_prefix(path: Path) -> str:
    """Return how temporary files of `path` begin, short enough for any name."""
    return f".{path.name[:40]}.tmp-"


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files that killed processes left; a younger one may be another writer's."""
    prefix, oldest = _temporary_prefix(path), time.time() - _LEFTOVER_S
    with os.scandir(path.parent) as entries:
        left = [entry for entry in entries if entry.name.startswith(prefix)]
    for entry in left:
        other = Path(entry.path)
        if entry.is_file(follow_symlinks=False) and other.lstat().st_mtime < oldest:
            other.unlink(missing_ok=True)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """Read a model's JSON object; raise CheckpointError when it is missing or holds none."""
    return read_json_bytes(path)[0]


def read_json_bytes(path: Path) -> tuple[dict[str, Any], bytes]:
    """Open a model's JSON file once; return what `read_json` does and the file's bytes."""
    if not path.exists():
        raise CheckpointError(f"{path.parent} must hold a {path.name}, it has none; check the path")
    try:
        data = read_limited(path, MAX_JSON_BYTES)
        content = json.loads(data)
    except (ValueError, RecursionError, ConfigError) as err:
        raise CheckpointError(f"{path} is not valid JSON ({err}); fetch it again") from err
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; fetch it again")
    return content, data


def load_yaml(path: Path, model: type[ModelT]) -> ModelT:
    """Read a YAML file into `model`; raise ConfigError with one sentence when it does not fit."""
    return read_yaml(path, model)[0]


def read_yaml(path: Path, model: type[ModelT]) -> tuple[ModelT, str]:
    """Open a YAML file once; return what `load_yaml` does and the hex SHA-256 of its bytes."""
    data = read_limited(path, MAX_YAML_BYTES)
    content = validate(parse_yaml(data, str(path)), model, str(path))
    return content, hashlib.sha256(data).hexdigest()


def validate(content: Any, model: type[ModelT], name: str) -> ModelT:
    """Check parsed content against `model`; raise ConfigError that names the first offence."""
    try:
        return model.model_validate(content)
    except ValidationError as err:
        raise ConfigError(f"{name}: {_first_offence(err, model)}") from err


def dump_yaml(model: BaseModel) -> bytes:
    """Return the YAML text of `model`: keys in declared order, short lists on one line."""
    return format_yaml(model.model_dump(mode="json", exclude_none=True))


def _first_offence(err: ValidationError, model: type[BaseModel]) -> str:
    offences = err.errors(include_url=False)
    # a misspelt key is both unknown and missing; only the first of the two helps
    offence = next((o for o in offences if o["type"] == "extra_forbidden"), offences[0])
    where = ".".join(map(str, offence["loc"]))[:200] or "the file"
    if offence["type"] == "extra_forbidden":
        known = _keys_beside(model, offence["loc"])
        return f"unknown key {where}; {nearest(where.rpartition('.')[2], known)}"
    if offence["type"] == "missing":
        return f"key {where} is required; add it"
    message = offence["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, got {brief(offence['input'])}; mend it"


def _keys_beside(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys that would have been valid where `loc` points."""
    current: Any = model
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        field = getattr(current, "model_fields", {}).get(part)
        # a part that is no field is the key of a mapping whose values are models
        if field is not None:
            current = _model_inside(field.annotation)
    return list(getattr(current, "model_fields", {}))


def _model_inside(annotation: Any) -> Any:
    """Return the pydantic model inside an annotation such as `tuple[Row, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_inside(argument)
        if found is not None:
            return found
    return None
