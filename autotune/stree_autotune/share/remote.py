"""Shared libraries: push to a URL, pull from one, or keep a copy of one to search.

Every file is checked against the size and the digest in the library's index before it is kept, and
kept under the index's rules for names, so that nothing is written outside the target folder. Files
go up before the index that names them.

Reading and writing is fsspec's, whose driver for `hf` is huggingface_hub. The copy is kept by hand:
fsspec's caches and huggingface_hub's check no digest of ours before a file is used, keep files
under names that cannot be searched as a data folder (a hash, a tree of links), and the latter knows
one server only.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stree_autotune.share.check import TRACE_SUFFIX, check_shared, shareable
from stree_autotune.share.index import (
    INDEX,
    MAX_INDEX_BYTES,
    Entry,
    Index,
    inside,
    read_index,
    shared_files,
    write_index,
)
from stree_autotune.share.store import LOCK, Store, Unreachable
from stree_autotune.store import command
from stree_core.errors import ConfigError, nearest
from stree_core.files import locked, require_place, sha256_of, validate, write_atomically
from stree_core.profile import Profile
from stree_core.strict_yaml import parse_yaml

logger = logging.getLogger(__name__)

NUM_FETCHERS = 8
NUM_ATTEMPTS = 5


def cache_root() -> Path:
    """Return the folder that holds the copies of libraries, one folder each."""
    return Path.home() / ".cache" / "stree" / "libraries"


def sync(url: str) -> Path:
    """Bring the copy of a library up to date and return its folder; unreachable, use it as it is.

    Processes that do so at once wait for each other. A file that is not what the index says is
    named and left out. Raises ConfigError when the index is malformed, Unreachable when there is no
    copy either.
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
    with locked(copy / LOCK, f"the copy of {store.name}"):
        _fetch(store, index.files, copy)
        for path in set(shared_files(copy)) - {entry.path for entry in index.files}:
            inside(copy, path).unlink(missing_ok=True)
        write_atomically(copy / INDEX, write_index(index))
    return copy


def pull(url: str, folder: Path, names: Sequence[str], *, force: bool) -> list[str]:
    """Copy files of a library into a data folder: those that match `names`, all by default.

    A profile brings the table and the trace that it was made from, a trace what lies beside it.
    Returns the paths of the files; a broken one is named and left out. Raises ConfigError, before
    anything is written, when one would replace another file, or when nothing but broken files was
    asked for.
    """
    store = Store.open(url)
    require_place(folder / INDEX)
    index = _read_index(store)
    chosen = _select(index, names)
    chosen |= _sources(store, index, chosen)
    chosen |= _beside(index, chosen)
    _require_free(chosen.values(), folder, force=force)
    broken = _fetch(store, chosen.values(), folder, check=check_shared)
    if len(broken) == len(chosen) and broken:
        raise next(iter(broken.values()))
    return [path for path in chosen if path not in broken]


def push(url: str, files: Mapping[str, Path], *, force: bool) -> list[str]:
    """Copy files, by their paths inside the library, to a URL; return the paths that were new.

    Pushes to one folder wait for each other; elsewhere the index is compared before it is replaced.
    Raises ConfigError, before anything is written, when one would replace another file.
    """
    store = Store.open(url)
    store.require_place()
    contents = {path: shareable(path, file) for path, file in files.items()}
    with store.locked():
        return _push(store, contents, force=force)


def _push(store: Store, contents: Mapping[str, bytes], *, force: bool) -> list[str]:
    entries = {path: _entry(path, data) for path, data in contents.items()}
    index = _read_index(store, missing_ok=True)
    new = _new_entries(store, index, entries, force=force)
    index.with_files(new)
    for path in new:
        if store.is_local:
            inside(Path(store.root), path)
        store.write(path, contents[path])
    for _ in range(NUM_ATTEMPTS):
        # somebody may have pushed meanwhile: their entries stay
        index = _read_index(store, missing_ok=True)
        merged = index.with_files(_new_entries(store, index, entries, force=force))
        if merged != index or not index.files:
            store.write(INDEX, write_index(merged))
        if store.is_local or _has_all(_read_index(store), entries):
            return list(new)
    raise Unreachable(
        f"{store.name} was changed by others while its index was written {NUM_ATTEMPTS} times; "
        "push again when they are done"
    )


