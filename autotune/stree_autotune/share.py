"""Shared libraries: push to a URL, pull from one, or keep a copy of one to search.

Every file is checked against the size and the digest in the library's index before it is kept, and
kept under the index's rules for names, so that nothing is written outside the target folder. Files
go up before the index that names them.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stree_autotune.share_index import (
    INDEX,
    MAX_INDEX_BYTES,
    Entry,
    Index,
    inside,
    read_index,
    shared_files,
    write_index,
)
from stree_autotune.share_store import Store, Unreachable
from stree_core.errors import ConfigError, nearest
from stree_core.files import (
    parse_yaml,
    read_limited,
    sha256_of,
    validate,
    write_atomically,
)
from stree_core.profile import Profile

logger = logging.getLogger(__name__)

NUM_FETCHERS = 8
TRACE = ".safetensors"


def cache_root() -> Path:
    """Return the folder that holds the copies of libraries, one folder each."""
    return Path.home() / ".cache" / "stree" / "libraries"


def sync(url: str) -> Path:
    """Bring the copy of a library up to date and return its folder; unreachable, use it as it is.

    Raises ConfigError when the library is malformed, Unreachable when there is no copy either.
    """
    store = Store.open(url)
    copy = cache_root() / hashlib.sha256(f"{store.files.protocol}{store.root}".encode()).hexdigest()
    try:
        index = _read_index(store)
    except Unreachable as err:
        if not (copy / INDEX).is_file():
            raise
        logger.warning("%s; its copy of an earlier day is used", str(err).partition(";")[0])
        return copy
    _fetch(store, index.files, copy)
    for path in set(shared_files(copy)) - {entry.path for entry in index.files}:
        inside(copy, path).unlink()
    write_atomically(copy / INDEX, write_index(index))
    return copy


def pull(url: str, folder: Path, names: Sequence[str], *, force: bool) -> list[str]:
    """Copy files of a library into a data folder: those that match `names`, all by default.

    A profile brings the table and the trace that it was made from, a trace what lies beside it.
    Returns the paths of the files. Raises ConfigError, before anything is written, when one would
    replace another file.
    """
    store = Store.open(url)
    index = _read_index(store)
    chosen = _select(index, names)
    chosen |= _sources(store, index, chosen)
    chosen |= _beside(index, chosen)
    _require_free(chosen.values(), folder, force=force)
    _fetch(store, chosen.values(), folder)
    return list(chosen)


def push(url: str, files: Mapping[str, Path], *, force: bool) -> list[str]:
    """Copy files, by their paths inside the library, to a URL; return the paths that were new.

    Raises ConfigError, before anything is written, when one would replace another file.
    """
    store = Store.open(url)
    index = _read_index(store, missing_ok=True)
    entries = {path: _entry(path, file) for path, file in files.items()}
    new = {path: entry for path, entry in entries.items() if index.entry(path) != entry}
    taken = [path for path in new if index.entry(path) is not None]
    if taken and not force:
        raise ConfigError(f"{url} has another {taken[0]}; pass --force to replace it")
    merged = index.with_files(new)
    for path, entry in new.items():
        if store.is_local:
            inside(Path(store.root), path)
        store.write(path, read_limited(files[path], entry.bytes))
    if new or not index.files:
        store.write(INDEX, write_index(merged))
    return list(new)


def _read_index(store: Store, *, missing_ok: bool = False) -> Index:
    store.refresh()
    data = store.read(INDEX, MAX_INDEX_BYTES)
    if data is None and not missing_ok:
        raise ConfigError(
            f"a library has an {INDEX}, {store.url} has none; make one with "
            f"`stree-tune push {store.url}`, or name a data folder with --data"
        )
    return Index() if data is None else read_index(data, f"{INDEX} of {store.url}")


def _select(index: Index, names: Sequence[str]) -> dict[str, Entry]:
    """Return the entries whose path, file name or stem matches one of `names`, or all, by path."""
    chosen: dict[str, Entry] = {}
    for name in names or ("*",):
        found = [entry for entry in index.files if _matches(entry, name)]
        if not found and names:
            stems = {Path(entry.path).stem for entry in index.files}
            raise ConfigError(f"the library has no {name}; {nearest(name, stems)}")
        chosen |= {entry.path: entry for entry in found}
    return chosen


def _matches(entry: Entry, name: str) -> bool:
    path = Path(entry.path)
    return any(fnmatch.fnmatchcase(text, name) for text in (entry.path, path.name, path.stem))


def _sources(store: Store, index: Index, chosen: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the entries of the files that the chosen profiles were made from."""
    digests = set()
    for entry in chosen.values():
        if entry.path.startswith("tuned/"):
            name = f"{entry.path} of {store.url}"
            sources = validate(parse_yaml(_read(store, entry), name), Profile, name).sources
            digests |= {sources.runtime.sha256, sources.trace.sha256}
    return {entry.path: entry for entry in index.files if entry.sha256 in digests}


def _beside(index: Index, chosen: Iterable[str]) -> dict[str, Entry]:
    """Return the entries of what lies beside the chosen traces."""
    stems = tuple(f"{path.removesuffix(TRACE)}." for path in chosen if path.endswith(TRACE))
    return {entry.path: entry for entry in index.files if entry.path.startswith(stems)}


def _require_free(entries: Iterable[Entry], folder: Path, *, force: bool) -> None:
    for entry in entries:
        path = inside(folder, entry.path)
        if path.exists() and not force and sha256_of(path) != entry.sha256:
            raise ConfigError(f"{path} is another file already; pass --force to replace it")


def _fetch(store: Store, entries: Iterable[Entry], folder: Path) -> None:
    """Bring files into `folder` unless they are there; raise ConfigError when one is not right."""
    missing = [entry for entry in entries if not _is_there(entry, inside(folder, entry.path))]
    with ThreadPoolExecutor(NUM_FETCHERS) as pool:
        for entry in pool.map(lambda entry: _fetch_one(store, entry, folder), missing):
            logger.info("fetched %s", entry.path)


def _is_there(entry: Entry, path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and sha256_of(path) == entry.sha256


def _fetch_one(store: Store, entry: Entry, folder: Path) -> Entry:
    write_atomically(inside(folder, entry.path), _read(store, entry))
    return entry


def _read(store: Store, entry: Entry) -> bytes:
    """Return a file's bytes; raise ConfigError unless they are what the index says."""
    data = store.read(entry.path, entry.bytes)
    if data is None or hashlib.sha256(data).hexdigest() != entry.sha256:
        got = "is missing" if data is None else "is another file than the index says"
        raise ConfigError(
            f"{entry.path} of {store.url} {got}; if somebody is pushing try again, else it has to "
            "be pushed again"
        )
    return data


def _entry(path: str, file: Path) -> Entry:
    return Entry(path=path, sha256=sha256_of(file), bytes=file.stat().st_size)
