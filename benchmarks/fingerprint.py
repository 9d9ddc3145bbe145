"""What a source says to Python, as a hash: the same for another comment, docstring or line break.

A results file keeps the hash of every source that its numbers depend on, so that it can be told
without git whether they are still of this code, and which source changed. Hashes are the same under
every version of Python that the project runs with.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
NUM_DIGITS = 12
EXPORTED = ".git_archival.txt"
"""Holds the commit in a tree that `git archive` exported; `.gitattributes` has it filled in."""
Hashes = dict[str, str]
"""The hash of each source by its path in the checkout."""
ORIGIN_BLOCKS = re.compile(rb"^(?:measured|provenance):.*\n(?: .*\n)*", re.MULTILINE)
IGNORED_FIELDS = frozenset({"kind", "type_comment", "type_params", "type_ignores", "ctx"})


def hashes(globs: Sequence[str], root: Path = ROOT) -> Hashes:
    """Return the hashes of the files of a checkout that the globs name; `-` begins an exclusion.

    An `__init__.py` only says which names a package has, and is no source.
    """
    paths: set[str] = set()
    for glob in globs:
        found = {path.relative_to(root).as_posix() for path in root.glob(glob.removeprefix("-"))}
        if not found:
            raise ValueError(f"no file matches {glob}; correct the list of sources")
        paths = paths - found if glob.startswith("-") else paths | found
    kept = sorted(path for path in paths if not path.endswith("/__init__.py"))
    return {path: hash_of(path, (root / path).read_bytes()) for path in kept}


def of_all(sources: Mapping[str, str]) -> str:
    """Return one hash of all sources."""
    lines = "".join(f"{path} {value}\n" for path, value in sorted(sources.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:NUM_DIGITS]


def changed(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the sources of now that were others or not there then."""
    return [path for path, value in now.items() if then.get(path) != value]


@functools.cache
def hash_of(path: str, content: bytes) -> str:
    """Return the hash of a source: of a Python file of what it says, of others of the bytes.

    Of a table or a profile in YAML, who made it and when it was measured change no number.
    """
    suffix = PurePosixPath(path).suffix
    if suffix == ".py":
        content = "\n".join(_words(ast.parse(content))).encode()
    elif suffix == ".yaml":
        content = ORIGIN_BLOCKS.sub(b"", content)
    return hashlib.sha256(content).hexdigest()[:NUM_DIGITS]


def _words(value: object) -> Iterator[str]:
    """Yield a syntax tree in words that no version of Python spells differently."""
    if isinstance(value, ast.AST):
        yield f"({type(value).__name__}"
        for name in value._fields:
            inner = getattr(value, name, None)
            if name in IGNORED_FIELDS or inner is None or inner == []:
                continue
            yield name
            yield from _words(inner)
        yield ")"
    elif isinstance(value, list):
        yield "["
        for item in value:
            if not _is_docstring(item) and not _is_empty_text(item):
                yield from _words(item)
        yield "]"
    else:
        yield repr(value)


def _is_docstring(node: object) -> bool:
    """Say whether a statement is a text alone, which does nothing."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _is_empty_text(node: object) -> bool:
    """Say whether a node is an empty text, which Python 3.12 puts into f-strings."""
    return isinstance(node, ast.Constant) and node.value == ""


def git(*arguments: str, root: Path = ROOT) -> bytes | None:
    """Return what git says of a checkout, None where it is not one or git refuses."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def hashes_at(revision: str, paths: Sequence[str], root: Path = ROOT) -> Hashes | None:
    """Return the hashes that sources had at a revision; None where git does not know it."""
    listing = git("ls-tree", "-r", "--full-tree", revision, "--", *paths, root=root)
    if listing is None:
        return None
    found = {}
    for line in listing.decode().splitlines():
        entry, _, path = line.partition("\t")
        found[path] = _hash_of_blob(path, entry.split()[2], root)
    return found


@functools.cache
def _hash_of_blob(path: str, blob: str, root: Path) -> str:
    content = git("cat-file", "blob", blob, root=root)
    assert content is not None
    return hash_of(path, content)


def head_with(sources: Mapping[str, str], root: Path = ROOT) -> str | None:
    """Return the commit that is checked out, None unless it has exactly these sources.

    Of a tree that `git archive` exported it is the commit that was exported.
    """
    head = git("rev-parse", "HEAD", root=root)
    if head is None:
        exported = (root / EXPORTED).read_text().strip() if (root / EXPORTED).exists() else ""
        return exported if re.fullmatch("[0-9a-f]{40}", exported) else None
    revision = head.decode().strip()
    return revision if hashes_at(revision, sorted(sources), root) == dict(sources) else None


def revision_with(sources: Mapping[str, str], root: Path = ROOT) -> str | None:
    """Return the newest commit that brought exactly these sources; None where none has them."""
    paths = sorted(sources)
    log = git("log", "--first-parent", "--format=%H", "--", *paths, root=root) or b""
    for revision in log.decode().split():
        if hashes_at(revision, paths, root) == dict(sources):
            return revision
    return None