def _new_entries(
    store: Store, index: Index, entries: Mapping[str, Entry], *, force: bool
) -> dict[str, Entry]:
    """Return the entries that an index lacks; raise ConfigError for what would be replaced."""
    new = {path: entry for path, entry in entries.items() if index.entry(path) != entry}
    taken = [path for path in new if index.entry(path) is not None]
    if taken and not force:
        raise ConfigError(f"{store.name} has another {taken[0]}; pass --force to replace it")
    return new


def _has_all(index: Index, entries: Mapping[str, Entry]) -> bool:
    return all(index.entry(path) == entry for path, entry in entries.items())


def _read_index(store: Store, *, missing_ok: bool = False) -> Index:
    store.refresh()
    data = store.read(INDEX, MAX_INDEX_BYTES)
    if data is None and not missing_ok:
        raise ConfigError(
            f"a library has an {INDEX}, {store.name} has none; make one with "
            f"`{command('push', store.name)}`, or name a data folder with --data"
        )
    return Index() if data is None else read_index(data, f"{INDEX} of {store.name}")


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
            name = f"{entry.path} of {store.name}"
            try:
                profile = validate(parse_yaml(_read(store, entry), name), Profile, name)
            except ConfigError:
                # fetching it says so
                continue
            digests |= {profile.sources.runtime.sha256, profile.sources.trace.sha256}
    return {entry.path: entry for entry in index.files if entry.sha256 in digests}


def _beside(index: Index, chosen: Iterable[str]) -> dict[str, Entry]:
    """Return the entries of what lies beside the chosen traces."""
    stems = tuple(
        f"{path.removesuffix(TRACE_SUFFIX)}." for path in chosen if path.endswith(TRACE_SUFFIX)
    )
    return {entry.path: entry for entry in index.files if entry.path.startswith(stems)}


def _require_free(entries: Iterable[Entry], folder: Path, *, force: bool) -> None:
    for entry in entries:
        path = inside(folder, entry.path)
        if path.exists() and not force and sha256_of(path) != entry.sha256:
            raise ConfigError(f"{path} is another file already; pass --force to replace it")


def _fetch(
    store: Store,
    entries: Iterable[Entry],
    folder: Path,
    check: Callable[[str, bytes], object] | None = None,
) -> dict[str, ConfigError]:
    """Bring files into `folder` unless they are there; return and name those that are broken.

    Raises UnwritableFile and Unreachable, which no other file would fare better with.
    """
    missing = [entry for entry in entries if not _is_there(entry, inside(folder, entry.path))]
    broken: dict[str, ConfigError] = {}

    def fetch(entry: Entry) -> None:
        try:
            data = _read(store, entry)
            if check is not None:
                check(entry.path, data)
        except ConfigError as err:
            broken[entry.path] = err
            return
        write_atomically(inside(folder, entry.path), data)

    with ThreadPoolExecutor(NUM_FETCHERS) as pool:
        for entry, _ in zip(missing, pool.map(fetch, missing), strict=True):
            if entry.path in broken:
                logger.warning("left out: %s", broken[entry.path])
            else:
                logger.info("fetched %s", entry.path)
    return broken


def _is_there(entry: Entry, path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and sha256_of(path) == entry.sha256


def _read(store: Store, entry: Entry) -> bytes:
    """Return a file's bytes; raise ConfigError unless they are what the index says."""
    data = store.read(entry.path, entry.bytes)
    if data is None or hashlib.sha256(data).hexdigest() != entry.sha256:
        got = "is missing" if data is None else "is another file than the index says"
        raise ConfigError(
            f"{entry.path} of {store.name} {got}; if somebody is pushing try again, else it has to "
            "be pushed again"
        )
    return data


def _entry(path: str, data: bytes) -> Entry:
    return Entry(path=path, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
