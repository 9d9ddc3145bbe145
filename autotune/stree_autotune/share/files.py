"""What to push: the files that were named, or all of the own data folders, by their shared paths.

Every file is read by its own loader first, so that nothing broken is shared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from stree_autotune.search import find_source_file
from stree_autotune.share.check import TRACE_SUFFIX
from stree_autotune.share.index import SUFFIXES, Entry, shared_files
from stree_autotune.store import GREEDY, SEPARATOR, GpuSpec, Library, RuntimeTable, trace_file_name
from stree_autotune.trace import load_trace
from stree_core.errors import ConfigError, MissingMeasurement
from stree_core.files import MAX_YAML_BYTES, read_limited, validate
from stree_core.profile import Profile
from stree_core.strict_yaml import parse_yaml

logger = logging.getLogger(__name__)


def named_files(names: Sequence[str], library: Library) -> dict[str, Path]:
    """Return the files to push, by path inside a library.

    A name is a path or a profile's name. A profile brings its table and its trace, a trace the
    certificates beside it. Raises ConfigError for anything that is none of these.
    """
    files: dict[str, Path] = {}
    for name in names:
        path = Path(name) if Path(name).is_file() else library.find_profile(name)
        files |= _with_companions(path, library)
    return _checked(files)


def own_files(folders: Sequence[Path], library: Library) -> dict[str, Path]:
    """Return everything in data folders that can be shared; the first folder's files win."""
    files: dict[str, Path] = {}
    for root in folders:
        for name in shared_files(root):
            # what lies beside a trace comes with it
            if not name.startswith("traces/") or name.endswith(TRACE_SUFFIX):
                files = _with_companions(root / name, library) | files
    if not files:
        where = ", ".join(map(str, folders))
        raise ConfigError(f"there is nothing to push in {where}; name files, such as a profile")
    return _checked(files)


def _with_companions(path: Path, library: Library) -> dict[str, Path]:
    """Return a file and what belongs to it, by path inside a library."""
    if path.suffix == TRACE_SUFFIX:
        return _trace_files(path)
    name = str(path)
    content = parse_yaml(read_limited(path, MAX_YAML_BYTES), name)
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "stree-runtime":
        return {f"runtime/{validate(content, RuntimeTable, name).file_name}": path}
    if kind == "stree-gpu":
        return {f"gpus/{validate(content, GpuSpec, name).name}.yaml": path}
    if kind == "stree-profile":
        profile = validate(content, Profile, name)
        return {f"tuned/{profile_file_name(profile)}": path, **_source_files(profile, library)}
    raise ConfigError(
        f"profiles, runtime tables, GPU specs and traces can be pushed, {path} is none of them; "
        "leave it out"
    )


def profile_file_name(profile: Profile) -> str:
    """Return the name of a profile in a library; the sampling stands in it unless greedy."""
    parts = [profile.gpu.name, profile.target.name, profile.draft.name, profile.dataset]
    label = profile.sampling.label
    return f"{SEPARATOR.join(parts if label == GREEDY else [*parts, label])}.yaml"


def _trace_files(path: Path) -> dict[str, Path]:
    meta = load_trace(path).meta
    names = (meta.target.name, meta.draft.name, meta.dataset, meta.sampling.label)
    stem = trace_file_name(*names).removesuffix(TRACE_SUFFIX)
    return {f"traces/{stem}{file.name.removeprefix(path.stem)}": file for file in _beside(path)}


def _beside(path: Path) -> Iterator[Path]:
    """Yield a trace's file and those of the same stem beside it."""
    for other in sorted(path.parent.iterdir()):
        if other.name.startswith(f"{path.stem}.") and other.suffix in SUFFIXES["traces"]:
            yield other


def _source_files(profile: Profile, library: Library) -> dict[str, Path]:
    """Return the profile's table and trace under the names that it knows them by."""
    files: dict[str, Path] = {}
    sources = profile.sources
    for folder, source in (("runtime", sources.runtime), ("traces", sources.trace)):
        try:
            path = find_source_file(source, folder, library)
        except MissingMeasurement as err:
            logger.warning("note: pushed without a source: %s", err)
            continue
        beside = _beside(path) if folder == "traces" else [path]
        files |= {f"{folder}/{file.name}": file for file in beside}
    return files


def _checked(files: dict[str, Path]) -> dict[str, Path]:
    """Return `files`; raise ConfigError for one that a library does not take."""
    for path, file in files.items():
        try:
            Entry(path=path, sha256="0" * 64, bytes=file.stat().st_size)
        except ValidationError as err:
            problem = err.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(
                f"{file} cannot be shared as {path}: {problem}; leave it out"
            ) from err
    return files
