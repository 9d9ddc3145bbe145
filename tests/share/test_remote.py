"""Libraries behind URLs: what goes up comes down, checked; nothing lands where it should not."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import logging
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from synthetic_data import make_table, write_library
from synthetic_profile import NAME, PAIR, PROFILE, TABLE, TRACE, write_profile

from stree_autotune.cli.listing import list_rows
from stree_autotune.search.profile_sources import profile_cost, profile_trace
from stree_autotune.share.files import named_files, own_files
from stree_autotune.share.index import (
    INDEX,
    Entry,
    Index,
    check_path,
    inside,
    read_index,
    write_index,
)
from stree_autotune.share.remote import cache_root, pull, push, sync
from stree_autotune.share.store import LOCK, Store, Unreachable
from stree_autotune.store.library import Library, shipped_root
from stree_autotune.trace.file import Trace, load_trace, save_trace
from stree_core.errors import ConfigError, StreeError
from stree_core.files import sha256_of
from stree_core.profile import load_profile

CERTIFICATE = TRACE.replace(".safetensors", ".certificate.json")


class HubFiles(MemoryFileSystem):
    """Stands in for the hub, which cannot be reached here: object by object, without folders."""

    protocol = "hf"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The hub has no folders."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of our own, with the cache in it."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with a profile, its sources and a certificate."""
    root = tmp_path / "data"
    write_profile(root)
    (root / CERTIFICATE).write_text("{}")
    return root


