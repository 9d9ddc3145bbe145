"""Atomic writes, and YAML that carries surprises."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from stree_core.errors import ConfigError
from stree_core.files import (
    MAX_YAML_BYTES,
    MAX_YAML_DEPTH,
    dump_yaml,
    load_yaml,
    parse_yaml,
    read_limited,
    sha256_of,
    write_atomically,
)
from stree_core.profile import Strict


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
    with pytest.raises(OSError, match="disk full"):
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
        (b"", "the file"),
        (b"inner: !!python/object/apply:os.system [echo]", "plain YAML"),
        (b"inner: !!python/name:os.system", "plain YAML"),
        (b"inner: !custom {size: 1}", "plain YAML"),
        (b"inner: &a {size: 1}\nrows: [*a]", "anchors or aliases"),
        (b"inner: {size: 1, size: 2}", "'size' stands twice"),
        (b"<<: {inner: {size: 1}}\ninner: {size: 2}", "plain YAML"),
        (b"? [1, 2]\n: x", "a key must be a plain word"),
        (b"inner: {size: 1", "plain YAML"),
        (b"inner: {size: 1}\n---\ninner: {size: 1}", "plain YAML"),
        (b"\xff\xfe\x00\xd8", "plain YAML"),
        (b"a: \x00", "plain YAML"),
        (b"[" * 60 + b"]" * 60, "at most 24 levels"),
        (b"inner: {size: 1}\nnote: 9999-99-99", "plain YAML"),
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


def test_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(b"#" * (MAX_YAML_BYTES + 1))
    with pytest.raises(ConfigError, match=f"at most {MAX_YAML_BYTES} bytes"):
        load_yaml(path, Outer)


@pytest.mark.parametrize("name", ["absent", "."])
def test_unreadable_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_limited(tmp_path / name, 10**6)
