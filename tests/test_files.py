"""Atomic writes, and YAML that carries surprises."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from pydantic import Field

from stree_core.errors import ConfigError, UnwritableFile
from stree_core.files import (
    MAX_YAML_BYTES,
    dump_yaml,
    load_yaml,
    locked,
    read_limited,
    require_place,
    sha256_of,
    validate,
    write_atomically,
)
from stree_core.profile import Strict
from stree_core.strict_yaml import MAX_YAML_DEPTH, parse_yaml


class Inner(Strict):
    size: int = Field(ge=1)


class Outer(Strict):
    inner: Inner
    rows: tuple[Inner, ...] = ()
    by_name: dict[str, Inner] = Field(default_factory=dict)
    note: str | None = None


def test_write_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert sha256_of(path) == "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"


def test_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"one")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(
        UnwritableFile, match=r"file cannot be written \(disk full\), what was there"
    ):
        write_atomically(path, b"two")
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    path, plain = tmp_path / "file", tmp_path / "plain"
    write_atomically(path, b"one")
    plain.write_bytes(b"one")
    assert path.stat().st_mode == plain.stat().st_mode


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "outer.yaml"
    outer = Outer(inner=Inner(size=2), rows=(Inner(size=3),), by_name={"7": Inner(size=1)})
    path.write_bytes(dump_yaml(outer))
    assert load_yaml(path, Outer) == outer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"inner: {sise: 3}", "unknown key inner.sise; did you mean size?"),
        (b"iner: {size: 3}", "unknown key iner; did you mean inner?"),
        (
            b"inner: {size: 1}\nrows: [{size: 1, siz: 2}]",
            "unknown key rows.0.siz; did you mean size",
        ),
        (
            b"inner: {size: 1}\nby_name: {a: {sizes: 2}}",
            "unknown key by_name.a.sizes; did you mean",
        ),
        (b"note: x", "key inner is required; add it"),
        (b"inner: {size: 0}", "inner.size: Input should be greater than or equal to 1, got 0"),
        (b"inner: {size: .nan}", "inner.size"),
        (b"[]", "the file"),
        (b"", "holds no YAML"),
        (b"inner: !!python/object/apply:os.system [echo]", "plain YAML"),
        (b"inner: !!python/name:os.system", "plain YAML"),
        (b"inner: !custom {size: 1}", "plain YAML"),
        (b"inner: &a {size: 1}\nrows: [*a]", "anchors or aliases"),
        (b"inner: {size: 1, size: 2}", "'size' stands twice"),
        (b"<<: {inner: {size: 1}}\ninner: {size: 2}", "unknown key <<"),
        (b"? [1, 2]\n: x", "a key must be a plain word"),
        (b"inner: {size: 1", "plain YAML"),
        (b"inner: {size: 1}\n---\ninner: {size: 1}", "plain YAML"),
        (b"\xff\xfe\x00\xd8", "plain YAML"),
        (b"a: \x00", "plain YAML"),
        (b"note: !!str x", "has the tag"),
        (b"inner: {size: !!int ''}", "has the tag"),
        (b"inner: {size: !!bool x}", "has the tag"),
        (b"inner: {size: !!timestamp x}", "has the tag"),
        (b"inner: {size: !!float ''}", "has the tag"),
        (b"inner: !!map {size: 1}", "has the tag"),
        (b"rows: ! []", "has the tag"),
        (b"inner: {size: 2001-01-01 00:00:00 +99:99}", "inner.size"),
        (b"inner: {size: 1" + b":59" * 100_000 + b"}", "inner.size"),
        (b"inner: {size: 0x_}", "plain YAML"),
        (b"inner: {size: =}", "inner.size"),
        (b"? " * 30, "at most 24 levels"),
        (b"{" * 60, "at most 24 levels"),
        (b"[" * 60 + b"]" * 60, "at most 24 levels"),
        (b"inner: {size: 9999-99-99}", "inner.size: Input should be a valid integer"),
        (b"inner: {size: " + b"9" * 5000 + b"}", "plain YAML"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else "",
)
def test_hostile_yaml_is_one_sentence(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_yaml(path, Outer)
    assert "\n" not in str(caught.value)


def test_nesting_up_to_the_limit_is_allowed() -> None:
    text = b"[" * MAX_YAML_DEPTH + b"]" * MAX_YAML_DEPTH
    assert isinstance(parse_yaml(text, "text"), list)


def test_endless_nesting_is_refused_without_recursion() -> None:
    with pytest.raises(ConfigError, match="levels"):
        parse_yaml(b"[" * 1_000_000, "text")
    with pytest.raises(ConfigError, match="levels"):
        parse_yaml(b"- " * 1_000_000, "text")


@pytest.mark.parametrize("text", [b"", b"\n", b"# a comment\n", b"---\n", b"null\n"])
def test_a_file_without_yaml_says_so(text: bytes) -> None:
    with pytest.raises(ConfigError, match=r"text holds no YAML, .* make it again"):
        parse_yaml(text, "text")


def test_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(b"#" * (MAX_YAML_BYTES + 1))
    with pytest.raises(ConfigError, match=f"at most {MAX_YAML_BYTES} bytes"):
        load_yaml(path, Outer)


@pytest.mark.parametrize("name", ["absent", "."])
def test_unreadable_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_limited(tmp_path / name, 10**6)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "folder"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    for read in (lambda: read_limited(path, 100), lambda: sha256_of(path)):
        with pytest.raises(ConfigError, match="name a regular file"):
            read()


def test_reading_stops_at_the_limit_whatever_the_size_says() -> None:
    # files of the kernel say that they are empty
    assert Path("/proc/self/maps").stat().st_size == 0
    with pytest.raises(ConfigError, match="at most 100 bytes, it has more"):
        read_limited(Path("/proc/self/maps"), 100)


def test_a_place_is_tried_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_place(tmp_path / "new" / "folder" / "x.yaml")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UnwritableFile, match=r"file/x.yaml cannot be written \(Not a directory\)"):
        require_place(tmp_path / "file" / "x.yaml")
    with pytest.raises(UnwritableFile, match="it is a folder; name a file in it"):
        require_place(tmp_path)

    def full(_: int, __: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UnwritableFile, match=r"No space left on device\).*free some space"):
        require_place(tmp_path / "x.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_long_names_have_temporary_files_too(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 125 + ".yaml")
    write_atomically(path, b"x")
    assert path.read_bytes() == b"x"


def test_what_a_killed_process_left_is_removed_later(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    old, new = tmp_path / ".x.yaml.tmp-old", tmp_path / ".x.yaml.tmp-new"
    old.write_text("half")
    new.write_text("half")
    os.utime(old, (0, time.time() - 7200))
    write_atomically(path, b"x")
    assert sorted(other.name for other in tmp_path.iterdir()) == [new.name, path.name]


def test_one_at_a_time_holds_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def second() -> None:
        with locked(tmp_path / "deep" / "lock", "it"):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(tmp_path / "deep" / "lock", "it"):
        thread.start()
        time.sleep(0.1)
        order.append("first")
        monkeypatch.setattr("stree_core.files.LOCK_WAIT_S", 0.0)
        with (
            pytest.raises(ConfigError, match="it is in use by another process"),
            locked(tmp_path / "deep" / "lock", "it"),
        ):
            pass
        monkeypatch.setattr("stree_core.files.LOCK_WAIT_S", 60.0)
    thread.join()
    assert order == ["first", "second"]


def test_numbers_of_thousands_of_digits_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match="a number of thousands of digits"):
        validate({"inner": {"size": -(10**5000)}}, Outer, "text")