@pytest.fixture(params=["memory", "file", "path", "hf"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty library of each kind that can be written to."""
    known = fsspec.registry.get("hf")
    fsspec.register_implementation("hf", HubFiles, clobber=True)
    folder = tmp_path / "shared" / "library"
    yield {
        "memory": "memory://library",
        "file": folder.as_uri(),
        "path": str(folder),
        "hf": "hf://datasets/me/trees",
    }[request.param]
    MemoryFileSystem.store.clear()
    HubFiles.store.clear()
    if known is not None:
        fsspec.register_implementation("hf", known, clobber=True)


@pytest.fixture
def shelf(data: Path, tmp_path: Path) -> Path:
    """A local library that holds the data folder."""
    shelf = tmp_path / "shelf"
    push(str(shelf), own_files([data], Library((data,))), force=False)
    return shelf


def contents(root: Path) -> dict[str, bytes]:
    """All files but locks."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != LOCK)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_what_goes_up_comes_down(url: str, data: Path, tmp_path: Path) -> None:
    library = Library((data,))
    files = named_files([NAME], library)
    assert set(files) == {PROFILE, TABLE, TRACE, CERTIFICATE}
    assert set(push(url, files, force=False)) == set(files)
    assert push(url, files, force=False) == []

    copy = sync(url)
    assert copy.is_relative_to(cache_root())
    shared = Library((copy, shipped_root()))
    profile = load_profile(shared.find_profile(NAME))
    assert profile == load_profile(data / PROFILE)
    assert profile_trace(profile, shared).meta.dataset == "gsm8k"
    assert profile_cost(profile, shared).batch_sizes

    target = tmp_path / "pulled"
    assert pull(url, target, [Path(TABLE).name], force=False) == [TABLE]
    assert contents(target) == {TABLE: (data / TABLE).read_bytes()}
    assert set(pull(url, target, [NAME], force=False)) == set(files)
    assert contents(target) == contents(data)
    with pytest.raises(ConfigError, match=f"has no {NAME[:-1]}; did you mean {NAME}"):
        pull(url, target, [NAME[:-1]], force=False)


def test_a_copy_follows_its_library(data: Path, shelf: Path) -> None:
    copy = sync(str(shelf))
    assert contents(copy) == contents(shelf)
    fetched = (copy / TABLE).stat().st_mtime_ns
    write_library(data, make_table("h100", *PAIR))
    push(str(shelf), own_files([data], Library((data,))), force=False)
    index = read_index((shelf / INDEX).read_bytes(), "index")
    left = tuple(entry for entry in index.files if entry.path != CERTIFICATE)
    (shelf / INDEX).write_text(Index(files=left).model_dump_json())
    (copy / PROFILE).write_text("changed by hand")
    assert sync(str(shelf)) == copy
    assert (copy / "runtime" / "h100--toy-target--toy-draft.yaml").is_file()
    assert not (copy / CERTIFICATE).exists()
    assert (copy / PROFILE).read_bytes() == (data / PROFILE).read_bytes()
    assert (copy / TABLE).stat().st_mtime_ns == fetched


def test_precedence_is_local_library_shipped(data: Path, shelf: Path) -> None:
    copy = sync(str(shelf))
    library = Library.open([data, copy])
    assert library.find_trace(*PAIR, "gsm8k").is_relative_to(data)
    shutil.rmtree(data)
    assert Library.open([copy]).find_profile(NAME).is_relative_to(copy)
    assert (
        Library.open([copy])
        .find_trace("demo-target", "demo-draft", "mt_bench")
        .is_relative_to(shipped_root())
    )


@pytest.fixture
def server(shelf: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    """A plain HTTP server over the library."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(shelf))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_reading_over_http_and_without_it(
    server: http.server.ThreadingHTTPServer, shelf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"http://127.0.0.1:{server.server_port}"
    copy = sync(url)
    assert contents(copy) == contents(shelf)
    with pytest.raises(ConfigError, match=r"has none; make one with `stree-tune push"):
        sync(f"{url}/traces")
    with pytest.raises(Unreachable, match="cannot be written"):
        Store.open(url).write("tuned/x.yaml", b"")
    server.shutdown()
    server.server_close()
    with caplog.at_level(logging.WARNING):
        assert sync(url) == copy
    assert "its copy of an earlier day is used" in caplog.text
    shutil.rmtree(copy)
    with pytest.raises(Unreachable, match=f"{url} cannot be read"):
        sync(url)


def test_changed_files_are_refused(shelf: Path, tmp_path: Path) -> None:
    whole = (shelf / TABLE).read_bytes()
    same_size = whole.replace(b"h200", b"h900")
    for damaged, words in ((same_size, "another file than"), (whole + b"x", "bytes, it has more")):
        (shelf / TABLE).write_bytes(damaged)
        with pytest.raises(ConfigError, match=words):
            pull(str(shelf), tmp_path / "new", [Path(TABLE).stem], force=False)
    (shelf / TABLE).unlink()
    with pytest.raises(ConfigError, match="is missing; if somebody is pushing"):
        pull(str(shelf), tmp_path / "new", [Path(TABLE).stem], force=False)
    assert contents(tmp_path / "new") == {}


HOSTILE = [
    "../x.yaml",
    "/etc/x.yaml",
    "tuned/../../x.yaml",
    "tuned//x.yaml",
    "tuned/a/b.yaml",
    "tuned\\x.yaml",
    "tuned/.x.yaml",
    "tuned/x.py",
    "tuned/x",
    "tuned/",
    "tuned/a..b.yaml",
    "models/config.json",
    "index.json",
    "C:/tuned/x.yaml",
    "tuned/x\n.yaml",
    "tuned/" + "x" * 260 + ".yaml",
    "",
]


@pytest.mark.parametrize("path", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_paths_are_refused(shelf: Path, tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match="a shared file is"):
        check_path(path)
    index = json.loads((shelf / INDEX).read_text())
    index["files"][0]["path"] = path
    (shelf / INDEX).write_text(json.dumps(index))
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"files\.0\.path: a shared file is"):
        sync(str(shelf))
    with pytest.raises(ConfigError, match=r"files\.0\.path: a shared file is"):
        pull(str(shelf), tmp_path / "new", [], force=False)
    assert contents(tmp_path) == before


def entry(**changed: object) -> dict[str, object]:
    return {"path": "tuned/a.yaml", "sha256": "0" * 64, "bytes": 1} | changed


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([entry(), entry()], "stands once"),
        ([entry(), entry(path="tuned/A.yaml")], "stands once"),
        ([entry(bytes=(256 << 20) + 1)], "less than or equal"),
        ([entry(bytes=-1)], "greater than or equal"),
        ([entry(path=f"tuned/{i}.yaml", bytes=256 << 20) for i in range(9)], "at most"),
        ([entry(sha256="0" * 63)], "sha256"),
        ([entry(url="http://elsewhere")], "unknown key"),
    ],
)
def test_bad_indexes_are_refused(files: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_index(json.dumps({"files": files}).encode(), "index.json of x")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_no_index_is_one_sentence(text: bytes) -> None:
    with pytest.raises(ConfigError, match=r"index.json of x"):
        read_index(text, "index.json of x")


def test_links_do_not_lead_out(shelf: Path, data: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    target = tmp_path / "target"
    target.mkdir()
    (target / "traces").symlink_to(outside)
    with pytest.raises(ConfigError, match="is a link out of it"):
        pull(str(shelf), target, [], force=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "traces").symlink_to(outside)
    with pytest.raises(ConfigError, match="is a link out of it"):
        push(str(other), own_files([data], Library((data,))), force=True)
    assert contents(outside) == {}
    # nor does bringing a copy up to date delete anything behind one
    copy = sync(str(shelf))
    shutil.rmtree(copy / "traces")
    (copy / "traces").symlink_to(outside)
    (outside / "mine.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match="is a link out of it"):
        sync(str(shelf))
    assert contents(outside) == {"mine.safetensors": b"mine"}
    # a linked file is replaced, not written through
    victim = outside / "victim"
    victim.write_text("mine")
    (target / "tuned").mkdir()
    (target / PROFILE).symlink_to(victim)
    (target / "traces").unlink()
    pull(str(shelf), target, [PROFILE], force=True)
    assert victim.read_text() == "mine"
    assert not (target / PROFILE).is_symlink()
    assert inside(target, PROFILE) == target / PROFILE


def test_nothing_is_replaced_unasked(shelf: Path, data: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    write_library(target, make_table("h200", *PAIR, spread=0.2))
    mine = (target / TABLE).read_bytes()
    with pytest.raises(ConfigError, match="is another file already; pass --force"):
        pull(str(shelf), target, [], force=False)
    assert contents(target) == {TABLE: mine}
    with pytest.raises(ConfigError, match="is another file already"):
        pull(str(shelf), target, [NAME], force=False)
    assert contents(target) == {TABLE: mine}
    files = {TABLE: target / TABLE}
    before = contents(shelf)
    with pytest.raises(ConfigError, match=f"has another {TABLE}; pass --force"):
        push(str(shelf), files, force=False)
    assert contents(shelf) == before
    assert push(str(shelf), files, force=True) == [TABLE]
    pull(str(shelf), target, [], force=True)
    assert (target / TABLE).read_bytes() == mine == (shelf / TABLE).read_bytes()
    assert sha256_of(target / TRACE) == sha256_of(data / TRACE)


def test_only_what_loads_is_pushed(data: Path, tmp_path: Path) -> None:
    library = Library((data,))
    odd = tmp_path / "notes.yaml"
    odd.write_text("kind: diary\n")
    with pytest.raises(ConfigError, match=r"can be pushed, .* is none of them"):
        named_files([str(odd)], library)
    (data / TRACE).write_bytes((data / TRACE).read_bytes()[:-1])
    with pytest.raises(ConfigError, match="record it again"):
        named_files([str(data / TRACE)], library)
    with pytest.raises(ConfigError, match="there is nothing to push in"):
        own_files([tmp_path / "empty"], library)
    with pytest.raises(ConfigError, match="no profile absent is there"):
        named_files(["absent"], library)


def test_files_are_shared_under_their_own_names(data: Path, tmp_path: Path) -> None:
    """Whatever they are called here; specs and tables of other names included."""
    library = Library((data,))
    (tmp_path / "mine.yaml").write_bytes((data / TABLE).read_bytes())
    (tmp_path / "spec.yaml").write_bytes((shipped_root() / "gpus" / "h100.yaml").read_bytes())
    (tmp_path / "t.safetensors").write_bytes((data / TRACE).read_bytes())
    names = [str(tmp_path / name) for name in ("mine.yaml", "spec.yaml", "t.safetensors")]
    assert set(named_files(names, library)) == {TABLE, "gpus/h100.yaml", TRACE}


def test_a_missing_source_is_said(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    (data / TABLE).unlink()
    with caplog.at_level(logging.WARNING):
        files = named_files([NAME], Library((data,)))
    assert set(files) == {PROFILE, TRACE, CERTIFICATE}
    assert f"pushed without a source: this needs {TABLE}" in caplog.text


@pytest.mark.parametrize(
    ("bad", "message"),
    [("nosuch://x", "must be a path or a URL that fsspec knows"), ("sftp://x/y", "pip install")],
)
def test_unknown_protocols_are_one_sentence(bad: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sync(bad)


def test_a_broken_file_is_named_and_left_out(
    shelf: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = b"kind: stree-profile\ncontext: -1\n"
    bad = "tuned/broken.yaml"
    (shelf / bad).write_bytes(broken)
    index = read_index((shelf / INDEX).read_bytes(), INDEX)
    added = Entry(path=bad, sha256=hashlib.sha256(broken).hexdigest(), bytes=len(broken))
    (shelf / INDEX).write_bytes(write_index(index.with_files({bad: added})))
    with caplog.at_level(logging.WARNING):
        pulled = pull(str(shelf), tmp_path / "new", [], force=False)
    assert set(pulled) == {PROFILE, TABLE, TRACE, CERTIFICATE}
    assert contents(tmp_path / "new") == contents(data)
    assert f"left out: {bad}" in caplog.text
    with pytest.raises(ConfigError, match=f"{bad}: key target is required"):
        pull(str(shelf), tmp_path / "new", ["broken"], force=False)
    # a file that is not what the index says harms no other either
    (shelf / TABLE).write_bytes(b"x")
    copy = sync(str(shelf))
    assert not (copy / TABLE).exists()
    assert (copy / TRACE).read_bytes() == (data / TRACE).read_bytes()
    rows = list_rows(Library((copy,)))
    assert {row.kind for row in rows} == {"profile", "trace"}


def tables(root: Path, names: Sequence[str]) -> dict[str, Path]:
    """Tables of GPUs of these names, by path inside a library."""
    files = {}
    for name in names:
        table = make_table(name, *PAIR, batch_sizes=(1,))
        write_library(root, table)
        files[f"runtime/{table.file_name}"] = root / "runtime" / table.file_name
    return files


def test_pushes_at_once_lose_nothing(tmp_path: Path) -> None:
    shares = [tables(tmp_path, [f"gpu-{who}-{i}" for i in range(5)]) for who in "abc"]
    library = tmp_path / "library"

    def push_one_by_one(files: dict[str, Path]) -> None:
        for path, file in files.items():
            push(str(library), {path: file}, force=False)

    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(push_one_by_one, shares))
    index = read_index((library / INDEX).read_bytes(), INDEX)
    assert {entry.path for entry in index.files} == {path for files in shares for path in files}


def test_an_index_that_changed_meanwhile_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no lock: somebody pushes between our files and our index."""
    url = "memory://races"
    mine, theirs = (tables(tmp_path, [name]) for name in ("mine", "theirs"))
    write = Store.write
    times = []

    def interrupted(store: Store, name: str, data: bytes) -> None:
        write(store, name, data)
        if name != INDEX and not times:
            times.append(name)
            push(url, theirs, force=False)

    monkeypatch.setattr(Store, "write", interrupted)
    push(url, mine, force=False)
    index = read_index(Store.open(url).read(INDEX, 10**6) or b"", INDEX)
    assert {entry.path for entry in index.files} == {*mine, *theirs}
    MemoryFileSystem.store.clear()


def test_an_index_that_others_keep_replacing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Store.write

    def replaced(store: Store, name: str, data: bytes) -> None:
        write(store, name, write_index(Index()) if name == INDEX else data)

    monkeypatch.setattr(Store, "write", replaced)
    with pytest.raises(Unreachable, match=r"was changed by others .* push again"):
        push("memory://races", tables(tmp_path, ["mine"]), force=False)
    MemoryFileSystem.store.clear()


def test_readers_at_once_share_one_copy(shelf: Path, tmp_path: Path) -> None:
    names = [f"gpu-{i}" for i in range(8)]
    push(str(shelf), tables(tmp_path, names), force=False)
    copy = sync(str(shelf))
    index = read_index((shelf / INDEX).read_bytes(), INDEX)
    kept = tuple(entry for entry in index.files if "gpu-" not in entry.path)
    (shelf / INDEX).write_bytes(write_index(Index(files=kept)))
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(sync, [str(shelf)] * 16)) == {copy}
    assert set(contents(copy)) == {*(entry.path for entry in kept), INDEX}


@pytest.mark.parametrize("place", ["tuned", "runtime", "traces"])
def test_no_password_is_shared(data: Path, tmp_path: Path, place: str) -> None:
    secret = "stree-tune --storage postgresql://me:hunter2@db/x"
    if place == "tuned":
        name, path = PROFILE, data / PROFILE
        text = path.read_text().replace("command: x", f"command: {secret}")
        path.write_text(text)
    elif place == "runtime":
        name, path = TABLE, data / TABLE
        path.write_text(path.read_text().replace("stree-tune probe --gpu h200", secret))
    else:
        name, path = TRACE, data / TRACE
        trace = load_trace(path)
        made = trace.meta.provenance.model_copy(update={"command": secret})
        meta = trace.meta.model_copy(update={"provenance": made})
        save_trace(Trace(trace.ranks, trace.offsets, meta), path)
    assert b"hunter2" in path.read_bytes()
    if place == "tuned":
        push(str(tmp_path / "shelf"), {name: path}, force=False)
        assert load_profile(tmp_path / "shelf" / name) == load_profile(path)
    else:
        with pytest.raises(ConfigError, match="has a password in the command") as refusal:
            push(str(tmp_path / "shelf"), {name: path}, force=False)
        assert "hunter2" not in str(refusal.value)
    assert not [c for c in contents(tmp_path / "shelf").values() if b"hunter2" in c]


def test_no_password_is_in_what_a_library_says(tmp_path: Path) -> None:
    for url in ("nosuch://me:hunter2@host/x", "http://me:hunter2@127.0.0.1:9/x?token=hunter2"):
        for attempt in (sync, lambda url: push(url, {}, force=False)):
            with pytest.raises(StreeError) as refusal:
                attempt(url)
            assert "hunter2" not in str(refusal.value)
