"""The index of a shared library: its files, with sizes and digests, and the names they may have.

A library is laid out like a data folder and has `index.json` at its root. What a name may be is
decided here, for reading and for writing: one of four folders, one plain file name, a known suffix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pydantic_core
from pydantic import AfterValidator, Field, NonNegativeInt, model_validator

from stree_autotune.trace import MAX_FILE_BYTES
from stree_core.errors import ConfigError
from stree_core.files import validate
from stree_core.profile import Sha256, Strict

INDEX = "index.json"
MAX_INDEX_BYTES = 8 << 20
MAX_FILES = 20_000
MAX_LIBRARY_BYTES = 2 << 30
SUFFIXES = {
    "gpus": (".yaml",),
    "runtime": (".yaml",),
    # beside a trace lie certificates, files of the same stem
    "traces": (".safetensors", ".yaml", ".json"),
    "tuned": (".yaml",),
}
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,249}")


def check_path(path: str) -> str:
    """Return a file's path inside a library; raise ValueError when it could be anything else."""
    folder, _, name = path.partition("/")
    known = SUFFIXES.get(folder, ())
    if not _FILE_NAME.fullmatch(name) or ".." in name or not name.endswith(known or ("/",)):
        raise ValueError(
            "a shared file is gpus/, runtime/ or tuned/NAME.yaml or traces/NAME.safetensors, NAME "
            "of letters, digits and . _ + -"
        )
    return path


class Entry(Strict):
    """One file of a library."""

    path: Annotated[str, AfterValidator(check_path)]
    sha256: Sha256
    bytes: Annotated[NonNegativeInt, Field(le=MAX_FILE_BYTES)]


class Index(Strict):
    """All files of a library, by path."""

    schema_version: Literal[1] = 1
    kind: Literal["stree-index"] = "stree-index"
    files: Annotated[tuple[Entry, ...], Field(max_length=MAX_FILES)] = ()

    @model_validator(mode="after")
    def _files_are_distinct(self) -> Index:
        # some file systems do not tell upper from lower case
        if len({entry.path.casefold() for entry in self.files}) != len(self.files):
            raise ValueError("every file of a library stands once in its index")
        total = sum(entry.bytes for entry in self.files)
        if total > MAX_LIBRARY_BYTES:
            raise ValueError(f"a library has at most {MAX_LIBRARY_BYTES} bytes, this has {total}")
        return self

    def entry(self, path: str) -> Entry | None:
        """Return the entry of a path, None when there is none."""
        return next((entry for entry in self.files if entry.path == path), None)

    def with_files(self, entries: dict[str, Entry]) -> Index:
        """Return the index with entries added or replaced, by path; ConfigError if it cannot be."""
        merged = {entry.path: entry for entry in self.files} | entries
        files = [merged[path].model_dump() for path in sorted(merged)]
        return validate({"files": files}, Index, "the library's index")


def read_index(data: bytes, name: str) -> Index:
    """Parse an index; raise ConfigError with one sentence when it is not one."""
    try:
        content = pydantic_core.from_json(data)
    except ValueError as err:
        raise ConfigError(f"{name} must be JSON ({err}); push to the library again") from err
    return validate(content, Index, name)


def write_index(index: Index) -> bytes:
    """Return the text of an index."""
    return index.model_dump_json(indent=1).encode() + b"\n"


def inside(folder: Path, path: str) -> Path:
    """Return where a shared file lies in `folder`; raise ConfigError when a link leads out."""
    target = folder / check_path(path)
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"files are kept inside {folder}, but {target.parent} is a link out of it; remove it"
        )
    return target


def shared_files(folder: Path) -> Iterator[str]:
    """Yield the paths in `folder` that a library could have; others are nobody's business."""
    for name, suffixes in SUFFIXES.items():
        for path in sorted((folder / name).glob("*")):
            if _FILE_NAME.fullmatch(path.name) and path.suffix in suffixes:
                yield f"{name}/{path.name}"
